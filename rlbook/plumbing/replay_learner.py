"""A learner of a system with replay, as its driver calls it: a draw in, priorities and weights out.

    parts of a draw ──► joined ──► dealt to k batches ──► update(batch) k times ──► priorities back
                                                                │
                                                                └──► weights, if it is time

A system says what an update is; here is what travels. Where the learner is a client of the memory
it draws by itself, the next draw while it learns from this one, and sends the priorities itself.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from rlbook.data import tree_map
from rlbook.parts.flat import Flat
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.memory_shard import Part, shares, whole
from rlbook.plumbing.param_server import Alive


class ReplayLearner(Alive):
    """Two networks, of which the target is a copy of what the online one was, and an optimiser.

    Args:
        online: the parameters that are learnt, and their gradients.
        target: of an equal network.
        optimizer: of `online.vector`.
        config: of the system, with `updates_per_call`, `batch_size`, `calls_in_flight`,
            `broadcast_period`, `seed` and, if it knows that, `finds_smallest` (see `Part`).
        metered: report how long it had no work (of the wall, so never on a virtual clock).
        memory: a client; None where draws are brought.
    """

    def __init__(
        self,
        online: Flat,
        target: Flat,
        optimizer: torch.optim.Optimizer,
        config: Any,
        metered: bool = False,
        memory: Any = None,
    ) -> None:
        self.flat, self.flat_target, self.optimizer = online, target, optimizer
        self.config, self.metered = config, metered
        self.rng, self.updates = np.random.default_rng([config.seed, 3]), 0
        target.vector.copy_(online.vector)
        self._ended_at = time.perf_counter()
        self.memory = memory
        self._reader = None if memory is None else ThreadPoolExecutor(1)
        self._next: Future[Part | None] | None = None

    def update(self, batch: Part) -> tuple[np.ndarray, dict[str, float]]:
        """One update: new priorities `[rows]`, and metrics. Adds 1 to `updates`."""
        raise NotImplementedError

    def learn(self, *parts: Part) -> tuple[Any, ...]:
        """All updates of a draw: metrics (means), weights for actors or None, each shard's
        priorities. No metrics if there was nothing to draw: the server lost its memory.
        """
        draw = whole(parts) if self.memory is None else self._drawn()
        if draw is None:
            return None, None
        began, before = time.perf_counter(), self.updates
        assert draw.sample is not None
        priorities, found = np.empty(len(draw.sample.keys)), []
        for rows in self._dealt(len(priorities)):
            sample = tree_map(lambda column, rows=rows: column[rows], draw.sample)
            priorities[rows], metrics = self.update(draw._replace(sample=sample))
            found.append(metrics)
        means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
        period = self.config.broadcast_period
        weights = self.newest() if self.updates // period > before // period else None
        if self.memory is not None:
            self.memory.update_priorities(draw.sample.keys, priorities)
        return means | self._idle(began), weights, *shares(parts, priorities)

    def newest(self) -> Vector:
        """The parameters after all updates so far."""
        return Vector(self.updates, self.flat.vector.numpy().copy())

    def state_dict(self) -> dict[str, Any]:
        """Both networks, the optimiser, the count of updates and the random generator."""
        vectors = {"online": self.flat.vector.numpy(), "target": self.flat_target.vector.numpy()}
        state = {name: vector.copy() for name, vector in vectors.items()}
        counts = {"updates": self.updates, "rng": self.rng.bit_generator.state}
        return {**state, **counts, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._next = None
        np.copyto(self.flat.vector.numpy(), state["online"])
        np.copyto(self.flat_target.vector.numpy(), state["target"])
        self.updates, self.rng.bit_generator.state = state["updates"], state["rng"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _drawn(self) -> Part | None:
        """A draw of our own; with more than one call in flight the next one is begun."""
        rows = self.config.batch_size * self.config.updates_per_call
        finds = getattr(self.config, "finds_smallest", False)

        def draw() -> Part | None:
            try:
                return self.memory.part(rows, finds_smallest=finds)
            except ValueError:
                if len(self.memory):
                    raise
                return None

        part, self._next = draw() if self._next is None else self._next.result(), None
        if self._reader is not None and self.config.calls_in_flight > 1:
            self._next = self._reader.submit(draw)
        return part

    def _dealt(self, size: int) -> np.ndarray:
        """Rows of each batch. Neighbours come from neighbouring strata of the draw: one of each k
        to each batch, by lot, so that every batch is a stratified draw of its own.
        """
        groups = np.arange(size).reshape(-1, self.config.updates_per_call)
        return groups.T if groups.shape[1] == 1 else self.rng.permuted(groups, axis=1).T

    def _idle(self, began: float) -> dict[str, float]:
        """The part of the time since the last draw was learnt in which there was nothing to do."""
        if not self.metered:
            return {}
        last, self._ended_at = self._ended_at, time.perf_counter()
        return {"learner_idle_fraction": (began - last) / (self._ended_at - last)}
