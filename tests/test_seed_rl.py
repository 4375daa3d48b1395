"""SEED RL: what it reduces to, on calls and on real streams; lag, faults, checkpoints."""

import math
import os
import signal
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from rlbook import impala as ip
from rlbook import r2d2
from rlbook import seed_rl as sr
from rlbook.harness.checkpoint import load_checkpoint
from rlbook.harness.log import METRICS
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.parts.envs import Episode
from rlbook.plumbing.central import Finished, Report
from rlbook.plumbing.central_flow import CentralFlow
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.crew import Crew, CrewError
from rlbook.plumbing.faults import sigkill
from rlbook.plumbing.inference import Who
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime
from rlbook.plumbing.sequence_learner import scored
from rlbook.plumbing.virtual import VirtualRuntime
from tests.counters import register, stacked_envs
from tests.runs import assert_same_run, ctrl_c_at, same_parameters
from tests.seeds import certificate

QUICK = sr.Config(
    wiring="calls",
    progress=False,
    num_envs=8,
    inference_batch=8,
    unroll_length=5,
    entropy_cost=0.02,
    learning_rate=4e-3,
    total_env_steps=4_000,
    log_every_env_steps=500,
)
FRAMES = replace(QUICK, env_id="test/Frames-v0", num_workers=3, unroll_length=7)
SYNC = replace(QUICK, update_rule="sync", unrolls_in_flight=1, unrolls_per_batch=2)
STREAMS = replace(QUICK, wiring="unix")


def virtual(seed=1, cores=8, hollow=False, **cluster) -> VirtualRuntime:
    nodes = (Node(cores=cores),)
    return VirtualRuntime(seed, Cluster(nodes=nodes, costs=sr.COSTS, **cluster), hollow=hollow)


def train(config: sr.Config, seed: int = 1, **cluster) -> Result:
    if config.wiring != "calls":
        return sr.train(config)
    with virtual(seed, **cluster) as runtime:
        return sr.train(config, runtime)


def impala_of(config: sr.Config) -> ip.Config:
    names = set(vars(ip.Config())) & set(vars(config)) - {"num_learners", "runtime"}
    shared = {name: getattr(config, name) for name in names}
    return ip.Config(**shared, num_actors=config.num_workers, num_learners=config.num_learners)


def trained_by_impala(config: sr.Config) -> Result:
    costs = Cluster(nodes=(Node(cores=8),), costs=ip.COSTS)
    with VirtualRuntime(1, costs) as runtime:
        return ip.train(impala_of(config), runtime)


# -- reductions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", ["calls", "unix", "tcp"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lstm_size": 6, "env_id": "rlbook/Memory-v0", "optimizer": "adam"},
        {"env_id": "rlbook/Catch-v0", "loss_reduction": "sum", "lambda_": 1.0, "num_workers": 1},
    ],
    ids=["cartpole", "memory", "catch"],
)
def test_without_lag_it_is_impala_bit_for_bit(wiring, changes):
    """Each worker's rows a batch of their own: the same arithmetic in the same order."""
    changes = {"unrolls_per_batch": changes.get("num_workers", 2), **changes}
    changes |= {"total_env_steps": 2_000, "anneal_learning_rate": True}
    config = replace(SYNC, wiring=wiring, **changes)
    mine = train(config)
    theirs = trained_by_impala(config)
    assert mine.env_steps == theirs.env_steps and mine.learner_steps == theirs.learner_steps > 10
    assert set(mine.extra["policy_lag"]) == {0}
    assert same_parameters(mine, theirs)
    assert np.array_equal(mine.curves["loss"], theirs.curves["loss"])
    assert mine.metrics["episode_return_mean"] == theirs.metrics["episode_return_mean"]
    assert not same_parameters(mine, trained_by_impala(replace(config, seed=2)))


@pytest.mark.parametrize("actors", [1, 2])
def test_a_frame_told_once_teaches_what_whole_stacks_teach(monkeypatch, actors):
    """Through episodes' ends and resets; a checkpoint in between keeps whole stacks."""
    register()
    changes = {"num_workers": actors, "unrolls_per_batch": actors, "total_env_steps": 2_000}
    config = replace(SYNC, env_id="test/Frames-v0", **changes)
    whole, seen = train(config), []
    monkeypatch.setattr(sr, "make_envs", stacked_envs)
    told_once = train(config)
    assert told_once.learner_steps > 10 and same_parameters(whole, told_once)
    backward = sr.Learner.backward

    def noting(self, *unrolls):
        seen.extend(unroll.env_outputs.observation.shape for unroll in unrolls)
        return backward(self, *unrolls)

    monkeypatch.setattr(sr.Learner, "backward", noting)
    train(replace(config, total_env_steps=500))
    assert set(seen) == {(config.unroll_length + 4, config.num_envs, 2, 3)}


def test_a_batch_of_all_workers_is_impala_but_for_the_last_bits():
    config = replace(SYNC, inference_batch=16, total_env_steps=800)
    mine, theirs = train(config), trained_by_impala(config)
    a, b = mine.policy.network.state_dict(), theirs.policy.network.state_dict()
    assert mine.metrics["inference_batch_mean"] == 16
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-4), name


def test_two_learners_run_as_one_but_for_the_last_bits():
    config = replace(SYNC, num_workers=4, unrolls_per_batch=4, total_env_steps=1_500)
    one, two = train(config), train(replace(config, num_learners=2))
    a, b = one.policy.network.state_dict(), two.policy.network.state_dict()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-4), name


# -- lag and what is in flight ---------------------------------------------------------------------


@contextmanager
def lags_of_the_data(monkeypatch):
    """What learners see: their version less each step's, however it is counted elsewhere."""
    seen: Counter[int] = Counter()
    gradient = sr.Learner.backward

    def seeing(self, *unrolls):
        for unroll in unrolls:
            seen.update((self.version - unroll.version).tolist())
        return gradient(self, *unrolls)

    with monkeypatch.context() as patch:
        patch.setattr(sr.Learner, "backward", seeing)
        yield seen


@pytest.mark.parametrize(
    ("config", "largest"),
    [
        (SYNC, 0),
        (replace(QUICK, num_workers=4), 8),
        (replace(QUICK, updates_in_flight=3, unrolls_in_flight=4), 12),
        (STREAMS, 8),
        (replace(STREAMS, groups=2), 16),
    ],
    ids=["sync", "async", "queued", "streams", "groups"],
)
def test_the_lag_that_is_recorded_is_the_lag_of_the_data(config, largest, monkeypatch):
    with lags_of_the_data(monkeypatch) as seen:
        result = train(config)
    found = result.extra["policy_lag"]
    assert {lag: count for lag, count in found.items() if count} == dict(seen)
    assert sum(found.values()) == result.learner_steps * config.unrolls_per_batch * 5
    assert result.metrics["policy_lag_max"] <= max(found)
    if config.wiring == "calls":  # on real streams somebody may be slow
        assert max(found) <= largest
    assert (max(found) > 0) == (config.update_rule == "async")


def test_the_version_may_change_within_an_unroll(monkeypatch):
    mixed = []
    gradient = sr.Learner.backward

    def seeing(self, *unrolls):
        mixed.extend(len(set(unroll.version.tolist())) for unroll in unrolls)
        return gradient(self, *unrolls)

    monkeypatch.setattr(sr.Learner, "backward", seeing)
    train(QUICK)
    assert max(mixed) > 1


def test_unrolls_are_learnt_from_first_in_first_out_and_never_more_than_allowed(monkeypatch):
    finished, learnt, most = [], [], []
    first, learn = CentralFlow.first, CentralFlow.learn

    def finishing(flow):
        most.append(max(place.untaken for place in flow.places))
        turn = first(flow)
        if turn is not None and turn.metrics is None:
            finished.append(turn.came.unroll)
        return turn

    def learning(flow, *arguments):
        learn(flow, *arguments)
        *_, learning = flow.in_flight.values()
        learnt.extend(one.unroll for one in learning.update.batch)

    monkeypatch.setattr(CentralFlow, "first", finishing)
    monkeypatch.setattr(CentralFlow, "learn", learning)
    config = replace(QUICK, num_workers=4, unrolls_in_flight=3, unrolls_per_batch=5)
    result = train(config, jitter=0.5, stragglers={"EnvWorker 2": 5.0})
    assert learnt == finished[: len(learnt)] and len(learnt) > 50
    assert max(most) == 3
    assert result.extra["unrolls_dropped"] == len(finished) - len(learnt) < 5


def test_batches_hold_what_there_is_up_to_the_most():
    config = replace(QUICK, num_workers=6)
    sizes = []
    for most, timeout_s in ((8, 0.005), (24, 0.005), (48, 0.005), (48, 0.0)):
        found = train(replace(config, inference_batch=most, inference_timeout_s=timeout_s))
        sizes.append(found.metrics["inference_batch_mean"])
    assert sizes[0] == 8 and 16 < sizes[1] <= 24 and 24 < sizes[2] <= 48
    assert sizes[3] < 16, "nobody waits"


def test_a_dead_worker_in_the_batch_costs_time_outs_and_no_more():
    """With one worker gone for good a batch of all is never full."""
    config = replace(QUICK, num_workers=3, inference_batch=24, inference_timeout_s=0.01)
    whole = train(config)
    slow = train(config, stragglers={"EnvWorker 1": 1e4})
    assert slow.wall_time_s > 3 * whole.wall_time_s
    assert slow.metrics["inference_batch_mean"] <= 16 < whole.metrics["inference_batch_mean"]


def test_a_batch_that_can_never_fill_is_refused_or_found():
    with pytest.raises(ValueError, match="wait for ever"):
        replace(QUICK, inference_batch=17, inference_timeout_s=None)
    train(replace(QUICK, inference_batch=17, total_env_steps=300))  # its time-out saves it
    stuck = replace(SYNC, inference_batch=16, inference_timeout_s=None, total_env_steps=500)
    train(stuck)
    object.__setattr__(stuck, "inference_batch", 17)  # as if nobody had looked
    with pytest.raises(RuntimeError, match="would hang"):
        train(stuck)
    # Two of three make a batch and end their unroll; the third waits for one of them, they for it.
    three = replace(SYNC, num_workers=3, unrolls_per_batch=3, total_env_steps=500)
    with pytest.raises(ValueError, match="wait for ever"):
        replace(three, inference_batch=16, inference_timeout_s=None)
    train(replace(three, inference_batch=24, inference_timeout_s=None))
    object.__setattr__(three, "inference_batch", 16)
    object.__setattr__(three, "inference_timeout_s", None)
    with pytest.raises(RuntimeError, match="would hang"):
        train(three)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wiring": "pigeon"}, "wiring"),
        ({"groups": 2}, "groups"),
        ({"wiring": "unix", "num_learners": 2, "unrolls_per_batch": 2}, "num_learners"),
        ({"unrolls_per_batch": 5}, "unrolls_per_batch"),
        ({"update_rule": "sync"}, "sync"),
        ({"address": "0.0.0.0:5000"}, "allow_remote"),
        ({"inference_timeout_s": -1.0}, "inference_timeout_s"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **changes)


# -- the virtual cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", [QUICK, SYNC], ids=["async", "sync"])
def test_the_same_seed_gives_the_same_run_and_another_order_gives_another(base):
    config = replace(base, num_workers=4, unrolls_per_batch=4, num_learners=2)
    one, same, other = train(config), train(config), train(config, seed=2, jitter=0.5)
    assert_same_run(one, same)
    assert one.wall_time_s == same.wall_time_s
    assert same_parameters(one, other) == (base is SYNC)  # who waits for all has one order


def test_a_hollow_run_predicts_the_same_clock_and_the_same_lag():
    config = replace(QUICK, num_workers=4, inference_batch=16)
    found = []
    for hollow in (False, True):
        with virtual(hollow=hollow) as runtime:
            result = sr.train(config, runtime)
        lags = result.extra["policy_lag"]
        mean = sum(lag * count for lag, count in lags.items()) / sum(lags.values())
        found.append((result.metrics["env_steps_per_s"], mean))
    (rate, lag), (hollow_rate, hollow_lag) = found
    assert 0.8 < hollow_rate / rate < 1.2 and abs(hollow_lag - lag) < 0.5


def test_five_hundred_workers_are_played_hollow():
    """Slow environments: more workers help until the server's own time is used up."""

    def rate(workers: int, batch: int) -> float:
        config = replace(
            QUICK,
            num_workers=workers,
            inference_batch=batch,
            unrolls_per_batch=4,
            total_env_steps=8_000 + 5 * 40 * workers,
        )
        costs = {**sr.COSTS, "env_step": 10e-3, "inference": 2e-6, "batch": 0.5e-3, "learn": 1e-4}
        cluster = Cluster(nodes=(Node(cores=workers + 2),), costs=costs)
        with VirtualRuntime(1, cluster, hollow=True) as runtime:
            return sr.train(config, runtime).metrics["env_steps_per_s"]

    few, more, alone, together = rate(2, 8), rate(12, 8), rate(500, 8), rate(500, 256)
    assert 4.5 * few < more < 6.5 * few
    assert alone < 0.2 * 500 / 12 * more, "a forward pass for each worker is too many"
    assert together > 4 * alone, "batches are what the server lives on"


def test_units_of_work_have_the_names_that_costs_have():
    for config in (QUICK, replace(QUICK, env_id="rlbook/Memory-v0", lstm_size=4)):
        units = sr.units_of_work(config)
        assert units.keys() == sr.COSTS.keys()
        for work in units.values():
            work()


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [QUICK, SYNC], ids=["async", "sync"])
@pytest.mark.parametrize("restart_s", [None, 0.01])
def test_workers_may_die_while_others_go_on(base, restart_s):
    config = replace(base, num_workers=3, unrolls_per_batch=3)
    whole = train(config).wall_time_s
    crashes = (
        Crash("EnvWorker 0", at_s=0.3 * whole, restart_s=restart_s),
        Crash("EnvWorker 2", at_s=0.5 * whole, restart_s=restart_s),
    )
    result = train(config, crashes=crashes)
    assert result.stopped_because == "total_env_steps"
    if restart_s is None:
        assert {"EnvWorker 3", "EnvWorker 4"} <= {span.who for span in result.spans}
    used = sum(result.extra["policy_lag"].values()) // 5
    steps = (used + result.extra["unrolls_dropped"]) * config.num_envs * config.unroll_length
    assert 0.7 * steps < result.env_steps <= steps, "what was reported was learnt from, or counted"


def test_rows_of_two_lives_are_never_in_one_unroll(monkeypatch):
    """Counter's steps tell: within an unroll each row follows from the one before."""
    register()
    config = replace(QUICK, env_id="test/Counter-v0", num_workers=3, unroll_length=4)
    gradient, seen = sr.Learner.backward, []

    def looking(self, *unrolls):
        for unroll in unrolls:
            step = unroll.env_outputs.observation[..., 2]
            follows = (step[1:] == step[:-1] + 1) | unroll.env_outputs.first[1:]
            seen.append(bool(follows.all()))
        return gradient(self, *unrolls)

    monkeypatch.setattr(sr.Learner, "backward", looking)
    whole = train(config).wall_time_s
    for restart_s in (None, 0.0, 0.02):
        seen.clear()
        times = np.linspace(0.1, 0.8, 8) * whole
        crashes = tuple(Crash("EnvWorker 1", at_s=at, restart_s=restart_s) for at in times)
        train(config, crashes=crashes[: 1 if restart_s is None else 8])
        assert all(seen) and len(seen) > 20


@pytest.mark.parametrize("who", ["Server 0", "Learner 0"])
def test_the_death_of_server_or_learner_ends_the_run(who):
    with pytest.raises(ActorDiedError, match=f"{who} died"):
        train(QUICK, crashes=(Crash(who, at_s=0.02),))


def test_it_runs_on_ray_and_real_workers_killed_by_sigkill_are_replaced(capfd):
    config = replace(QUICK, num_envs=32, inference_batch=32, total_env_steps=60_000)
    with RayRuntime(num_cpus=4) as runtime:
        with sigkill("EnvWorker", after_s=0.5):
            result = sr.train(config, runtime)
    assert result.stopped_because == "total_env_steps"
    assert {"EnvWorker 2", "Server 0", "Learner 0"} <= {span.who for span in result.spans}
    assert capfd.readouterr() == ("", "")
    assert result.learner_steps >= 60_000 // (32 * 5) - 3


@contextmanager
def killing(after_s: float, times: int = 1):
    """Sends SIGKILL to worker 0 of the next crew, some time after it plays."""
    pids: list[int] = []
    ended = threading.Event()

    def strike(crew: Crew) -> None:
        for _ in range(times):
            ended.wait(after_s)
            if not ended.is_set() and crew._children:
                pids.append(crew.pids[0])
                os.kill(crew.pids[0], signal.SIGKILL)

    enter = Crew.__enter__

    def entering(crew: Crew) -> Crew:
        enter(crew)
        threading.Thread(target=strike, args=(crew,), daemon=True).start()
        return crew

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Crew, "__enter__", entering)
        try:
            yield pids
        finally:
            ended.set()


def children() -> set[int]:
    found = set()
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ends as we look
            if "rlbook.plumbing.crew" in " ".join(one.cmdline()):
                found.add(one.pid)
    return found


def test_workers_on_streams_killed_by_sigkill_are_replaced(monkeypatch):
    """Their rows go, those of the others stay: learning goes on."""
    workers = Counter()
    learn = sr.Learner.backward

    def seeing(self, *unrolls):
        workers.update(unroll.actor for unroll in unrolls)
        return learn(self, *unrolls)

    monkeypatch.setattr(sr.Learner, "backward", seeing)
    config = replace(STREAMS, num_envs=32, inference_batch=32, total_env_steps=400_000)
    with killing(after_s=0.7) as pids:
        result = train(config)
    assert len(pids) == 1 and result.stopped_because == "total_env_steps"
    assert workers[0] > 0 and workers[1] > 0
    assert {"EnvWorker 1", "EnvWorker 2"} <= {span.who for span in result.spans}  # 2 is new
    assert not children()


def test_a_worker_that_fails_ends_the_run_and_says_why(monkeypatch):
    config = replace(STREAMS, env_id="CartPole-v1")
    made = sr.place_seed
    monkeypatch.setattr(sr, "on_streams", _broken(sr.on_streams))
    with pytest.raises(CrewError, match="no_such_method"):
        train(config)
    assert made is sr.place_seed and not children()


def _broken(on_streams):
    """Workers that are asked for what they cannot do."""

    def broken(config, stack):
        wiring = on_streams(config, stack)
        ask = wiring.crew.ask
        wiring.crew.ask = lambda index, method, *rest: ask(
            index, "no_such_method" if method == "play" else method, *rest
        )
        return wiring

    return broken


def test_ctrl_c_ends_a_run_on_streams_in_good_order(tmp_path):
    threads = threading.active_count()
    config = replace(STREAMS, total_env_steps=10_000_000, run_dir=str(tmp_path / "run"))
    with ctrl_c_at(3_000):
        result = train(config)
    assert result.stopped_because == "interrupted" and 3_000 <= result.env_steps < 100_000
    assert not children()
    end = time.monotonic() + 5
    while threading.active_count() > threads + 1 and time.monotonic() < end:
        time.sleep(0.05)  # gRPC's own poller may stay
    assert threading.active_count() <= threads + 1
    resumed = train(
        replace(
            config,
            run_dir=None,
            resume=str(tmp_path / "run"),
            total_env_steps=result.env_steps + 2_000,
        )
    )
    assert resumed.stopped_because == "total_env_steps"
    assert resumed.learner_steps > result.learner_steps


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        replace(SYNC, num_workers=2),
        replace(QUICK, num_workers=3, optimizer="adam", inference_batch=16),
        replace(QUICK, num_workers=3, unrolls_per_batch=4, num_learners=2),
        replace(QUICK, num_workers=3, lstm_size=8, unroll_length=7),
        FRAMES,
    ],
    ids=["sync", "async", "learners", "memory", "frames"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, config):
    """The power fails after a checkpoint; what is resumed ends as if it had not."""
    register()
    if config.env_id == FRAMES.env_id:
        monkeypatch.setattr(sr, "make_envs", stacked_envs)
    config = replace(config, checkpoint_every_s=0.05, anneal_learning_rate=True)
    end_as_if_it_had_not_failed(tmp_path, monkeypatch, config)


def end_as_if_it_had_not_failed(tmp_path, monkeypatch, config):
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))
    saved = []
    save, record = Run.checkpoint, Run.record

    def saving(run: Run) -> None:
        save(run)
        saved.append(run.env_steps)

    def until(run: Run, **turn) -> None:
        record(run, **turn)
        if saved and run.env_steps > saved[-1] + 300:
            raise EOFError

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", saving)
        patch.setattr(Run, "record", until)
        with pytest.raises(EOFError):
            train(replace(config, run_dir=str(tmp_path / "cut")))
    assert saved[-1] < config.total_env_steps - 500
    resumed = train(replace(config, resume=str(tmp_path / "cut")))
    assert_same_run(whole, resumed)
    assert whole.extra == resumed.extra
    assert np.isclose(whole.wall_time_s, resumed.wall_time_s, rtol=1e-6, atol=0)
    assert same_parameters(whole, Result.load(tmp_path / "cut"))


@pytest.mark.parametrize("lstm_size", [0, 6])
def test_without_lag_a_run_on_streams_resumes_bit_for_bit_too(tmp_path, lstm_size):
    """Who waits for all has one order, on real processes as well."""
    config = replace(SYNC, wiring="unix", total_env_steps=2_400, lstm_size=lstm_size)
    whole = train(replace(config, wiring="calls"))
    half = replace(config, total_env_steps=1_200, run_dir=str(tmp_path / "half"))
    train(half)
    resumed = train(replace(config, resume=str(tmp_path / "half")))
    assert same_parameters(whole, resumed) and whole.env_steps == resumed.env_steps
    assert same_parameters(resumed, Result.load(tmp_path / "half"))


def test_a_run_on_streams_loses_no_unroll_at_a_rest(tmp_path, monkeypatch):
    """What is finished and fills no batch is learnt from first in a resumed run."""
    config = replace(STREAMS, unrolls_per_batch=3, unrolls_in_flight=4, total_env_steps=1_500)
    for attempt in range(5):  # until somebody has just finished one
        folder = tmp_path / str(attempt)
        train(replace(config, run_dir=str(folder), checkpoint_every_s=0.05))
        if kept := load_checkpoint(folder / "checkpoint.npz")["parts"]["streams"]["queue"]:
            break
    gradient, seen = sr.Learner.backward, []

    def seeing(self, *unrolls):
        seen.extend(unrolls)
        return gradient(self, *unrolls)

    monkeypatch.setattr(sr.Learner, "backward", seeing)
    resumed = train(replace(config, resume=str(folder), total_env_steps=3_000))
    assert resumed.extra["unrolls_dropped"] == 0
    assert kept
    for one, unroll in zip(kept, seen, strict=False):
        assert one["place"] == unroll.actor
        assert np.array_equal(one["unroll"][0][0], unroll.env_outputs.observation)


def test_what_a_run_on_streams_measures_is_known(tmp_path):
    result = train(replace(STREAMS, run_dir=str(tmp_path / "run")))
    assert set(result.curves) <= set(METRICS)
    assert result.metrics["inference_batch_mean"] == 8
    # What is seen, and one action: parameters never travel.
    assert 20 < result.metrics["bytes_per_env_step"] < 35
    assert {"Inference 0", "Learner 0", "EnvWorker 0", "driver"} <= {s.who for s in result.spans}
    assert math.isfinite(result.metrics["loss"])
    stepped = [s for s in result.spans if s.what == "step"]
    assert {s.who for s in stepped} == {"EnvWorker 0", "EnvWorker 1"}
    assert all(0 < s.end - s.start < 1 for s in stepped)


# -- several servers -------------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", ["calls", "tcp"])
def test_several_servers_act_as_one(wiring, tmp_path):
    """Each worker's rows are a batch of their own, whoever acts upon them; and they resume."""
    config = replace(SYNC, num_workers=3, unrolls_per_batch=3, total_env_steps=1_200)
    one = train(config)
    config = replace(config, wiring=wiring, num_inference=2)
    half = train(replace(config, total_env_steps=600, run_dir=str(tmp_path / "half")))
    resumed = train(replace(config, resume=str(tmp_path / "half")))
    assert same_parameters(one, resumed) and one.env_steps == resumed.env_steps
    kind = "Server" if wiring == "calls" else "Inference"
    assert {f"{kind} 0", f"{kind} 1"} <= {span.who for span in half.spans}


def test_several_servers_rest_and_go_on_without_losing_a_worker(tmp_path):
    """Checkpoints of a run without waiting: all workers rest, and all play again."""
    config = replace(STREAMS, num_workers=3, num_inference=2, total_env_steps=20_000)
    config = replace(config, run_dir=str(tmp_path / "run"), checkpoint_every_s=0.2)
    result = train(config)
    assert result.stopped_because == "total_env_steps" and not children()
    names = {span.who for span in result.spans if span.who.startswith("EnvWorker")}
    assert names == {"EnvWorker 0", "EnvWorker 1", "EnvWorker 2"}, "nobody was replaced"


@pytest.mark.parametrize("base", ["vtrace", "r2d2"])
def test_servers_and_learner_may_be_on_other_devices(base):
    """Another name for where we are ("cpu:0"), so that all goes the way it goes to a GPU."""
    config = replace(SYNC, env_id="rlbook/Memory-v0", lstm_size=6, total_env_steps=600)
    if base == "r2d2":
        config = replace(REPLAY_SYNC, total_env_steps=600)
    here = train(config)
    devices = {"device": "cpu:0", "inference_devices": ("cpu", "cpu:0"), "num_inference": 2}
    there = train(replace(config, **devices))
    a, b = here.policy.network.state_dict(), there.policy.network.state_dict()
    assert here.learner_steps == there.learner_steps > 3
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-4), name


def test_encrypted_streams_carry_a_run(tmp_path):
    pair = certificate(tmp_path)
    plain = replace(SYNC, wiring="tcp", total_env_steps=400)
    files = {"tls_certificate": pair.certificate, "tls_key": pair.key, "tls_name": pair.name}
    assert same_parameters(train(replace(plain, **files)), train(plain))


# -- R2D2's learner --------------------------------------------------------------------------------

REPLAY = replace(
    sr.PRESETS["r2d2"],
    wiring="calls",
    progress=False,
    num_envs=4,
    inference_batch=4,
    lstm_size=6,
    hidden_sizes=(8,),
    batch_size=8,
    learning_starts=20,
    target_period=10,
    total_env_steps=2_400,
    log_every_env_steps=400,
)
REPLAY_SYNC = replace(REPLAY, update_rule="sync", unrolls_in_flight=1, unrolls_per_batch=2)


def trained_by_r2d2(config: sr.Config) -> Result:
    names = set(vars(r2d2.Config())) & set(vars(config)) - {"runtime"}
    shared = {name: getattr(config, name) for name in names}
    shared |= {"num_actors": config.num_workers, "optimizer_epsilon": config.adam_epsilon}
    alone = {"updates_per_call": 1, "calls_in_flight": 1, "broadcast_period": 1}
    costs = Cluster(nodes=(Node(cores=8),), costs=r2d2.COSTS)
    with VirtualRuntime(1, costs) as runtime:
        return r2d2.train(r2d2.Config(**(shared | alone)), runtime)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"wiring": "unix", "total_env_steps": 1_200},
        {"env_id": "CartPole-v1", "lstm_size": 0, "burn_in_length": 0, "rescaling_epsilon": None},
        {"num_workers": 1, "unrolls_per_batch": 1, "state_init": "zero", "unroll_length": 7},
    ],
    ids=["memory", "streams", "cartpole", "one"],
)
def test_with_replay_it_is_r2d2_bit_for_bit(changes):
    """The same rows, actions, sequences, priorities, draws and updates, one after the other."""
    config = replace(REPLAY_SYNC, **changes)
    mine, theirs = train(config), trained_by_r2d2(config)
    assert mine.env_steps == theirs.env_steps
    assert mine.learner_steps == theirs.learner_steps > 50
    assert same_parameters(mine, theirs)
    assert mine.metrics["episode_return_mean"] == theirs.metrics["episode_return_mean"]
    assert not same_parameters(mine, trained_by_r2d2(replace(config, seed=2)))


def test_what_is_learnt_from_replay_is_what_was_owed():
    result = train(REPLAY)
    rows = sum(result.extra["policy_lag"].values()) * REPLAY.num_envs
    owed = REPLAY.samples_per_insert * rows / REPLAY.sequence_length
    assert 0.8 * owed < result.learner_steps * REPLAY.batch_size <= owed
    assert set(result.curves) <= set(METRICS)
    assert result.metrics["replay_size"] > 100 and result.metrics["policy_lag_max"] <= 8


@pytest.mark.parametrize("base", [REPLAY, REPLAY_SYNC], ids=["async", "sync"])
def test_a_run_with_replay_resumes_bit_for_bit(base, tmp_path, monkeypatch):
    config = replace(base, checkpoint_every_s=0.2)
    end_as_if_it_had_not_failed(tmp_path, monkeypatch, config)


def test_the_same_seed_gives_the_same_run_with_replay():
    one, same, other = train(REPLAY), train(REPLAY), train(REPLAY, seed=2, jitter=0.5)
    assert_same_run(one, same)
    assert not same_parameters(one, other)


def test_a_sequence_has_rows_of_one_episode_of_one_life(monkeypatch):
    """Counter's numbers tell: they follow from each other, and copy and episode stay."""
    register()
    config = replace(REPLAY, env_id="test/Counter-v0", num_workers=3, unroll_length=4)
    config = replace(config, sequence_length=3, sequence_overlap=1, n_step=2, burn_in_length=2)
    config = replace(config, total_env_steps=900, samples_per_insert=1.0)
    keep, learners = sr.SequenceLearner.keep, []

    def keeping(self, unroll):
        learners.append(self)
        keep(self, unroll)

    monkeypatch.setattr(sr.SequenceLearner, "keep", keeping)
    whole = train(config).wall_time_s
    for restart_s in (None, 0.0, 0.02):
        times = np.linspace(0.1, 0.8, 1 if restart_s is None else 8) * whole
        crashes = tuple(Crash("EnvWorker 1", at_s=at, restart_s=restart_s) for at in times)
        train(config, crashes=crashes)
        assert_rows_follow(learners[-1].memory, copies=4)


def assert_rows_follow(memory, copies: int):
    items = memory.sample(2_000).items
    seen, valid = items.observation, items.valid
    there = np.concatenate([valid, np.zeros_like(valid[:, :1])], 1)
    there[:, 1:] |= valid  # where a step led
    assert len(np.unique(seen[there][:, 0])) >= copies
    for row, known in zip(seen, there, strict=True):
        copy, episode, step = row[known].T
        assert (copy == copy[0]).all() and (episode == episode[0]).all()
        assert (np.diff(step) == 1).all()


def test_a_sequence_ends_where_episodes_were_begun_anew_after_a_rest():
    """An environment that cannot be saved is reset; the server's slot goes on."""
    register()
    config = replace(REPLAY, env_id="test/Counter-v0", unroll_length=4, burn_in_length=2)
    config = replace(config, sequence_length=3, sequence_overlap=1, n_step=2)
    envs, server = sr.make_game(config, 4, 0), sr.make_inference(config)
    learner, row = sr.SequenceLearner(config), envs.env_output
    for _ in range(6):
        while (unroll := server.observe(Who(0, 0), row)) is None:
            row = envs.step(server.act([0])[0])
        learner.keep(unroll)
        row = envs.reset(seed=1)
    assert_rows_follow(learner.memory, copies=4)


def test_the_score_is_of_the_copies_that_explore_least():
    config = replace(REPLAY, num_workers=3, groups=1, scored_fraction=0.25)
    ladder = config.epsilons
    assert ladder.shape == (3, 4) and ladder.max() == 0.4
    assert ladder.min() == pytest.approx(0.4**8)
    assert np.array_equal(np.sort(ladder, None)[::-1], ladder.T.ravel()), "dealt in turn"
    for place in range(3):
        episodes = [Episode(env, 1.0, 1) for env in range(4)]
        came = Finished(place, [], None, Report(4, episodes, {}))
        assert [one.env for one in scored(config, came)] == [3]
        assert scored(replace(config, learner="vtrace"), came) == episodes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner": "dqn"}, "learner"),
        ({"sequence_overlap": 10}, "sequence_overlap"),
        ({"num_learners": 2}, "num_learners"),
        ({"unrolls_per_batch": 2}, "unrolls_per_batch"),
        ({"samples_per_insert": 0.0}, "samples_per_insert"),
        ({"replay_capacity": 10}, "replay_capacity"),
        ({"state_init": "random"}, "state_init"),
        ({"epsilon_base": 1.5}, "epsilon_base"),
        ({"scored_fraction": 2.0}, "scored_fraction"),
        ({"num_inference": 3}, "num_inference"),
        ({"tls_key": "key.pem"}, "tls_key"),
        ({"inference_timeout_s": None, "num_inference": 2, "inference_batch": 5}, "for ever"),
        ({"inference_timeout_s": None, "num_workers": 3, "inference_batch": 8}, ""),
    ],
)
def test_settings_of_replay_that_cannot_work_are_refused(changes, message):
    if not message:
        replace(REPLAY, **changes)
        return
    with pytest.raises(ValueError, match=message):
        replace(REPLAY, **changes)


def test_it_remembers_what_no_agent_without_memory_can():
    config = replace(sr.PRESETS["r2d2"], wiring="calls", progress=False, total_env_steps=30_000)
    assert train(replace(config, stop_at_return=0.9)).stopped_because == "solved"
