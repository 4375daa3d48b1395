"""The ring under both replays: arrays written in circles, and keys that tell time (numpy).

The key of an item is how many items were added before it. It lies in slot `key % capacity`, and it
is there as long as it is among the `capacity` youngest: `key >= oldest_key`.
"""

from collections import namedtuple
from collections.abc import Mapping
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlbook.parts.sum_tree import Ints, integers, positive_int

ItemsT = TypeVar("ItemsT", bound=tuple[Any, ...])


class Ring(Generic[ItemsT]):
    """Storage that both replays share: an array `[capacity, ...]` a field, written in circles."""

    def __init__(self, capacity: int, example: ItemsT | None) -> None:
        self.capacity = positive_int("capacity", capacity)
        self.added = 0
        self._fields: dict[str, NDArray[Any]] = {}
        self._type: Any = None
        if example is not None:
            arrays = _arrays(example)
            self._type = type(example)
            self._fields = self._allocated({name: a[np.newaxis] for name, a in arrays.items()})

    def __len__(self) -> int:
        """Items held."""
        return min(self.added, self.capacity)

    @property
    def oldest_key(self) -> int:
        """Key of the oldest item held; what is smaller was overwritten."""
        return self.added - len(self)

    @property
    def nbytes(self) -> int:
        """Bytes when full; 0 while the fields are not known."""
        return sum(field.nbytes for field in self._fields.values())

    def length_of(self, items: ItemsT) -> int:
        """N of `items`, fields `[N, ...]`, which must be like those before."""
        return len(next(iter(self._checked(items).values())))

    def write(self, items: ItemsT) -> Ints:
        """Store `items`, fields `[N, ...]`, over the oldest; their keys, int64 `[N]`."""
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
        """Copies of the items `keys` `[B]`, fields `[B, ...]`, in the type that was added."""
        slots = keys % self.capacity
        return cast(ItemsT, self._type(*(f.take(slots, axis=0) for f in self._fields.values())))

    def key_of(self, slots: Ints) -> Ints:
        """The youngest key in each slot."""
        return slots + (self.added - 1 - slots) // self.capacity * self.capacity

    def uniform_keys(self, batch_size: int, rng: np.random.Generator) -> Ints:
        """Keys `[batch_size]` of items drawn alike. ValueError if there is none."""
        size = positive_int("batch_size", batch_size)
        if not self.added:
            raise ValueError("cannot sample: the replay is empty")
        return rng.integers(self.oldest_key, self.added, size)

    def checked_keys(self, keys: ArrayLike) -> Ints:
        """`keys` as int64 `[N]`. ValueError if one was never given out."""
        found = integers("keys", keys)
        if found.size and (found.min() < 0 or found.max() >= self.added):
            raise ValueError(
                f"keys must be from 0 to {self.added - 1}: others were never given out"
            )
        return found

    def state(self) -> dict[str, Any]:
        """Copies of the fields, and the counters."""
        fields = {name: field[: len(self)].copy() for name, field in self._fields.items()}
        return {"capacity": self.capacity, "added": self.added, "fields": fields}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state()` was taken. If it does not fit, ValueError and no change."""
        capacity, added = count(state, "capacity"), count(state, "added")
        if capacity != self.capacity:
            raise ValueError(f"the state has capacity {capacity}, not {self.capacity}")
        fields = entry(state, "fields")
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
        """RuntimeError if the counters and the fields do not fit together."""
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


def _arrays(items: tuple[Any, ...]) -> dict[str, NDArray[Any]]:
    names = getattr(items, "_fields", ())
    arrays = {name: np.asarray(value) for name, value in zip(names, items, strict=False)}
    if not arrays or any(array.dtype.kind not in "biufc" for array in arrays.values()):
        raise ValueError(
            "items must be a NamedTuple of numeric arrays, e.g. rlbook.data.Transition"
        )
    return arrays


def entry(state: Mapping[str, Any], name: str) -> Any:
    """`state[name]`; ValueError if there is none."""
    if name not in state:
        raise ValueError(f"this is no state of such a replay: it has no {name!r}")
    return state[name]


def count(state: Mapping[str, Any], name: str) -> int:
    """`state[name]`, which must be an integer >= 0, or ValueError."""
    value = entry(state, name)
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"the state is damaged: {name} is {value!r}")
    return value
