"""A replay memory in shards, each a process of its own, as their driver holds them.

    actor ── reference to transitions ──► add ──► shard 0, shard 1, … in turn
                                          sample ──► reference to a `Sample` ──► learner

The driver never sees a transition: it hands references on, and counts what each shard was given. A
shard that dies takes what it held with it; an empty one takes its place and is drawn from once it
has been filled again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlbook.data import Transition
from rlbook.parts.replay import Sample, UniformReplay
from rlbook.plumbing.deeds import StandIn
from rlbook.plumbing.param_server import Alive, alive
from rlbook.plumbing.runtime import Reference, Runtime
from rlbook.plumbing.team import place_seed


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


class Draw(NamedTuple):
    """A batch on its way from the shards to a learner."""

    parts: list[Reference]
    """To a `Part` from each shard, or to None from one that gives no rows. Where the learner is a
    client of the memory itself there are none: it draws `rows` by itself."""
    rows: int
    reports: list[Reference]
    """To what each shard tells the driver."""
    born: list[int]
    """How many died in each shard's place before."""


class Part(NamedTuple):
    """The rows of a batch that one shard gives."""

    sample: Sample
    """Its probabilities are those among *all* shards; its weights are not."""
    size: int
    """N, items in all shards."""
    smallest: float
    """min P(i) over all items of all shards; 0 where nobody asked for it."""


class Priorities(NamedTuple):
    """What a learner sends back to the shard that gave the rows."""

    keys: Any
    values: Any


class Replay(Protocol):
    """A replay memory as its driver conducts it: data goes by, in references that it hands on.

    An actor makes a `Made`, or, where it is a client of the memory, adds by itself and makes None.
    """

    def add(self, made: Reference, count: int) -> None:
        """Hands on the `count` items that an actor made. Returns at once."""

    def sample(self, rows: int) -> Draw:
        """Draws so many rows from all shards together, by p^α / Σ p^α. Returns at once."""

    def update_priorities(self, draw: Draw, priorities: Sequence[Reference]) -> None:
        """Hands on a `Priorities` for each part of a draw that has been learnt from. What belongs
        to items that are gone, or to a shard that died since, is ignored. Returns at once.
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
