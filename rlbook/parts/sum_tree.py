"""The sum tree: drawing one of a million items by priority in the time of twenty additions (numpy).

Source: Schaul et al., arXiv:1511.05952, appendix B.2.1.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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
        self.capacity = positive_int("capacity", capacity)
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
            nodes <<= 1
            left = self._nodes.take(nodes)
            beyond = rest >= left
            rest -= left * beyond
            nodes += beyond
        for lost in np.flatnonzero(self._nodes.take(nodes) == 0):  # rare: x was a hair too large
            nodes[lost] = self._last_before(nodes[lost])
        return nodes - self._leaves

    def sample(self, batch_size: int, rng: np.random.Generator) -> Ints:
        """Leaves, int64 `[batch_size]`, in proportion to priority: one an equal share of the total.

        Such strata (arXiv:1511.05952, appendix B.2.1) lower the variance of a batch; they also come
        in the order of the tree, which the caches like. ValueError if every priority is 0.
        """
        size = positive_int("batch_size", batch_size)
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

    def _last_before(self, node: int) -> int:
        """The last leaf with a priority to the left of leaf `node`, which has none."""
        while self._nodes[node] == 0:
            node >>= 1
        while node < self._leaves:
            node = 2 * node + int(self._nodes[2 * node + 1] > 0)
        return node

    def _checked_indices(self, indices: ArrayLike) -> Ints:
        found = integers("indices", indices)
        if found.size and (found.min() < 0 or found.max() >= self.capacity):
            raise ValueError(f"indices must be from 0 to {self.capacity - 1}")
        return found


def checked_priorities(priorities: ArrayLike, *, size: int) -> Floats:
    """`priorities` as float64 `[size]`; ValueError if one is negative, NaN or infinite."""
    values = np.asarray(priorities, dtype=np.float64)
    if values.shape != (size,):
        raise ValueError(f"priorities must have shape ({size},), not {values.shape}")
    if not ((values >= 0) & (values < np.inf)).all():
        raise ValueError("priorities must be finite and not negative")
    return values


def integers(name: str, values: ArrayLike) -> Ints:
    """`values` as a new int64 `[N]`; ValueError if they are no vector of integers."""
    found = np.asarray(values)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"{name} must be a vector of integers, not {found.dtype} {found.shape}")
    return found.astype(np.int64)


def positive_int(name: str, value: int) -> int:
    """`value`, an integer of at least 1, or ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}")
    return int(value)
