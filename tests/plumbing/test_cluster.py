"""A cluster on paper: bad values are refused by name, measured ones are of this machine."""

import math
import time
from typing import Any

import pytest

from rlbook.plumbing import cluster as module
from rlbook.plumbing.cluster import Cluster, Crash, Node, median_seconds

BAD: list[tuple[Any, dict[str, Any], str]] = [
    (Node, {"cores": 0}, "cores"),
    (Node, {"speed": 0.0}, "speed"),
    (Node, {"speed": math.nan}, "speed"),
    (Crash, {"actor": "Worker"}, "Actor 0"),
    (Crash, {"actor": "Worker 0", "at_s": -1.0}, "at_s"),
    (Crash, {"actor": "Worker 0", "before_s": 0.0}, "before_s"),
    (Crash, {"actor": "Worker 0", "restart_s": -1.0}, "restart_s"),
    (Cluster, {"nodes": ()}, "nodes"),
    (Cluster, {"latency_s": -1e-6}, "latency_s"),
    (Cluster, {"latency_s": math.inf}, "latency_s"),
    (Cluster, {"bandwidth": 0.0}, "bandwidth"),
    (Cluster, {"driver_call_s": -1.0}, "driver_call_s"),
    (Cluster, {"jitter": -0.1}, "jitter"),
    (Cluster, {"delay_s": math.nan}, "delay_s"),
    (Cluster, {"costs": {"env_step": -1.0}}, "env_step"),
    (Cluster, {"stragglers": {"3": 2.0}}, "stragglers"),
    (Cluster, {"stragglers": {"Worker 3": 0.0}}, "Worker 3"),
]


@pytest.mark.parametrize(("kind", "fields", "name"), BAD, ids=lambda value: str(value))
def test_bad_values_are_refused_by_name(kind: Any, fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        kind(**fields)


def test_work_is_priced_in_units() -> None:
    cluster = Cluster(costs={"env_step": 0.25, "inference": 2.0})
    assert cluster.seconds(3) == 3.0
    assert cluster.seconds({"env_step": 8, "inference": 0.5}) == 8 * 0.25 + 0.5 * 2.0
    assert cluster.seconds({}) == 0.0
    with pytest.raises(ValueError, match="gradient.*env_step"):
        cluster.seconds({"gradient": 1})


class Clock:
    """Goes on by what the next work takes."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.seconds = 0.0, iter(seconds)

    def perf_counter(self) -> float:
        return self.now

    def work(self) -> None:
        self.now += next(self.seconds)


def test_costs_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(100, 1, 2, 90, 3, 1, 9, 9, 9)  # the first call warms up and is not counted
    monkeypatch.setattr(module, "time", clock)
    assert median_seconds(clock.work, 5.0) == 2  # of five: there must be that many
    patient = Clock(100, *[4] * 3, *[5] * 4, 6)
    monkeypatch.setattr(module, "time", patient)
    assert median_seconds(patient.work, 30.0) == 5  # of seven, until 30 s have passed
    with pytest.raises(ValueError, match="seconds"):
        median_seconds(lambda: None, 0.0)


def test_what_is_given_is_not_measured() -> None:
    work = {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.01)}
    cluster = Cluster.measure(
        work, cores=3, latency_s=1e-3, bandwidth=2e9, driver_call_s=0.0, seconds=0.02, jitter=0.0
    )
    assert cluster.nodes == (Node(cores=3),) and cluster.jitter == 0.0
    assert (cluster.latency_s, cluster.bandwidth, cluster.driver_call_s) == (1e-3, 2e9, 0.0)
    assert 0.001 <= cluster.costs["short"] < cluster.costs["long"]
    with pytest.raises(ValueError, match="bandwidth"):
        Cluster.measure({}, latency_s=0.0, bandwidth=0.0, driver_call_s=0.0)
