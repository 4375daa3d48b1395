"""A process of a real Ray is killed while calls go on; everybody else lives."""

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlbook.plumbing.faults import processes, sigkill
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime


@pytest.fixture(scope="module")
def runtime() -> Iterator[RayRuntime]:
    with RayRuntime(num_cpus=2) as runtime:
        yield runtime


def named(name: str) -> type:
    """An actor class of that name; it travels by value."""

    class Actor:
        def __init__(self, seconds: float = 0.0) -> None:
            time.sleep(seconds)

        def pid(self) -> int:
            return os.getpid()

        def nap(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    Actor.__name__ = Actor.__qualname__ = name
    return Actor


def made(runtime: RayRuntime, name: str, count: int) -> tuple[list[Any], list[int]]:
    """Actors and their processes, by process number."""
    remote = runtime.remote(named(name), num_cpus=0)
    actors = [remote.remote() for _ in range(count)]
    pids = runtime.get([actor.pid.remote() for actor in actors])
    both = sorted(zip(pids, actors, strict=True), key=lambda pair: pair[0])
    return [actor for _, actor in both], [pid for pid, _ in both]


@pytest.mark.parametrize("busy", [False, True])
def test_one_of_its_class_dies_and_no_other(runtime: RayRuntime, busy: bool) -> None:
    others, _ = made(runtime, "Work_er_too", 1)
    more, _ = made(runtime, "Work", 1)
    actors, pids = made(runtime, "Work_er", 3)
    until = time.monotonic() + 30  # those of an earlier test may still be on their way out
    while len(processes("Work_er")) > 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert [process.pid for process in processes("Work_er")] == pids
    calls = [actor.nap.remote(1.0 if busy else 0.0) for actor in actors]
    with sigkill("Work_er", 0.2, which=1) as fault:
        assert fault.killed == []
        begun = time.perf_counter()
        deadline = begun + 30
        while not fault.killed and time.perf_counter() < deadline:
            time.sleep(0.01)
    ((pid, seconds),) = fault.killed
    assert pid == pids[1] and seconds >= 0.2
    if busy:
        with pytest.raises(ActorDiedError):
            runtime.get(calls[1])
    with pytest.raises(ActorDiedError):
        runtime.get(actors[1].pid.remote())
    assert runtime.get([calls[0], calls[2]]) == [1.0 if busy else 0.0] * 2
    assert runtime.get([actors[0].pid.remote(), actors[2].pid.remote()]) == [pids[0], pids[2]]
    runtime.get([others[0].pid.remote(), more[0].pid.remote()])


def test_it_looks_until_there_is_one_whose_constructor_has_ended(runtime: RayRuntime) -> None:
    with sigkill("Late", 0.0) as fault:
        begun = time.perf_counter()
        actor = runtime.remote(named("Late"), num_cpus=0).remote(1.0)
        with pytest.raises(ActorDiedError):
            while True:  # the constructor's end is what lets the first call through
                runtime.get(actor.pid.remote())
    assert len(fault.killed) == 1 and time.perf_counter() - begun >= 1.0


def test_nothing_to_kill_is_an_error_and_hides_none(runtime: RayRuntime) -> None:
    before = threading.active_count()
    early, _ = made(runtime, "Early", 1)
    with pytest.raises(RuntimeError, match="before the 100.0 s"):
        with sigkill("Early", 100.0):
            time.sleep(0.5)
    assert runtime.get(early[0].nap.remote(0.0)) == 0.0
    made(runtime, "Single", 1)
    with pytest.raises(RuntimeError, match="more than 1 .*Single.* which=1"):
        with sigkill("Single", 0.0, which=1):
            time.sleep(0.5)
    with pytest.raises(KeyError):
        with sigkill("Nobody", 0.0):
            raise KeyError
    assert threading.active_count() == before


def test_bad_values_are_refused() -> None:
    for wrong, name in (
        (("", 1.0), "name"),
        (("ray::Worker", 1.0), "name"),
        (("Worker", -1.0), "after_s"),
        (("Worker", float("nan")), "after_s"),
        (("Worker", float("inf")), "after_s"),
    ):
        with pytest.raises(ValueError, match=name):
            sigkill(*wrong)
    with pytest.raises(ValueError, match="which"):
        sigkill("Worker", 1.0, which=-1)
