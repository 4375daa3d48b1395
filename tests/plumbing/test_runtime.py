"""RayRuntime: the four verbs, a silent Ray, and no process left however the `with` is left."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from rlbook.plumbing.runtime import RayRuntime


def counting_class() -> type:
    """A class made here travels to the workers by value: they cannot import a test."""

    class Counter:
        """Counts its calls, so that an order can be seen."""

        def __init__(self, start: int) -> None:
            self.count = start

        def add(self, amount: int) -> int:
            self.count += amount
            return self.count

        def total(self, array: np.ndarray) -> tuple[int, float]:
            return os.getpid(), float(array.sum())

        def nap(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

        def fail(self) -> None:
            raise KeyError("on purpose")

    return Counter


def ray_processes(session: int) -> list[str]:
    """Processes of Ray in the process group or session `session`."""
    listing = subprocess.run(
        ["ps", "-eo", "sid,stat,args"], capture_output=True, text=True, check=True
    )
    words = ("raylet", "gcs_server", "ray::", "default_worker.py", "/ray/")
    lines = [line.split(maxsplit=2) for line in listing.stdout.splitlines()[1:]]
    ours = [args for sid, stat, args in lines if int(sid) == session and stat[0] != "Z"]
    return [args for args in ours if any(word in args for word in words)]


def test_verbs():
    with RayRuntime(num_cpus=2) as runtime:
        remote = runtime.remote(counting_class())
        counters = [remote.remote(start) for start in (0, 100)]
        calls = [counters[0].add.remote(1) for _ in range(5)]
        assert runtime.get(calls) == [1, 2, 3, 4, 5]  # first in, first out
        assert runtime.get(counters[1].add.remote(1)) == 101
        shared = runtime.put(np.arange(10.0))
        seen = runtime.get([counter.total.remote(shared) for counter in counters])
        assert [total for _, total in seen] == [45.0, 45.0]
        assert len({os.getpid(), *[pid for pid, _ in seen]}) == 3  # processes of their own
        slow, fast = counters[0].nap.remote(5.0), counters[1].nap.remote(0.0)
        ready, pending = runtime.wait([slow, fast])
        assert ready == [fast] and pending == [slow]
        assert runtime.wait([slow], timeout=0.01) == ([], [slow])
        with pytest.raises(KeyError, match="on purpose"):
            runtime.get(counters[1].fail.remote())
        free = runtime.remote(lambda x: abs(x), num_cpus=0)
        assert runtime.get(free.remote(-3)) == 3
        with pytest.raises(RuntimeError, match="already runs"), RayRuntime(num_cpus=1):
            pass
    runtime.shutdown()  # once more does nothing
    noted = {(span.who, span.what) for span in runtime.timeline()}  # but of who is busy
    assert {("Counter 1", "fail"), ("driver", "get")} <= noted


def test_bad_sizes_are_refused():
    for arguments in ({"num_cpus": 0}, {"object_store_mb": 1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            RayRuntime(**arguments)


PROGRAM = """
import sys, time
from rlbook.plumbing.runtime import RayRuntime

class Worker:
    def work(self):
        print("a worker's chatter")
        return 7

how = sys.argv[1]
runtime = RayRuntime(num_cpus=1)
if how == "forgotten":
    runtime.__enter__()
    worker = runtime.remote(Worker).remote()
    print(runtime.get(worker.work.remote()), flush=True)
else:
    with runtime:
        worker = runtime.remote(Worker).remote()
        print(runtime.get(worker.work.remote()), flush=True)
        if how == "exception":
            raise SystemExit("left by an exception")
        time.sleep(100)
"""


KILLED = """
import os, signal, time
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime

class Worker:
    def __init__(self, *needs):
        pass
    def nap(self, *needs):
        time.sleep(1000)
    def pid(self, *needs):
        return os.getpid()
    def fail(self):
        raise KeyError("nobody asks")

from ray._private import worker as ray_worker
before = ray_worker.print_to_stdstream, ray_worker._unhandled_error_handler
with RayRuntime(num_cpus=1) as runtime:
    remote = runtime.remote(Worker, num_cpus=0)
    one, other, third = [remote.remote() for _ in range(3)]
    pid = runtime.get(one.pid.remote())
    running, queued = one.nap.remote(), one.pid.remote()
    depends = [other.pid.remote(running), remote.remote(1).pid.remote()]
    third.pid.remote(other.pid.remote(running))  # and their references are dropped
    os.kill(pid, signal.SIGKILL)
    for reference in (running, queued, *depends, one.pid.remote()):
        try:
            runtime.get(reference)
        except ActorDiedError:
            pass
    assert runtime.get([other.pid.remote(), third.pid.remote()]).count(pid) == 0
    del depends, reference, running, queued
    time.sleep(1.5)  # what Ray prints comes late
    ray_worker.print_to_stdstream({"lines": ["memory"], "pid": "raylet", "is_err": False}, True)
    other.fail.remote()
    runtime.get(other.pid.remote())
assert before == (ray_worker.print_to_stdstream, ray_worker._unhandled_error_handler)
"""


def test_a_killed_actor_is_no_news_on_the_screen():
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # other news is let through
    assert line.endswith("memory")
    assert done.stderr.count("Unhandled error") == 1 and "nobody asks" in done.stderr
    assert "died" not in done.stderr


WAYS = ("exception", "forgotten", "interrupt", "kill")


@pytest.fixture
def child(how: str, tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A program of its own, in a session of its own, which is left in the way that ``how`` says."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(program), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS)
def test_nothing_is_left(how: str, child: subprocess.Popen):
    assert child.stdout is not None
    first = child.stdout.readline()
    assert first == "7\n", child.communicate(timeout=60)[1]
    signals = {"interrupt": signal.SIGINT, "kill": signal.SIGKILL}
    if how in signals:
        assert ray_processes(child.pid)  # the count sees what is to be gone
        child.send_signal(signals[how])
    out, err = child.communicate(timeout=60)
    assert out == ""
    if how in ("forgotten", "kill"):
        assert err == ""
    elif how == "exception":
        assert err == "left by an exception\n"
    deadline = time.monotonic() + 30
    while (left := ray_processes(child.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_a_ray_that_cannot_start_leaves_nothing():
    """Ray refuses so much memory when its first processes run already."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(ValueError, match="memory"), RayRuntime(num_cpus=1, object_store_mb=10**9):
        pass
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    with RayRuntime(num_cpus=1) as runtime:  # and the next one starts
        assert runtime.get(runtime.remote(counting_class()).remote(1).add.remote(1)) == 2


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_a_cluster_that_is_not_there_is_one_sentence(closed_port: int):
    with pytest.raises(ConnectionError, match="ray_address: no Ray cluster answers") as found:
        RayRuntime(address=f"127.0.0.1:{closed_port}").__enter__()
    assert "\n" not in str(found.value)
    with pytest.raises(ValueError, match="run the driver on a host of the cluster"):
        RayRuntime(address="ray://127.0.0.1:10001").__enter__()
