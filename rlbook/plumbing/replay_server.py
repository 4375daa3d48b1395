"""A replay memory in shards, each a process of its own, as their driver holds them.

    actor ── reference to items, priorities ──► add ──► shard 0, shard 1, … in turn
                       rows dealt by Σ p^α ──► sample ──► reference to a `Part` of each ──► learner
    learner ── reference to new priorities ──► update_priorities ──► the shard that gave the rows

The driver never sees an item: it hands references on, counts what each shard was given, and knows
each shard's Σ p^α from small reports. It deals the rows of a batch to shards by those totals, so
that together they draw with p^α / Σ p^α over all of them. A total may have changed since it was
reported; a row's probability is that with which it was really drawn, so that importance weights
are right all the same. A shard that dies takes what it held with it; an empty one takes its place.

`ReplayServer` is the plain form: whole batches from one shard after the other, drawn uniformly.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlbook.data import Transition
from rlbook.parts.replay import UniformReplay
from rlbook.plumbing.deeds import StandIn
from rlbook.plumbing.memory_shard import (
    ONE_LEARNER,
    Deal,
    MemorySettings,
    MemoryShard,
    ShardReport,
)
from rlbook.plumbing.param_server import Alive, alive
from rlbook.plumbing.runtime import ActorDiedError, Reference, Runtime
from rlbook.plumbing.team import place_seed


class Draw(NamedTuple):
    """A batch on its way from the shards to a learner."""

    parts: list[Reference]
    """To a `Part` from each shard for the first learner, then for the second, … Where learners are
    clients of the memory themselves there are none: they draw `rows` by themselves."""
    rows: int
    reports: list[Reference] = []
    """To what each shard tells the driver: a `ShardReport`."""
    born: tuple[int, ...] = ()
    """How many died in each shard's place before."""


class Replay(Protocol):
    """A replay memory as its driver conducts it: data goes by, in references that it hands on.

    An actor makes a `Made`, or, where it is a client of the memory, adds by itself and makes None.
    """

    memory: Any
    """A client of the memory, for each actor and the learner; None where data goes by here."""

    @property
    def parts(self) -> int:
        """Of each draw, for each learner: R, or 0 where learners draw by themselves."""

    @property
    def nbytes(self) -> int:
        """Of all items, when full."""

    def add(self, made: Reference, count: int) -> Reference | None:
        """Hands on the `count` items that an actor made. Returns at once: a reference to wait for
        before `stored` is called with it; None where they are stored already.
        """

    def stored(self, added: Reference) -> None:
        """What `add` handed on is stored, or was lost with who should have stored it."""

    def sample(self, rows: int, deal: Deal = ONE_LEARNER) -> Draw | None:
        """Draws so many rows from all shards together, by p^α / Σ p^α, for the learners that a deal
        says. Returns at once; None while there is nothing to draw.
        """

    def update_priorities(self, draw: Draw, priorities: Sequence[Reference]) -> None:
        """Hands on a `Priorities` (or None) for each part of a draw that was learnt from; at once.

        What belongs to items that are gone, or to a shard that died since, is ignored.
        """

    def __len__(self) -> int:
        """Items held, as far as the driver knows."""

    @property
    def total(self) -> float:
        """Σ p^α over all shards, as far as the driver knows."""

    def mend(self) -> int:
        """Replaces what died, and tells how many did."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing may be in flight."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""


class ReplayShard(UniformReplay[Transition], Alive):
    """A ring of transitions to draw from, uniformly."""

    def keep(self, transitions: Transition | None) -> None:
        """Stores what an actor made, if it made anything."""
        if transitions is not None:
            self.add(transitions)


class ReplayServer:
    """R shards behind one name.

    On a virtual cluster one `keep` costs an "add" and one batch a "sample".

    Args:
        runtime: where they live.
        config: of the system, with `replay_capacity` and `learning_starts` (transitions in a
            shard), `batch_size` and `seed`.
        shards: R.
        row_bytes: of a transition, for hollow runs.
    """

    def __init__(self, runtime: Runtime, config: Any, shards: int, row_bytes: int = 0) -> None:
        self.runtime, self.batch_size = runtime, config.batch_size
        self.capacity, self.learning_starts = config.replay_capacity, config.learning_starts
        remote = runtime.remote(
            ReplayShard,
            costs={"keep": {"add": 1}, "sample": {"sample": 1}},
            returns={"sample": StandIn(config.batch_size * row_bytes)},
        )
        self._make: Callable[[int, int], Any] = lambda index, born: remote.remote(
            config.replay_capacity, place_seed(config.seed, index, born)
        )
        self.shards = [self._make(index, 0) for index in range(shards)]
        self.held = [0] * shards
        """Transitions that each shard was given since it was made."""
        self.born = [0] * shards
        self.adds = self.draws = self.owed = 0
        """Calls of `add` and `sample`; draws that are owed: one for each add to a filled memory."""

    def __len__(self) -> int:
        return int(np.minimum(self.held, self.capacity).sum())

    @property
    def filled(self) -> list[int]:
        """The shards that may be drawn from."""
        return [i for i, held in enumerate(self.held) if held >= self.learning_starts]

    def add(self, transitions: Reference, count: int) -> None:
        """Hands `count` transitions to the shard whose turn it is. Returns at once."""
        index = self.adds % len(self.shards)
        self.shards[index].keep.remote(transitions)
        self.held[index] += count
        self.adds += 1
        self.owed += bool(self.filled)

    def sample(self) -> Reference:
        """A reference to a batch of the next shard that is filled; IndexError if none is."""
        index = self.filled[self.draws % len(self.filled)]
        self.draws += 1
        self.owed -= 1
        return self.shards[index].sample.remote(self.batch_size)

    def mend(self) -> int:
        """Puts an empty shard in the place of each dead one, and tells how many died."""
        dead = [i for i, shard in enumerate(self.shards) if not alive(self.runtime, shard)]
        for index in dead:
            self.born[index] += 1
            self.shards[index] = self._make(index, self.born[index])
            self.held[index] = 0
        if not self.filled:
            self.owed = 0
        return len(dead)

    def state_dict(self) -> dict[str, Any]:
        """What every shard holds, and the counts."""
        with self.runtime.off_the_clock():
            states = self.runtime.get([shard.state_dict.remote() for shard in self.shards])
        counts = {"adds": self.adds, "draws": self.draws, "owed": self.owed}
        return {"shards": states, "held": list(self.held), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        pairs = zip(self.shards, state["shards"], strict=True)
        with self.runtime.off_the_clock():
            self.runtime.get([shard.load_state_dict.remote(kept) for shard, kept in pairs])
        self.held, self.owed = list(state["held"]), state["owed"]
        self.adds, self.draws = state["adds"], state["draws"]


class ShardedReplay:
    """R shards that draw together as one memory would.

    On a virtual cluster one `keep` costs an "add", `batch` rows drawn a "sample", the priorities of
    a whole draw an "update".

    Args:
        runtime: where they live.
        settings: of each shard's memory.
        shards: R.
        seed: of all draws; shard 0 draws as a memory in this process with that seed would.
        batch: rows that "sample" is the cost of.
        row_bytes: of an item on its way to a learner, for hollow runs.
        stored_bytes: of an item in a shard; by default the same.
    """

    memory = None

    def __init__(
        self,
        runtime: Runtime,
        settings: MemorySettings,
        shards: int = 1,
        *,
        seed: int,
        batch: int = 1,
        row_bytes: int = 0,
        stored_bytes: int | None = None,
    ) -> None:
        self.runtime, self.settings, self.seed = runtime, settings, seed
        full = ShardReport(settings.capacity, 1.0)

        def drawn(rows: int, share: float, deal: Deal = ONE_LEARNER, first: int = 0) -> Any:
            return full, *[StandIn(rows * row_bytes // deal.learners)] * deal.learners

        self._remote = runtime.remote(
            MemoryShard,
            costs={
                "keep": {"add": 1},
                "draw": lambda rows, *_: {"sample": rows / batch},
                "correct": {"update": 1 / shards},
            },
            returns={"keep": full, "draw": drawn},
        )
        stored = row_bytes if stored_bytes is None else stored_bytes
        self._nbytes = settings.capacity * shards * stored
        self.shards = [self._make(index, 0) for index in range(shards)]
        self.held, self.born = [0] * shards, [0] * shards
        """Items that each shard was given since it was made; how many died in its place."""
        self._reports: list[ShardReport | None] = [None] * shards
        self._kept: list[Reference | None] = [None] * shards
        self._storing: dict[Reference, tuple[int, int]] = {}
        """What `add` gave back → the shard, and how many had died in its place."""
        self._rng = np.random.default_rng([seed, 2])
        self.adds = 0

    def __len__(self) -> int:
        return sum(min(held, self.settings.capacity) for held in self.held)

    @property
    def parts(self) -> int:
        """R."""
        return len(self.shards)

    @property
    def nbytes(self) -> int:
        """Of the items of all shards, when full; known where `row_bytes` was given."""
        return self._nbytes

    @property
    def total(self) -> float:
        """Σ p^α over all shards, by their newest reports."""
        return sum(report.total for report in self._reports if report is not None)

    def add(self, made: Reference, count: int) -> Reference:
        """Hands a `Made` to the shard whose turn it is. Returns at once."""
        index = self.adds % len(self.shards)
        self.adds += 1
        self.held[index] += count
        added = self._kept[index] = self.shards[index].keep.remote(made)
        self._storing[added] = index, self.born[index]
        return added

    def stored(self, added: Reference) -> None:
        """Takes the shard's report to the books; if it died, an empty one takes its place."""
        index, born = self._storing.pop(added)
        try:
            report = self.runtime.get(added)
        except ActorDiedError:
            self.mend()
            return
        if born == self.born[index]:
            self._note(index, report)

    def sample(self, rows: int, deal: Deal = ONE_LEARNER) -> Draw | None:
        """Rows of all shards. Waits only for a shard that had nothing when it last reported."""
        if (dealt := self._shares()) is None:
            return None
        edges = np.floor(np.cumsum(dealt) * rows + self._rng.random()).astype(int)
        edges[-1] = rows
        starts = [0, *edges.tolist()]
        calls = []
        for shard, first, end, share in zip(
            self.shards, starts[:-1], starts[1:], dealt.tolist(), strict=True
        ):
            call = shard.draw.options(num_returns=1 + deal.learners)
            how = () if deal.learners == 1 else (deal, first)
            calls.append(call.remote(end - first, share, *how))
        reports, *parts = (list(column) for column in zip(*calls, strict=True))
        return Draw([part for mine in parts for part in mine], rows, reports, tuple(self.born))

    def update_priorities(self, draw: Draw, priorities: Sequence[Reference]) -> None:
        """Hands a `Priorities` to each shard that gave rows. Returns at once."""
        for index, shard in enumerate(self.shards):
            if draw.born[index] != self.born[index]:  # its keys were the dead one's
                continue
            self._note(index, self.runtime.get(draw.reports[index]))
            if self.settings.prioritized:
                shard.correct.remote(*priorities[index :: len(self.shards)])

    def mend(self) -> int:
        """Puts an empty shard in the place of each dead one, and tells how many died."""
        dead = [i for i, shard in enumerate(self.shards) if not alive(self.runtime, shard)]
        for index in dead:
            self.born[index] += 1
            self.shards[index] = self._make(index, self.born[index])
            self.held[index], self._reports[index], self._kept[index] = 0, None, None
        return len(dead)

    def state_dict(self) -> dict[str, Any]:
        """What every shard holds, the counts and the reports."""
        with self.runtime.off_the_clock():
            states = self.runtime.get([shard.state_dict.remote() for shard in self.shards])
        for index in range(len(self.shards)):
            self._reports[index] = self._report(index)
        reports = [None if report is None else tuple(report) for report in self._reports]
        rng = self._rng.bit_generator.state
        return {"shards": states, "held": self.held, "adds": self.adds, "rng": rng} | {
            "reports": reports
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        pairs = zip(self.shards, state["shards"], strict=True)
        with self.runtime.off_the_clock():
            self.runtime.get([shard.load_state_dict.remote(kept) for shard, kept in pairs])
        self.held, self.adds = list(state["held"]), state["adds"]
        self._rng.bit_generator.state = state["rng"]
        self._reports = [None if r is None else ShardReport(*r) for r in state["reports"]]

    def _make(self, index: int, born: int) -> Any:
        return self._remote.remote(self.settings, place_seed(self.seed, index, born))

    def _note(self, index: int, report: ShardReport) -> None:
        """Keeps the newest."""
        known = self._reports[index]
        if known is None or report.number >= known.number:
            self._reports[index] = report

    def _report(self, index: int) -> ShardReport | None:
        """The newest that is known of a shard; while it held nothing, what the newest add says."""
        known, kept = self._reports[index], self._kept[index]
        if kept is not None and (known is None or not known.size):
            try:
                self._reports[index] = self.runtime.get(kept)
            except ActorDiedError:
                if not self.mend():  # the shard lives: what was to be added died with its maker
                    self.held[index] = 0
        return self._reports[index]

    def _shares(self) -> np.ndarray | None:
        """The part `[R]` of all rows that each shard gives; by size where all priorities are 0."""
        reports = [self._report(i) or ShardReport(0, 0.0) for i in range(len(self.shards))]
        weights = np.array([report.total for report in reports])
        if not weights.any():
            weights = np.array([float(report.size) for report in reports])
        return weights / weights.sum() if weights.any() else None
