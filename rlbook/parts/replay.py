"""Replay: a ring of transitions to draw from, uniformly or by priority (numpy; no process inside).

    add ──> [ ring of `capacity` items: the oldest are overwritten ] ──> sample ──> learner
                     ▲                                                                 │
                     └── sum tree of p^α <── update_priorities(keys, |TD errors|) <────┘

An item is known by its *key*: how many items were added before it. It lies in slot
`key % capacity`, and it is still there as long as it is among the `capacity` youngest. A priority
that comes back for an item that was overwritten meanwhile is therefore recognised and ignored; with
slots alone it would fall on a stranger. Sources: DQN (Mnih et al. 2015); prioritised replay (Schaul
et al., arXiv:1511.05952).
"""

from collections.abc import Mapping
from typing import Any, Generic, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlbook.maths.priorities import importance_weights, powered_priorities
from rlbook.parts.frame_ring import FrameRing
from rlbook.parts.ring import ItemsT, Ring, count, entry
from rlbook.parts.sum_tree import Floats, Ints, SumTree, checked_priorities

__all__ = ["PrioritizedReplay", "Sample", "SumTree", "UniformReplay"]


class Sample(NamedTuple, Generic[ItemsT]):
    """A batch drawn from a replay, with what is needed to correct for how it was drawn."""

    items: ItemsT
    """The type that was added, arrays `[batch_size, ...]`; copies, safe to change."""

    keys: Ints
    """int64 `[batch_size]`: give them back to `update_priorities`."""

    probabilities: Floats
    """float64 `[batch_size]`, P(i) of being drawn."""

    weights: NDArray[np.float32]
    """float32 `[batch_size]`, importance weights (N P(i))^-β over their maximum in the batch."""


def weighed(
    sample: Sample[ItemsT], *, size: int, exponent: float, smallest: float = 0.0
) -> Sample[ItemsT]:
    """A sample with its importance weights, over the largest (see `importance_weights`).

    Args:
        sample: with the probabilities of its rows.
        size: items that could have been drawn.
        exponent: β >= 0; 0 gives all rows the weight 1.
        smallest: the probability of which the weight is 1: the least of a whole batch of which
            this is a part, or of the whole memory; 0 for the least in the sample.
    """
    weights = importance_weights(
        sample.probabilities, size=size, exponent=exponent, smallest=smallest or None
    )
    return sample._replace(weights=weights.astype(np.float32))


class UniformReplay(Generic[ItemsT]):
    """Items drawn alike, with replacement (DQN, Mnih et al. 2015)."""

    def __init__(
        self,
        capacity: int,
        seed: int = 0,
        *,
        example: ItemsT | None = None,
        frames: float = 0.0,
    ) -> None:
        """Empty replay for `capacity` items.

        Args:
            capacity: items held; beyond it the oldest are overwritten.
            seed: of the draws.
            example: one item (NamedTuple of arrays `[...]`); without it, the first `add` decides.
            frames: that an item brings along, where items are `Transition`s of stacks of frames and
                are added as `FramedTransitions`; 0 if they are added as they are.

        Raises:
            ValueError: capacity < 1, or an example that is no NamedTuple of arrays.
        """
        self._ring = _ring(capacity, example, frames)
        self._rng = np.random.default_rng(seed)

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def capacity(self) -> int:
        """Most items held."""
        return self._ring.capacity

    @property
    def nbytes(self) -> int:
        """Bytes when full; known from the first `add`, or from the start with an `example`."""
        return self._ring.nbytes

    def add(self, items: ItemsT) -> Ints:
        """Store `items`, a NamedTuple of arrays `[N, ...]`, and give their keys, int64 `[N]`.

        Raises:
            ValueError: fields, shapes or dtypes other than before; nothing is stored then.
        """
        return self._ring.write(items)

    def sample(self, batch_size: int) -> Sample[ItemsT]:
        """Draw `batch_size` items; all weights are 1. ValueError if the replay is empty."""
        keys = self._ring.uniform_keys(batch_size, self._rng)
        probabilities = np.full(len(keys), 1.0 / len(self))
        return Sample(self._ring.read(keys), keys, probabilities, np.ones(len(keys), np.float32))

    def state(self) -> dict[str, Any]:
        """Everything that future draws depend on: copies of arrays, and plain values."""
        return {**self._ring.state(), "rng": self._rng.bit_generator.state}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state()` was taken. If it does not fit, ValueError and no change."""
        rng = _generator(state)
        self._ring.load_state(state)
        self._rng = rng

    state_dict = state
    load_state_dict = load_state

    def check_valid(self) -> None:
        """RuntimeError if something that must always hold does not."""
        self._ring.check_valid()


class PrioritizedReplay(Generic[ItemsT]):
    """Items drawn in proportion to p^α (Schaul et al., arXiv:1511.05952, proportional variant).

    A priority of 0 is never drawn while any other is positive (add a small ε to |TD error| to avoid
    that); if all are 0, all are drawn alike. α applies once, when a priority comes in.
    """

    def __init__(
        self,
        capacity: int,
        priority_exponent: float = 0.6,
        importance_exponent: float = 0.4,
        seed: int = 0,
        *,
        example: ItemsT | None = None,
        frames: float = 0.0,
    ) -> None:
        """Empty replay for `capacity` items.

        Args:
            capacity: items held; beyond it the oldest are overwritten.
            priority_exponent: α >= 0; 0 draws uniformly.
            importance_exponent: β >= 0, where `sample` is not given another.
            seed: of the draws.
            example: one item (NamedTuple of arrays `[...]`); without it, the first `add` decides.
            frames: that an item brings along, as for `UniformReplay`.

        Raises:
            ValueError: capacity < 1, a negative exponent, or an example that is no NamedTuple of
                arrays.
        """
        for name, value in (("priority", priority_exponent), ("importance", importance_exponent)):
            if not 0.0 <= value < np.inf:
                raise ValueError(f"{name}_exponent must be finite and at least 0, not {value}")
        self._ring = _ring(capacity, example, frames)
        self._tree = SumTree(capacity)
        self._rng = np.random.default_rng(seed)
        self._max_priority = 1.0
        self.priority_exponent = float(priority_exponent)
        self.importance_exponent = float(importance_exponent)

    def __len__(self) -> int:
        return len(self._ring)

    @property
    def capacity(self) -> int:
        """Most items held."""
        return self._ring.capacity

    @property
    def nbytes(self) -> int:
        """Bytes when full, tree included; the fields count from the first `add` or `example`."""
        return self._ring.nbytes + self._tree.nbytes

    @property
    def total_priority(self) -> float:
        """Σ p^α over all items: what shards of one replay add up to get P(i) over all of them."""
        return self._tree.total

    @property
    def smallest_priority(self) -> float:
        """min p^α over the items that can be drawn, 0 if there is none: a look at all of them."""
        found = self._tree.get(np.arange(len(self)))
        return float(found[found > 0].min(initial=np.inf)) if found.any() else 0.0

    def add(self, items: ItemsT, priorities: ArrayLike | None = None) -> Ints:
        """Store `items`, a NamedTuple of arrays `[N, ...]`, and give their keys, int64 `[N]`.

        `priorities` `[N]` may come with them, as Ape-X's actors send them; without, new items get
        the largest priority seen so far (at first 1), so that each is likely to be drawn soon.

        Raises:
            ValueError: fields, shapes or dtypes other than before, or a priority that is negative,
                NaN or infinite; nothing is stored then.
        """
        size = self._ring.length_of(items)
        if priorities is None:
            values = np.full(size, self._max_priority)
        else:
            values = checked_priorities(priorities, size=size)
        scaled = self._scaled(values)
        keys = self._ring.write(items)
        self._set(keys, values, scaled)
        return keys

    def sample(self, batch_size: int, importance_exponent: float | None = None) -> Sample[ItemsT]:
        """Draw `batch_size` items by priority, one from each equal share of the total.

        Args:
            batch_size: at least 1; an item may be drawn more than once.
            importance_exponent: β for this batch; it is usually annealed to 1 during training.

        Raises:
            ValueError: the replay is empty, or a number is out of range.
        """
        if importance_exponent is None:
            importance_exponent = self.importance_exponent
        total = self._tree.total
        if total > 0:
            slots = self._tree.sample(batch_size, self._rng)
            keys = self._ring.key_of(slots)
            probabilities = self._tree.get(slots) / total
        else:
            keys = self._ring.uniform_keys(batch_size, self._rng)
            probabilities = np.full(len(keys), 1.0 / len(self))
        weights = importance_weights(
            probabilities, size=len(self), exponent=importance_exponent
        ).astype(np.float32)
        return Sample(self._ring.read(keys), keys, probabilities, weights)

    def update_priorities(self, keys: ArrayLike, priorities: ArrayLike) -> int:
        """Give items `keys` `[N]` the `priorities` `[N]`; of equal keys the last one counts.

        Keys of items that were overwritten since they were drawn are ignored.

        Returns:
            How many of the keys were still there.

        Raises:
            ValueError: a key that was never given out, another length, or a priority that is
                negative, NaN or infinite; nothing is changed then.
        """
        found = self._ring.checked_keys(keys)
        values = checked_priorities(priorities, size=len(found))
        scaled = self._scaled(values)
        alive = found >= self._ring.oldest_key
        self._set(found[alive], values[alive], scaled[alive])
        return int(alive.sum())

    def state(self) -> dict[str, Any]:
        """Everything that future draws depend on: copies of arrays, and plain values."""
        return {
            **self._ring.state(),
            "rng": self._rng.bit_generator.state,
            "priority_exponent": self.priority_exponent,
            "scaled_priorities": self._tree.get(np.arange(len(self))),
            "max_priority": self._max_priority,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state()` was taken. If it does not fit, ValueError and no change."""
        rng = _generator(state)
        if entry(state, "priority_exponent") != self.priority_exponent:
            raise ValueError(
                f"the state has priority_exponent {state['priority_exponent']}, "
                f"not {self.priority_exponent}"
            )
        (max_priority,) = checked_priorities([entry(state, "max_priority")], size=1)
        size = min(count(state, "added"), self.capacity)
        tree = SumTree(self.capacity)
        scaled = checked_priorities(entry(state, "scaled_priorities"), size=size)
        tree.set(np.arange(size), scaled)
        self._ring.load_state(state)
        self._tree, self._rng, self._max_priority = tree, rng, float(max_priority)

    state_dict = state
    load_state_dict = load_state

    def check_valid(self) -> None:
        """RuntimeError if something that must always hold does not."""
        self._ring.check_valid()
        self._tree.check_valid()
        if self._tree.get(np.arange(len(self), self.capacity)).any():
            raise RuntimeError("replay: an empty slot has a priority")
        if not 0 <= self._max_priority < np.inf:
            raise RuntimeError(f"replay: the largest priority is {self._max_priority}")

    def _scaled(self, priorities: Floats) -> Floats:
        with np.errstate(over="ignore"):
            scaled = powered_priorities(priorities, exponent=self.priority_exponent)
        return self._tree.checked(scaled)

    def _set(self, keys: Ints, priorities: Floats, scaled: Floats) -> None:
        alive = keys >= self._ring.oldest_key
        if alive.any():
            self._tree.set(keys[alive] % self.capacity, scaled[alive])
            self._max_priority = max(self._max_priority, float(priorities[alive].max()))


def _ring(capacity: int, example: ItemsT | None, frames: float) -> Ring[ItemsT]:
    return FrameRing(capacity, example, frames) if frames else Ring(capacity, example)


def _generator(state: Mapping[str, Any]) -> np.random.Generator:
    rng = np.random.default_rng()
    try:
        rng.bit_generator.state = entry(state, "rng")
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"the state's generator is damaged: {error}") from error
    return rng
