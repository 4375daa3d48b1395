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

from collections import namedtuple
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlbook.maths.priorities import importance_weights, powered_priorities

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ItemsT = TypeVar("ItemsT", bound=tuple[Any, ...])


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


class SumTree:
    """Priorities as leaves of a binary tree in which each node holds the sum of its two children.

    Drawing in proportion to priority is then a walk down from the root, and a change a walk up:
    log₂ `capacity` steps, each taken for the whole batch at once. Node i of the flat array has
    children 2i and 2i + 1, the root is 1, and leaf j is node `leaves + j`. Sums are float64: in
    float32 a walk can end at a leaf of priority 0. Parents are sums of their children anew each
    time, so that no error accumulates.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` leaves of priority 0, padded to a power of two. ValueError if it is < 1."""
        self.capacity = _positive_int("capacity", capacity)
        self._leaves = 1 << (self.capacity - 1).bit_length()
        self._depth = self._leaves.bit_length() - 1
        self._nodes = np.zeros(2 * self._leaves)
        self._pairs = self._nodes.reshape(-1, 2)
        self._largest = float(np.finfo(np.float64).max) / self._leaves

    @property
    def total(self) -> float:
        """Sum of all priorities."""
        return float(self._nodes[1])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._nodes.nbytes

    def get(self, indices: ArrayLike) -> Floats:
        """Priorities, float64 `[N]`, of leaves `indices` `[N]`; ValueError out of range."""
        return self._nodes[self._checked_indices(indices) + self._leaves]

    def set(self, indices: ArrayLike, priorities: ArrayLike) -> None:
        """Give leaves `indices` `[N]` the `priorities` `[N]`; of equal indices the last one counts.

        Raises:
            ValueError: an index out of range, another length, or a priority that is negative, NaN,
                infinite or so large that the sum could overflow; nothing is changed then.
        """
        nodes = self._checked_indices(indices) + self._leaves
        values = self.checked(checked_priorities(priorities, size=len(nodes)))
        self._nodes[nodes] = values
        for _ in range(self._depth):
            nodes >>= 1
            children = self._pairs.take(nodes, axis=0)
            self._nodes[nodes] = children[:, 0] + children[:, 1]

    def checked(self, priorities: Floats) -> Floats:
        """`priorities`, if none is so large that a sum of them could overflow; else ValueError."""
        if not (priorities <= self._largest).all():
            raise ValueError(
                f"priorities must be at most {self._largest:g}, or their sum overflows"
            )
        return priorities

    def find(self, prefix_sums: ArrayLike) -> Ints:
        """Leaf j for each x of `prefix_sums` `[N]`: p_0 + … + p_{j-1} <= x < p_0 + … + p_j.

        A leaf of priority 0 is never found, not even where rounding puts x at or beyond the total.

        Raises:
            ValueError: all priorities are 0, or an x is negative or NaN.
        """
        rest = np.array(prefix_sums, dtype=np.float64)
        if rest.ndim != 1 or not (rest >= 0).all():
            raise ValueError("prefix_sums must be a vector of numbers that are not negative")
        if self.total <= 0:
            raise ValueError("there is nothing to find: every priority is 0")
        nodes = np.ones(len(rest), dtype=np.int64)
        for _ in range(self._depth):
            children = self._pairs.take(nodes, axis=0)
            left = children[:, 0]
            # An empty right half is never entered: rounding may have left x a hair too large.
            right_too = (rest >= left) & (children[:, 1] > 0)
            rest -= left * right_too
            nodes <<= 1
            nodes += right_too
        return nodes - self._leaves

    def sample(self, batch_size: int, rng: np.random.Generator) -> Ints:
        """Leaves, int64 `[batch_size]`, in proportion to priority: one an equal share of the total.

        Such strata (arXiv:1511.05952, appendix B.2) lower the variance of a batch; they also come
        in the order of the tree, which the caches like. ValueError if every priority is 0.
        """
        size = _positive_int("batch_size", batch_size)
        return self.find((np.arange(size) + rng.random(size)) * (self.total / size))

    def check_valid(self) -> None:
        """RuntimeError unless nodes are the sums of their children and leaves finite and >= 0."""
        leaves = self._nodes[self._leaves :]
        if not (np.isfinite(leaves) & (leaves >= 0)).all():
            raise RuntimeError("sum tree: a priority is negative, NaN or infinite")
        if leaves[self.capacity :].any():
            raise RuntimeError("sum tree: a leaf beyond the capacity has a priority")
        if not np.array_equal(self._nodes[1 : self._leaves], self._pairs[1:].sum(axis=1)):
            raise RuntimeError("sum tree: a node is not the sum of its children")

    def _checked_indices(self, indices: ArrayLike) -> Ints:
        found = _integers("indices", indices)
        if found.size and (found.min() < 0 or found.max() >= self.capacity):
            raise ValueError(f"indices must be from 0 to {self.capacity - 1}")
        return found


class UniformReplay(Generic[ItemsT]):
    """Items drawn alike, with replacement (DQN, Mnih et al. 2015)."""

    def __init__(self, capacity: int, seed: int = 0, *, example: ItemsT | None = None) -> None:
        """Empty replay for `capacity` items.

        Args:
            capacity: items held; beyond it the oldest are overwritten.
            seed: of the draws.
            example: one item (NamedTuple of arrays `[...]`); without it, the first `add` decides.

        Raises:
            ValueError: capacity < 1, or an example that is no NamedTuple of arrays.
        """
        self._ring = _Ring(capacity, example)
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
    ) -> None:
        """Empty replay for `capacity` items.

        Args:
            capacity: items held; beyond it the oldest are overwritten.
            priority_exponent: α >= 0; 0 draws uniformly.
            importance_exponent: β >= 0, where `sample` is not given another.
            seed: of the draws.
            example: one item (NamedTuple of arrays `[...]`); without it, the first `add` decides.

        Raises:
            ValueError: capacity < 1, a negative exponent, or an example that is no NamedTuple of
                arrays.
        """
        for name, value in (("priority", priority_exponent), ("importance", importance_exponent)):
            if not 0.0 <= value < np.inf:
                raise ValueError(f"{name}_exponent must be finite and at least 0, not {value}")
        self._ring = _Ring(capacity, example)
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
        if _entry(state, "priority_exponent") != self.priority_exponent:
            raise ValueError(
                f"the state has priority_exponent {state['priority_exponent']}, "
                f"not {self.priority_exponent}"
            )
        (max_priority,) = checked_priorities([_entry(state, "max_priority")], size=1)
        size = min(_count(state, "added"), self.capacity)
        tree = SumTree(self.capacity)
        scaled = checked_priorities(_entry(state, "scaled_priorities"), size=size)
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


class _Ring(Generic[ItemsT]):
    """Storage that both replays share: an array `[capacity, ...]` a field, written in circles."""

    def __init__(self, capacity: int, example: ItemsT | None) -> None:
        self.capacity = _positive_int("capacity", capacity)
        self.added = 0
        self._fields: dict[str, NDArray[Any]] = {}
        self._type: Any = None
        if example is not None:
            arrays = _arrays(example)
            self._type = type(example)
            self._fields = self._allocated({name: a[np.newaxis] for name, a in arrays.items()})

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def oldest_key(self) -> int:
        return self.added - len(self)

    @property
    def nbytes(self) -> int:
        return sum(field.nbytes for field in self._fields.values())

    def length_of(self, items: ItemsT) -> int:
        """N of `items`, fields `[N, ...]`, which must be like those before."""
        return len(next(iter(self._checked(items).values())))

    def write(self, items: ItemsT) -> Ints:
        arrays = self._checked(items)
        if not self._fields:
            self._fields = self._allocated(arrays)
        self._type = type(items)
        size = len(next(iter(arrays.values())))
        keys = np.arange(self.added, self.added + size, dtype=np.int64)
        skipped = max(0, size - self.capacity)  # would be overwritten by the rest at once
        start = (self.added + skipped) % self.capacity
        split = min(size - skipped, self.capacity - start)  # then on from slot 0
        for name, array in arrays.items():
            field, kept = self._fields[name], array[skipped:]
            field[start : start + split] = kept[:split]
            field[: len(kept) - split] = kept[split:]
        self.added += size
        return keys

    def read(self, keys: Ints) -> ItemsT:
        slots = keys % self.capacity
        return cast(ItemsT, self._type(*(f.take(slots, axis=0) for f in self._fields.values())))

    def key_of(self, slots: Ints) -> Ints:
        """The youngest key in each slot."""
        return slots + (self.added - 1 - slots) // self.capacity * self.capacity

    def uniform_keys(self, batch_size: int, rng: np.random.Generator) -> Ints:
        size = _positive_int("batch_size", batch_size)
        if not self.added:
            raise ValueError("cannot sample: the replay is empty")
        return rng.integers(self.oldest_key, self.added, size)

    def checked_keys(self, keys: ArrayLike) -> Ints:
        found = _integers("keys", keys)
        if found.size and (found.min() < 0 or found.max() >= self.added):
            raise ValueError(
                f"keys must be from 0 to {self.added - 1}: others were never given out"
            )
        return found

    def state(self) -> dict[str, Any]:
        fields = {name: field[: len(self)].copy() for name, field in self._fields.items()}
        return {"capacity": self.capacity, "added": self.added, "fields": fields}

    def load_state(self, state: Mapping[str, Any]) -> None:
        capacity, added = _count(state, "capacity"), _count(state, "added")
        if capacity != self.capacity:
            raise ValueError(f"the state has capacity {capacity}, not {self.capacity}")
        fields = _entry(state, "fields")
        if not isinstance(fields, Mapping) or (added and not fields):
            raise ValueError("the state is damaged: it has no fields")
        arrays = {name: np.asarray(array) for name, array in fields.items()}
        if arrays:
            self._check_like_before(arrays)
        size = min(added, capacity)
        if any(len(array) != size for array in arrays.values()):
            raise ValueError(f"the state is damaged: not every field holds {size} items")
        loaded = self._allocated(arrays)
        for name, array in arrays.items():
            loaded[name][:size] = array
        if self._type is None and arrays:  # until an add tells the type of its own
            self._type = namedtuple("Items", list(arrays))  # type: ignore[misc]
        self._fields, self.added = loaded or self._fields, added

    def check_valid(self) -> None:
        lengths = {len(field) for field in self._fields.values()}
        if self.added < 0 or (self.added and lengths != {self.capacity}):
            raise RuntimeError(f"replay: {self.added} items added, fields of length {lengths}")

    def _checked(self, items: ItemsT) -> dict[str, NDArray[Any]]:
        arrays = _arrays(items)
        lengths = sorted({array.shape[:1] for array in arrays.values()})
        if len(lengths) != 1 or lengths == [()]:
            raise ValueError(f"fields must be arrays [N, ...] of one N, not of {lengths}")
        self._check_like_before(arrays)
        return arrays

    def _check_like_before(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        if not self._fields:
            return
        if list(arrays) != list(self._fields):
            raise ValueError(f"items must have fields {list(self._fields)}, not {list(arrays)}")
        for name, array in arrays.items():
            field = self._fields[name]
            if array.shape[1:] != field.shape[1:] or array.dtype != field.dtype:
                raise ValueError(
                    f"{name} must be {field.dtype} [N, {str(field.shape[1:])[1:-1]}] as before, "
                    f"not {array.dtype} {array.shape}"
                )

    def _allocated(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {n: np.zeros((self.capacity, *a.shape[1:]), a.dtype) for n, a in arrays.items()}


def checked_priorities(priorities: ArrayLike, *, size: int) -> Floats:
    """`priorities` as float64 `[size]`; ValueError if one is negative, NaN or infinite."""
    values = np.asarray(priorities, dtype=np.float64)
    if values.shape != (size,):
        raise ValueError(f"priorities must have shape ({size},), not {values.shape}")
    if not ((values >= 0) & (values < np.inf)).all():
        raise ValueError("priorities must be finite and not negative")
    return values


def _arrays(items: tuple[Any, ...]) -> dict[str, NDArray[Any]]:
    names = getattr(items, "_fields", ())
    arrays = {name: np.asarray(value) for name, value in zip(names, items, strict=False)}
    if not arrays or any(array.dtype.kind not in "biufc" for array in arrays.values()):
        raise ValueError(
            "items must be a NamedTuple of numeric arrays, e.g. rlbook.data.Transition"
        )
    return arrays


def _integers(name: str, values: ArrayLike) -> Ints:
    found = np.asarray(values)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a vector of integers, not {found.dtype} {found.shape}")
    return found.astype(np.int64)


def _positive_int(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
    return int(value)


def _entry(state: Mapping[str, Any], name: str) -> Any:
    if name not in state:
        raise ValueError(f"this is no state of such a replay: it has no {name!r}")
    return state[name]


def _count(state: Mapping[str, Any], name: str) -> int:
    value = _entry(state, name)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"the state is damaged: {name} is {value!r}")
    return value


def _generator(state: Mapping[str, Any]) -> np.random.Generator:
    rng = np.random.default_rng()
    try:
        rng.bit_generator.state = _entry(state, "rng")
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"the state's generator is damaged: {error}") from error
    return rng
