"""Acts for the copies of several workers at once, from one forward pass.

    rows of worker 0 ┐              ┌► actions of worker 0, drawn by its own generator
    rows of worker 1 ┼► network [N] ┼► actions of worker 1, drawn by its own
    …                ┘              └► …

A worker's draws are its own, so that they do not hang on who else was in the batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rlbook.data import AgentOutput
from rlbook.parts.networks import ActorCritic
from rlbook.parts.numpy_mlp import numpy_forward
from rlbook.parts.recurrent import RecurrentActorCritic

Memory = tuple[np.ndarray, np.ndarray] | None
"""(h, c) of an LSTM, `[N, H]` each; None without memory."""
Draws = Sequence[tuple[np.random.Generator, int]]
"""Generators with the number of rows that each draws for, in the order of the rows."""


class CentralSampler:
    """Samples from an actor-critic for N copies with N different owners.

    Args:
        network: its parameters must have their place already (see `numpy_forward`).
    """

    def __init__(self, network: nn.Module) -> None:
        assert isinstance(network, ActorCritic | RecurrentActorCritic)
        self.network = network
        self._forward = numpy_forward(network)

    def initial_state(self, copies: int) -> Memory:
        """What is known before a worker's first row."""
        if not isinstance(self.network, RecurrentActorCritic):
            return None
        h, c = self.network.initial_state(copies)
        return h.numpy(), c.numpy()

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
        noise = [rng.standard_exponential((rows, size)) for rng, rows in draws]
        scores = logits - np.log(noise[0] if len(noise) == 1 else np.concatenate(noise))
        return AgentOutput(scores.argmax(-1), logits, value), state

    @torch.inference_mode()
    def _evaluate(
        self, observation: np.ndarray, first: np.ndarray, state: Memory
    ) -> tuple[np.ndarray, np.ndarray, Memory]:
        if state is not None:
            seen, begins = _tensor(observation)[None], _tensor(first)[None]
            h, c = map(_tensor, state)
            logits, value, (h, c) = self.network(seen, begins, (h, c))
            return logits[0].numpy(), value[0].numpy(), (h.numpy(), c.numpy())
        if self._forward is not None:
            return *self._forward(observation), None
        logits, value = self.network(_tensor(observation))
        return logits.numpy(), value.numpy(), None


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Of the same memory, unless that is somebody else's (what came in a message)."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())
