"""Gorila: reductions to DQN, targets by server updates, refusals, sharing, faults, checkpoints."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlbook import dqn, gorila
from rlbook.data import Transition
from rlbook.harness.log import METRICS
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.parts.replay import Sample
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.codecs import Identity, decode
from rlbook.plumbing.faults import sigkill
from rlbook.plumbing.replay_server import ReplayServer, ReplayShard
from rlbook.plumbing.runtime import RayRuntime
from rlbook.plumbing.shard import Weights
from rlbook.plumbing.virtual import VirtualRuntime
from tests.runs import assert_same_run, same_parameters

SHARED = {
    "progress": False,
    "num_envs": 4,
    "learning_starts": 64,
    "batch_size": 16,
    "hidden_sizes": (16,),
    "log_every_env_steps": 150,
    "epsilon_steps": 300,
    "target_period": 7,
    "replay_capacity": 400,
    "total_env_steps": 900,
    "learning_rate": 1e-3,
    "n_step": 3,
    "update_period": 1,
}
QUICK = gorila.Config(**SHARED, update_rule="async")
APART = replace(QUICK, bundled=False, num_actors=3, num_learners=2, num_replays=2)
ONE = {"num_workers": 1, "num_actors": 1, "num_learners": 1, "num_replays": 1}


def virtual(seed=1, cores=8, **cluster) -> VirtualRuntime:
    return VirtualRuntime(seed, Cluster(nodes=(Node(cores=cores),), costs=gorila.COSTS, **cluster))


def train(config: gorila.Config, seed: int = 1, **cluster) -> Result:
    with virtual(seed, **cluster) as runtime:
        return gorila.train(config, runtime)


def weights_of(network: torch.nn.Module, version: int) -> Weights:
    vector = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
    return Weights(version, Identity().encode(vector.numpy()))


# -- reductions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bundled", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update_period": 3, "double": False, "n_step": 1},
        {"target_period": 1, "num_envs": 7, "seed": 5},
    ],
    ids=["default", "period", "others"],
)
def test_one_synchronous_worker_is_dqn_bit_for_bit(bundled, settings):
    config = {**SHARED, **settings}
    theirs = dqn.train(dqn.Config(**config))
    mine = train(gorila.Config(**config, **ONE, bundled=bundled, update_rule="sync"))
    assert same_parameters(mine, theirs)
    assert (mine.env_steps, mine.learner_steps) == (theirs.env_steps, theirs.learner_steps)
    if config["update_period"] == 1:  # else a turn is longer than DQN's, and so are the rows
        for name in ("env_steps", "episode_return_mean", "loss", "td_error_mean"):
            rows = len(theirs.curves[name]) - 1
            assert rows > 4
            mine_, theirs_ = mine.curves[name][:rows], theirs.curves[name][:rows]
            assert np.allclose(mine_, theirs_, rtol=1e-12, equal_nan=True), name
    other = dqn.train(dqn.Config(**{**config, "seed": 9}))
    assert not same_parameters(mine, other)


def test_many_shards_train_as_one_does():
    """With free pulls and pushes, so that the clock does not tell one from three."""
    costs = {**gorila.COSTS, "apply": 0.0, "copy": 0.0}
    results = []
    for shards in (1, 3):
        cluster = Cluster(nodes=(Node(cores=16),), costs=costs, jitter=0.0, bandwidth=1e15)
        with VirtualRuntime(1, cluster) as runtime:
            results.append(gorila.train(replace(QUICK, num_workers=3, num_shards=shards), runtime))
    assert same_parameters(*results)
    assert results[0].extra["staleness"] == results[1].extra["staleness"]


# -- the four parts --------------------------------------------------------------------------------


def test_the_target_is_copied_when_the_server_has_made_its_updates():
    """Versions pulled: 0, 5, 9, 12, 30. With a period of 10: copies at 12 and at 30 alone."""
    learner = gorila.Learner(replace(QUICK, target_period=10))
    rng = np.random.default_rng(0)
    rows = Transition(
        rng.normal(size=(16, 4)).astype(np.float32),
        rng.integers(2, size=16),
        np.ones(16, np.float32),
        np.ones(16, np.float32),
        rng.normal(size=(16, 4)).astype(np.float32),
    )
    sample = Sample(rows, np.arange(16), np.ones(16), np.ones(16, np.float32))
    copies = []
    for version in (0, 5, 9, 12, 30):
        with torch.no_grad():
            learner.flat.vector.add_(1.0)
        learner.gradient(sample, weights_of(learner.online, version))
        if torch.equal(learner.flat_target.vector, learner.flat.vector):
            copies.append(version)
    assert copies == [12, 30] and learner.synced == 30


def test_with_many_workers_the_targets_follow_the_server_and_not_each_workers_updates():
    """Eight workers, period 40: each makes an eighth of the updates, yet all targets are copied."""
    synced = []
    gradient = gorila.Learner.gradient

    def watching(self, sample, *weights):
        before = self.synced
        answer = gradient(self, sample, *weights)
        if self.synced != before:
            synced.append((weights[0].version, self.synced))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gorila.Learner, "gradient", watching)
        result = train(replace(QUICK, num_workers=8, target_period=40, total_env_steps=3_000))
    assert result.learner_steps > 120
    rounds = Counter(version // 40 for version, _ in synced)
    assert all(rounds[r] == 8 for r in range(1, max(rounds))), "every worker, once a period"
    assert all(version % 40 < 16 for version, _ in synced), "soon after the server's multiple"


def test_every_worker_and_every_one_that_replaces_it_draws_anew():
    """Actions, environments and batches differ between places, and after a death."""
    weights = weights_of(gorila.Learner(QUICK).online, 0)
    seen = set()
    for place in ((0, 0), (1, 0), (0, 1)):
        worker = gorila.Worker(QUICK, *place)
        played, transitions = worker.actor.play(0, weights)
        while transitions is None:
            played, transitions = worker.actor.play(0, weights)
        worker.replay.keep(transitions)
        batch = worker.replay.sample(16)
        seen.add((transitions.obs_tm1.tobytes(), tuple(batch.keys % 4)))
    assert len({observations for observations, _ in seen}) == 3
    assert len({keys for _, keys in seen}) == 3


def test_a_gradient_carries_its_loss_as_what_outliers_are_judged_by():
    worker = gorila.Worker(replace(QUICK, **ONE), 0)
    weights = weights_of(worker.learner.online, 0)
    answers = [worker.gradient(0, weights) for _ in range(40)]
    learnt = [answer for answer in answers if answer[0].samples]
    assert all(answer[1] is None for answer in answers if not answer[0].samples)
    assert 20 < len(learnt) < 40
    for report, piece in learnt:
        assert piece.magnitude == report.metrics["loss"] and piece.samples == 16


def test_outliers_and_stale_gradients_are_refused_and_counted():
    """A worker that is fed spoilt rewards now and then; and more workers than a bound allows."""
    gradient = gorila.Learner.gradient
    calls = [0]

    def spoilt(self, sample, *weights):
        calls[0] += 1
        if calls[0] % 50 == 0:
            items = sample.items._replace(r_t=sample.items.r_t + np.float32(1e4))
            sample = sample._replace(items=items)
        return gradient(self, sample, *weights)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gorila.Learner, "gradient", spoilt)
        config = replace(QUICK, num_workers=3, max_sigmas=4.0, total_env_steps=4_000)
        guarded = train(config)
    outliers = calls[0] // 50
    assert outliers > 10 and guarded.extra["refused"]["outlier"] >= outliers - 2
    assert guarded.extra["refused"]["outlier"] < 3 * outliers
    bounded = train(replace(QUICK, num_workers=6, max_staleness=2))
    assert bounded.extra["refused"]["stale"] > 0 and bounded.learner_steps > 20
    taken = sum(bounded.extra["staleness"].values()) - bounded.extra["refused"]["stale"]
    assert taken - 5 <= bounded.learner_steps <= taken  # the last ones are applied together


@pytest.mark.parametrize("rule", ["async", "sync"])
def test_apart_every_turn_of_an_actor_owes_one_gradient(rule):
    result = train(replace(APART, update_rule=rule, total_env_steps=3_000))
    turns = result.env_steps / 4
    warm_up = 64 * 2 / 4  # until the first of two memories is filled
    gradients = sum(result.extra["staleness"].values())
    assert turns - warm_up - 12 <= gradients <= turns
    ratio = result.metrics["replay_ratio"]
    assert ratio == pytest.approx(16 * gradients / result.env_steps, rel=0.02)


def test_shared_memories_are_filled_and_drawn_from_in_turn():
    with virtual() as runtime:
        replay = ReplayServer(runtime, APART, 2)
        rows = Transition(*(np.zeros((40, 1), np.float32) for _ in range(5)))
        for number in range(4):
            filled = Transition(*(column + number for column in rows))
            replay.add(runtime.put(filled), 40)
        assert replay.held == [80, 80] and len(replay) == 160
        assert replay.filled == [0, 1] and replay.owed == 2
        seen = [set(np.unique(runtime.get(replay.sample()).items.r_t)) for _ in range(2)]
    assert seen == [{0.0, 2.0}, {1.0, 3.0}]


def test_a_replay_shard_draws_as_the_memory_of_chapter_03_does():
    from rlbook.parts.replay import UniformReplay

    rows = Transition(*(np.arange(50, dtype=np.float32)[:, None] for _ in range(5)))
    shard, plain = ReplayShard(30, 7), UniformReplay(30, seed=7)
    shard.keep(rows)
    shard.keep(None)
    plain.add(rows)
    assert np.array_equal(shard.sample(8).items.r_t, plain.sample(8).items.r_t)


# -- the virtual cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QUICK, APART], ids=["bundled", "apart"])
def test_the_same_seed_gives_the_same_run_and_another_order_gives_another(config):
    config = replace(config, num_workers=4, calls_in_flight=2)
    one, same, other = train(config), train(config), train(config, seed=2, jitter=0.5)
    assert_same_run(one, same)
    assert one.wall_time_s == same.wall_time_s
    assert not same_parameters(one, other)


@pytest.mark.parametrize("config", [QUICK, APART], ids=["bundled", "apart"])
def test_a_hollow_run_predicts_the_same_clock(config):
    config = replace(config, learning_starts=1)
    real = train(config)
    with VirtualRuntime(
        1, Cluster(nodes=(Node(cores=8),), costs=gorila.COSTS), hollow=True
    ) as runtime:
        hollow = gorila.train(config, runtime)
    ratio = hollow.metrics["env_steps_per_s"] / real.metrics["env_steps_per_s"]
    assert 0.85 < ratio < 1.15


def test_units_of_work_have_the_names_that_costs_have():
    units = gorila.units_of_work(QUICK)
    assert units.keys() == gorila.COSTS.keys()
    for work in units.values():
        work()


def test_rows_say_what_the_table_of_metrics_says():
    curves = train(QUICK).curves
    assert set(curves) <= set(METRICS)
    assert {"replay_ratio", "bytes_per_env_step", "staleness_mean", "epsilon"} <= set(curves)


def test_bytes_are_those_of_weights_and_gradients_bundled_and_of_transitions_apart():
    size = 4 * sum(p.numel() for p in gorila.Learner(QUICK).online.parameters())
    bundled = train(replace(QUICK, **ONE, total_env_steps=2_000))
    learnt = sum(bundled.extra["staleness"].values())
    turns = bundled.env_steps / 4
    expected = (turns * size + learnt * size) / bundled.env_steps
    assert bundled.metrics["bytes_per_env_step"] == pytest.approx(expected, rel=0.05)
    apart = train(replace(APART, **ONE, total_env_steps=2_000))
    learnt = sum(apart.extra["staleness"].values())
    row = 2 * 16 + 16
    expected = apart.env_steps / 4 * size + learnt * (2 * size + 16 * row)
    expected = expected / apart.env_steps + row
    assert apart.metrics["bytes_per_env_step"] == pytest.approx(expected, rel=0.05)


# -- faults ----------------------------------------------------------------------------------------


def test_workers_shards_and_memories_may_die_while_others_go_on():
    config = replace(QUICK, num_workers=3, num_shards=2, total_env_steps=3_000)
    whole = train(config).wall_time_s
    crashes = (Crash("Shard 1", at_s=0.3 * whole), Crash("Worker 0", at_s=0.5 * whole))
    result = train(config, crashes=crashes)
    assert result.stopped_because == "total_env_steps"
    assert sum(result.extra["staleness"].values()) - result.learner_steps in (0, 1, 2)
    apart = replace(APART, num_shards=2, total_env_steps=3_000)
    whole = train(apart).wall_time_s
    crashes = (
        Crash("Actor 0", at_s=0.3 * whole),
        Crash("ReplayShard 1", at_s=0.5 * whole),
        Crash("Learner 1", at_s=0.6 * whole),
    )
    result = train(apart, crashes=crashes)
    assert result.stopped_because == "total_env_steps"
    assert result.learner_steps > 0.8 * result.env_steps / 4 - 32


def test_the_only_replay_memory_dies_and_is_filled_again():
    config = replace(APART, num_replays=1, total_env_steps=3_000)
    whole = train(config).wall_time_s
    result = train(config, crashes=(Crash("ReplayShard 0", at_s=0.5 * whole),))
    assert result.stopped_because == "total_env_steps"
    assert result.learner_steps < train(config).learner_steps - 5  # none while it was filled
    assert result.learner_steps > 0.7 * result.env_steps / 4


def test_real_processes_killed_by_sigkill_are_replaced(capfd):
    config = replace(APART, total_env_steps=6_000, num_actors=2, num_learners=1, num_replays=2)
    with RayRuntime(num_cpus=4) as runtime:
        with sigkill("ReplayShard", after_s=0.5), sigkill("Actor", after_s=1.0):
            result = gorila.train(config, runtime)
    assert result.stopped_because == "total_env_steps"
    assert result.learner_steps > 100
    assert capfd.readouterr() == ("", "")
    assert {"ReplayShard 2", "Actor 2"} <= {span.who for span in result.spans}


# -- checkpoints -----------------------------------------------------------------------------------


class StoppedError(Exception):
    """The power fails."""


@pytest.mark.parametrize(
    "config",
    [QUICK, replace(QUICK, update_rule="sync"), APART, replace(APART, update_rule="sync")],
    ids=["async", "sync", "apart", "apart-sync"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, config):
    config = replace(config, checkpoint_every_s=0.15, total_env_steps=1_500)
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))
    saved = []
    save, record = Run.checkpoint, Run.record

    def failing(run: Run) -> None:
        save(run)
        saved.append(run.env_steps)

    def until(run: Run, **turn) -> None:
        record(run, **turn)
        if len(saved) == 2 and run.env_steps > saved[-1] + 60:
            raise StoppedError

    monkeypatch.setattr(Run, "checkpoint", failing)
    monkeypatch.setattr(Run, "record", until)
    with pytest.raises(StoppedError):
        train(replace(config, run_dir=str(tmp_path / "cut")))
    assert saved[-1] < config.total_env_steps - 100
    monkeypatch.undo()
    resumed = train(replace(config, resume=str(tmp_path / "cut")))
    assert_same_run(whole, resumed)
    assert np.isclose(whole.wall_time_s, resumed.wall_time_s, rtol=1e-4, atol=0)
    assert same_parameters(whole, Result.load(tmp_path / "cut"))


def test_on_real_processes_it_learns_catch():
    config = gorila.Config(
        env_id="rlbook/Catch-v0",
        progress=False,
        num_envs=16,
        learning_starts=500,
        batch_size=64,
        hidden_sizes=(64,),
        epsilon_steps=4_000,
        total_env_steps=12_000,
    )
    with RayRuntime(num_cpus=4) as runtime:
        result = gorila.train(config, runtime)
    assert result.evaluate(50).mean > 0.5
    assert {span.who for span in result.spans} >= {"Worker 0", "Worker 1", "Shard 0", "driver"}
    assert result.metrics["gradient_time_fraction"] > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"update_rule": "bounded"}, "update_rule: must be one of async, sync"),
        ({"optimizer": "lion"}, "optimizer: must be one of sgd"),
        ({"num_learners": 0}, "num_learners: must be at least 1"),
        ({"learning_starts": 500}, "learning_starts: must be at most replay_capacity"),
        ({"max_sigmas": -1.0}, "max_sigmas"),
        ({"env_id": "Pendulum-v1"}, "needs a discrete one"),
        ({"replay_capacity": 10**12}, "replay_capacity: .* need"),
    ],
)
def test_bad_settings_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        train(replace(QUICK, **settings))


def test_what_is_pulled_is_what_the_actor_plays_with():
    actor = gorila.Actor(QUICK, 0)
    vector = np.random.default_rng(0).normal(size=len(actor.flat.vector)).astype(np.float32)
    actor.play(10**9, Weights(3, Identity().encode(vector)))
    assert np.array_equal(actor.flat.vector.numpy(), vector)
    assert np.array_equal(decode(Identity().encode(vector)), vector)
