"""A replay memory as one process sees it, and a shard: a process that holds one.

Memory       what has items, priorities and draws: `rlbook.parts.replay`, or a server's client
MemoryShard  a memory in a process of its own; `rlbook.plumbing.replay_server` conducts them
Made         what an actor sends to it
Part         what it sends to a learner: the rows of a batch that this shard gives
Priorities   what the learner sends back
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlbook.data import tree_map
from rlbook.parts.replay import PrioritizedReplay, Sample, UniformReplay
from rlbook.plumbing.param_server import Alive


class Memory(Protocol):
    """Where items lie and are drawn from, as one process sees it: in its own memory
    (`rlbook.parts.replay`), or on a server elsewhere that it is a client of.

    An item is a row of a NamedTuple of arrays: a transition, a sequence, …
    """

    def add(self, items: Any, priorities: Any = None) -> Any:
        """Stores `items`, fields `[N, ...]`, with `priorities` `[N]`: their keys, int64 `[N]`.

        Without priorities, they get the largest there ever was. The oldest make room.
        """

    def sample(self, batch_size: int, importance_exponent: float | None = None) -> Sample:
        """Draws so many by p^α; ValueError while it is empty."""

    def update_priorities(self, keys: Any, priorities: Any) -> int:
        """New priorities `[N]`; of equal keys the last counts. Keys of items that are gone are
        ignored: how many were still there.
        """

    def __len__(self) -> int:
        """Items held."""

    @property
    def total_priority(self) -> float:
        """Σ p^α over all items."""

    @property
    def smallest_priority(self) -> float:
        """min p^α over all items that can be drawn; for weights over the maximum of the buffer."""

    @property
    def nbytes(self) -> int:
        """Bytes when full."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that future draws depend on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""


class Made(NamedTuple):
    """What an actor made: items `[N, ...]` with priorities `[N]`, or without (None)."""

    items: Any
    priorities: Any = None


def handed_on(made: Made | None, memory: Memory | None) -> Made | None:
    """What an actor answers: what it made, or, where it is a client of a memory, None: then it has
    stored that by itself.
    """
    if memory is not None and made is not None:
        memory.add(*made)
    return made if memory is None else None


class Part(NamedTuple):
    """The rows of a batch that one shard gives, or, joined, all of them."""

    sample: Sample | None
    """Its probabilities are those among *all* shards, its weights mean nothing; None: no rows."""
    size: int
    """Items in the shard."""
    smallest: float = 0.0
    """min P(i) over its items, among all shards; 0 where nobody asked for it."""


def whole(parts: Sequence[Part]) -> Part:
    """All rows of a draw, and over all shards N and the smallest P(i)."""
    samples = [part.sample for part in parts if part.sample is not None]
    one = samples[0]
    if len(samples) > 1:
        items = tree_map(lambda *columns: np.concatenate(columns), *(s.items for s in samples))
        one = Sample(items, *(np.concatenate(c) for c in list(zip(*samples, strict=True))[1:]))
    size = sum(part.size for part in parts)
    return Part(one, size, min(part.smallest for part in parts if part.size))


def shares(parts: Sequence[Part], priorities: np.ndarray) -> "list[Priorities | None]":
    """What each shard gets back of the new priorities `[rows]` of a draw."""
    found: list[Priorities | None] = []
    for part in parts:
        rows = 0 if part.sample is None else len(part.sample.keys)
        mine, priorities = priorities[:rows], priorities[rows:]
        found.append(None if part.sample is None else Priorities(part.sample.keys, mine))
    return found


class Deal(NamedTuple):
    """How the rows of a draw go to k learners: so many neighbours together to each in turn.

    Neighbours come from neighbouring strata, and a learner deals them to its batches: so all k
    together have the batches that one learner would have had.
    """

    learners: int = 1
    together: int = 1


ONE_LEARNER = Deal()


def dealt(sample: Sample | None, rows: int, deal: Deal, first: int) -> "list[Sample | None]":
    """The rows of each learner; None for no rows. `first` is the place of row 0 in the draw."""
    if sample is None or deal.learners == 1:
        return [sample] * deal.learners
    owner = np.arange(first, first + rows) // deal.together % deal.learners
    return [
        tree_map(lambda column, mine=owner == one: column[mine], sample)
        if (owner == one).any()
        else None
        for one in range(deal.learners)
    ]


class Priorities(NamedTuple):
    """What a learner sends back to the shard that gave the rows."""

    keys: Any
    values: Any


class MemorySettings(NamedTuple):
    """What a shard's memory is."""

    capacity: int
    """Items in one shard."""
    prioritized: bool = True
    priority_exponent: float = 0.6
    """α."""
    finds_smallest: bool = False
    """Look for the smallest priority before each draw (O(capacity)); else it is given as 0."""
    example: Any = None
    """One item, a NamedTuple of arrays `[...]`; without it the first that comes decides, and a
    memory that is loaded does not know the type's name until then."""
    frames: float = 0.0
    """Where items come as `FramedTransitions`: frames that each brings along. Needs an example."""

    def make(self, seed: int) -> "UniformReplay[Any] | PrioritizedReplay[Any]":
        """An empty memory."""
        if not self.prioritized:
            return UniformReplay(self.capacity, seed, example=self.example, frames=self.frames)
        how: Any = {"seed": seed, "example": self.example, "frames": self.frames}
        return PrioritizedReplay(self.capacity, self.priority_exponent, **how)


class ShardReport(NamedTuple):
    """What the driver learns of a shard."""

    size: int
    total: float
    """Σ p^α; N where all are drawn alike."""
    number: int = 0
    """How many reports there were before: the driver may get an older one later."""


class MemoryShard(Alive):
    """A memory in a process of its own."""

    def __init__(self, settings: MemorySettings, seed: int) -> None:
        self.settings, self.memory, self.reports = settings, settings.make(seed), 0

    def keep(self, made: Made | None) -> ShardReport:
        """Stores what an actor made, if it made anything."""
        if made is not None and isinstance(self.memory, PrioritizedReplay):
            self.memory.add(*made)
        elif made is not None:
            self.memory.add(made.items)
        return self.report()

    def draw(
        self, rows: int, share: float, deal: Deal = ONE_LEARNER, first: int = 0
    ) -> tuple[Any, ...]:
        """So many rows: a `ShardReport`, and a `Part` for each learner.

        Args:
            rows: to draw.
            share: part of all rows of the draw that this shard gives on average.
            deal: who gets which rows.
            first: rows of the draw that come from the shards before this one.
        """
        report, smallest = self.report(), 0.0
        if self.settings.finds_smallest and isinstance(self.memory, PrioritizedReplay):
            smallest = self.memory.smallest_priority / (report.total or 1.0) * share
        sample = None
        if rows:
            sample = self.memory.sample(rows)
            sample = sample._replace(probabilities=sample.probabilities * share)
        parts = [Part(mine, report.size, smallest) for mine in dealt(sample, rows, deal, first)]
        return report, *parts

    def correct(self, *priorities: Priorities | None) -> int:
        """Stores new priorities, those of each learner; how many of the items were still there."""
        if not isinstance(self.memory, PrioritizedReplay):
            return 0
        found = [one for one in priorities if one is not None]
        return sum(self.memory.update_priorities(one.keys, one.values) for one in found)

    def report(self) -> ShardReport:
        """How much there is."""
        self.reports += 1
        size = len(self.memory)
        if isinstance(self.memory, PrioritizedReplay):
            return ShardReport(size, self.memory.total_priority, self.reports)
        return ShardReport(size, float(size), self.reports)

    def state_dict(self) -> dict[str, Any]:
        """Of the memory."""
        return {"memory": self.memory.state_dict(), "reports": self.reports}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.memory.load_state_dict(state["memory"])
        self.reports = state["reports"]
