"""What lies in a codec's blob, and how it is opened (the codecs themselves: `codecs.py`).

    header, 8 bytes: mark "rc" | kind u8 | dtype u8 | P u32     (all numbers little-endian)
      none   values [P]
      fp16   half-precision values [P]
      int8   scales [⌈P / 256⌉] | steps int8 [P]
      sign   mean [1] | signs, 8 to a byte [⌈P / 8⌉]
      topk   k u32 | width u8 | gaps between positions [k] | a blob of the k values

Nothing is unpickled: a blob can only be numbers. What it says is checked against its length, but it
carries no checksum; the transport beneath has one.
"""

import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Blob: TypeAlias = bytes | bytearray | memoryview
Vector: TypeAlias = NDArray[np.floating[Any]]
"""Flat float32 or float64, `[P]`."""

BLOCK = 256
"""Neighbours that share a scale in int8."""

FLOATS = (np.dtype("<f4"), np.dtype("<f8"))
GAPS = tuple(np.dtype(kind) for kind in ("<u1", "<u2", "<u4"))
MARK = b"rc"
NONE, HALF, INT8, SIGN, TOPK = range(5)
HEADER = struct.Struct("<2sBBI")
"""Mark, kind, index into `FLOATS`, P."""
TOP_HEADER = struct.Struct("<IB")
"""k, index into `GAPS`."""


def decode(blob: Blob) -> Vector:
    """Opens a blob of any codec: `[P]`, a new array of the dtype that was encoded.

    Raises:
        ValueError: the blob is damaged, or not one of ours.
    """
    if not isinstance(blob, bytes | bytearray | memoryview):
        raise ValueError(f"a blob is bytes, not {type(blob).__name__}")
    if len(blob) < HEADER.size:
        raise ValueError(f"damaged blob: {len(blob)} bytes are too few for a header")
    mark, kind, dtype, size = HEADER.unpack_from(blob)
    if mark != MARK or kind >= len(READERS) or dtype >= len(FLOATS):
        raise ValueError("damaged blob: it does not begin as a codec's blob does")
    return READERS[kind](memoryview(blob)[HEADER.size :], FLOATS[dtype], size)


def framed(kind: int, vector: Vector, *parts: bytes | NDArray[Any]) -> bytes:
    """A header for `vector` `[P]`, and the bytes of the parts."""
    header = HEADER.pack(MARK, kind, FLOATS.index(vector.dtype), len(vector))
    pieces: list[Any] = [p if isinstance(p, bytes) else np.ascontiguousarray(p) for p in parts]
    return b"".join([header, *pieces])


def flat(vector: Vector) -> Vector:
    """`vector` if it is flat float32 or float64 `[P]`, or ValueError."""
    if not isinstance(vector, np.ndarray) or vector.ndim != 1 or vector.dtype not in FLOATS:
        shape = f"{vector.dtype} {list(vector.shape)}" if hasattr(vector, "dtype") else ""
        found = f"{type(vector).__name__} {shape}".strip()
        raise ValueError(f"a vector is a flat numpy array of float32 or float64, not {found}")
    return vector


def finite(vector: Vector, consequence: str = "") -> Vector:
    """`vector` if it is flat and without NaN and infinity, or ValueError."""
    values = flat(vector)
    if not (good := np.isfinite(values)).all():
        bad, count = int(np.argmin(good)), int((~good).sum())
        raise ValueError(
            f"{count} of {len(values)} values are not finite, the first at index {bad}: "
            f"{values[bad]}{consequence}"
        )
    return values


def alike(found: Vector, wanted: Vector, what: str, whose: str) -> None:
    """ValueError unless length and dtype are the same."""
    if (len(found), found.dtype) != (len(wanted), wanted.dtype):
        raise ValueError(
            f"{what} of {len(found)} {found.dtype} does not fit {whose}, "
            f"of {len(wanted)} {wanted.dtype}"
        )


def in_blocks(values: NDArray[Any]) -> NDArray[Any]:
    """`[P]` as `[⌈P / 256⌉, 256]`, the last row filled with zeros."""
    padded = np.zeros(-(-len(values) // BLOCK) * BLOCK, values.dtype)
    padded[: len(values)] = values
    return padded.reshape(-1, BLOCK)


def _arrays(body: memoryview, *parts: tuple[np.dtype[Any], int]) -> list[NDArray[Any]]:
    """The arrays of these dtypes and lengths that a body consists of, or ValueError."""
    wanted = sum(dtype.itemsize * count for dtype, count in parts)
    if len(body) != wanted:
        raise ValueError(f"damaged blob: {len(body)} bytes after its header instead of {wanted}")
    arrays, offset = [], 0
    for dtype, count in parts:
        arrays.append(np.frombuffer(body, dtype, count, offset))
        offset += dtype.itemsize * count
    return arrays


def _read_none(body: memoryview, dtype: np.dtype[Any], size: int) -> Vector:
    return _arrays(body, (dtype, size))[0].copy()


def _read_half(body: memoryview, dtype: np.dtype[Any], size: int) -> Vector:
    return _arrays(body, (np.dtype("<f2"), size))[0].astype(dtype)


def _read_int8(body: memoryview, dtype: np.dtype[Any], size: int) -> Vector:
    scales, steps = _arrays(body, (dtype, -(-size // BLOCK)), (np.dtype("<i1"), size))
    return (in_blocks(steps) * scales[:, None]).reshape(-1)[:size]


def _read_sign(body: memoryview, dtype: np.dtype[Any], size: int) -> Vector:
    mean, bits = _arrays(body, (dtype, 1), (np.dtype("<u1"), -(-size // 8)))
    return np.concatenate([-mean, mean])[np.unpackbits(bits, count=size)]


def _read_top(body: memoryview, dtype: np.dtype[Any], size: int) -> Vector:
    if len(body) < TOP_HEADER.size:
        raise ValueError("damaged blob: it ends before the number of its entries")
    count, width = TOP_HEADER.unpack_from(body)
    split = TOP_HEADER.size + count * GAPS[width].itemsize if width < len(GAPS) else 0
    if not TOP_HEADER.size <= split <= len(body) - HEADER.size or body[split + 2] == TOPK:
        raise ValueError("damaged blob: its positions and entries do not fit into it")
    (gaps,) = _arrays(body[TOP_HEADER.size : split], (GAPS[width], count))
    positions = np.cumsum(gaps, dtype=np.int64) + np.arange(count)
    entries = decode(body[split:])
    if len(entries) != count or entries.dtype != dtype or (count and positions[-1] >= size):
        raise ValueError("damaged blob: its positions and entries do not belong together")
    try:
        values = np.zeros(size, dtype)
    except MemoryError:
        raise ValueError(f"damaged blob: it speaks of {size} values") from None
    values[positions] = entries
    return values


READERS: tuple[Callable[[memoryview, np.dtype[Any], int], Vector], ...] = (
    _read_none,
    _read_half,
    _read_int8,
    _read_sign,
    _read_top,
)
"""How the body of each kind is read, in the order of the kinds."""
