"""A learner of a system with replay, as its driver calls it: a draw in, priorities and weights out.

    parts of a draw ──► joined ──► dealt to batches ──► update(batch), again and again
                                                           │    gradient ──► mean of all ──► step
                                                           ├──► priorities back
                                                           └──► weights, if it is time

A system says what the gradient of a batch is; here is what travels. Where the learner is a client
of the memory it draws by itself, the next draw while it learns from this one, and sends the
priorities itself.

Of k learners each has 1/k of every batch. Importance weights are divided by the largest of the
*whole* batch, so before the first update of a draw they tell each other the smallest probability in
each batch (one small all-reduce for a draw); then the gradients of an update are averaged, weighted
by the rows that they are means of, and all make the same step.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from rlbook.data import tree_map
from rlbook.parts.flat import Flat
from rlbook.parts.on_device import means, numbers, on_host, there
from rlbook.plumbing.devices import DeviceFields, HostCopy, autocast, compiled, device_here
from rlbook.plumbing.learner_group import Ranked, Share, Vector, combined
from rlbook.plumbing.memory_shard import Part, shares, whole
from rlbook.plumbing.team import place_seed


@dataclass(frozen=True, kw_only=True)
class LearnerFields(DeviceFields):
    """What a config tells learners with replay."""

    num_learners: int = 1
    """k, processes that learn together, each from 1/k of every batch (1 in the paper)."""

    def check_learners(self: Any) -> None:
        """ValueError, with the field's name, for the first value that is out of range."""
        self.check_devices()
        if self.num_learners < 1:
            raise ValueError(f"num_learners: must be at least 1, got {self.num_learners}")
        if self.batch_size % self.num_learners:
            raise ValueError(
                f"batch_size: must be a multiple of num_learners, which is {self.num_learners}, so"
                f" that each has an equal part; got {self.batch_size}"
            )


class Found(NamedTuple):
    """What a batch brought besides the gradient."""

    priorities: Any
    """`[rows]`, new: an array, or a tensor anywhere."""
    weight: float
    """Rows that the loss is a mean over: what its gradient counts among those of others."""
    metrics: dict[str, Any]
    """Numbers, or tensors of one. All of it is fetched when the draw is learnt."""


def on_its_device(network: nn.Module, config: Any, rank: int) -> Any:
    """A network where learner `rank` computes, compiled if `config` says so."""
    return compiled(network.to(device_here(config, rank)), config)


@dataclass
class _Draw:
    """What a learner is at."""

    part: Part
    parts: tuple[Part, ...]
    before: int
    """Updates that were made before."""
    rows: np.ndarray
    """`[updates, rows]`, of each batch."""
    found: list[Found] = field(default_factory=list)
    """What each update brought."""
    began: float = field(default_factory=time.perf_counter)

    def priorities(self) -> np.ndarray:
        """`[rows]`, new, when all updates are made."""
        priorities = np.empty(self.rows.size)
        priorities[self.rows.reshape(-1)] = fetched([one.priorities for one in self.found])
        return priorities

    def means(self) -> dict[str, float]:
        """Of all metrics."""
        return means([one.metrics for one in self.found])


def fetched(values: Sequence[Any]) -> np.ndarray:
    """Arrays, or tensors wherever they are, one after the other; they come together."""
    tensors = isinstance(values[0], torch.Tensor)
    return torch.cat(list(values)).cpu().numpy() if tensors else np.concatenate(values)


class ReplayLearner(Ranked):
    """Two networks, of which the target is a copy of what the online one was, and an optimiser.

    Args:
        online: the parameters that are learnt, and their gradients.
        target: of an equal network.
        optimizer: of `online.vector`.
        config: of the system, with `updates_per_call`, `batch_size`, `num_learners`,
            `calls_in_flight`, `broadcast_period`, `target_period`, `max_gradient_norm`, `seed` and,
            if it knows that, `finds_smallest` (see `Part`).
        rank: which of the learners; each is given its own part of a draw.
        metered: report how long it had no work (of the wall, so never on a virtual clock).
        memory: a client; None where draws are brought.
    """

    def __init__(
        self,
        online: Flat,
        target: Flat,
        optimizer: torch.optim.Optimizer,
        config: Any,
        rank: int = 0,
        metered: bool = False,
        memory: Any = None,
    ) -> None:
        super().__init__(online, config, metered=metered)
        self.flat_target, self.optimizer, self.rank = target, optimizer, rank
        self.rng, self.updates = np.random.default_rng([config.seed, 3]), 0
        target.vector.copy_(online.vector)
        self.finds_smallest = getattr(config, "finds_smallest", False)
        if memory is not None and rank:  # who draws with the same lots draws the same rows
            memory = memory.reseeded(place_seed(config.seed, rank, 0))
        self.memory = memory
        self._reader = None if memory is None else ThreadPoolExecutor(1)
        self._next: Future[Part | None] | None = None
        self._draw: _Draw | None = None

    def gradient(self, batch: Part) -> Found:
        """Leaves the gradient of the mean loss of a batch in `flat.gradients`, not clipped.

        `batch.smallest` is the probability of which the weight is 1; 0 for the smallest in it.
        """
        raise NotImplementedError

    def cast(self) -> AbstractContextManager[Any]:
        """In which the networks are asked: of the precision that `config` says."""
        return autocast(self.config, self.device)

    def step(self) -> dict[str, Any]:
        """One step of the optimiser; the target network follows if it is time."""
        norm = self.flat.clipped(self.config.max_gradient_norm)
        self.optimizer.step()
        self.updates += 1
        if self.updates % self.config.target_period == 0:
            self.flat_target.vector.copy_(self.flat.vector)
        return {"gradient_norm": norm}

    def update(self, batch: Part) -> tuple[np.ndarray, dict[str, float]]:
        """One update, with the others if they have met: new priorities `[rows]`, and metrics."""
        found = self._moved(self.gradient(batch))
        return fetched([found.priorities]), numbers(found.metrics)

    def learn(self, *parts: Part) -> tuple[Any, ...]:
        """All updates of a draw: metrics (means), weights for actors or None, each shard's
        priorities. No metrics if there was nothing to draw: the server lost its memory.
        """
        try:
            lowest = self.lowest(self.begin(*parts))
            while self._draw is not None and (batch := self._batch(lowest)) is not None:
                self._draw.found.append(self._moved(self.gradient(batch)))
        except Exception:
            self.leave()
            raise
        return self.finish(None, lowest)

    def begin(self, *parts: Part) -> np.ndarray:
        """Takes a draw: 1 if there is one, else 0; then the smallest P(i), of each of its batches,
        or of the whole memory.
        """
        part, self._draw = whole(parts) if self.memory is None else self._drawn(), None
        lowest = np.full(1 + self.config.updates_per_call, np.inf)
        lowest[0] = float(part is not None)
        if part is not None:
            assert part.sample is not None
            chances = part.sample.probabilities
            rows = self._dealt(len(chances))
            lowest[1:] = part.smallest if self.finds_smallest else chances[rows].min(1)
            self._draw = _Draw(part, parts, self.updates, rows)
        return lowest

    def share(self, after: None, *lowest: np.ndarray) -> Share:
        """The gradient of the next batch, to be handed on to all learners.

        Args:
            after: what `apply` answered before: if that failed, this fails.
            lowest: what each learner's `begin` said.
        """
        if self._draw is None or (batch := self._batch(np.min(lowest, axis=0))) is None:
            return Share(np.zeros(0, np.float32), 0.0, {})
        found = self.gradient(batch)
        self._draw.found.append(found)
        return Share(self.flat.gradients.cpu().numpy(), found.weight, {})

    def apply(self, *shares: Share) -> None:
        """One step along the mean of all gradients of an update."""
        if self._draw is not None and all(len(share.gradient) for share in shares):
            self.flat.gradients.copy_(there(combined(shares, self.average), self.device))
            self._draw.found[-1].metrics.update(self.step())

    def finish(self, after: None, *lowest: np.ndarray) -> tuple[Any, ...]:
        """What `learn` answers, when all updates of the draw are made; arguments as for `share`."""
        draw, self._draw = self._draw, None
        if draw is None or not np.min(lowest, axis=0)[0]:
            return None, None, *([None] * len(draw.parts) if draw else [])
        period = self.config.broadcast_period
        due = self.updates // period > draw.before // period
        arrived = HostCopy(self.flat).begin() if due and not self.rank else None
        priorities, means = draw.priorities(), draw.means()  # parameters travel meanwhile
        weights = None if arrived is None else Vector(self.updates, arrived())
        if self.memory is not None:
            assert draw.part.sample is not None
            self.memory.update_priorities(draw.part.sample.keys, priorities)
        return means | self.idle(draw.began), weights, *shares(draw.parts, priorities)

    def newest(self) -> Vector:
        """The parameters after all updates so far."""
        return Vector(self.updates, HostCopy(self.flat).take())

    def state_dict(self) -> dict[str, Any]:
        """Both networks, the optimiser, the count of updates and the random generator: the same
        for every one of k learners.
        """
        vectors = {"online": self.flat, "target": self.flat_target}
        state = {name: HostCopy(flat).take() for name, flat in vectors.items()}
        counts = {"updates": self.updates, "rng": self.rng.bit_generator.state}
        return {**state, **counts, "optimizer": on_host(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._next = None
        HostCopy(self.flat).put(state["online"])
        HostCopy(self.flat_target).put(state["target"])
        self.updates, self.rng.bit_generator.state = state["updates"], state["rng"]
        self.optimizer.load_state_dict(state["optimizer"])

    def _batch(self, lowest: np.ndarray) -> Part | None:
        """The next batch of the draw; None after the last, or if not all learners have a draw."""
        draw = self._draw
        assert draw is not None and draw.part.sample is not None
        at = len(draw.found)
        if not lowest[0] or at == len(draw.rows):
            return None
        sample = tree_map(lambda column: column[draw.rows[at]], draw.part.sample)
        return draw.part._replace(sample=sample, smallest=float(lowest[1 + at]))

    def _moved(self, found: Found) -> Found:
        """One step, with the others if they have met."""
        self.reduce(found.weight)
        return found._replace(metrics={**found.metrics, **self.step()})

    def _drawn(self) -> Part | None:
        """A draw of our own; with more than one call in flight the next one is begun."""
        rows = self.config.batch_size * self.config.updates_per_call // self.config.num_learners

        def draw() -> Part | None:
            try:
                return self.memory.part(rows, finds_smallest=self.finds_smallest)
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
        to each batch, by lot, so that every batch is a stratified draw of its own. Every learner
        draws the lots of all, and takes its own: together they have the batches of one.
        """
        updates, learners = self.config.updates_per_call, self.config.num_learners
        groups = np.arange(size * learners).reshape(-1, updates)
        if updates > 1:
            groups = self.rng.permuted(groups, axis=1)
        mine = groups[self.rank :: learners] % updates
        return (mine + updates * np.arange(len(mine))[:, None]).T
