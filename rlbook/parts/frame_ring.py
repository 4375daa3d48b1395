"""A ring of transitions whose observations are stacks of frames: each frame is kept once (numpy).

    what an actor sends    frames of copy 0, of copy 1, …       k − 1 older ones, then one a row
                             x x x x x x x x x x x x
                           transition i:  └──────┘ from at_tm1[i], k of them
                                                └──────┘ from at_t[i]

    [ ring of `capacity` small rows ]  ──(chunk, at)──►  [ chunks of frames: one is given up as soon
                                                           as its last transition is overwritten ]

Whole stacks would be 2 k frames a transition (56 kB of Atari); this is little more than one. Stacks
are put together when they are drawn. Planes from before the beginning of an episode are zeros in a
stack, whatever was shown then: how many is kept with each transition. Frames once written are never
changed, so that a checkpoint needs no copy of them.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from rlbook.data import Transition, tree_nbytes
from rlbook.parts.frames import before_an_episode
from rlbook.parts.ring import Ring, count, entry
from rlbook.parts.sum_tree import Ints


class FramedTransitions(NamedTuple):
    """N transitions of a stretch of time, and the frames that they show."""

    frames: Any
    """`[F, H, W]`; the k of a stack follow each other."""
    a_tm1: Any
    """`[N]`, as are all below."""
    r_t: Any
    discount_t: Any
    at_tm1: Any
    """int32: the frame with which the stack obs_tm1 begins."""
    blank_tm1: Any
    """uint8: so many of its planes, the oldest, are from before the episode, which are zeros."""
    at_t: Any
    """int32, of obs_t."""
    blank_t: Any
    """uint8, likewise."""


class Kept(NamedTuple):
    """What the ring holds of a transition, beside the frames."""

    chunk: Any
    """int64: how many chunks were added before that of its frames."""
    a_tm1: Any
    r_t: Any
    discount_t: Any
    at_tm1: Any
    blank_tm1: Any
    at_t: Any
    blank_t: Any


class Chunk(NamedTuple):
    """Frames that were added together."""

    frames: np.ndarray
    end: int
    """Key after that of its last transition."""


def frames_each(planes: int, unroll_length: int, n_step: int) -> float:
    """Frames that a transition brings along, those that end no episode: 1, and its share of the
    n − 1 rows that chunks of T share and of the k older planes; 0 where observations are no stacks.

    Args:
        planes: k; 1 for observations that are no stacks of frames.
        unroll_length: T.
        n_step: n.
    """
    return (unroll_length + n_step - 1 + planes) / unroll_length if planes > 1 else 0.0


def stored_bytes(example: Any, frames: float) -> int:
    """Of a transition as it is sent and kept.

    Args:
        example: one, with whole observations.
        frames: see `frames_each`; 0 if it is kept as it is.
    """
    if not frames:
        return tree_nbytes(example)
    return tree_nbytes(_small(example)) + round(frames * example.obs_tm1[0].nbytes)


def framed(
    seen: Sequence[np.ndarray],
    first: np.ndarray,
    before: tuple[np.ndarray, np.ndarray],
    after: tuple[np.ndarray, np.ndarray],
    columns: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> FramedTransitions:
    """Transitions between rows of a stretch, each frame told once.

    Args:
        seen: R rows `[B, k, H, W]` that follow each other.
        first: `[R, B]` bool: a later row than row 0 with which an episode begins.
        before: (row, copy), `[N]` each, of obs_tm1.
        after: likewise of obs_t.
        columns: a_tm1, r_t and discount_t `[N]`.
    """
    copies, planes, *size = seen[0].shape
    frames = np.empty((copies, len(seen) + planes - 1, *size), seen[0].dtype)
    frames[:, : planes - 1] = seen[0][:, :-1]
    for row, stack in enumerate(seen, planes - 1):
        frames[:, row] = stack[:, -1]
    blank = before_an_episode(first, planes).sum(-1, dtype=np.uint8)

    def where(row: np.ndarray, copy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (copy * frames.shape[1] + row).astype(np.int32), blank[row, copy]

    return FramedTransitions(frames.reshape(-1, *size), *columns, *where(*before), *where(*after))


class FrameRing(Ring[Any]):
    """The storage of a replay memory: `FramedTransitions` in, `Transition`s out.

    Args:
        capacity: transitions.
        example: a `Transition` with whole observations `[k, H, W]`.
        frames: that a transition brings along, for `nbytes` (see `frames_each`).

    Raises:
        ValueError: capacity < 1, or an example that is none.
    """

    def __init__(self, capacity: int, example: Any, frames: float) -> None:
        if getattr(example, "_fields", ()) != Transition._fields or np.ndim(example.obs_t) != 3:
            raise ValueError("frames: need an example, a Transition of stacks [k, H, W]")
        super().__init__(capacity, _small(example))
        self._stack, self._frames = np.asarray(example.obs_t), frames
        self._chunks: dict[int, Chunk] = {}
        self._came = 0
        """Chunks that were added."""

    @property
    def nbytes(self) -> int:
        """Bytes when full, if few episodes end: each end takes a frame that no transition needs."""
        return super().nbytes + round(self.capacity * self._frames * self._stack[0].nbytes)

    @property
    def held_nbytes(self) -> int:
        """Bytes now, all that is allocated."""
        return super().nbytes + sum(chunk.frames.nbytes for chunk in self._chunks.values())

    def length_of(self, items: Any) -> int:
        """N of `FramedTransitions`; ValueError if they are none, or not like those before."""
        if getattr(items, "_fields", ()) != FramedTransitions._fields:
            raise ValueError(f"items must be FramedTransitions, not {type(items).__name__}")
        frames, size = np.asarray(items.frames), super().length_of(self._rows(items))
        self._check_frames(frames)
        self._check_places(len(frames), items)
        return size

    def write(self, items: Any) -> Ints:
        """Stores `FramedTransitions` over the oldest; their keys, int64 `[N]`."""
        self.length_of(items)
        keys = super().write(self._rows(items))
        if len(keys):
            self._chunks[self._came] = Chunk(np.array(items.frames), self.added)
            self._came += 1
        gone = takewhile(lambda one: self._chunks[one].end <= self.oldest_key, self._chunks)
        for number in list(gone):
            del self._chunks[number]
        return keys

    def read(self, keys: Ints) -> Any:
        """The transitions `keys` `[B]`, with whole observations."""
        row: Kept = super().read(keys)
        before = self._stacks(row.chunk, row.at_tm1, row.blank_tm1)
        after = self._stacks(row.chunk, row.at_t, row.blank_t)
        return Transition(before, row.a_tm1, row.r_t, row.discount_t, after)

    def state(self) -> dict[str, Any]:
        """Copies of the small fields, the counters, and the frames themselves."""
        frames = [chunk.frames for chunk in self._chunks.values()]
        ends = [chunk.end for chunk in self._chunks.values()]
        return {**super().state(), "came": self._came, "frames": frames, "ends": ends}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue where `state()` was taken. If it does not fit, ValueError and no change."""
        came, ends = count(state, "came"), entry(state, "ends")
        frames = [np.array(one) for one in entry(state, "frames")]  # not where they came from
        for one in frames:
            self._check_frames(one)
        pairs = zip(frames, ends, strict=True)
        chunks = {number: Chunk(*pair) for number, pair in enumerate(pairs, came - len(frames))}
        before = self._fields, self.added
        super().load_state(state)
        try:
            self._check_kept(np.array([len(one) for one in frames]), came)
        except ValueError:
            self._fields, self.added = before
            raise
        self._chunks, self._came = chunks, came

    def check_valid(self) -> None:
        """RuntimeError if transitions and frames do not fit together."""
        super().check_valid()
        held = set(self._fields["chunk"][: len(self)].tolist())
        if not held <= self._chunks.keys() or (self._chunks and not held):
            raise RuntimeError(f"replay: frames {list(self._chunks)}, transitions of {held}")

    def _rows(self, items: FramedTransitions) -> Kept:
        size = np.shape(items.r_t)
        return Kept(np.full(size, self._came, np.int64), *items[1:])

    def _stacks(self, chunk: np.ndarray, at: np.ndarray, blank: np.ndarray) -> np.ndarray:
        """Whole observations `[N, k, H, W]`."""
        planes = len(self._stack)
        found = np.empty((len(at), *self._stack.shape), self._stack.dtype)
        for row, (number, start) in enumerate(zip(chunk.tolist(), at.tolist(), strict=True)):
            found[row] = self._chunks[number].frames[start : start + planes]
        if blank.any():
            found[np.arange(planes) < blank[:, None]] = 0
        return found

    def _check_frames(self, frames: np.ndarray) -> None:
        one = self._stack[0]
        if frames.shape[1:] != one.shape or frames.dtype != one.dtype:
            raise ValueError(
                f"frames must be {one.dtype} [F, {str(one.shape)[1:-1]}], not {frames.dtype}"
                f" {frames.shape}"
            )

    def _check_kept(self, lengths: np.ndarray, came: int) -> None:
        """ValueError if a transition's frames are not among the chunks of so many each."""
        held = Kept(*(field[: len(self)] for field in self._fields.values()))
        index = held.chunk - (came - len(lengths))
        if index.size and not (index.min() >= 0 and index.max() < len(lengths)):
            raise ValueError("the state is damaged: the frames of some transitions are missing")
        self._check_places(lengths[index] if index.size else 0, held)

    def _check_places(self, frames: int | np.ndarray, items: Any) -> None:
        """ValueError if a stack is not within so many frames."""
        planes = len(self._stack)
        for at in (np.asarray(items.at_tm1), np.asarray(items.at_t)):
            if (at < 0).any() or (at + planes > frames).any():
                raise ValueError(f"a stack of {planes} does not lie within its frames")


def _small(example: Transition) -> Kept:
    """One, of any values."""
    at, blank = np.int32(0), np.uint8(0)
    columns = example.a_tm1, example.r_t, example.discount_t
    return Kept(np.int64(0), *columns, at, blank, at, blank)
