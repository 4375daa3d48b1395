"""Unrolls side by side in one batch, and a memory of the last ones to draw from again.

joined([u_0, u_1, …])        [T+1, B_0], [T+1, B_1], …  →  [T+1, B_0 + B_1 + …]
memory.add(unrolls) · memory.draw(n)
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from rlbook.data import AgentOutput, EnvOutput, Unroll, tree_map
from rlbook.parts.on_device import joined, there

CPU = torch.device("cpu")


def side_by_side(unrolls: Sequence[Unroll], device: torch.device = CPU) -> Unroll:
    """One unroll of all copies of the environment, in newly allocated arrays.

    Args:
        unrolls: of one length T; recurrent states `[B, H]`, if any, as arrays: out come tensors.
        device: of a GPU all but `first` come as tensors that are there. Frames travel as bytes.
    """

    def beside(*arrays: np.ndarray) -> Any:
        return joined(arrays, 1, device)

    *columns, first = zip(*[unroll.env_outputs for unroll in unrolls], strict=True)
    observation, reward, discount = (beside(*column) for column in columns)
    states = [unroll.agent_state for unroll in unrolls]
    return Unroll(
        EnvOutput(observation, reward, discount, np.concatenate(first, axis=1)),
        AgentOutput(*map(beside, *[unroll.agent_outputs for unroll in unrolls])),
        tree_map(lambda *rows: there(np.concatenate(rows), device), *states),
    )


class UnrollReplay:
    """The last `capacity` unrolls, drawn alike and with replacement.

    Args:
        capacity: unrolls held; 0 keeps none.
        seed: of the draws.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self._unrolls: deque[Unroll] = deque(maxlen=capacity)
        self._rng = np.random.default_rng([seed, 2])

    def __len__(self) -> int:
        return len(self._unrolls)

    def add(self, unrolls: Iterable[Unroll]) -> None:
        """Keeps copies; the oldest fall out."""
        if self._unrolls.maxlen:
            # Copies: what came from another process is a view of memory that it would hold on to.
            self._unrolls.extend(tree_map(_copy, unroll) for unroll in unrolls)

    def draw(self, count: int) -> list[Unroll]:
        """`count` unrolls; none while nothing is held."""
        if not self._unrolls or not count:
            return []
        chosen = self._rng.integers(len(self._unrolls), size=count)
        return [self._unrolls[index] for index in chosen]

    def state_dict(self) -> dict[str, Any]:
        """What is held, and the random generator."""
        return {
            "unrolls": [
                {
                    "env_outputs": tuple(unroll.env_outputs),
                    "agent_outputs": tuple(unroll.agent_outputs),
                    "agent_state": unroll.agent_state,
                    "actor": unroll.actor,
                    "version": unroll.version,
                }
                for unroll in self._unrolls
            ],
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._unrolls.clear()
        for kept in state["unrolls"]:
            rows = EnvOutput(*kept["env_outputs"]), AgentOutput(*kept["agent_outputs"])
            self._unrolls.append(Unroll(*rows, kept["agent_state"], kept["actor"], kept["version"]))
        self._rng.bit_generator.state = state["rng"]


def _copy(leaf: Any) -> Any:
    return leaf.copy() if isinstance(leaf, np.ndarray) else leaf
