"""Acts for the copies of several workers at once, from one forward pass.

    rows of worker 0 ┐              ┌► actions of worker 0, drawn by its own generator
    rows of worker 1 ┼► network [N] ┼► actions of worker 1, drawn by its own
    …                ┘              └► …

A worker's draws are its own, so that they do not hang on who else was in the batch.

CentralSampler    draws from a policy (an actor-critic)
CentralQ          the best action, or with probability ε, each copy's own, any (a Q-network)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rlbook.data import AgentOutput
from rlbook.maths.exploration import epsilon_ladder
from rlbook.parts.networks import ActorCritic
from rlbook.parts.numpy_mlp import numpy_forward
from rlbook.parts.on_device import OnDevice
from rlbook.parts.q_learning import epsilon_greedy
from rlbook.parts.recurrent import RecurrentActorCritic, RecurrentQNetwork
from rlbook.parts.recurrent_q import ArrayState, numpy_step, torch_step

Memory = tuple[np.ndarray, np.ndarray] | None
"""(h, c) of an LSTM, `[N, H]` each; None without memory."""
Draws = Sequence[tuple[np.random.Generator, int, int]]
"""Generator, number of rows and place of each owner, in the order of the rows."""


class CentralSampler:
    """Samples from an actor-critic for N copies with N different owners.

    Args:
        network: its parameters must have their place already (see `numpy_forward`).
        device: where its forward passes are made.
    """

    said = AgentOutput

    def __init__(self, network: nn.Module, device: str = "cpu") -> None:
        assert isinstance(network, ActorCritic | RecurrentActorCritic)
        self.network = network
        self._forward = numpy_forward(network)
        self._there = None if device == "cpu" else OnDevice(network, device)

    def initial_state(self, copies: int) -> Memory:
        """What is known before a worker's first row."""
        if not isinstance(self.network, RecurrentActorCritic):
            return None
        h, c = self.network.initial_state(copies)
        return h.numpy(), c.numpy()

    def refresh(self) -> None:
        """The parameters have changed; here they are read where they lie."""
        if self._there is not None:
            self._there.refresh()

    def act(
        self, observation: np.ndarray, first: np.ndarray, state: Memory, draws: Draws
    ) -> tuple[AgentOutput, Memory]:
        """One action for each row, and the memory after it.

        Args:
            observation: `[N, ...]`.
            first: `[N]` bool, whose episode begins with this row.
            state: before this row.
            draws: whose rows they are.
        """
        logits, value, state = self._evaluate(observation, first, state)
        size = logits.shape[-1]
        noise = [rng.standard_exponential((rows, size)) for rng, rows, _ in draws]
        scores = logits - np.log(noise[0] if len(noise) == 1 else np.concatenate(noise))
        return AgentOutput(scores.argmax(-1), logits, value), state

    @torch.inference_mode()
    def _evaluate(
        self, observation: np.ndarray, first: np.ndarray, state: Memory
    ) -> tuple[np.ndarray, np.ndarray, Any]:
        if self._there is not None:
            rows = (observation,) if state is None else (observation[None], first[None], state)
            said, worth, *after = self._there(*rows)
            return (said, worth, None) if state is None else (said[0], worth[0], tuple(after))
        if state is not None:
            seen, begins = _tensor(observation)[None], _tensor(first)[None]
            h, c = map(_tensor, state)
            logits, value, (h, c) = self.network(seen, begins, (h, c))
            return logits[0].numpy(), value[0].numpy(), (h.numpy(), c.numpy())
        if self._forward is not None:
            return *self._forward(observation), None
        logits, value = self.network(_tensor(observation))
        return logits.numpy(), value.numpy(), None


class QOutput(NamedTuple):
    """What a Q-network said to rows `[B, ...]`; `[T, B, ...]` in an unroll."""

    action: Any
    """int64."""
    q: Any
    """`[..., A]`."""
    hidden: Any
    """h *before* the row, `[..., H]`; H = 0 without memory."""
    cell: Any
    """c likewise."""


class CentralQ:
    """Plays ε-greedily by a Q-network for N copies with N different owners.

    Args:
        network: its parameters must have their place already (see `numpy_step`).
        epsilon: `[places, B]`, of each copy in each place.
        device: where its forward passes are made.
    """

    said = QOutput

    def __init__(self, network: nn.Module, epsilon: np.ndarray, device: str = "cpu") -> None:
        self.network, self.epsilon = network, epsilon
        self.size = network.core.hidden_size if isinstance(network, RecurrentQNetwork) else 0
        self._step = numpy_step(network) or torch_step(network)
        self._there = None if device == "cpu" else OnDevice(network, device)
        if self._there is not None:
            self._step = self._step_there

    def initial_state(self, copies: int) -> ArrayState:
        """What is known before a worker's first row: zeros."""
        return (np.zeros((copies, self.size), np.float32),) * 2

    def refresh(self) -> None:
        """The parameters have changed; here they are read where they lie."""
        if self._there is not None:
            self._there.refresh()

    def act(
        self, observation: np.ndarray, first: np.ndarray, state: ArrayState, draws: Draws
    ) -> tuple[QOutput, ArrayState]:
        """As `CentralSampler.act`."""
        if first.any():
            keep = ~first[:, None]
            state = state[0] * keep, state[1] * keep
        q, after = self._step(observation, state)
        actions, end = [], 0
        for rng, rows, place in draws:
            mine = q[end : (end := end + rows)]
            actions.append(epsilon_greedy(mine, self.epsilon[place], rng))
        return QOutput(np.concatenate(actions), q, *state), after

    def _step_there(
        self, observation: np.ndarray, state: ArrayState
    ) -> tuple[np.ndarray, ArrayState]:
        assert self._there is not None
        if not self.size:
            return self._there(observation)[0], state
        first = np.zeros((1, len(observation)), bool)
        q, h, c = self._there(observation[None], first, state)
        return q[0], (h, c)


def ladder(places: int, copies: int, base: float, alpha: float) -> np.ndarray:
    """ε `[places, B]` of an ε-ladder over all copies, dealt to the places in turn."""
    return epsilon_ladder(places * copies, base=base, alpha=alpha).reshape(copies, places).T


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Of the same memory, unless that is somebody else's (what came in a message)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
