"""How an actor-critic acts in a worker and in an evaluation, whatever its kind.

MLP        in numpy, on the parameters' own memory      (fastest at small batches)
Atari      in PyTorch
memory     in PyTorch, with the recurrent state carried from step to step
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rlbook.data import AgentOutput
from rlbook.parts.networks import ActorCritic, SamplingPolicy, sample_action
from rlbook.parts.numpy_mlp import numpy_forward
from rlbook.parts.recurrent import (
    RecurrentActorCritic,
    RecurrentSamplingPolicy,
    State,
    recurrent_action,
)


def make_actor_critic(
    observation_shape: Sequence[int],
    num_actions: int,
    hidden_sizes: Sequence[int],
    lstm_size: int = 0,
    torso: str = "nature",
) -> ActorCritic | RecurrentActorCritic:
    """A network with memory if `lstm_size` is not 0; `torso`: convolutions for frames."""
    shape = observation_shape, num_actions
    if lstm_size:
        return RecurrentActorCritic(*shape, lstm_size, hidden_sizes, torso)
    return ActorCritic(*shape, hidden_sizes, torso=torso)


def sampling_policy(network: nn.Module) -> Any:
    """The policy that evaluates a network by sampling, with memory if it has one."""
    if isinstance(network, RecurrentActorCritic):
        return RecurrentSamplingPolicy(network)
    assert isinstance(network, ActorCritic)
    return SamplingPolicy(network)


class Sampler:
    """Acts for B copies, with a state of its own where the network has one.

    Args:
        network: its parameters must have their place already (see `numpy_forward`).
        num_envs: B.
        rng: where the draws come from.
    """

    def __init__(self, network: nn.Module, num_envs: int, rng: np.random.Generator) -> None:
        self.network, self.rng = network, rng
        self.state: State | None = None
        """Of the LSTM before the next step, `[B, H]` twice; None without memory."""
        if isinstance(network, RecurrentActorCritic):
            self.state = network.initial_state(num_envs)
        self._forward = numpy_forward(network)

    def act(self, observation: np.ndarray, first: np.ndarray) -> AgentOutput:
        """Samples an action for each copy: observation `[B, ...]`, first `[B]` bool."""
        if isinstance(self.network, RecurrentActorCritic):
            assert self.state is not None
            output, self.state = recurrent_action(
                self.network, observation, self.state, first, self.rng
            )
            return output
        if self._forward is None:
            return sample_action(self.network, observation, self.rng)  # type: ignore[arg-type]
        logits, value = self._forward(observation)
        scores = logits - np.log(self.rng.standard_exponential(logits.shape))
        return AgentOutput(scores.argmax(-1), logits, value)

    def state_dict(self) -> dict[str, Any]:
        """Random generator and recurrent state."""
        state = None if self.state is None else [part.numpy() for part in self.state]
        return {"rng": self.rng.bit_generator.state, "state": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.rng.bit_generator.state = state["rng"]
        if self.state is not None:
            h, c = state["state"]
            self.state = torch.from_numpy(np.array(h)), torch.from_numpy(np.array(c))
