"""A crew: answers, deaths, errors; memory that processes share; nothing hangs, stays or prints."""

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from rlbook.plumbing.crew import Crew, CrewError
from rlbook.plumbing.shared import SharedArrays

ROOT = Path(__file__).parents[2]


class Counter:
    """Counts for itself, and where it is shared."""

    def __init__(self, index: int, born: int, memory: SharedArrays | None = None) -> None:
        print("a worker's chatter", file=sys.stderr)
        self.index, self.born, self.memory, self.count = index, born, memory, 0

    def who(self) -> tuple[int, int, int, str]:
        return self.index, self.born, os.getpid(), os.environ["OMP_NUM_THREADS"]

    def add(self, amount: int) -> int:
        self.count += amount
        return self.count

    def add_shared(self, times: int, locked: bool) -> None:
        assert self.memory is not None
        counts = self.memory["counts"]
        for _ in range(times):
            if locked:
                with self.memory.lock():
                    seen = counts.copy()
                    seen += 1
                    np.copyto(counts, seen)
            else:
                seen = counts.copy()
                seen += 1
                np.copyto(counts, seen)

    def die_locked(self) -> None:
        assert self.memory is not None
        with self.memory.lock():
            os.kill(os.getpid(), signal.SIGKILL)

    def fail(self) -> None:
        raise KeyError("on purpose")

    def die(self) -> None:
        print("its last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Unborn:
    """Dies in its constructor."""

    def __init__(self) -> None:
        print("its last words", file=sys.stderr, flush=True)
        os._exit(3)


class Refusing:
    """Raises in its constructor."""

    def __init__(self) -> None:
        raise ValueError("not like this")


def two(memory: SharedArrays | None = None) -> Crew:
    inherit = [] if memory is None else [memory.descriptor]
    return Crew(Counter, lambda index, born: (index, born, memory), 2, inherit)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(scope="module")
def memory() -> SharedArrays:
    return SharedArrays({"counts": ((1000,), np.int64), "other": ((3, 2), np.float32)})


@pytest.fixture(scope="module")
def crew(memory: SharedArrays) -> Iterator[Crew]:
    with two(memory) as made:
        yield made


def test_each_answers_in_order_from_a_process_of_its_own(crew: Crew) -> None:
    found = crew.each("who")
    assert [answer[0] for answer in found] == [0, 1]
    assert [answer[2] for answer in found] == crew.pids
    assert len({os.getpid(), *crew.pids}) == 3
    assert {answer[3] for answer in found} == {"1"}, "one thread each"
    for amount in (1, 10, 100):
        crew.ask(0, "add", amount)
    assert (crew.in_flight(), crew.in_flight(0), crew.in_flight(1)) == (3, 3, 0)
    assert [crew.first() for _ in range(3)] == [(0, 1), (0, 11), (0, 111)]
    with pytest.raises(ValueError, match="nothing is in flight"):
        crew.first()


def test_state_is_saved_around_what_is_in_flight_and_nothing_is_lost(crew: Crew) -> None:
    crew.load_state_dict({"members": [{"count": 5}, {"count": 50}]})
    crew.ask(1, "add", 1)
    assert crew.state_dict() == {"members": [{"count": 5}, {"count": 51}]}
    assert crew.in_flight(1) == 1, "its answer waits to be taken"
    assert crew.rest() == [(1, 51)] and crew.in_flight() == 0


def test_everybody_is_on_the_timeline(crew: Crew) -> None:
    spans = list(crew.timeline())
    assert {span.who for span in spans} == {"Counter 0", "Counter 1", "driver"}
    assert "add" in {span.what for span in spans}
    assert all(0 <= span.start <= span.end <= crew.now for span in spans)


def test_what_is_shared_is_one_memory_for_all(crew: Crew, memory: SharedArrays) -> None:
    memory["counts"][:] = 0
    crew.each("add_shared", [(1, True)] * 2)
    assert (memory["counts"] == 2).all()


def test_with_the_lock_nothing_is_lost_and_without_it_something_is(
    crew: Crew, memory: SharedArrays
) -> None:
    for locked in (True, False):
        memory["counts"][:] = 0
        crew.each("add_shared", [(20_000, locked)] * 2)
        assert (memory["counts"] == 40_000).all() == locked
        assert (memory["counts"] <= 40_000).all()


def test_shared_arrays_start_at_zero_apart_from_each_other(memory: SharedArrays) -> None:
    fresh = SharedArrays({"a": ((3,), np.int8), "b": ((2, 2), np.float64)})
    assert not fresh["a"].any() and not fresh["b"].any()
    fresh["a"][:] = 7
    assert not fresh["b"].any()
    same = pickle.loads(pickle.dumps(fresh))
    same["b"][0, 1] = 2.5
    assert fresh["b"][0, 1] == 2.5
    kept = fresh.state_dict()
    fresh["b"][:] = 0
    assert kept["b"][0, 1] == 2.5
    fresh.load_state_dict(kept)
    assert fresh["b"][0, 1] == 2.5
    with pytest.raises(ValueError, match="a: has shape"):
        fresh.load_state_dict({"a": np.zeros(4), "b": np.zeros((2, 2))})


def test_a_dead_process_is_replaced_and_only_what_it_had_in_hand_is_lost(
    memory: SharedArrays,
) -> None:
    memory["counts"][:] = 3
    before = children()
    with two(memory) as crew:
        pids = crew.pids
        crew.ask(0, "add", 7)
        crew.ask(1, "die_locked")  # the lock of a dead process is free
        crew.ask(1, "add", 1)
        answers = [crew.first(), crew.first()]
        assert None in answers and (0, 7) in answers
        assert crew.in_flight(1) == 1, "its constructor"
        assert crew.rest() == [] and crew.born == [0, 1]
        assert [answer[:2] for answer in crew.each("who")] == [(0, 0), (1, 1)]
        assert crew.pids[0] == pids[0] and crew.pids[1] != pids[1]
        assert (memory["counts"] == 3).all()
        crew.each("add_shared", [(1, True)] * 2)
        assert (memory["counts"] == 5).all()
        assert "Counter 2" in {span.who for span in crew.timeline()}
    assert children() == before


def test_errors_are_raised_with_their_traceback_and_end_all() -> None:
    before = children()
    with pytest.raises(CrewError, match="Counter 0 failed in fail(.|\n)*KeyError: 'on purpose'"):
        with two() as crew:
            crew.ask(0, "fail")
            crew.first()
    with pytest.raises(CrewError, match="__init__(.|\n)*not like this"):
        with Crew(Refusing, lambda index, born: (), 2):
            pass
    with pytest.raises(CrewError, match=r"died \(exit code 3\)\nits last words"):
        with Crew(Unborn, lambda index, born: (), 1):
            pass
    assert children() == before


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Crew(Counter, lambda index, born: (), 0)
    local = type("Local", (), {"__module__": "__main__"})
    with pytest.raises(ValueError, match="Local: must be importable"):
        Crew(local, lambda index, born: (), 1)


PROGRAM = """
from tests.plumbing.test_crew import SharedArrays, two
memory = SharedArrays({"counts": ((1000,), "int64")})
with two(memory) as crew:
    print(*crew.pids, flush=True)
    crew.ask(0, "add_shared", 10**6, False)
    crew.first()
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nobody_outlives_the_driver_nobody_prints_and_no_memory_stays(how: signal.Signals) -> None:
    def segments() -> set[str]:
        folder = Path("/dev/shm")
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    before = segments()
    driver = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
    assert len(workers) == 2
    driver.send_signal(how)
    _, err = driver.communicate(timeout=30)
    assert "chatter" not in err and "resource_tracker" not in err and "leaked" not in err
    assert psutil.wait_procs(workers, timeout=15)[1] == []
    assert not {name for name in segments() - before if "rlbook" in name}


def test_a_lock_is_between_processes_not_threads() -> None:
    """Said in its docstring: two threads of one process are both let in."""
    memory = SharedArrays({"x": ((1,), np.int64)})
    within = threading.Event()

    def other() -> None:
        with memory.lock():
            within.set()

    with memory.lock():
        thread = threading.Thread(target=other)
        thread.start()
        assert within.wait(5.0)
        thread.join()
