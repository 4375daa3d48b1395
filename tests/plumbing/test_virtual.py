"""The virtual clock: schedules worked out by hand, an oracle, the same run again, hollow work."""

import gc
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.mdp import Block, Parallel, asynchronous_value_iteration, value_iteration
from rlbook.parts.gridworld import ENV_ID
from rlbook.parts.tabular import make_tabular_env, mdp_of
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.runtime import ActorDiedError
from rlbook.plumbing.timeline import Span
from rlbook.plumbing.virtual import StandIn, VirtualRuntime

L = 2**-6
"""One way of a message; powers of two add up without rounding."""


class Worker:
    def __init__(self) -> None:
        self.calls = 0

    def work(self, *values: Any) -> int:
        self.calls += 1
        return self.calls

    def array(self, size: int) -> np.ndarray:
        return np.zeros(size)

    def arrays(self, *sizes: int) -> list[np.ndarray]:
        return [np.zeros(size) for size in sizes]


BY_FIRST = {"work": lambda seconds, *_: seconds}
"""Work takes the seconds that its first argument says."""


def cluster(*cores: int, **fields: Any) -> Cluster:
    """Nothing but what a test is about."""
    quiet = {"latency_s": L, "bandwidth": math.inf, "jitter": 0.0}
    return Cluster(nodes=tuple(Node(cores=n) for n in cores or (8,)), **(quiet | fields))


def workers(runtime: VirtualRuntime, count: int, costs: Any = BY_FIRST, **options: Any) -> list:
    remote = runtime.remote(Worker, costs=costs, **options)
    return [remote.remote() for _ in range(count)]


def worked(runtime: VirtualRuntime) -> list[tuple[str, float, float]]:
    """(who, start, end) of all calls of work."""
    return [(s.who, s.start, s.end) for s in runtime.timeline() if s.what == "work"]


# -- by hand -------------------------------------------------------------------------------


def test_a_message_takes_its_time_and_calls_of_one_actor_queue() -> None:
    runtime = VirtualRuntime(1, cluster())
    (worker,) = workers(runtime, 1)
    first, second = worker.work.remote(1.0), worker.work.remote(4.0)
    runtime.wait([second, first])
    assert runtime.now == L + 1.0 + L
    runtime.get(second)
    assert runtime.now == L + 1.0 + 4.0 + L
    runtime.get(worker.work.remote(1.0))  # sent when the driver knew
    assert runtime.now == (L + 1.0 + 4.0 + L) + (L + 1.0 + L)
    assert worked(runtime)[:2] == [("Worker 0", L, L + 1), ("Worker 0", L + 1, L + 1 + 4)]
    assert [span for span in runtime.timeline() if span.waiting] == [
        Span("driver", "wait", 0.0, L + 1.0 + L),
        Span("driver", "get", L + 1.0 + L, L + 1.0 + 4.0 + L),
        Span("driver", "get", 5 + 2 * L, 5 + 2 * L + 1 + 2 * L),
    ]


def test_the_driver_and_the_constructor_take_time_too() -> None:
    d = 2**-4
    runtime = VirtualRuntime(1, cluster(driver_call_s=d))
    (worker,) = workers(runtime, 1, {"__init__": 2.0, "work": 1.0})
    reference = worker.work.remote()
    assert runtime.now == 2 * d
    runtime.get(reference)
    assert runtime.now == d + L + 2.0 + 1.0 + L
    runtime.get(reference)
    assert runtime.now == d + L + 2.0 + 1.0 + L + d


@pytest.mark.parametrize("by_arguments", [False, True])
def test_costs_are_units_of_work_by_speed_and_straggling(by_arguments: bool) -> None:
    machines = Cluster(
        nodes=(Node(cores=4), Node(cores=4, speed=2.0)),
        costs={"env_step": 0.25, "inference": 0.5},
        stragglers={"Worker 2": 3.0},
        latency_s=L,
        jitter=0.0,
        bandwidth=math.inf,
    )
    runtime = VirtualRuntime(1, machines)
    units = {"env_step": 20, "inference": 5}
    work = {"work": (lambda: units) if by_arguments else units}
    on_slow = workers(runtime, 1, work, node=0)
    on_fast = workers(runtime, 2, work, node=1)
    runtime.get([worker.work.remote() for worker in on_slow + on_fast])
    seconds = 20 * 0.25 + 5 * 0.5
    assert worked(runtime) == [
        ("Worker 1", L, L + seconds / 2),
        ("Worker 0", L, L + seconds),
        ("Worker 2", L, L + 3 * seconds / 2),
    ]


def test_cores_are_shared_first_come_first_served() -> None:
    runtime = VirtualRuntime(1, cluster(2))
    a, b, c = workers(runtime, 3)
    calls = [a.work.remote(1.0), a.work.remote(1.0), b.work.remote(3.0), c.work.remote(1.0)]
    runtime.get(calls)
    # At 1 the second call of a becomes runnable; c has been since 0 and goes first.
    assert worked(runtime) == [
        ("Worker 0", L, L + 1),
        ("Worker 2", L + 1, L + 1 + 1),
        ("Worker 1", L, L + 3),
        ("Worker 0", L + 1 + 1, L + 1 + 1 + 1),
    ]
    assert runtime.now == L + 3 + L


def test_actors_and_functions_go_where_there_is_room() -> None:
    runtime = VirtualRuntime(1, cluster(1, 2))
    runtime.get([worker.work.remote(1.0) for worker in workers(runtime, 3)])
    assert runtime.now == 1 + 2 * L  # one, and two
    runtime = VirtualRuntime(1, cluster(1, 2))
    nap = runtime.remote(lambda seconds: seconds, costs=lambda seconds: seconds)
    runtime.get([nap.remote(1.0) for _ in range(4)])
    assert runtime.now == 2 + 2 * L  # three at once, and one after them
    fast = replace(cluster(), nodes=(Node(1), Node(2, speed=4.0)))
    runtime = VirtualRuntime(1, fast)
    nap = runtime.remote(abs, costs=lambda seconds: seconds)
    for _ in range(4):  # each finds node 0 empty again
        runtime.get(nap.remote(1.0))
    assert runtime.now == 4 * (1 + 2 * L)
    broken = runtime.remote(len).remote(3)
    for _ in range(3):  # calls that never arrive leave no trace either
        with pytest.raises(TypeError):
            runtime.get(nap.remote(broken))
    begun = runtime.now
    runtime.get(nap.remote(1.0))
    assert runtime.now == begun + 1 + 2 * L
    runtime = VirtualRuntime(1, cluster(1, 2))
    runtime.get([worker.work.remote(1.0) for worker in workers(runtime, 3, node=0)])
    assert runtime.now == 3 + 2 * L  # all on node 0


def test_cores_that_are_shared_late_are_busy_to_the_end_of_what_was_promised() -> None:
    runtime = VirtualRuntime(1, cluster(2))
    early = [worker.work.remote(1.0) for worker in workers(runtime, 2)]
    late = [worker.work.remote(1.0) for worker in workers(runtime, 2)]
    runtime.get(early)
    assert runtime.now == L + 1 + L
    runtime.get(late)
    assert runtime.now == L + 1 + 1 + L


def test_bytes_cross_once_to_a_node_and_queue_for_it() -> None:
    bandwidth = 2.0**20
    runtime = VirtualRuntime(1, cluster(8, 8, bandwidth=bandwidth))
    put = runtime.put(np.zeros(2**14))
    over = put.nbytes / bandwidth
    assert put.nbytes > 8 * 2**14 and runtime.now == over  # into node 0's memory
    one, other = workers(runtime, 2, {"work": 1.0}, node=1)
    (home,) = workers(runtime, 1, {"work": 1.0}, node=0)
    sent = [one.work.remote(put), other.work.remote(put), home.work.remote(put)]
    assert runtime.get(sent) == [1, 1, 1]
    tiny = 5 / bandwidth  # the pickle of a small number
    assert sent[0].nbytes == 5
    starts = {who: start for who, start, _ in worked(runtime)}
    assert starts == {"Worker 0": 2 * over + L, "Worker 1": 2 * over + L, "Worker 2": over + L}
    assert runtime.now == 2 * over + L + 1 + L + 3 * tiny
    assert runtime.nbytes == 2 * put.nbytes + 3 * 5


def test_arguments_by_value_weigh_too() -> None:
    bandwidth = 2.0**20
    runtime = VirtualRuntime(1, cluster(8, 8, bandwidth=bandwidth))
    (worker,) = workers(runtime, 1, {"work": 1.0}, node=1)
    before = runtime.nbytes
    sent = [worker.work.remote(np.zeros(2**14)) for _ in range(2)]
    over = (runtime.nbytes - before) / 2 / bandwidth
    runtime.get(sent)
    assert over > 8 * 2**14 / bandwidth
    # The second came while the first was at work.
    assert worked(runtime) == [
        ("Worker 0", L + over, L + over + 1),
        ("Worker 0", L + over + 1, L + over + 1 + 1),
    ]


def test_two_values_for_one_node_queue_on_its_wire() -> None:
    bandwidth = 2.0**20
    runtime = VirtualRuntime(1, cluster(8, 8, bandwidth=bandwidth))
    makers = workers(runtime, 2, {"array": 1.0}, node=0)
    (reader,) = workers(runtime, 1, {"work": 0.0}, node=1)
    made = [maker.array.remote(2**14) for maker in makers]
    runtime.wait(made, num_returns=2)
    asked = runtime.now
    read = [reader.work.remote(value) for value in made]
    runtime.wait(read, num_returns=2)
    over = made[0].nbytes / bandwidth
    assert [start for _, start, _ in worked(runtime)] == [asked + L + over, asked + L + 2 * over]


def test_what_is_on_its_way_holds_up_nobody() -> None:
    """The wire is busy while bytes go onto it, not until they have arrived."""
    bandwidth = 2.0**20
    runtime = VirtualRuntime(1, cluster(8, bandwidth=bandwidth))
    maker, reader = workers(runtime, 2, {"array": 1.0, "work": 0.0})
    made = maker.array.remote(2**14)
    runtime.wait([made])
    begun, before = runtime.now, runtime.nbytes
    read = reader.work.remote(0.5)
    sent = (runtime.nbytes - before) / bandwidth
    runtime.get(made)
    assert runtime.now == begun + sent + made.nbytes / bandwidth  # in line, but not for L
    runtime.wait([read])
    assert worked(runtime) == [("Worker 1", begun + sent + L, begun + sent + L)]


def test_messages_that_are_delayed_overtake_each_other() -> None:
    runtime = VirtualRuntime(1, cluster(50, bandwidth=2.0**20, delay_s=10.0))
    for worker in workers(runtime, 40):
        worker.work.remote(0.0)
    runtime.now = 1e3
    runtime.put(0)
    starts = {who: start for who, start, _ in worked(runtime)}
    in_turn = np.diff([starts[f"Worker {number}"] for number in range(40)])
    assert (in_turn < 0).mean() > 0.3


@pytest.mark.parametrize("hollow", [False, True])
def test_each_of_several_results_travels_alone(hollow: bool) -> None:
    bandwidth = 2.0**20
    runtime = VirtualRuntime(1, cluster(8, 8, bandwidth=bandwidth), hollow=hollow)
    costs, sizes = {"arrays": 1.0}, (2**14, 2**10)
    weights = tuple(StandIn(runtime.put(np.zeros(size)).nbytes) for size in sizes)
    returns = {"arrays": weights if hollow else None}
    (maker,) = workers(runtime, 1, costs, node=0, returns=returns)
    (reader,) = workers(runtime, 1, costs, node=1)
    before, begun = runtime.nbytes, runtime.now
    big, small = maker.arrays.options(num_returns=2).remote(*sizes)
    read = reader.work.remote(small)
    by_value = runtime.nbytes - before  # the arguments
    runtime.wait([read])
    assert [big.nbytes, small.nbytes] == [weight.nbytes for weight in weights]
    assert runtime.nbytes - before - by_value == small.nbytes  # the big one stays
    assert big.at == small.at and big.at >= begun + L + 1 + L
    assert len([span for span in runtime.timeline() if span.what == "arrays"]) == 1


def test_a_call_leaves_when_its_argument_exists() -> None:
    runtime = VirtualRuntime(1, cluster())
    one, other = workers(runtime, 2)
    late = one.work.remote(2.0)
    behind = [other.work.remote(0.5, late), other.work.remote(0.25)]
    assert runtime.get(behind) == [1, 2]
    known = L + 2.0 + L
    assert worked(runtime)[1:] == [
        ("Worker 1", known + L, known + L + 0.5),
        ("Worker 1", known + L + 0.5, known + L + 0.5 + 0.25),
    ]


def test_a_call_waits_for_those_before_it_though_its_own_argument_exists() -> None:
    runtime = VirtualRuntime(1, cluster())
    one, other, reader = workers(runtime, 3)
    late, early = one.work.remote(8.0), other.work.remote(1.0)
    both = [reader.work.remote(0.5, late), reader.work.remote(0.25, early)]
    assert runtime.get(both) == [1, 2]
    assert worked(runtime)[-2:] == [
        ("Worker 2", L + 8 + L + L, L + 8 + L + L + 0.5),
        ("Worker 2", L + 8 + L + L + 0.5, L + 8 + L + L + 0.5 + 0.25),
    ]


def test_waiting_has_a_limit_in_virtual_seconds() -> None:
    runtime = VirtualRuntime(1, cluster())
    (worker,) = workers(runtime, 1)
    slow = worker.work.remote(10.0)
    assert runtime.wait([slow], timeout=3.0) == ([], [slow])
    assert runtime.now == 3.0
    with pytest.raises(TimeoutError):
        runtime.get(slow, timeout=4.0)
    assert runtime.now == 3.0 + 4.0
    assert runtime.wait([slow], timeout=100.0) == ([slow], [])
    assert runtime.now == L + 10.0 + L
    stranger = VirtualRuntime(1).remote(Worker).remote().work.remote()
    with pytest.raises(RuntimeError, match="nothing is under way"):
        runtime.wait([stranger])


# -- faults --------------------------------------------------------------------------------


@pytest.mark.parametrize("cores", [2, 8], ids=["shared", "roomy"])
def test_a_crash_frees_the_core_and_fails_what_was_under_way(cores: int) -> None:
    crash = Crash("Worker 0", at_s=2.5, restart_s=0.5)
    runtime = VirtualRuntime(1, cluster(cores, crashes=(crash,)))
    costs = {**BY_FIRST, "__init__": 0.0}
    doomed, other, third = workers(runtime, 3, costs)
    whole, running, queued = [doomed.work.remote(2.0) for _ in range(3)]
    long, waits = other.work.remote(9.0), third.work.remote(1.0)
    assert runtime.get(whole) == 1
    for reference in (running, queued):
        with pytest.raises(ActorDiedError, match="Worker 0"):
            runtime.get(reference)
        assert runtime.now == 2.5 + L
    refused = doomed.work.remote(1.0)
    with pytest.raises(ActorDiedError):
        runtime.get(refused)
    assert runtime.now == (2.5 + L) + L + L
    runtime.wait([long], timeout=0.5)  # until it is up again
    again = runtime.now
    assert runtime.get(doomed.work.remote(1.0)) == 1  # it counts from the start
    assert runtime.get([long, waits]) == [1, 1]
    spans = {("Worker 0", L, 2 + L), ("Worker 1", L, 9 + L)}
    if cores == 8:
        spans |= {("Worker 0", 2 + L, 2.5), ("Worker 2", L, L + 1)}
        spans |= {("Worker 0", again + L, again + L + 1)}
    else:  # the third actor was in line for the core first; the call that crashed never had one
        spans |= {("Worker 2", 2 + L, 3 + L)}
        spans |= {("Worker 0", max(again, 3) + L, max(again, 3) + L + 1)}
    assert set(worked(runtime)) == spans


def test_a_crash_hands_the_core_on_at_once() -> None:
    crashes = Crash("Worker 0", at_s=1.5), Crash("Worker 0", at_s=2.0, restart_s=0.0)
    runtime = VirtualRuntime(1, cluster(1, crashes=crashes))
    doomed, other = workers(runtime, 2)
    lost, waits = doomed.work.remote(9.0), other.work.remote(1.0)
    assert runtime.get(waits) == 1
    assert worked(runtime) == [("Worker 0", L, 1.5), ("Worker 1", 1.5, 1.5 + 1)]
    with pytest.raises(ActorDiedError):
        runtime.get(lost)
    begun = runtime.now
    for _ in range(2):  # it never comes back, whatever befalls it then
        with pytest.raises(ActorDiedError):
            runtime.get(doomed.work.remote(1.0))
    assert runtime.now == begun + 2 * (L + L)


def test_an_answer_on_its_way_outlives_its_actor() -> None:
    crash = Crash("Worker 0", at_s=1 + L + L / 2, restart_s=0.0)
    runtime = VirtualRuntime(1, cluster(crashes=(crash,)))
    (worker,) = workers(runtime, 1)
    assert runtime.get(worker.work.remote(1.0)) == 1
    assert runtime.get(worker.work.remote(1.0)) == 1  # by its second life
    assert runtime.get(worker.work.remote(1.0)) == 2


def test_what_happened_while_the_driver_was_busy_comes_first() -> None:
    crash = Crash("Worker 0", at_s=2.5, restart_s=0.25)
    runtime = VirtualRuntime(1, cluster(driver_call_s=1.0, crashes=(crash,)))
    (worker,) = workers(runtime, 1)
    runtime.put(0)
    assert runtime.get(worker.work.remote(1.0)) == 1  # sent at 3, when it was up again
    assert runtime.now == 3 + L + 1 + L


def test_a_crash_in_the_constructor_of_a_restart() -> None:
    crashes = (
        Crash("Worker 0", at_s=5.0, restart_s=1.0),
        Crash("Worker 0", at_s=7.0, restart_s=1.0),
    )
    runtime = VirtualRuntime(1, cluster(crashes=crashes))
    (worker,) = workers(runtime, 1, {"__init__": 3.0, "work": 1.0})
    assert runtime.get(worker.work.remote()) == 1  # 3 to 4
    (idle,) = workers(runtime, 1, {"work": 10.0})
    runtime.get(idle.work.remote())
    sent = runtime.now
    assert runtime.get(worker.work.remote()) == 1
    assert sent > 7 + 1 + 3 and runtime.now == sent + L + 1 + L
    made = [
        span for span in runtime.timeline() if (span.who, span.what) == ("Worker 0", "__init__")
    ]
    assert [(s.start, s.end) for s in made] == [(L, L + 3.0), (6.0, 7.0), (8.0, 11.0)]


def test_random_crashes_come_from_the_seed() -> None:
    def when(seed: int) -> float:
        runtime = VirtualRuntime(seed, cluster(crashes=(Crash("Worker 0", before_s=4.0),)))
        (worker,) = workers(runtime, 1)
        with pytest.raises(ActorDiedError):
            runtime.get(worker.work.remote(100.0))
        return runtime.now - L

    times = [when(seed) for seed in range(50)]
    assert times == [when(seed) for seed in range(50)]
    assert 0 < min(times) < 1 and 3 < max(times) < 4 and len(set(times)) == 50


def test_a_fault_for_an_actor_that_never_was_is_an_error() -> None:
    for wrong in ({"crashes": (Crash("Worker 1"),)}, {"stragglers": {"Wroker 0": 2.0}}):
        with pytest.raises(RuntimeError, match="never made"):
            with VirtualRuntime(1, cluster(**wrong)) as runtime:
                workers(runtime, 1)
    with VirtualRuntime(1, cluster(stragglers={"Worker 0": 2.0})) as runtime:
        workers(runtime, 1)


# -- an oracle and two identities ----------------------------------------------------------


def by_oracle(cores: int, durations: Sequence[Sequence[float]]) -> set[tuple[str, float, float]]:
    """Each actor's calls, all sent at 0: always the call that has been runnable longest (of the
    actor made first, if several) takes the core that is free first.
    """
    free, spans = [0.0] * cores, set()
    heads = [(L, k, 0) for k in range(len(durations)) if durations[k]]
    while heads:
        runnable, k, position = min(heads)
        core = free.index(min(free))
        start = max(runnable, free[core])
        end = free[core] = start + durations[k][position]
        spans.add((f"Worker {k}", start, end))
        heads.remove((runnable, k, position))
        if position + 1 < len(durations[k]):
            heads.append((end, k, position + 1))
    return spans


quarters = st.integers(1, 400).map(lambda n: n / 7)
tasks = st.lists(st.lists(quarters, min_size=1, max_size=5), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(cores=st.integers(1, 4), durations=tasks)
def test_shared_cores_agree_with_the_oracle(cores: int, durations: list[list[float]]) -> None:
    if len({d for row in durations for d in row}) < sum(map(len, durations)):
        return  # ties may be broken either way
    runtime = VirtualRuntime(1, cluster(cores))
    actors = workers(runtime, len(durations))
    calls = [a.work.remote(d) for a, row in zip(actors, durations, strict=True) for d in row]
    runtime.get(calls)
    found = sorted(worked(runtime))
    expected = sorted(by_oracle(cores, durations))
    assert [who for who, *_ in found] == [who for who, *_ in expected]
    np.testing.assert_allclose([f[1:] for f in found], [e[1:] for e in expected], rtol=1e-12)


def conducted(runtime: VirtualRuntime, actors: int, calls: int) -> list[tuple[int, float]]:
    """A driver that keeps every actor busy, and what it saw: (number of the call, when)."""
    free = workers(runtime, actors, {"work": lambda n: 0.1 + 0.01 * (n % 7)})
    inflight: dict[Any, tuple[int, Any]] = {}
    seen: list[tuple[int, float]] = []
    for number in range(calls):
        worker = free.pop(0)
        inflight[worker.work.remote(number)] = number, worker
        while inflight and (not free or number == calls - 1):
            (reference,), _ = runtime.wait(inflight)
            answered, worker = inflight.pop(reference)
            seen.append((answered, runtime.now))
            free.append(worker)
    return seen


def test_counting_cores_changes_nothing_where_there_is_one_for_everybody() -> None:
    def play(counted: bool) -> list[tuple[int, float]]:
        runtime = VirtualRuntime(5, cluster(8))
        if counted:
            runtime._simulator.share(0.0, runtime._simulator.rooms[0])
        return conducted(runtime, 8, 100)

    assert play(counted=True) == play(counted=False)


def test_delayed_answers_of_one_actor_stay_in_order() -> None:
    runtime = VirtualRuntime(1, cluster(delay_s=10.0))
    (worker,) = workers(runtime, 1)
    calls = [worker.work.remote(1.0) for _ in range(50)]
    assert runtime.get(calls) == list(range(1, 51))
    known = [reference.at for reference in calls]
    assert known == sorted(known)
    extra = [at - end - L for at, (_, _, end) in zip(known, worked(runtime), strict=True)]
    assert 10 < np.mean(extra) and min(extra) >= 0  # those before it hold an answer up


# -- the same run again --------------------------------------------------------------------

PROGRAM = """
import sys
sys.path.insert(0, "tests/plumbing")
import test_virtual
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.virtual import VirtualRuntime
cluster = Cluster(nodes=(Node(cores=2), Node(cores=2)), delay_s=1e-3, driver_call_s=1e-4,
                  stragglers={"Worker 1": 3.0})
print(test_virtual.conducted(VirtualRuntime(int(sys.argv[1]), cluster), 6, 60))
"""


def test_the_same_seed_gives_the_same_run_in_any_process() -> None:
    def run(seed: int, hash_seed: int) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONPATH": "."}
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", PROGRAM, str(seed)]
        return subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, check=True
        ).stdout

    first = run(1, 0)
    assert first == run(1, 7)  # to the last bit: repr shows all of a float
    other = run(2, 0)
    order = [[number for number, _ in eval(text)] for text in (first, other)]
    assert order[0] != order[1] and sorted(order[0]) == sorted(order[1])


def test_planning_in_parallel_is_planning() -> None:
    mdp = mdp_of(make_tabular_env(ENV_ID))
    start = np.zeros(mdp.num_states)
    alone = value_iteration(Block(mdp.block(0, mdp.num_states), 0.9), start, tolerance=1e-8)
    with VirtualRuntime(1, Cluster(nodes=(Node(cores=2),))) as runtime:
        spread = value_iteration(Parallel(mdp, 0.9, runtime, 3), start, tolerance=1e-8)
        eager = asynchronous_value_iteration(Parallel(mdp, 0.9, runtime, 3), start, tolerance=1e-8)
    assert np.array_equal(alone.values, spread.values)
    assert np.array_equal(alone.residuals, spread.residuals)
    np.testing.assert_allclose(eager.values, alone.values, atol=2e-8)


# -- saved and loaded ----------------------------------------------------------------------


class Walker:
    """What it knows depends on every call, in order."""

    def __init__(self, scale: int) -> None:
        self.scale, self.place = scale, 1

    def step(self, number: int, other: int = 0) -> int:
        self.place = (self.scale * self.place + number + other) % 10_007
        return self.place

    def save(self) -> int:
        return self.place

    def load(self, place: int) -> None:
        self.place = place


FAULTY = cluster(
    *(2, 3),
    bandwidth=2.0**20,
    jitter=0.4,
    delay_s=0.05,
    driver_call_s=0.001,
    stragglers={"Walker 1": 4.0},
    crashes=(
        Crash("Walker 0", at_s=3.0, restart_s=0.5),
        Crash("Walker 2", before_s=9.0, restart_s=2.0),
        Crash("Walker 3", before_s=9.0, restart_s=2.0),
        Crash("Walker 4", before_s=12.0),
    ),
)


class Driver:
    """Keeps all actors busy; what it does next depends on what was done first."""

    def __init__(self, seed: int, actors: int, saved: Any = None) -> None:
        self.runtime = VirtualRuntime(seed, FAULTY)
        costs = {"__init__": 0.3, "step": lambda number, _: 0.1 + 0.01 * (number % 7), "load": 1.0}
        remote = self.runtime.remote(Walker, costs=costs)
        self.actors = [remote.remote(scale) for scale in range(2, 2 + actors)]
        self.number, self.seen = 0, []  # type: ignore[var-annotated]
        if saved is not None:
            self.runtime.load_state_dict(saved["runtime"])
            self.number = saved["number"]
            with self.runtime.off_the_clock():
                for actor, place in zip(self.actors, saved["places"], strict=True):
                    if place is not None:
                        self.runtime.get(actor.load.remote(place))

    def go_on(self, calls: int) -> None:
        last, shared = 0, self.runtime.put(self.number)
        free, inflight = list(self.actors), {}
        for _ in range(calls):
            actor = free.pop(0)
            inflight[actor.step.remote(self.number, shared)] = actor
            self.number += 1
            while inflight and (not free or self.number % calls == 0):
                (reference,), _ = self.runtime.wait(inflight)
                free.append(inflight.pop(reference))
                try:
                    last = self.runtime.get(reference)
                except ActorDiedError:
                    last = -1
                self.seen.append((last, self.runtime.now, self.runtime.nbytes))

    def save(self) -> dict[str, Any]:
        places: list[Any] = []
        with self.runtime.off_the_clock():
            for actor in self.actors:
                try:
                    places.append(self.runtime.get(actor.save.remote()))
                except ActorDiedError:
                    places.append(None)
        return {"runtime": self.runtime.state_dict(), "places": places, "number": self.number}


@pytest.mark.parametrize(("seed", "actors"), [(1, 5), (2, 5), (1, 12), (3, 12)])
def test_a_run_that_is_loaded_goes_on_as_the_one_that_was_saved(
    seed: int, actors: int, tmp_path: Path
) -> None:
    whole, plain = Driver(seed, actors), Driver(seed, actors)
    resumed: Driver | None = None
    downs = 0
    for part in range(12):
        whole.go_on(20)
        plain.go_on(20)
        assert whole.seen == plain.seen  # saving leaves no trace
        if resumed is not None:
            resumed.go_on(20)
            assert resumed.seen == whole.seen[20 * part :]
        saved = whole.save()
        downs += None in saved["places"]
        save_checkpoint(tmp_path / "state", saved)  # plain values and arrays
        resumed = Driver(seed, actors, load_checkpoint(tmp_path / "state"))
        assert resumed.runtime.now == whole.runtime.now
        assert len(resumed.runtime.timeline()) == 0
    assert downs > 2 and any(value == -1 for value, *_ in whole.seen)
    assert list(plain.runtime.timeline()) == list(whole.runtime.timeline())


def test_a_promised_core_and_an_actor_in_line_are_saved_too() -> None:
    crashes = Crash("Worker 0", at_s=1.0, restart_s=1.0), Crash("Worker 1", at_s=1.5, restart_s=0.0)

    def begun() -> tuple[VirtualRuntime, list]:
        runtime = VirtualRuntime(1, cluster(1, crashes=crashes))
        costs = {**BY_FIRST, "__init__": 3.0}
        return runtime, workers(runtime, 1, {**BY_FIRST, "__init__": 0.5}) + workers(
            runtime, 1, costs
        )

    runtime, (one, other) = begun()
    lost = one.work.remote(50.0)
    with pytest.raises(ActorDiedError):
        runtime.get(lost)
    runtime.wait([runtime.remote(abs, costs=0.75).remote(1)])
    state = runtime.state_dict()
    ends = []
    for resumed in (False, True):
        if resumed:
            runtime, (one, other) = begun()
            runtime.load_state_dict(state)
        assert runtime.get([other.work.remote(1.0), one.work.remote(1.0)]) == [1, 1]
        ends.append((runtime.now, worked(runtime)[-2:]))
    assert ends[0] == ends[1]


def test_an_actor_that_could_not_be_restarted_stays_dead() -> None:
    class Once:
        broken = False

        def __init__(self) -> None:
            if Once.broken:
                raise OSError("its file is gone")

        def work(self) -> int:
            return 1

    def begun() -> tuple[VirtualRuntime, Any]:
        Once.broken = False
        crash = Crash("Once 0", at_s=1.0, restart_s=1.0)
        runtime = VirtualRuntime(1, cluster(1, crashes=(crash,)))
        return runtime, runtime.remote(Once, costs={"work": 0.5}).remote()

    runtime, actor = begun()
    assert runtime.get(actor.work.remote()) == 1
    Once.broken = True
    runtime.get(runtime.remote(abs, costs=3.0).remote(1))
    state = runtime.state_dict()
    for resumed in (False, True):
        if resumed:
            runtime, actor = begun()
            runtime.load_state_dict(state)
        with pytest.raises(ActorDiedError, match="file is gone"):
            runtime.get(actor.work.remote())


def test_a_constructor_that_a_crash_cut_off_is_nobodys_call() -> None:
    crashes = Crash("Worker 0", at_s=1.0, restart_s=0.0), Crash("Worker 0", at_s=1.125)
    runtime = VirtualRuntime(1, cluster(crashes=crashes))
    workers(runtime, 1, {"__init__": 0.25})
    runtime.get(runtime.remote(abs, costs=1.125 + L / 2 - 2 * L).remote(1))
    assert runtime.now == 1.125 + L / 2  # its failure is still on its way
    assert runtime.state_dict()["now"] == runtime.now


def test_noise_goes_on_where_it_was_however_long_the_run() -> None:
    def begun() -> tuple[VirtualRuntime, Any]:
        runtime = VirtualRuntime(1, cluster(jitter=1.0), hollow=True)
        return runtime, workers(runtime, 1, {"work": 1.0})[0]

    def go_on(runtime: VirtualRuntime, actor: Any, calls: int) -> float:
        return runtime.get([actor.work.remote() for _ in range(calls)]) and runtime.now

    whole = begun()
    go_on(*whole, 5000)  # more than are drawn at once
    state = whole[0].state_dict()
    resumed = begun()
    resumed[0].load_state_dict(state)
    assert go_on(*whole, 5000) == go_on(*resumed, 5000) > state["now"]


def test_saving_waits_for_calls_and_loading_for_the_same_actors() -> None:
    runtime = VirtualRuntime(1, cluster(2))
    one, other, third = workers(runtime, 3)
    pending = [one.work.remote(1.0), other.work.remote(1.0), third.work.remote(1.0)]
    late = one.work.remote(pending[2])
    empty = VirtualRuntime(1, cluster(2)).state_dict()
    for refused in (
        runtime.state_dict,
        runtime.off_the_clock().__enter__,
        lambda: runtime.load_state_dict({**empty, "made": {"Worker": 3}}),
    ):
        with pytest.raises(RuntimeError, match="calls are under way"):
            refused()
    runtime.get([*pending, late])
    state = runtime.state_dict()
    with pytest.raises(RuntimeError, match="1 calls are under way"):
        with runtime.off_the_clock():
            one.work.remote(5.0)
    for wrong, message in (
        (VirtualRuntime(1, cluster(2)), "made"),
        (VirtualRuntime(1, cluster(2, 2)), "same order"),
    ):
        workers(wrong, 3 if message == "same order" else 2)
        with pytest.raises(ValueError, match=message):
            wrong.load_state_dict(state)


# -- waiting -------------------------------------------------------------------------------


def test_waits_on_several_collections_lose_nothing() -> None:
    runtime = VirtualRuntime(3, cluster(4, jitter=0.5, driver_call_s=0.01))
    left, right = workers(runtime, 6, {"work": 0.1}), workers(runtime, 3, {"work": 0.05})
    sets = [{w.work.remote(): w for w in side} for side in (left, right)]
    returned: list[Any] = []
    turns = np.random.default_rng(0)
    for turn in range(400):
        inflight = sets[turn % 2]
        count = int(turns.integers(1, len(inflight) + 1))
        found, pending = runtime.wait(inflight, num_returns=count)
        assert len(found) == count and len(pending) == len(inflight) - count
        assert found == [reference for reference in inflight if reference in found]
        assert all(reference.at <= runtime.now for reference in found)
        later = [r.at for r in inflight if r not in found and r.at < math.inf]
        assert not later or max(r.at for r in found) <= min(later)  # the first to be done
        for reference in found:
            worker = inflight.pop(reference)
            returned.append(reference)
            inflight[worker.work.remote()] = worker
    assert len(set(returned)) == len(returned)


def test_what_was_known_before_is_returned_once_and_costs_no_time() -> None:
    runtime = VirtualRuntime(1, cluster())
    early = [worker.work.remote(1.0) for worker in workers(runtime, 2)]
    (late,) = [worker.work.remote(5.0) for worker in workers(runtime, 1)]
    runtime.get(workers(runtime, 1)[0].work.remote(3.0))
    begun = runtime.now
    assert runtime.wait([*early, late]) == ([early[0]], [early[1], late])
    assert runtime.wait(early, num_returns=2) == (early, [])
    assert runtime.now == begun == L + 3 + L  # it does not go back either
    assert runtime.wait([*early, late], num_returns=3) == ([*early, late], [])
    assert runtime.now == L + 5 + L


def test_dropped_references_are_forgotten() -> None:
    runtime = VirtualRuntime(1, cluster())
    (worker,) = workers(runtime, 1, None)
    references = [worker.array.remote(10) for _ in range(10)] + [runtime.put(3)]
    runtime.get(references)
    runtime.wait(set(references), num_returns=11)
    ghosts = [weakref.ref(reference) for reference in references]
    del references
    gc.collect()
    assert [ghost for ghost in ghosts if ghost() is not None] == []
    assert not runtime._aside and not runtime._simulator.ready


# -- hollow --------------------------------------------------------------------------------


def test_hollow_work_keeps_the_schedule_and_runs_nothing() -> None:
    class Loud(Worker):
        def __init__(self) -> None:
            raise AssertionError("constructed")

    costs = {"work": lambda n, *_: n, "array": 0.5}
    machines = cluster(2, 2, bandwidth=2.0**10, jitter=0.3, delay_s=0.1)

    def play(target: type, **options: Any) -> tuple[list[Span], int]:
        runtime = VirtualRuntime(4, machines, **options)
        heavy = StandIn(VirtualRuntime(1).put(np.zeros(64)).nbytes)
        returns = {"work": lambda *_: 1, "array": heavy}
        remote = runtime.remote(target, costs=costs, returns=returns)
        one, other = remote.remote(), remote.remote()
        for _ in range(5):
            runtime.get(other.work.remote(0.25, one.array.remote(64)))
        return list(runtime.timeline()), runtime.nbytes

    Loud.__name__ = "Worker"
    assert play(Worker) == play(Loud, hollow=True)


def test_hollow_calls_return_their_stand_ins() -> None:
    runtime = VirtualRuntime(1, cluster(), hollow=True)
    returns = {"work": lambda a, b: a + b, "array": StandIn(10**9, "heavy")}
    worker = runtime.remote(Worker, returns=returns).remote()
    heavy = worker.array.remote(1)
    assert runtime.get([worker.work.remote(1, runtime.put(2)), heavy]) == [3, "heavy"]
    assert heavy.nbytes == 10**9
    silent = runtime.remote(Worker).remote()
    assert runtime.get(silent.work.remote()) is None
    assert runtime.get(silent.work.options(num_returns=2).remote()) == [None, None]
    several = {"work": lambda a: (a, StandIn(10**9, "heavy")), "array": (1, 2)}
    worker = runtime.remote(Worker, returns=several).remote()
    light, heavy = worker.work.options(num_returns=2).remote(7)
    assert runtime.get([light, heavy]) == [7, "heavy"]
    assert (light.nbytes, heavy.nbytes) == (5, 10**9)
    assert runtime.get(worker.array.options(num_returns=2).remote()) == [1, 2]
    with pytest.raises(ValueError, match="num_returns=3"):  # a wrong declaration, at once
        runtime.get(worker.array.options(num_returns=3).remote()[0])
    function = runtime.remote(abs, costs=2.0, returns=7)
    assert runtime.get(function.remote(-1)) == 7


def test_nothing_is_traced_on_request() -> None:
    runtime = VirtualRuntime(1, cluster(), trace=False)
    assert runtime.get(workers(runtime, 1)[0].work.remote(1.0)) == 1
    assert len(runtime.timeline()) == 0 and runtime.timeline().totals() == {}


# -- refusals ------------------------------------------------------------------------------


def test_wrong_declarations_are_refused_by_name() -> None:
    runtime = VirtualRuntime(1, Cluster(costs={"env_step": 1.0}))
    for wrong, name in (
        ({"costs": {"wrok": 1.0}}, "wrok"),
        ({"costs": {"work": {"gradient": 1}}}, "gradient"),
        ({"costs": {"work": -1.0}}, "seconds"),
        ({"costs": {"work": {"env_step": -1}}}, "env_step"),
        ({"returns": {"wrok": 1.0}}, "wrok"),
        ({"returns": {"work": StandIn(-1)}}, "nbytes"),
        ({"node": 1}, "node"),
    ):
        with pytest.raises(ValueError, match=name):
            runtime.remote(Worker, **wrong)
    worker = runtime.remote(Worker, costs={"work": lambda: {"gradient": 1}}).remote()
    with pytest.raises(ValueError, match="gradient"):
        worker.work.remote()
    with pytest.raises(RuntimeError, match="handle stays with the driver"):
        worker.work.remote(worker, 1)


def test_errors_say_where_they_happened() -> None:
    class Stubborn(Exception):
        def __init__(self, a: int, b: int) -> None:  # cannot be made again from its text
            super().__init__(f"{a}, {b}")

    def fail(kind: int) -> None:
        raise Stubborn(1, 2) if kind else ZeroDivisionError("by hand")

    runtime = VirtualRuntime(1, cluster())
    remote = runtime.remote(fail, costs=3.0)
    with pytest.raises(ZeroDivisionError, match="by hand") as caught:
        runtime.get(remote.remote(0))
    note = "".join(caught.value.__notes__)
    assert "fail.__call__ at 3.0156" in note and "test_virtual.py" in note
    with pytest.raises(RuntimeError, match="Stubborn: 1, 2"):
        runtime.get(remote.remote(1))
