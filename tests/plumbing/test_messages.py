"""What needs a real Ray: the cost of messages on every road, and the two loops."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from rlbook.plumbing import messages, rounds
from rlbook.plumbing.ranks import Ranks
from rlbook.plumbing.runtime import RayRuntime
from tests.plumbing.test_rounds import alone, run

ROADS = ["shared memory", "pipe", "gloo", "Ray call", "Ray reference"]


@pytest.fixture(scope="module")
def ray() -> Iterator[RayRuntime]:
    with RayRuntime(num_cpus=2) as runtime:
        yield runtime


@pytest.mark.slow
def test_all_roads_at_all_sizes(ray: RayRuntime) -> None:
    sizes = (8, 5_000, 4_000_000)
    with Ranks(2) as ranks:
        trips = messages.measure_messages(ray, ranks, sizes, seconds=0.02)
    assert sorted({trip.road for trip in trips}) == sorted(ROADS)
    assert {trip.nbytes for trip in trips} == set(sizes) and len(trips) == 5 * len(sizes)
    assert all(0 < trip.seconds < 10 for trip in trips)


@pytest.mark.slow
def test_the_two_loops_are_the_same_on_ray(ray: RayRuntime) -> None:
    sync = run(ray, rounds.synchronous, 2)
    np.testing.assert_allclose(sync[-1].parameters, alone(), atol=1e-12, rtol=0)
    updates = run(ray, rounds.asynchronous, 2)
    assert updates[0].ages == (0,) and {w for u in updates for w in u.workers} <= {0, 1}
    assert all(later.at_s > earlier.at_s for earlier, later in itertools.pairwise(updates))


def test_touch_reads_every_page() -> None:
    array = np.zeros(10 * messages.PAGE, np.uint8)
    array[:: messages.PAGE] = 3
    assert messages.touch(array) == 30
    assert messages.Receiver().take(array[: messages.PAGE + 1]) == 6


def test_small_trips_are_repeated_often_and_large_ones_a_few_times() -> None:
    counts = [messages._repeats(nbytes, 0.1) for nbytes in messages.SIZES]
    assert counts == sorted(counts, reverse=True) and counts[0] == 500 and counts[-1] >= 5
