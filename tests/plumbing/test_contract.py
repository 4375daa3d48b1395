"""One contract, two runtimes: what a system may rely on holds on Ray and on the virtual clock."""

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rlbook.plumbing.cluster import Cluster, Crash, Node, usable_cores
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime, Runtime, make_runtime
from rlbook.plumbing.virtual import VirtualRuntime

NAP = {"nap": lambda seconds: seconds}
FRESH = 100.0
"""Long enough for anything but a call that is never to end."""


def counting_class() -> type:
    """A class made here travels to Ray's workers by value: they cannot import a test."""

    class Counter:
        """Counts, keeps an array, and gives back what it gets."""

        def __init__(self, start: int = 0, *, step: int = 1) -> None:
            if start < 0:
                raise ValueError(f"a start of {start}")
            self.count, self.step = start, step
            self.array = np.zeros(3)

        def add(self, amount: int = 1) -> int:
            self.count += amount * self.step
            return self.count

        def fill(self) -> np.ndarray:
            self.array += 1
            return self.array

        def write(self, array: np.ndarray) -> None:
            array += 1

        def same(self, *values: Any, **named: Any) -> Any:
            return values, named

        def kinds(self, *values: Any, **named: Any) -> list[str]:
            return [type(value).__name__ for value in (*values, *named.values())]

        def nap(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

        def several(self, count: int) -> Any:
            self.count += 1
            return tuple([n] * (n + self.count) for n in range(count))

        def fail(self) -> None:
            raise KeyError("on purpose")

        def pid(self) -> int:
            return os.getpid()

    return Counter


@pytest.fixture(scope="module")
def ray_runtime() -> Iterator[RayRuntime]:
    with RayRuntime(num_cpus=2) as runtime:
        yield runtime


@pytest.fixture(params=["ray", "virtual"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    if request.param == "ray":
        return request.getfixturevalue("ray_runtime")
    crashes = Crash("Doomed 0", at_s=1.0, restart_s=0.5), Crash("Mortal 0", at_s=1.0)
    return VirtualRuntime(1, Cluster(nodes=(Node(cores=2), Node(cores=4)), crashes=crashes))


@pytest.fixture
def counter(runtime: Runtime) -> Callable[..., Any]:
    """Makes actors."""
    return runtime.remote(counting_class(), costs=NAP, num_cpus=0).remote


def test_calls_of_an_actor_run_in_order(runtime: Runtime, counter: Callable[..., Any]) -> None:
    first, second = counter(), counter(100, step=-1)
    sums = [first.add.remote(amount) for amount in (1, 10, 100)]
    assert runtime.get(second.add.remote()) == 99
    assert runtime.get(sums) == [1, 11, 111]
    assert runtime.get([]) == []
    # A call that waits for its argument holds up those behind it.
    late = second.nap.remote(0.2)
    assert runtime.get([first.same.remote(late), first.add.remote()])[1] == 112


def test_references_arrive_as_values_at_the_top_only(
    runtime: Runtime, counter: Callable[..., Any]
) -> None:
    one, other = counter(), counter(5)
    put, made = runtime.put([1, 2]), one.add.remote()
    assert runtime.get(other.same.remote(put, made, name=put)) == (([1, 2], 1), {"name": [1, 2]})
    nested, top = runtime.get([other.same.remote([made]), other.kinds.remote([made], {}, x=made)])
    assert top == ["list", "dict", "int"]
    assert runtime.get(nested[0][0]) == [1]  # inside a value it is still a reference, to the same
    square = runtime.remote(lambda x: x * x, num_cpus=0)
    assert runtime.get(square.remote(square.remote(3))) == 3**2**2


def test_values_are_copied_when_they_are_handed_over(
    runtime: Runtime, counter: Callable[..., Any]
) -> None:
    one = counter()
    before, after = runtime.get([one.fill.remote(), one.fill.remote()])
    assert before.tolist() == [1, 1, 1] and after.tolist() == [2, 2, 2]
    mine = np.zeros(2)
    put, sent = runtime.put(mine), one.same.remote(mine)
    mine += 1
    assert runtime.get(put).tolist() == [0, 0]
    assert runtime.get(sent)[0][0].tolist() == [0, 0]
    with pytest.raises(ValueError, match="read-only"):
        runtime.get(put)[:] = 1
    with pytest.raises(ValueError, match="read-only"):
        runtime.get(one.write.remote(mine))
    tensors = {"plain": torch.arange(6.0).view(2, 3).t(), "bf16": torch.ones(2).bfloat16()}
    (copy,), _ = runtime.get(one.same.remote(tensors))
    copy["plain"] += 1
    assert torch.equal(copy["plain"], tensors["plain"] + 1)
    assert torch.equal(copy["bf16"], tensors["bf16"]) and copy["bf16"].dtype == torch.bfloat16


def test_exceptions_come_back_as_themselves(runtime: Runtime, counter: Callable[..., Any]) -> None:
    one = counter()
    failed = one.fail.remote()
    for reference in (failed, one.same.remote(failed), counter().same.remote(failed)):
        with pytest.raises(KeyError, match="on purpose"):
            runtime.get(reference)
    assert runtime.wait([failed]) == ([failed], [])
    assert runtime.get(one.add.remote()) == 1  # the actor lives
    with pytest.raises(AttributeError, match="nothing"):
        one.nothing.remote()
    with pytest.raises(TypeError):
        runtime.get(one.pid.remote(3))
    stillborn = counter(-1)
    for _ in range(2):
        with pytest.raises(ActorDiedError, match="a start of -1"):
            runtime.get(stillborn.add.remote())


def test_a_call_of_several_results(runtime: Runtime, counter: Callable[..., Any]) -> None:
    one, other = counter(), counter()
    alone = one.several.options(num_returns=1).remote(2)
    assert runtime.get(alone) == ([0] * 1, [1] * 2)  # one result: the value itself
    few, many = one.several.options(num_returns=2).remote(2)
    assert runtime.get(other.same.remote(many, few)) == (([1] * 3, [0] * 2), {})
    assert runtime.get([many, few]) == [[1] * 3, [0] * 2]  # the method ran once
    assert runtime.get(one.several.options(num_returns=3).remote(3))[2] == [2] * 5
    slow = other.nap.remote(0.5)
    late = one.same.options(num_returns=2).remote(slow, 1)
    assert runtime.wait([late[1], slow]) == ([slow], [late[1]])
    done, pending = runtime.wait(late, num_returns=2)
    assert done == late and list(pending) == []
    for count in (1, 3):
        wrong = one.several.options(num_returns=2).remote(count)
        assert len(wrong) == 2
        for reference in wrong:
            with pytest.raises(ValueError, match=f"{count}.*num_returns=2"):
                runtime.get(reference)
    for reference in one.add.options(num_returns=2).remote():
        with pytest.raises(TypeError):
            runtime.get(reference)
    for reference in one.fail.options(num_returns=2).remote():
        with pytest.raises(KeyError, match="on purpose"):
            runtime.get(other.same.remote(reference))
    for reference in counter(-1).same.options(num_returns=2).remote(1, 2):
        with pytest.raises(ActorDiedError):
            runtime.get(reference)
    with pytest.raises(ValueError, match="num_returns"):
        one.several.options(num_returns=-1)


def test_wait(runtime: Runtime, counter: Callable[..., Any]) -> None:
    one, other = counter(), counter()
    runtime.get([one.add.remote(), other.add.remote()])
    slow, fast, put = one.nap.remote(1.0), other.nap.remote(0.0), runtime.put(3)
    assert runtime.wait([slow, fast]) == ([fast], [slow])
    assert runtime.wait([slow, fast]) == ([fast], [slow])  # asked again, told again
    assert runtime.wait([slow, put, fast], num_returns=2) == ([put, fast], [slow])
    assert runtime.wait([slow], timeout=0.01) == ([], [slow])
    assert runtime.wait({slow: 1, fast: 2})[0] == [fast]
    done, pending = runtime.wait({slow, fast}, num_returns=2)
    assert set(done) == {slow, fast} and list(pending) == []
    assert runtime.wait([]) == ([], [])
    for wrong in ({"num_returns": 0}, {"num_returns": 3}):
        with pytest.raises(ValueError):
            runtime.wait([slow, fast], **wrong)
    with pytest.raises(ValueError):
        runtime.wait([slow, slow], num_returns=2)


def test_get_can_lose_patience(runtime: Runtime, counter: Callable[..., Any]) -> None:
    one = counter()
    slow = one.nap.remote(0.5)
    with pytest.raises(TimeoutError):
        runtime.get(slow, timeout=0.01)
    assert runtime.get(slow) == 0.5
    for nonsense in (3, [3]):
        with pytest.raises((TypeError, ValueError)):
            runtime.get(nonsense)


def test_only_the_driver_uses_the_verbs(runtime: Runtime) -> None:
    class Wrong:
        def verb(self, name: str) -> None:
            {"get": runtime.get, "wait": runtime.wait, "put": runtime.put}[name]([])

        def call(self) -> None:
            runtime.remote(abs).remote(-1)

    for name in ("get", "wait", "put"):
        with pytest.raises(RuntimeError, match="driver"):
            runtime.get(runtime.remote(Wrong, num_cpus=0).remote().verb.remote(name))
    with pytest.raises(RuntimeError, match="driver"):
        runtime.get(runtime.remote(Wrong, num_cpus=0).remote().call.remote())
    with pytest.raises(RuntimeError, match="driver"):
        runtime.remote(counting_class(), num_cpus=0).remote(runtime)


def test_a_crash_fails_what_was_asked_and_a_restart_begins_anew(runtime: Runtime) -> None:
    doomed = type("Doomed", (counting_class(),), {})
    actor = runtime.remote(doomed, costs=NAP, num_cpus=0, max_restarts=1).remote(40)
    assert runtime.get([actor.add.remote(), actor.add.remote()]) == [41, 42]
    pid = runtime.get(actor.pid.remote())
    running, queued = actor.nap.remote(FRESH), actor.add.remote()
    queued_too = actor.several.options(num_returns=2).remote(2)
    if isinstance(runtime, RayRuntime):
        os.kill(pid, signal.SIGKILL)
    for reference in (running, queued, *queued_too):
        with pytest.raises(ActorDiedError):
            runtime.get(reference, timeout=FRESH)
    for _ in range(10_000):  # calls fail until it is up again
        try:
            assert runtime.get(actor.add.remote()) == 41
            break
        except ActorDiedError:
            continue
    else:
        pytest.fail("it never came up again")


def test_a_death_fails_whatever_needs_what_died(
    runtime: Runtime, counter: Callable[..., Any]
) -> None:
    mortal: Any = type("Mortal", (counting_class(),), {})
    actor = runtime.remote(mortal, costs=NAP, num_cpus=0).remote()
    other, third = counter(), counter()
    answered = actor.same.remote(np.ones(10**6))
    pid = runtime.get([actor.pid.remote(), *[one.add.remote() for one in (other, third)]])[0]
    runtime.wait([answered])
    running = actor.nap.remote(FRESH)
    argument = other.same.remote(0, name=running)
    further, too = third.same.options(num_returns=2).remote(1, argument)  # two steps away
    newborn = counter(running)  # a constructor's argument
    if isinstance(runtime, RayRuntime):
        os.kill(pid, signal.SIGKILL)
    failed = [running, argument, further, too, newborn.add.remote()]
    assert runtime.wait(failed, num_returns=5, timeout=FRESH) == (failed, [])
    late = actor.add.remote()  # to the dead
    failed += [late, other.same.remote(late), newborn.add.remote(), counter(late).add.remote()]
    assert runtime.wait(failed, num_returns=9, timeout=FRESH) == (failed, [])
    for reference in failed:
        with pytest.raises(ActorDiedError):
            runtime.get(reference)
    with pytest.raises(ActorDiedError):
        runtime.get([answered, running])
    assert runtime.get([other.add.remote(), third.add.remote()]) == [2, 2]  # they live
    ((array,), _) = runtime.get(other.same.remote(answered))[0][0]  # an answer outlives its maker
    assert array.sum() == 10**6
    assert len(runtime.timeline()) > 0  # the dead are not waited for


def test_state_is_saved_and_loaded(runtime: Runtime, counter: Callable[..., Any]) -> None:
    one = counter()
    with runtime.off_the_clock():
        assert runtime.get(one.add.remote()) == 1
    state = runtime.state_dict()
    assert runtime.get(one.add.remote()) == 2
    runtime.load_state_dict(state)
    assert runtime.get(one.add.remote()) == 3  # what actors know is theirs to save


def test_the_timeline_knows_who_worked_and_who_waited(
    runtime: Runtime, counter: Callable[..., Any]
) -> None:
    one, other = counter(), counter()
    runtime.get([one.add.remote(), other.add.remote()])
    started = runtime.now
    assert runtime.get([one.nap.remote(0.3), one.nap.remote(0.2)]) == [0.3, 0.2]
    waited = runtime.now - started
    spans = [span for span in runtime.timeline() if span.start >= started]
    naps = [span for span in spans if span.what == "nap"]
    assert len(naps) == 2 and len({span.who for span in naps}) == 1
    assert naps[0].who.startswith("Counter ") and naps[0].end <= naps[1].start
    assert naps[1].end <= runtime.now
    spent = runtime.timeline().totals(started)[naps[0].who]
    assert 0.4 < spent.busy_s < waited
    (get,) = [span for span in spans if span.who == "driver"]
    assert get.what == "get" and get.waiting and 0.4 < get.end - get.start <= waited
    runtime.get(other.nap.remote(0.0))
    assert [s.who for s in runtime.timeline() if s.what == "nap"][-1] != naps[0].who


def test_a_runtime_by_its_name() -> None:
    ray = make_runtime("ray", seed=1, num_cpus=3, address="10.0.0.1:6379")
    assert isinstance(ray, RayRuntime) and ray.num_cpus == 3 and ray.address == "10.0.0.1:6379"
    assert make_runtime("ray", seed=1).num_cpus is None  # type: ignore[union-attr]
    cluster = Cluster(nodes=(Node(cores=7),), jitter=0.5)
    seconds = []
    for seed in (1, 1, 2):
        virtual = make_runtime("virtual", seed=seed, cluster=cluster, num_cpus=3)
        assert isinstance(virtual, VirtualRuntime) and virtual.cluster is cluster
        virtual.get(virtual.remote(abs, costs=1.0).remote(-1))
        seconds.append(virtual.now)
    assert seconds[0] == seconds[1] != seconds[2]
    with pytest.raises(ValueError, match="'ray' or 'virtual', got 'dask'"):
        make_runtime("dask", seed=1)


def test_messages_are_measured_on_ray(ray_runtime: RayRuntime) -> None:
    """Figures of this machine, except the one that is given."""
    cluster = Cluster.measure({}, runtime=ray_runtime, bandwidth=1.0)
    assert cluster.bandwidth == 1.0 and cluster.nodes == (Node(cores=usable_cores()),)
    assert 0 < cluster.driver_call_s < math.inf and 0 <= cluster.latency_s < math.inf
    measured = Cluster.measure({}, runtime=ray_runtime, latency_s=0.0, driver_call_s=0.0)
    assert 0 < measured.bandwidth < math.inf and measured.latency_s == 0.0
