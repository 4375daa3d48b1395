"""What more workers can buy: the laws of Amdahl and Gustafson, and the time of a message."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def amdahl_speedup(workers: ArrayLike, *, serial_fraction: float) -> Floats:
    """S(k) = 1 / (s + (1 - s)/k): the same work, done by k workers (Amdahl, 1967).

    Args:
        workers: k >= 1, `[...]`.
        serial_fraction: s in [0, 1], the share of one worker's time that cannot be shared out.

    Returns:
        float64 `[...]`.

    Raises:
        ValueError: an argument out of its range.
    """
    counts = _counts(workers)
    return 1.0 / (_share(serial_fraction) + (1.0 - serial_fraction) / counts)


def gustafson_speedup(workers: ArrayLike, *, serial_fraction: float) -> Floats:
    """S(k) = s + (1 - s) k: k times the shareable work, in the same time (Gustafson, 1988).

    `s` here is the serial share of the time *with* the k workers, which stays what it was with one
    when the work grows with k. Arguments and errors as in `amdahl_speedup`.
    """
    counts = _counts(workers)
    return _share(serial_fraction) + (1.0 - serial_fraction) * counts


def fit_serial_fraction(workers: ArrayLike, seconds: ArrayLike) -> float:
    """The s that fits measured times of the same work best: least squares of t(k) = a + b/k.

    Args:
        workers: k >= 1, `[n]`, at least two different ones.
        seconds: t(k) > 0, `[n]`.

    Returns:
        a / (a + b), cut to [0, 1].

    Raises:
        ValueError: shapes differ, too few points, or an argument out of its range.
    """
    counts, times = _counts(workers), np.asarray(seconds, dtype=np.float64)
    if counts.shape != times.shape or counts.ndim != 1 or len(np.unique(counts)) < 2:
        raise ValueError(
            f"workers and seconds must be [n] alike, with two different workers at least, not"
            f" {counts.shape} and {times.shape}"
        )
    if not (times > 0).all():
        raise ValueError("seconds must be above 0")
    rows = np.stack([np.ones_like(counts), 1.0 / counts], axis=1)
    (fixed, shared), *_ = np.linalg.lstsq(rows, times, rcond=None)
    return float(np.clip(fixed / (fixed + shared), 0.0, 1.0))


def message_seconds(nbytes: ArrayLike, *, latency_s: float, bandwidth: float) -> Floats:
    """t(n) = l + n / b: a message of n bytes at latency l and b bytes a second; `[...]`.

    Raises:
        ValueError: a negative size or latency, or a bandwidth that is not positive.
    """
    sizes = np.asarray(nbytes, dtype=np.float64)
    if (sizes < 0).any() or latency_s < 0 or not bandwidth > 0:
        raise ValueError("nbytes and latency_s must be 0 or more, bandwidth above 0")
    return latency_s + sizes / bandwidth


def _counts(workers: ArrayLike) -> Floats:
    counts = np.asarray(workers, dtype=np.float64)
    if not (counts >= 1).all():
        raise ValueError(f"workers must be 1 or more, not {counts}")
    return counts


def _share(serial_fraction: float) -> float:
    if not 0.0 <= serial_fraction <= 1.0:
        raise ValueError(f"serial_fraction must be between 0 and 1, not {serial_fraction}")
    return serial_fraction
