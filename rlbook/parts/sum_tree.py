"""The sum tree: drawing one of a million items by priority in the time of twenty additions (numpy).

Source: Schaul et al., arXiv:1511.05952, appendix B.2.1.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


TOP = 1024
"""Nodes of the level that a search starts from: their running sums are one pass over 8 KiB."""

WHOLE = 8192
"""Levels of at most so many nodes are added up whole: quicker than finding out what changed."""

SIGN = np.array(63)
"""The bit of a float64 that says whether it is negative. (An array: numpy need not make one.)"""


class SumTree:
    """Priorities as leaves of a binary tree in which each node holds the sum of its two children.

                     ┌──── running sums of a level of 1,024 nodes: one `searchsorted` a batch
         ┌───────────┴───────────┐
      ┌──┴──┐                 ┌──┴──┐     levels of at most 8,192 nodes: added up whole,
    ┌─┴─┐ ┌─┴─┐             ┌─┴─┐ ┌─┴─┐   when somebody asks
    ·   · ·   ·      …      ·   · ·   ·   below: a walk of all draws of a batch, level by level

    Drawing in proportion to priority is a walk down, and a change a walk up, each step taken for a
    whole batch at once; log₂ `capacity` steps in principle. What numpy does fast is one pass over
    a short array, and what costs time is each call of it: so the ten levels near the root are
    replaced by running sums, and those below them are added up only before the next search.

    Node i of the flat array has children 2i and 2i + 1, and leaf j is node `leaves + j`. Sums are
    float64: in float32 a walk can end at a leaf of priority 0. Parents are sums of their children
    anew each time, so that no error accumulates.
    """

    def __init__(self, capacity: int) -> None:
        """`capacity` leaves of priority 0, padded to a power of two. ValueError if it is < 1."""
        self.capacity = positive_int("capacity", capacity)
        self._leaves = 1 << (self.capacity - 1).bit_length()
        self._top, self._whole = min(TOP, self._leaves), min(WHOLE, self._leaves)
        self._memory = np.zeros(2 * self._leaves + 2)
        self._nodes = self._memory[2:]
        self._pairs = self._nodes.view(np.complex128)  # node i's children, taken as one
        self._before = np.zeros(self._top + 1)
        self._stale = False
        self._largest = float(np.finfo(np.float64).max) / self._leaves

    @property
    def total(self) -> float:
        """Sum of all priorities."""
        return float(self._running_sums()[-1])

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._memory.nbytes + self._before.nbytes

    def get(self, indices: ArrayLike) -> Floats:
        """Priorities, float64 `[N]`, of leaves `indices` `[N]`; ValueError out of range."""
        return self._nodes.take(self._checked_indices(indices) + self._leaves)

    def set(self, indices: ArrayLike, priorities: ArrayLike) -> None:
        """Give leaves `indices` `[N]` the `priorities` `[N]`; of equal indices the last one counts.

        Raises:
            ValueError: an index out of range, another length, or a priority that is negative, NaN,
                infinite or so large that the sum could overflow; nothing is changed then.
        """
        nodes = self._checked_indices(indices)
        values = self.checked(checked_priorities(priorities, size=len(nodes)))
        nodes += self._leaves
        self._nodes[nodes] = values
        pairs, sums = np.empty(len(nodes), np.complex128), np.empty(len(nodes))
        left, right, level = pairs.real, pairs.imag, self._leaves
        while level > self._whole:
            level >>= 1
            nodes >>= 1
            self._pairs.take(nodes, out=pairs, mode="clip")  # "clip" spares numpy a copy
            self._nodes[nodes] = np.add(left, right, out=sums)
        self._stale = True

    def checked(self, priorities: Floats) -> Floats:
        """`priorities`, if none is so large that a sum of them could overflow; else ValueError."""
        if priorities.size and not priorities.max() <= self._largest:
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
        rest = np.asarray(prefix_sums, dtype=np.float64) + 0.0  # a copy, and −0.0 becomes 0.0
        if rest.ndim != 1 or (rest.size and not rest.min() >= 0):
            raise ValueError("prefix_sums must be a vector of numbers that are not negative")
        if self.total <= 0:
            raise ValueError("there is nothing to find: every priority is 0")
        return self._walk(rest)

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
        self._running_sums()
        known = slice(self._top, self._leaves)  # nodes nearer to the root are not kept
        if not np.array_equal(self._nodes[known], self._nodes.reshape(-1, 2)[known].sum(axis=1)):
            raise RuntimeError("sum tree: a node is not the sum of its children")
        top = self._nodes[self._top : 2 * self._top]
        if not np.array_equal(self._before[1:], np.cumsum(top)):
            raise RuntimeError("sum tree: a running sum is not the sum of the nodes before")

    def _running_sums(self) -> Floats:
        """`[TOP + 1]`: the sum of all nodes before each of the top level; the last is the total."""
        if self._stale:
            level = self._whole
            while level > self._top:
                children = self._nodes[level : 2 * level]
                level >>= 1
                np.add(children[::2], children[1::2], out=self._nodes[level : 2 * level])
            top = self._nodes[level : 2 * level]
            np.add.accumulate(top, out=self._before[1:])
            self._stale = False
        return self._before

    def _walk(self, rest: Floats) -> Ints:
        """The leaf for each x of `rest` `[N]`, which is overwritten. Some priority is positive.

        A step of the walk compares x with the sum of the left child, goes left where it is smaller,
        and else right with x less that sum. As there is a price on each call of numpy, not on what
        it does to a few hundred numbers, the step is five calls: the difference x − left has its
        sign in its highest bit, which shifted down says −1 (left) or 0 (right); and as unsigned
        integers negative floats are larger than all others, so that the smaller of x and x − left
        is what remains of x in both cases.
        """
        top = self._before[1:].searchsorted(rest, side="right")
        np.minimum(top, self._top - 1, out=top)
        rest -= self._before.take(top)
        node = top + (self._top + 1)  # one more than the node, so that a step is 2 node + (−1 or 0)
        left, level = np.empty_like(rest), self._top
        signed, bits, rest_bits = left.view(np.int64), left.view(np.uint64), rest.view(np.uint64)
        while level < self._leaves:
            level <<= 1
            node += node
            self._memory.take(node, out=left, mode="clip")  # the left child, as that is 2 in front
            np.subtract(rest, left, out=left)
            np.minimum(rest_bits, bits, out=rest_bits)
            np.right_shift(signed, SIGN, out=signed)
            node += signed
        node -= 1
        if np.count_nonzero(self._nodes.take(node)) < len(node):  # rare: x was a hair too large
            for lost in np.flatnonzero(self._nodes.take(node) == 0):
                before = self._nodes[self._leaves : node[lost]]
                node[lost] = self._leaves + np.flatnonzero(before)[-1]
        node -= self._leaves
        return node

    def _checked_indices(self, indices: ArrayLike) -> Ints:
        found = integers("indices", indices)
        if found.size and found.view(np.uint64).max() >= self.capacity:  # negative: very large
            raise ValueError(f"indices must be from 0 to {self.capacity - 1}")
        return found


def checked_priorities(priorities: ArrayLike, *, size: int) -> Floats:
    """`priorities` as float64 `[size]`; ValueError if one is negative, NaN or infinite."""
    values = np.asarray(priorities, dtype=np.float64)
    if values.shape != (size,):
        raise ValueError(f"priorities must have shape ({size},), not {values.shape}")
    if values.size and not (values.min() >= 0 and values.max() < np.inf):  # NaN is neither
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
