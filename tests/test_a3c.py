"""A3C: what it reduces to, what is lost and what is not, who survives, what memory is good for."""

import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import psutil
import pytest
import torch

from rlbook import a3c
from rlbook import policy_gradient as pg
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.parts.flat import Flat
from rlbook.parts.optim import RMSProp
from rlbook.parts.recurrent import unrolled
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.crew import CrewError
from rlbook.plumbing.hogwild import counted_parameters, updates_lost
from rlbook.plumbing.interleave import interleave, play
from rlbook.plumbing.runtime import RayRuntime
from rlbook.plumbing.virtual import VirtualRuntime
from tests.counters import register
from tests.runs import assert_same_run, ctrl_c_at, same_parameters

QUICK = a3c.Config(
    progress=False,
    num_envs=8,
    unroll_length=5,
    lambda_=1.0,
    entropy_cost=0.02,
    total_env_steps=4_000,
    log_every_env_steps=500,
)
SERVED = replace(QUICK, wiring="parameter_server", runtime="virtual")
PAUSES = 6
"""Of a round without locks."""


def in_one_process(config: a3c.Config) -> tuple[list[a3c.Worker], a3c.SharedArrays]:
    """The workers and what they share, made as `train` makes them."""
    torch.set_num_threads(1)  # with two, the same seed gives other weights in the last bit
    network = a3c.make_network(config, a3c.make_envs(config.env_id, 1, config.seed))
    kinds = 2 if config.optimizer == "adam" else 1
    owners = 1 if config.share_statistics else config.num_workers
    start = Flat(network).vector.numpy()
    register()  # copies of Counter are counted from 0
    memory = counted_parameters(start, config.num_workers, kinds, owners)
    return [a3c.Worker(config, i, memory) for i in range(config.num_workers)], memory


def values(memory: a3c.SharedArrays) -> np.ndarray:
    return memory["parameters"]["value"].copy()


def virtual(seed=1, cores=8, hollow=False, **cluster) -> VirtualRuntime:
    nodes = (Node(cores=cores),)
    return VirtualRuntime(seed, Cluster(nodes=nodes, costs=a3c.COSTS, **cluster), hollow=hollow)


def served(config: a3c.Config, seed: int = 1, **cluster) -> Result:
    with virtual(seed, **cluster) as runtime:
        return a3c.train(config, runtime)


# -- reductions ------------------------------------------------------------------------------------


def a2c_of(config: a3c.Config, **changes) -> pg.Config:
    """A2C with the same settings."""
    shared = {name: getattr(config, name) for name in vars(pg.Config()) if hasattr(config, name)}
    return pg.Config(**{**shared, **changes})


@pytest.mark.parametrize("env_id", ["CartPole-v1", "test/Counter-v0"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("update", ["hogwild", "locked"])
def test_one_worker_is_a2c_bit_for_bit(update, optimizer, env_id):
    """Forty updates; Counter's episodes end by termination and by truncation in turn."""
    config = replace(QUICK, num_workers=1, update=update, optimizer=optimizer, env_id=env_id)
    register()
    (worker,), memory = in_one_process(config)
    register()
    theirs = a2c_of(config)
    envs = pg.make_envs(env_id, config.num_envs, config.seed)
    network = pg.make_network(theirs, envs)
    actor, learner = pg.Actor(envs, network, theirs), pg.Learner(network, theirs)
    start = values(memory)
    for _ in range(40):
        report = worker.rounds(1)
        unroll, valid, env_steps = actor.unroll()
        metrics = learner.update(unroll, valid)
        assert report.env_steps == env_steps and report.metrics == metrics
    assert np.array_equal(values(memory), learner.flat.vector.numpy())
    assert not np.array_equal(values(memory), start)
    assert (memory["parameters"]["count"] == 40).all() and memory["updates"].tolist() == [40]


def test_one_process_is_a2c_bit_for_bit():
    mine = a3c.train(replace(QUICK, num_workers=1))
    theirs = pg.train(a2c_of(QUICK, total_env_steps=mine.env_steps))
    assert same_parameters(mine, theirs)
    assert mine.learner_steps == theirs.learner_steps and mine.env_steps == theirs.env_steps
    assert mine.extra == {"updates_lost": 0.0, "updates_lost_max": 0.0}
    assert mine.metrics["episodes"] == theirs.metrics["episodes"]
    other = pg.train(a2c_of(QUICK, total_env_steps=mine.env_steps, seed=2))
    assert not same_parameters(mine, other)


@pytest.mark.parametrize("shards", [1, 3])
def test_one_worker_and_a_server_are_a2c_bit_for_bit(shards):
    mine = served(replace(SERVED, num_workers=1, num_shards=shards))
    theirs = pg.train(a2c_of(QUICK, total_env_steps=mine.env_steps))
    assert same_parameters(mine, theirs)
    assert mine.learner_steps == theirs.learner_steps and mine.env_steps == theirs.env_steps
    assert mine.extra["staleness"] == {0: mine.learner_steps}, "always from the newest"


# -- interleavings ---------------------------------------------------------------------------------


def test_an_update_that_another_overwrites_is_lost_whole_and_counted_as_one():
    """Worker 0 has read the pairs; worker 1 makes a whole round; worker 0 writes."""
    config = replace(QUICK, num_workers=2)
    (w0, w1), memory = in_one_process(config)
    trace = play([w0, w1], [0] * (PAUSES - 1) + [1] * PAUSES + [0])
    assert trace[-1] == trace[PAUSES + 4 + 1] == (0, "wrote pairs")
    assert memory["updates"].tolist() == [1, 1]
    assert (memory["parameters"]["count"] == 1).all()
    assert updates_lost(memory) == {"updates_lost": 0.5, "updates_lost_max": 0.5}
    (alone, _), undisturbed = in_one_process(config)
    alone.rounds(1)
    assert np.array_equal(values(memory), values(undisturbed)), "as if worker 1 had not been there"


def test_updates_that_come_one_after_the_other_are_all_there():
    """The gradients overlap (both were computed from the same parameters), the updates do not."""
    (w0, w1), memory = in_one_process(replace(QUICK, num_workers=2))
    play([w0, w1], [0, 1, 0, 1, *[0] * 4, *[1] * 4])
    assert (memory["parameters"]["count"] == 2).all()
    assert updates_lost(memory)["updates_lost_max"] == 0.0


def test_part_of_an_update_may_be_lost():
    _, memory = in_one_process(replace(QUICK, num_workers=2))
    memory["updates"][:] = 3, 5
    memory["parameters"]["count"] = 8
    memory["parameters"]["count"][:10] = 6
    size = len(memory["parameters"])
    lost = updates_lost(memory)
    assert np.isclose(lost["updates_lost"], (2 / 8) * 10 / size)
    assert lost["updates_lost_max"] == 2 / 8


def test_the_same_interleaving_gives_the_same_parameters_bit_for_bit():
    found = []
    for seed in (1, 1, 2):
        workers, memory = in_one_process(replace(QUICK, num_workers=3))
        trace = interleave(workers, seed, rounds=8)
        found.append((trace, memory.state_dict()))
    assert found[0][0] == found[1][0] != found[2][0]
    for name, array in found[0][1].items():
        assert np.array_equal(array, found[1][1][name]), name
    assert not np.array_equal(found[0][1]["parameters"], found[2][1]["parameters"])
    assert 0 < updates_lost(found[0][1])["updates_lost"] < 1


def test_with_locks_no_order_loses_anything():
    for seed in range(3):
        workers, memory = in_one_process(replace(QUICK, num_workers=3, update="locked"))
        words = {said for _, said in interleave(workers, seed, rounds=8)}
        assert words == {"read parameters", "computed gradient"}, "within the lock nobody pauses"
        assert (memory["parameters"]["count"] == 3 * 8).all()


def test_workers_that_are_never_interleaved_are_sequential_with_and_without_locks():
    found = []
    for update in ("hogwild", "locked"):
        workers, memory = in_one_process(replace(QUICK, num_workers=3, update=update))
        for who in (0, 1, 2, 2, 1, 0, 0):
            workers[who].rounds(1)
        assert (memory["parameters"]["count"] == 7).all()
        found.append(values(memory))
    workers, memory = in_one_process(replace(QUICK, num_workers=3))
    play(workers, [who for who in (0, 1, 2, 2, 1, 0, 0) for _ in range(PAUSES)])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], values(memory))


def test_a_round_starts_from_the_parameters_of_the_moment():
    (w0, w1), memory = in_one_process(replace(QUICK, num_workers=2))
    w0.rounds(3)
    before = values(memory)
    round_1 = w1.round()
    assert next(round_1) == "read parameters"
    assert np.array_equal(w1.flat.vector.numpy(), before)
    w0.rounds(1)
    assert not np.array_equal(values(memory), before)
    assert next(round_1) == "computed gradient"
    assert np.array_equal(w1.flat.vector.numpy(), before), "its copy is its own"


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("share", [True, False])
def test_statistics_are_shared_or_not_as_asked(share, optimizer):
    """Against PyTorch-like optimisers that are given the workers' gradients: one, or one each."""
    config = replace(
        QUICK, num_workers=2, share_statistics=share, share_step=share, optimizer=optimizer
    )
    workers, memory = in_one_process(config)
    vector = torch.from_numpy(values(memory))
    vector.grad = torch.zeros_like(vector)
    kinds = {
        "rmsprop": lambda: RMSProp([vector], lr=config.learning_rate, eps=config.rmsprop_epsilon),
        "adam": lambda: torch.optim.Adam([vector], lr=config.learning_rate),
    }
    one = kinds[optimizer]()
    optimizers = [one, one] if share else [kinds[optimizer]() for _ in workers]
    for who in (0, 1, 1, 0, 1):
        workers[who].rounds(1)
        vector.grad.copy_(workers[who].flat.gradients)
        optimizers[who].step()
        assert np.array_equal(values(memory), vector.numpy())


def test_a_step_that_is_not_shared_makes_other_steps():
    """Two updates are in the shared means, but worker 1 corrects them for one: a larger stride."""
    ends = []
    for share in (True, False):
        config = replace(QUICK, num_workers=2, optimizer="adam", share_step=share)
        workers, memory = in_one_process(config)
        workers[0].rounds(1)
        before = values(memory)
        workers[1].rounds(1)
        ends.append(np.linalg.norm(values(memory) - before))
    assert ends[1] > 1.2 * ends[0]


def test_the_learning_rate_falls_to_zero_over_the_run():
    config = replace(QUICK, num_workers=2, anneal_learning_rate=True, total_env_steps=800)
    workers, memory = in_one_process(config)
    strides = []
    for turn in range(60):
        before = values(memory)
        workers[turn % 2].rounds(1)
        strides.append(float(np.abs(values(memory) - before).max()))
        if memory["env_steps"].sum() >= 800:
            break
    assert memory["env_steps"].sum() >= 800 and strides[0] > 0 and strides[-1] == 0.0
    third = len(strides) // 3
    assert np.mean(strides[:third]) > 2 * np.mean(strides[-third:])


# -- memory ----------------------------------------------------------------------------------------


MEMORY = replace(a3c.PRESETS["memory"], num_workers=1, unroll_length=13, progress=False)


def test_the_learner_recomputes_what_the_actor_said():
    """Unrolls begin in the middle of episodes: the state before them must be kept, and reset."""
    worker = a3c.Worker(MEMORY, 0)
    torch.nn.init.orthogonal_(worker.network.policy_head.weight)
    for _ in range(4):
        unroll = worker.unroll()
        with torch.no_grad():
            logits, values = unrolled(worker.network, unroll)
        assert np.allclose(logits[:-1].numpy(), unroll.agent_outputs.logits, atol=1e-5)
        assert np.allclose(values[:-1].numpy(), unroll.agent_outputs.value, atol=1e-5)
    assert unroll.env_outputs.first[1:].any() and not unroll.env_outputs.first[0].any()
    wrong = unroll._replace(agent_state=worker.network.initial_state(MEMORY.num_envs))
    with torch.no_grad():
        assert not np.allclose(
            unrolled(worker.network, wrong)[0][:-1].numpy(), unroll.agent_outputs.logits, atol=1e-4
        )


def test_memory_is_learnt_with_an_lstm_and_not_without():
    config = replace(
        a3c.PRESETS["memory"],
        wiring="parameter_server",
        runtime="virtual",
        progress=False,
        stop_at_return=0.9,
        total_env_steps=150_000,
    )
    assert a3c.train(config).stopped_because == "solved"
    without = a3c.train(replace(config, lstm_size=0, total_env_steps=50_000))
    assert abs(without.evaluate(400).mean) < 0.2


# -- processes -------------------------------------------------------------------------------------


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@contextmanager
def at_env_steps(env_steps: int, act, monkeypatch):
    """Calls `act(run)` in the turn in which a run passes so many environment steps."""
    record, acted = Run.record, []

    def recording(self: Run, **turn) -> None:
        record(self, **turn)
        if self.env_steps >= env_steps and not acted:
            acted.append(True)
            act(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", recording)
        yield


PAPERLIKE = replace(QUICK, num_envs=1, total_env_steps=8_000)


@pytest.mark.parametrize("update", ["hogwild", "locked"])
def test_processes_lose_updates_without_locks_and_none_with_them(update, capfd, tmp_path):
    before = children()
    result = a3c.train(replace(PAPERLIKE, update=update, run_dir=str(tmp_path / "run")))
    assert children() == before and capfd.readouterr() == ("", "")
    assert result.stopped_because == "total_env_steps" and result.env_steps >= 8_000
    assert result.learner_steps >= result.env_steps / 5  # some rows are no steps
    lost = result.extra
    assert (lost["updates_lost_max"] > 0) == (update == "hogwild")
    assert 0 <= lost["updates_lost"] <= lost["updates_lost_max"] * (1 + 1e-12) < 0.5
    assert np.nanmax(result.curves["updates_lost"]) < 0.5
    assert {"Worker 0", "Worker 1", "driver"} == {span.who for span in result.spans}
    assert {"rounds", "__init__", "wait", "state_dict"} >= {span.what for span in result.spans}
    assert str(result.why()).startswith("Bound by ")
    parts = [result.metrics[f"{part}_time_fraction"] for part in ("env", "inference", "gradient")]
    assert min(parts) > 0.01 and sum(parts) < 1
    assert same_parameters(result, Result.load(tmp_path / "run"))


def test_a_run_of_one_process_goes_on_bit_for_bit(tmp_path):
    config = replace(QUICK, num_workers=1, run_dir=str(tmp_path / "run"), optimizer="adam")
    first = a3c.train(config)
    more = {"total_env_steps": 8_000, "run_dir": None}
    resumed = a3c.train(replace(config, resume=str(tmp_path / "run"), **more))
    whole = a3c.train(replace(config, **more))
    assert first.env_steps < resumed.env_steps == whole.env_steps
    assert resumed.learner_steps == whole.learner_steps
    assert same_parameters(resumed, whole) and not same_parameters(first, whole)


def test_a_run_of_two_processes_is_kept_and_goes_on(tmp_path):
    config = replace(QUICK, run_dir=str(tmp_path / "run"), checkpoint_every_s=0.02, lstm_size=8)
    first = a3c.train(config)
    kept = Result.load(tmp_path / "run")
    assert same_parameters(first, kept) and kept.evaluate(5).lengths.sum() > 0
    more = {"total_env_steps": 8_000, "run_dir": None}
    second = a3c.train(replace(config, resume=str(tmp_path / "run"), **more))
    assert second.env_steps >= 8_000 > first.env_steps and not same_parameters(first, second)
    assert second.learner_steps > first.learner_steps


@pytest.mark.parametrize("update", ["hogwild", "locked"])
def test_a_killed_worker_is_replaced_and_what_is_shared_lives_on(update, monkeypatch, capfd):
    seen = {}

    def kill(run: Run) -> None:
        crew, memory = run.parts["crew"], run.parts["memory"]
        os.kill(crew.pids[0], signal.SIGKILL)
        psutil.Process(crew.pids[0]).wait(10)
        seen.update(memory=memory, made=memory["updates"][0], before=values(memory))

    config = replace(PAPERLIKE, num_envs=8, total_env_steps=20_000, update=update)
    with at_env_steps(5_000, kill, monkeypatch):
        result = a3c.train(config)
    memory = seen["memory"]
    assert result.stopped_because == "total_env_steps"
    assert {"Worker 0", "Worker 1", "Worker 2"} <= {span.who for span in result.spans}
    assert memory["updates"][0] > seen["made"], "the new one counts on in the dead one's place"
    if update == "locked":  # the dead one may have died between its count and its write
        lost = memory["updates"].sum() - memory["parameters"]["count"]
        assert lost.min() >= 0 and lost.max() <= 1
    # What had been learnt was not lost: from one update to the next parameters move by little.
    assert np.isfinite(values(memory)).all()
    assert np.linalg.norm(seen["before"]) > 0 and capfd.readouterr() == ("", "")


def test_ctrl_c_ends_a_run_in_good_order_and_errors_leave_nobody(tmp_path, monkeypatch):
    before = children()
    with ctrl_c_at(3_000):
        result = a3c.train(replace(PAPERLIKE, run_dir=str(tmp_path / "run")))
    assert result.stopped_because == "interrupted" and children() == before
    assert same_parameters(result, Result.load(tmp_path / "run"))

    def fail(run: Run) -> None:
        run.parts["crew"].ask(1, "rounds", "many")

    with at_env_steps(1_000, fail, monkeypatch):
        with pytest.raises(CrewError, match="Worker 1 failed in rounds(.|\n)*TypeError"):
            a3c.train(QUICK)
    assert children() == before


# -- with a parameter server -----------------------------------------------------------------------


def test_the_same_seed_gives_the_same_run_and_another_order_gives_another():
    config = replace(SERVED, num_workers=4, calls_in_flight=2, num_shards=2)
    one, same = served(config), served(config)
    assert_same_run(one, same)
    assert one.wall_time_s == same.wall_time_s
    assert not same_parameters(one, served(config, seed=2, jitter=0.5))
    assert max(one.extra["staleness"]) >= 4 and one.metrics["staleness_mean"] > 1
    assert one.learner_steps == sum(one.extra["staleness"].values())


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch):
    """The power fails after a checkpoint; what is resumed ends as if it had not."""
    config = replace(SERVED, num_workers=3, lstm_size=8, checkpoint_every_s=0.03)
    whole = served(replace(config, run_dir=str(tmp_path / "whole")))
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
            served(replace(config, run_dir=str(tmp_path / "cut")))
    assert saved[-1] < config.total_env_steps - 500
    resumed = served(replace(config, resume=str(tmp_path / "cut")))
    assert_same_run(whole, resumed)
    assert np.isclose(whole.wall_time_s, resumed.wall_time_s, rtol=1e-6, atol=0)


def test_gradients_that_are_too_old_are_refused_and_workers_may_die():
    config = replace(SERVED, num_workers=6, max_staleness=3)
    refused = served(config)
    assert refused.extra["refused"]["stale"] > 0
    assert refused.learner_steps == (
        sum(refused.extra["staleness"].values()) - refused.extra["refused"]["stale"]
    )
    whole = served(replace(config, max_staleness=None)).wall_time_s
    crashes = (Crash("Worker 0", at_s=0.3 * whole), Crash("Shard 0", at_s=0.5 * whole))
    died = served(replace(config, max_staleness=None), crashes=crashes)
    assert died.stopped_because == "total_env_steps"
    assert sum(died.extra["staleness"].values()) == died.learner_steps


def test_a_hollow_run_predicts_the_same_clock_and_plays_thousands():
    config = replace(SERVED, num_workers=4)
    rates = []
    for hollow in (False, True):
        with virtual(hollow=hollow) as runtime:
            rates.append(a3c.train(config, runtime).metrics["env_steps_per_s"])
    assert 0.9 < rates[1] / rates[0] < 1.1
    scaling = []
    for workers in (4, 20, 1_000):
        many = replace(config, num_workers=workers, total_env_steps=2_000 + workers * 80)
        with virtual(cores=workers + 1, hollow=True) as runtime:
            scaling.append(a3c.train(many, runtime).metrics["env_steps_per_s"])
    assert all(more > less for less, more in pairwise(scaling[:2]))
    assert scaling[2] < 50 * scaling[0], "one shard cannot feed a thousand"


def test_units_of_work_have_the_names_that_costs_have():
    units = a3c.units_of_work(QUICK)
    assert units.keys() == a3c.COSTS.keys()
    for work in units.values():
        work()


def test_a_real_run_on_ray_learns(capfd):
    config = replace(
        a3c.PRESETS["parameter_server"], progress=False, total_env_steps=100_000, num_shards=2
    )
    with RayRuntime(num_cpus=4) as runtime:
        result = a3c.train(config, runtime)
    assert capfd.readouterr() == ("", "")
    assert result.metrics["episode_return_mean"] > 45
    assert result.learner_steps == sum(result.extra["staleness"].values())
    assert {"Worker 0", "Worker 1", "Shard 0", "Shard 1"} <= {span.who for span in result.spans}
    assert result.metrics["gradient_time_fraction"] > 0.05


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"wiring": "threads"}, "wiring: must be one of shared_memory, parameter_server"),
        ({"update": "atomic"}, "update: must be one of hogwild, locked"),
        ({"optimizer": "sgd"}, "optimizer: must be one of rmsprop, adam"),
        ({"runtime": "mpi"}, "runtime: must be one of ray, virtual"),
        ({"num_workers": 0}, "num_workers: must be at least 1"),
        ({"rounds_per_report": 0}, "rounds_per_report: must be at least 1"),
        ({"lstm_size": -1}, "lstm_size: must be at least 0"),
        ({"rmsprop_epsilon": 0.0}, "rmsprop_epsilon: must be larger than 0"),
        ({"rmsprop_decay": 1.5}, "rmsprop_decay: must be"),
        ({"wiring": "parameter_server", "anneal_learning_rate": True}, "anneal_learning_rate: "),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        a3c.Config(**settings)


def test_presets_are_what_they_say():
    paper = a3c.PRESETS["paper"]
    assert (paper.num_envs, paper.unroll_length, paper.lambda_) == (1, 5, 1.0)
    assert (paper.rmsprop_decay, paper.rmsprop_epsilon, paper.learning_rate) == (0.99, 0.1, 7e-4)
    assert (paper.entropy_cost, paper.discount) == (0.01, 0.99) and paper.anneal_learning_rate
    assert a3c.PRESETS["memory"].lstm_size > 0
    assert a3c.PRESETS["atari"].env_id.startswith("ALE/")
