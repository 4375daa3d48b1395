"""Items as rows of bytes: what a replay memory in another process stores and sends back (numpy).

    NamedTuple of arrays [N, ...]  ── pack ──►  N × nbytes bytes  ── unpack ──►  the same again

Every field has a fixed place in a row, so that nothing but numbers travels: no names, no pickle.
"""

import json
from typing import Any, Generic

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlbook.maths.priorities import importance_weights, powered_priorities
from rlbook.parts.replay import Sample
from rlbook.parts.ring import ItemsT
from rlbook.parts.sum_tree import Floats, Ints, checked_priorities


class Rows(Generic[ItemsT]):
    """The form of a row, from one item: a NamedTuple of numeric arrays `[...]`."""

    def __init__(self, example: ItemsT) -> None:
        """ValueError if `example` is no NamedTuple of numeric arrays."""
        names = getattr(example, "_fields", ())
        arrays = [np.asarray(value) for value in example] if names else []
        if not arrays or any(array.dtype.kind not in "biufc" for array in arrays):
            raise ValueError(
                "example must be a NamedTuple of numeric arrays, e.g. rlbook.data.Transition"
            )
        self._type: Any = type(example)
        self.example = example
        fields = [
            (n, a.dtype.newbyteorder("<"), a.shape) for n, a in zip(names, arrays, strict=True)
        ]
        self.dtype = np.dtype(fields)
        """Structured; its fields lie close together, little end first on every machine."""

    @property
    def nbytes(self) -> int:
        """Of one row."""
        return self.dtype.itemsize

    @property
    def schema(self) -> str:
        """The fields, their types and shapes as JSON; equal where rows fit together."""
        return json.dumps([[n, t.base.str, list(t.shape)] for n, t in self._fields()])

    def pack(self, items: ItemsT) -> tuple[int, memoryview]:
        """N and the bytes of `items`, fields `[N, ...]`.

        Raises:
            ValueError: other fields, shapes or dtypes than the example's, or fields of unequal N.
        """
        if getattr(items, "_fields", ()) != self.dtype.names:
            found = list(getattr(items, "_fields", [type(items).__name__]))
            raise ValueError(f"items must have fields {list(self.dtype.names or ())}, not {found}")
        arrays = [np.asarray(value) for value in items]
        lengths = sorted({array.shape[:1] for array in arrays})
        if len(lengths) != 1 or lengths == [()]:
            raise ValueError(f"fields must be arrays [N, ...] of one N, not of {lengths}")
        rows = np.empty(lengths[0], self.dtype)
        for (name, field), array in zip(self._fields(), arrays, strict=True):
            if array.shape[1:] != field.shape or array.dtype != field.base:
                raise ValueError(
                    f"{name} must be {field.base} [N, {str(field.shape)[1:-1]}] as in the example, "
                    f"not {array.dtype} {array.shape}"
                )
            rows[name] = array
        return len(rows), memoryview(rows.tobytes())

    def unpack(self, rows: NDArray[Any]) -> ItemsT:
        """Items, fields `[N, ...]`, from structured `rows` `[N]`; copies."""
        columns = (np.ascontiguousarray(rows[name], f.base) for name, f in self._fields())
        return self._type(*columns)

    def _fields(self) -> list[tuple[str, np.dtype[Any]]]:
        return [(name, self.dtype[name]) for name in self.dtype.names or ()]


def scaled_priorities(
    priorities: ArrayLike, *, size: int, exponent: float, most: float
) -> tuple[Floats, float]:
    """p^α, float64 `[size]`, and the largest of them (0 of none).

    Args:
        priorities: `[size]`, p.
        size: how many there must be.
        exponent: α.
        most: the largest p^α allowed, so that a sum of them cannot overflow.

    Raises:
        ValueError: another length, or a priority that is negative, NaN, infinite or too large.
    """
    values = checked_priorities(priorities, size=size)
    with np.errstate(over="ignore"):
        scaled = powered_priorities(values, exponent=exponent)
    largest = float(scaled.max(initial=0.0))
    if not largest <= most:
        raise ValueError(f"priorities to the power of {exponent} must be at most {most:g}")
    return scaled, largest


def drawn(
    items: Any, keys: Ints, scaled: Floats, *, total: float, size: int, exponent: float
) -> Sample:
    """A batch that was drawn elsewhere, with its probabilities and weights.

    Args:
        items: fields `[B, ...]`.
        keys: `[B]`.
        scaled: `[B]`, p^α of each.
        total: Σ p^α over all items; where it is 0, all are drawn alike.
        size: N, items that could have been drawn.
        exponent: β of the importance weights, which are divided by their largest in the batch.
    """
    probabilities = scaled / total if total > 0 else np.full(len(keys), 1.0 / size)
    weights = importance_weights(probabilities, size=size, exponent=exponent)
    return Sample(items, keys, probabilities, weights.astype(np.float32))
