"""Gradients and weights in fewer bytes: codecs, error feedback, delta updates (numpy alone).

    vector [P] ──encode──► blob: bytes ──wire──► decode ──► nearly the same vector [P]

    worker: v = g + residual ── blob = encode(v) ──► server: adds decode(blob)
                 ▲                     │
                 └── v − decode(blob) ─┘                 what was not said is said later

A codec is pure: the same vector gives the same blob. A blob is all that travels, so that its length
is what a message costs, and it says itself how to read it: one `decode` opens every kind.

A lossy codec alone is biased, and what it leaves out (small entries, the grain of 8 bits) can be
left out for ever. `ErrorFeedback` remembers what was left out and adds it to the next vector, so
that whatever was sent plus what is remembered is the sum of all vectors. That gives back the
convergence of plain SGD for any codec that keeps a part of the vector (Stich et al. 2018;
Karimireddy et al. 2019). `DeltaEncoder` does the same for weights, whose receiver has the last
ones already.

Sources: one bit and error feedback: Seide et al. 2014, "1-bit stochastic gradient descent";
Karimireddy et al., arXiv:1901.09847. Top-k: Aji & Heafield, arXiv:1704.05021; Lin et al.,
arXiv:1712.01887. Its analysis with memory: Stich et al., arXiv:1809.07599. 8 bits:
Dettmers, arXiv:1511.04561.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rlbook.plumbing.blobs import (
    GAPS,
    HALF,
    INT8,
    NONE,
    SIGN,
    TOP_HEADER,
    TOPK,
    Blob,
    Vector,
    alike,
    decode,
    finite,
    flat,
    framed,
    in_blocks,
)

__all__ = [
    "Codec",
    "DeltaDecoder",
    "DeltaEncoder",
    "ErrorFeedback",
    "Half",
    "Identity",
    "Int8",
    "Sign",
    "TopK",
    "Vector",
    "decode",
    "make_codec",
    "ratio",
]

DELTA_HEADER = struct.Struct("<2sBIqq")
"""Mark, whether whole, number since the last whole one, version before, version."""
DELTA_MARK = b"rd"


class Codec(Protocol):
    """Turns a vector into bytes and back."""

    @property
    def name(self) -> str:
        """What `make_codec` makes this codec from."""

    def encode(self, vector: Vector) -> bytes:
        """`vector` `[P]` as a blob. ValueError if it is not flat float32 or float64, or if it is
        not finite (except with `Identity`).
        """

    def decode(self, blob: Blob) -> Vector:
        """The vector `[P]` that a blob says, of the dtype that went in; writable."""


def ratio(blob: Blob, vector: Vector) -> float:
    """How many times fewer bytes the blob has than the vector `[P]`."""
    return vector.nbytes / len(blob)


@dataclass(frozen=True)
class Identity:
    """Every value as it is, bit for bit, NaN and infinity too: 4 or 8 bytes a value."""

    name = "none"

    def encode(self, vector: Vector) -> bytes:
        """A header and the array's own bytes."""
        values = flat(vector)
        return framed(NONE, values, values)

    decode = staticmethod(decode)


@dataclass(frozen=True)
class Half:
    """Two bytes a value: IEEE half precision, about three digits from 6e-8 to 65,504.

    Larger values become ±65,504 rather than infinite; with error feedback the rest comes later.
    """

    name = "fp16"

    def encode(self, vector: Vector) -> bytes:
        """Rounded to the nearest half."""
        values = finite(vector)
        most = float(np.finfo(np.float16).max)
        return framed(HALF, values, values.clip(-most, most).astype("<f2"))

    decode = staticmethod(decode)


@dataclass(frozen=True)
class Int8:
    """About one byte a value: whole multiples of a scale, which 256 neighbours share.

    The scale is the block's largest |x| / 127, so that one large entry spoils the grain of its
    block alone; no error exceeds half a scale. Differs from Dettmers 2016, whose 8 bits are a
    floating-point number with an exponent of varying length: equal steps are easier to read.
    """

    name = "int8"

    def encode(self, vector: Vector) -> bytes:
        """A scale a block, in the vector's dtype, then int8 `[P]`."""
        values = finite(vector)
        blocks = in_blocks(values)
        peaks = np.maximum(blocks.max(axis=1), -blocks.min(axis=1))
        # Below the largest float / 128, so that 127 scales are finite whatever the rounding.
        scales = np.minimum(peaks / 127, np.finfo(values.dtype).max / 128).astype(values.dtype)
        steps = np.rint(blocks / np.where(scales > 0, scales, 1)[:, None]).clip(-127, 127)
        return framed(INT8, values, scales, steps.astype("<i1").reshape(-1)[: len(values)])

    decode = staticmethod(decode)


@dataclass(frozen=True)
class Sign:
    """One bit a value: x ≥ 0 or not, all as large as the mean |x|.

    The scaled sign ‖x‖₁/P · sign(x) of Karimireddy et al. 2019, alg. 1: of all multiples of the
    signs the nearest to x. Without `ErrorFeedback` it need not converge. Differs from Seide et al.
    2014, who send two means for every column of a matrix.
    """

    name = "sign"

    def encode(self, vector: Vector) -> bytes:
        """The mean in the vector's dtype, then the signs, eight to a byte."""
        values = finite(vector)
        sizes = np.abs(values)
        peak = sizes.max(initial=0)
        # The mean of fractions of the largest: the sum of large values would overflow.
        mean = peak * np.mean(sizes / peak, dtype=np.float64) if peak else 0.0
        return framed(SIGN, values, np.array([mean], values.dtype), np.packbits(values >= 0))

    decode = staticmethod(decode)


@dataclass(frozen=True)
class TopK:
    """The k = max(1, ⌈fraction · P⌉) entries of largest |x|; the others count as 0.

    Of equal entries those of lower index go first, so that the blob is determined. Positions travel
    as the gaps between them, in the narrowest integers that hold the widest gap: with 1 % of the
    entries that is two bytes each, however long the vector. Differs from Lin et al. 2018: k is
    exact instead of estimated from a sample, over the whole vector instead of layer by layer, and
    momentum is left to the server.
    """

    fraction: float
    """Of the entries, in (0, 1]."""
    values: Codec = field(default_factory=Half)
    """How the entries themselves travel: any codec but another TopK."""

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"fraction must be above 0 and at most 1, not {self.fraction}")
        if isinstance(self.values, TopK):
            raise ValueError("the values of a TopK cannot be another TopK")

    @property
    def name(self) -> str:
        """As `make_codec` reads it."""
        return f"topk:{self.fraction!r}+{self.values.name}"

    def count(self, size: int) -> int:
        """k, of a vector of `size` entries."""
        # As the decimal that was written: 0.07 · 100 is above 7 in floating point.
        return min(size, max(1, math.ceil(Fraction(repr(float(self.fraction))) * size)))

    def encode(self, vector: Vector) -> bytes:
        """How many and how wide, the gaps `[k]`, then a blob of the entries `[k]`."""
        values = finite(vector)
        chosen = _largest(values, self.count(len(values)))
        gaps = np.diff(chosen, prepend=-1) - 1
        width = next(i for i, g in enumerate(GAPS) if gaps.max(initial=0) <= np.iinfo(g).max)
        top, inner = TOP_HEADER.pack(len(chosen), width), self.values.encode(values[chosen])
        return framed(TOPK, values, top, gaps.astype(GAPS[width]), inner)

    decode = staticmethod(decode)


SIMPLE: dict[str, Codec] = {c.name: c for c in (Identity(), Half(), Int8(), Sign())}


def make_codec(text: str) -> Codec:
    """A codec from its name: none, fp16, int8, sign, topk:0.01, topk:0.01+int8, …

    Without a "+", the entries of topk travel as fp16.

    Raises:
        ValueError: no such codec; the message says which there are.
    """
    kind, _, rest = text.partition(":")
    fraction, plus, values = rest.partition("+")
    try:
        if kind == "topk":
            return TopK(float(fraction), SIMPLE[values] if plus else Half())
        return SIMPLE[text]
    except (KeyError, ValueError):
        names = ", ".join(SIMPLE)
        raise ValueError(
            f"no codec {text!r}: there are {names}, topk:F and topk:F+V, "
            f"where F is above 0 and at most 1, and V one of {names}"
        ) from None


UNCHANGED = "; nothing sent, the residual is unchanged"


class ErrorFeedback:
    """A codec with a memory of what it left out (Seide et al. 2014; Stich et al. 2018, alg. 1).

    v = vector + residual; blob = encode(v); residual = v − decode(blob). Therefore
    Σ decode(sent) + residual = Σ vectors, up to rounding. One for each sender, and for each range
    of parameters that it sends. Differs from Stich et al., who remember learning rate · gradient:
    here the optimiser is the receiver's; with a constant learning rate and SGD it is the same.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.residual: Vector | None = None
        """What the receiver does not know yet, `[P]`; None before the first vector."""

    def encode(self, vector: Vector) -> bytes:
        """`vector` `[P]`, and what was left out before, as a blob for `decode`.

        Raises:
            ValueError: the vector is not flat float32 or float64, of another length or dtype than
                those before, or not finite. Nothing is sent then, and the residual is as before.
        """
        said = finite(vector, UNCHANGED)
        if self.residual is not None:
            alike(said, self.residual, "a vector", "those before")
            # Adding zeros would turn -0.0 into 0.0, and a lossless codec leaves nothing but zeros.
            if self.residual.any():
                said = finite(said + self.residual, UNCHANGED)
        blob = self.codec.encode(said)
        self.residual = finite(said - decode(blob), UNCHANGED)
        return blob

    def state_dict(self) -> dict[str, Any]:
        """Everything that later blobs depend on: the codec's name and a copy of the residual."""
        residual = None if self.residual is None else self.residual.copy()
        return {"codec": self.codec.name, "residual": residual}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken. If it does not fit, ValueError and no change."""
        if set(state) != {"codec", "residual"}:
            raise ValueError(f"no state of an ErrorFeedback: it has {sorted(state)}")
        if state["codec"] != self.codec.name:
            raise ValueError(f"the state is of codec {state['codec']}, not {self.codec.name}")
        residual = state["residual"]
        self.residual = None if residual is None else finite(residual).copy()


class DeltaEncoder:
    """Weights for one receiver that has older ones: what changed, by a codec.

    The encoder keeps a *shadow* of what its `DeltaDecoder` has and sends the difference to that.
    What the codec leaves out stays in the difference, so errors do not add up: the shadow is the
    error feedback. Both sides do the same arithmetic, hence the shadow is the receiver's weights
    bit for bit. With `Identity` every update is whole and exact: in floating point, w' + (w − w')
    need not be w.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.shadow: Vector | None = None
        """The receiver's weights `[P]`, read-only; None when the next update will be whole."""
        self.version = -1
        self._number = 0

    def reset(self) -> None:
        """The next update is whole: for a receiver that is new or began anew."""
        self.shadow = None

    def encode(self, weights: Vector, version: int) -> bytes:
        """`weights` `[P]` of `version` as an update for `DeltaDecoder.apply`.

        Raises:
            ValueError: weights that are not flat float32 or float64, of another length or dtype
                than before, or not finite; or a version below the last. Nothing changes then.
        """
        weights = finite(weights)
        whole = self.shadow is None or isinstance(self.codec, Identity)
        if self.shadow is None:
            before, number = -1, 0
        else:
            alike(weights, self.shadow, "weights", "those before")
            before, number = self.version, 0 if whole else self._number + 1
        if version < max(0, before):
            raise ValueError(f"version {version} comes after version {before}")
        if whole or self.shadow is None:
            blob, shadow = Identity().encode(weights), weights.copy()
        else:
            blob = self.codec.encode(weights - self.shadow)
            shadow = finite(self.shadow + decode(blob))
        self.shadow, self.version, self._number = _frozen(shadow), version, number
        return DELTA_HEADER.pack(DELTA_MARK, whole, number, before, version) + blob

    def state_dict(self) -> dict[str, Any]:
        """What later updates depend on: the codec's name, a copy of the shadow, and where it is."""
        return {"codec": self.codec.name, **_place(self.shadow, self.version, self._number)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken. If it does not fit, ValueError and no change.

        Only with the receiver of that moment: to one that went on since, `reset` before sending.
        """
        place = _placed({key: value for key, value in state.items() if key != "codec"})
        if state.get("codec") != self.codec.name:
            raise ValueError(f"the state is of codec {state.get('codec')}, not {self.codec.name}")
        self.shadow, self.version, self._number = place


class DeltaDecoder:
    """The receiver's side of a `DeltaEncoder`."""

    def __init__(self) -> None:
        self.weights: Vector | None = None
        """As they are now, `[P]`, read-only; None before the first update."""
        self.version = -1
        self._number = 0

    def apply(self, blob: Blob) -> Vector:
        """Brings the weights up to date and gives them: `[P]`, read-only, a new array each time.

        A whole update is taken whatever came before: a restored server begins anew with one.

        Raises:
            ValueError: a damaged blob, or a difference to other weights than these (one was lost,
                came twice or out of order). Nothing changes then.
        """
        known = isinstance(blob, bytes | bytearray | memoryview) and blob[:2] == DELTA_MARK
        if not known or len(blob) < DELTA_HEADER.size:
            raise ValueError("damaged update: it does not begin as an update does")
        _, whole, number, before, version = DELTA_HEADER.unpack_from(blob)
        values = decode(memoryview(blob)[DELTA_HEADER.size :])
        if not whole:
            if self.weights is None or (before, number) != (self.version, self._number + 1):
                raise ValueError(
                    f"the update is number {number}, from version {before} to {version}; "
                    f"these weights are at number {self._number}, version {self.version}: "
                    "reset the encoder"
                )
            alike(values, self.weights, "an update", "the weights")
            values = self.weights + values
        self.weights, self.version, self._number = _frozen(values), version, number
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """A copy of the weights, and which update they are of."""
        return _place(self.weights, self.version, self._number)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict()` was taken. If it does not fit, ValueError and no change."""
        self.weights, self.version, self._number = _placed(state)


def _place(values: Vector | None, version: int, number: int) -> dict[str, Any]:
    """Where one side of the delta updates is, as plain values and a copy."""
    copy = None if values is None else values.copy()
    return {"weights": copy, "version": version, "number": number}


def _placed(state: Mapping[str, Any]) -> tuple[Vector | None, int, int]:
    """What `_place` wrote down, or ValueError."""
    if set(state) != {"weights", "version", "number"}:
        raise ValueError(f"no state of delta updates: it has {sorted(state)}")
    values = state["weights"]
    copy = None if values is None else _frozen(finite(values).copy())
    return copy, int(state["version"]), int(state["number"])


def _frozen(values: Vector) -> Vector:
    """`values`, read-only from now on."""
    values.flags.writeable = False
    return values


def _largest(values: Vector, count: int) -> NDArray[np.int64]:
    """The positions, in order, of the `count` largest |values|; of equal ones the first."""
    if count == 0:
        return np.zeros(0, np.int64)
    sizes = np.abs(values)
    least = np.partition(sizes, len(sizes) - count)[len(sizes) - count]
    found = np.flatnonzero(sizes >= least)
    above = sizes[found] > least
    # All above the least go, and the first of those that equal it.
    return found[above | (np.cumsum(~above) <= count - above.sum())]
