"""Networks with memory: an LSTM between the torso and the heads, and how an actor-critic acts.

    x_t ──► torso ──► LSTM ──┬─► policy head: logits       time first: [T, B, …]
              first_t ──►│   ├─► value head:  value
                         │   └─► Q head, or dueling V + A: q [T, B, A]
    state before t ──────┴────► state after t              (h, c), [B, H] each

The state is zeroed where `first` is True *before* the step at t: nothing of one episode is known in
the next. Torso and heads see time folded into the batch; the LSTM alone runs over time, in
stretches between resets.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.data import AgentOutput, Unroll
from rlbook.parts.frames import restacked
from rlbook.parts.networks import make_torso
from rlbook.parts.on_device import there, widened

# `Flat` keeps the LSTM's weights among all others. cuDNN wants them alone: it copies them at every
# call, some megabytes on the GPU, which takes microseconds, and warns of it.
warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")

State = tuple[Tensor, Tensor]
"""(h, c): hidden state and cell of the LSTM, `[B, H]` each."""


class RecurrentActorCritic(nn.Module):
    """Policy and value with memory.

    Args:
        observation_shape: of one observation; `(C, 84, 84)` gets Atari's convolutions.
        num_actions: A.
        lstm_size: H.
        hidden_sizes: of the fully connected torso (unused for Atari's frames).
        torso: convolutions for frames, "nature" or "resnet".
    """

    def __init__(
        self,
        observation_shape: Sequence[int],
        num_actions: int,
        lstm_size: int = 64,
        hidden_sizes: Sequence[int] = (64,),
        torso: str = "nature",
    ) -> None:
        super().__init__()
        self.torso = make_torso(observation_shape, hidden_sizes, nn.Tanh, torso)
        self.core = nn.LSTM(self.torso.features, lstm_size)
        self.policy_head = nn.Linear(lstm_size, num_actions)
        self.value_head = nn.Linear(lstm_size, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, 2**0.5)
                nn.init.zeros_(module.bias)
        nn.init.orthogonal_(self.policy_head.weight, 0.01)
        nn.init.orthogonal_(self.value_head.weight, 1.0)

    def initial_state(self, num_envs: int) -> State:
        """What is known before an episode begins: zeros, `[B, H]` twice."""
        like = self.policy_head.weight
        return no_memory_of(like, num_envs, self.core.hidden_size)

    def forward(
        self, observation: Tensor, first: Tensor, state: State
    ) -> tuple[Tensor, Tensor, State]:
        """Logits `[T, B, A]`, values `[T, B]` and the state after the last row.

        Args:
            observation: `[T, B, ...]`.
            first: `[T, B]` bool: where an episode begins, and the state is zeroed.
            state: before row 0, `[B, H]` twice.
        """
        memory, state = remembered(self.torso, self.core, observation, first, state)
        return self.policy_head(memory), self.value_head(memory).squeeze(-1), state


class RecurrentQNetwork(nn.Module):
    """Action values with memory (R2D2, Kapturowski et al., 2019: an LSTM after the torso).

    Args:
        observation_shape: of one observation; `(C, 84, 84)` gets Atari's convolutions.
        num_actions: A.
        lstm_size: H.
        hidden_sizes: of the fully connected torso (unused for Atari's frames).
        dueling: q = V + A − mean A (Wang et al., 2016, equation 9) instead of one head.
        torso: convolutions for frames, "nature" or "resnet".
    """

    def __init__(
        self,
        observation_shape: Sequence[int],
        num_actions: int,
        lstm_size: int = 64,
        hidden_sizes: Sequence[int] = (64,),
        dueling: bool = True,
        torso: str = "nature",
    ) -> None:
        super().__init__()
        self.torso = make_torso(observation_shape, hidden_sizes, frames=torso)
        self.core = nn.LSTM(self.torso.features, lstm_size)
        self.advantage_head = nn.Linear(lstm_size, num_actions)
        self.value_head = nn.Linear(lstm_size, 1) if dueling else None

    def initial_state(self, num_envs: int) -> State:
        """What is known before an episode begins: zeros, `[B, H]` twice."""
        return no_memory_of(self.advantage_head.weight, num_envs, self.core.hidden_size)

    def forward(self, observation: Tensor, first: Tensor, state: State) -> tuple[Tensor, State]:
        """q `[T, B, A]` and the state after the last row.

        Args:
            observation: `[T, B, ...]`.
            first: `[T, B]` bool: where an episode begins, and the state is zeroed.
            state: before row 0, `[B, H]` twice.
        """
        memory, state = remembered(self.torso, self.core, observation, first, state)
        advantage = self.advantage_head(memory)
        if self.value_head is None:
            return advantage, state
        return self.value_head(memory) + advantage - advantage.mean(-1, keepdim=True), state


def no_memory_of(like: Tensor, num_envs: int, size: int) -> State:
    """Zeros `[B, H]` twice, of the kind of `like`."""
    zeros = torch.zeros(num_envs, size, dtype=like.dtype, device=like.device)
    return zeros, zeros.clone()


def remembered(
    torso: nn.Module, core: nn.LSTM, observation: Tensor, first: Tensor, state: State
) -> tuple[Tensor, State]:
    """What the LSTM says to each row, `[T, B, H]`, and the state after the last.

    Args:
        torso: sees time folded into the batch.
        core: runs over time, in stretches between resets, in float32 at least.
        observation: `[T, B, ...]`.
        first: `[T, B]` bool: where the state is zeroed before the row; of a network on a GPU best
            on the CPU, where the stretches are found.
        state: before row 0, `[B, H]` twice.
    """
    steps, copies = observation.shape[:2]
    features = widened(torso(observation.flatten(0, 1))).unflatten(0, (steps, copies))
    with torch.autocast(features.device.type, enabled=False):
        return _run(core, features, first, state)


def _run(core: nn.LSTM, features: Tensor, first: Tensor, state: State) -> tuple[Tensor, State]:
    """An LSTM over features `[T, B, F]`: what it says to each, and the state after the last."""
    steps = len(first)
    begins = [0, *(i for i in first.any(1).nonzero().flatten().tolist() if i > 0), steps]
    outputs = []
    for start, end in zip(begins[:-1], begins[1:], strict=True):
        keep = there(~first[start], features.device).to(features.dtype).unsqueeze(-1)
        h, c = (part * keep for part in state)
        output, (h, c) = core(features[start:end], (h.unsqueeze(0), c.unsqueeze(0)))
        outputs.append(output)
        state = (h.squeeze(0), c.squeeze(0))
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0], state


@torch.inference_mode()
def recurrent_action(
    network: RecurrentActorCritic,
    observation: np.ndarray,
    state: State,
    first: np.ndarray,
    rng: np.random.Generator,
) -> tuple[AgentOutput, State]:
    """Acts once: one forward pass, then one draw from each row's policy (Gumbel-max).

    Args:
        network: gives logits, values and the next state.
        observation: `[B, ...]`.
        state: before this step, `[B, H]` twice.
        first: `[B]` bool, whose episode begins with this observation.
        rng: where the draws come from.

    Returns:
        What was said, `[B, ...]`, and the state after it.
    """
    rows = torch.from_numpy(observation).unsqueeze(0), torch.from_numpy(first).unsqueeze(0)
    logits, value, state = network(*rows, state)
    scores = logits[0].numpy() - np.log(rng.standard_exponential(logits[0].shape))
    return AgentOutput(scores.argmax(-1), logits[0].numpy(), value[0].numpy()), state


class RecurrentSamplingPolicy:
    """Evaluates a stochastic policy with memory: samples, carries its state, resets it."""

    def __init__(self, network: RecurrentActorCritic) -> None:
        self.network = network

    def initial_state(self, num_envs: int) -> State:
        """Zeros."""
        return self.network.initial_state(num_envs)

    def act(
        self, observation: np.ndarray, state: State, first: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, State]:
        """One sampled action for each row, and the next state."""
        output, state = recurrent_action(self.network, observation, state, first, rng)
        return output.action, state


def unrolled(network: nn.Module, unroll: Unroll) -> tuple[Tensor, Tensor]:
    """Logits `[T+1, B, A]` and values `[T+1, B]` of all rows of an unroll, by either kind of
    actor-critic; one with memory starts from the unroll's `agent_state`.
    """
    device = next(network.parameters()).device
    observations = there(unroll.env_outputs.observation, device)
    if len(observations) != len(unroll.env_outputs.first):  # frames, each told once
        observations = restacked(observations, unroll.env_outputs.first)
    if unroll.agent_state is not None:
        first = torch.from_numpy(unroll.env_outputs.first)
        state = tuple(there(part, device) for part in unroll.agent_state)
        return network(observations, first, state)[:2]
    logits, values = network(observations.flatten(0, 1))
    rows = observations.shape[:2]
    return logits.unflatten(0, rows), values.unflatten(0, rows)
