"""Amdahl, Gustafson, and the time of a message, by hand."""

import numpy as np
import pytest

from rlbook.maths.scaling import (
    amdahl_speedup,
    fit_serial_fraction,
    gustafson_speedup,
    message_seconds,
)


def test_by_hand() -> None:
    assert amdahl_speedup(4, serial_fraction=0.25) == pytest.approx(1 / (0.25 + 0.75 / 4))
    assert gustafson_speedup(4, serial_fraction=0.25) == pytest.approx(0.25 + 0.75 * 4)
    assert message_seconds(3e6, latency_s=2e-3, bandwidth=1e9) == pytest.approx(2e-3 + 3e-3)


def test_limits() -> None:
    workers = np.array([1, 2, 1000, 10**9])
    np.testing.assert_allclose(amdahl_speedup(workers, serial_fraction=0.0), workers)
    np.testing.assert_allclose(gustafson_speedup(workers, serial_fraction=0.0), workers)
    np.testing.assert_array_equal(amdahl_speedup(workers, serial_fraction=1.0), 1.0)
    np.testing.assert_array_equal(gustafson_speedup(workers, serial_fraction=1.0), 1.0)
    capped = amdahl_speedup(workers, serial_fraction=0.1)
    assert (np.diff(capped) > 0).all() and capped[-1] == pytest.approx(1 / 0.1)


def test_the_two_laws_are_one_seen_from_two_ends() -> None:
    """Serial share s' with k workers ↔ s = s' / (s' + (1 − s') k) with one: the same speed-up."""
    workers, share = np.arange(1.0, 9.0), 0.2
    alone = share / (share + (1 - share) * workers)
    both = [amdahl_speedup(k, serial_fraction=s) for k, s in zip(workers, alone, strict=True)]
    np.testing.assert_allclose(both, gustafson_speedup(workers, serial_fraction=share))


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_the_fit_finds_the_share(share: float) -> None:
    workers = np.array([1, 2, 3, 8])
    seconds = 7.0 / amdahl_speedup(workers, serial_fraction=share)
    assert fit_serial_fraction(workers, seconds) == pytest.approx(share, abs=1e-9)
    noisy = seconds * np.array([1.01, 0.99, 1.01, 0.99])
    assert fit_serial_fraction(workers, noisy) == pytest.approx(share, abs=0.03)


def test_worse_than_serial_is_serial() -> None:
    assert fit_serial_fraction([1, 2], [1.0, 1.5]) == 1.0
    assert fit_serial_fraction([1, 2], [1.0, 0.4]) == 0.0


def test_bad_values_are_refused() -> None:
    for law in (amdahl_speedup, gustafson_speedup):
        with pytest.raises(ValueError, match="workers"):
            law(0, serial_fraction=0.5)
        for share in (-0.1, 1.1):
            with pytest.raises(ValueError, match="serial_fraction"):
                law(2, serial_fraction=share)
    for workers, seconds in (([1, 1], [1, 1]), ([1, 2], [1, 1, 1]), ([1, 2], [1, 0])):
        with pytest.raises(ValueError, match="workers|seconds"):
            fit_serial_fraction(workers, seconds)
    for nbytes, latency, bandwidth in ((-1, 0, 1), (1, -1, 1), (1, 0, 0)):
        with pytest.raises(ValueError, match="bandwidth"):
            message_seconds(nbytes, latency_s=latency, bandwidth=bandwidth)
