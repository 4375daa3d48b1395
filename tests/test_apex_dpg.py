"""Ape-X DPG: what differs from Ape-X, and that the whole learns, repeats and resumes."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

from rlbook import apex_dpg
from rlbook.data import Transition
from rlbook.harness.log import METRICS
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.maths.exploration import epsilon_ladder
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.virtual import VirtualRuntime
from tests.runs import assert_same_run, same_parameters

QUICK = apex_dpg.Config(
    progress=False,
    num_envs=3,
    unroll_length=6,
    num_replays=2,
    learning_starts=64,
    replay_capacity=500,
    batch_size=16,
    updates_per_call=2,
    broadcast_period=2,
    samples_per_insert=4.0,
    rate_tolerance=80,
    target_period=7,
    n_step=3,
    hidden_sizes=(16,),
    log_every_env_steps=150,
    total_env_steps=900,
)


class Reach(gym.Env):
    """Say twice the number that you see; the further off, the worse. An episode has five steps."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.see(), {}

    def step(self, action):
        reward = -float((action - 2 * self.seen)[0] ** 2)
        self.steps += 1
        return self.see(), reward, False, self.steps == 5, {}

    def see(self):
        self.seen = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.seen


gym.register("test/Reach-v0", Reach)


def train(config: apex_dpg.Config, seed: int = 1, **cluster) -> Result:
    room = Cluster(nodes=(Node(cores=8),), costs=apex_dpg.COSTS, **cluster)
    with VirtualRuntime(seed, room) as runtime:
        return apex_dpg.train(config, runtime)


def test_priorities_are_n_step_errors_by_the_actors_own_parameters():
    actor = apex_dpg.Actor(QUICK, 0)
    torch.manual_seed(3)
    vector = torch.randn(len(actor.flat.vector)) * 0.3
    actor.play(Vector(0, vector.numpy()))
    made = actor.play(Vector(0, vector.numpy()))[1]
    network = apex_dpg.make_network(QUICK, actor.envs)
    torch.nn.utils.vector_to_parameters(vector, network.parameters())
    rows = Transition(*map(torch.from_numpy, made.items))
    with torch.no_grad():
        after = network.value(rows.obs_t, network(rows.obs_t))
        errors = rows.r_t + rows.discount_t * after - network.value(rows.obs_tm1, rows.a_tm1)
    assert np.allclose(made.priorities, errors.abs().numpy() + 1e-6, rtol=1e-4)
    assert np.ptp(made.priorities) > 0.05 and (made.items.discount_t > 0).all()


def test_every_copy_has_its_own_noise_and_the_score_is_of_the_least():
    ladder, seen, scored = epsilon_ladder(6), [], []
    for index in range(2):
        actor = apex_dpg.Actor(QUICK, index)
        seen += list(actor.noise)
        scored += list(actor.noise[actor.scored])
    actor = apex_dpg.Actor(replace(QUICK, env_id="test/Reach-v0"), 0)
    report = actor.play(Vector(0, actor.flat.vector.numpy()))[0]
    assert {one.env for one in report.episodes} == set(np.flatnonzero(actor.scored)) != {0, 1, 2}
    assert sorted(seen) == sorted(ladder) and sorted(scored) == sorted(ladder[-3:])


def test_the_targets_are_copied_every_so_many_updates_and_weights_enter():
    config = replace(QUICK, updates_per_call=1, target_period=3)
    made = apex_dpg.Actor(config, 0).play(apex_dpg.Learner(config).newest())[1]
    shard = apex_dpg.MemoryShard(config.memory_settings, 0)
    shard.keep(made)
    ends = []
    for prioritized in (True, False):
        learner, copies = apex_dpg.Learner(replace(config, prioritized=prioritized)), []
        shard.memory._rng = np.random.default_rng(0)
        for update in range(1, 8):
            learner.learn(shard.draw(16, 1.0)[1])
            if torch.equal(learner.flat.vector, learner.flat_target.vector):
                copies.append(update)
        assert copies == [3, 6]
        ends.append(learner.flat.vector)
    assert not torch.equal(*ends)


def test_it_learns_to_say_twice_what_it_sees():
    config = replace(QUICK, env_id="test/Reach-v0", n_step=1, discount=0.5, total_env_steps=3_000)
    result = train(replace(config, samples_per_insert=8.0, hidden_sizes=(32, 32)))
    seen = np.linspace(-0.8, 0.8, 9, dtype=np.float32)[:, None]
    said, _ = result.policy.act(seen, None, np.zeros(9, bool), np.random.default_rng(0))
    assert np.abs(said - 2 * seen).max() < 0.35


def test_the_same_seed_gives_the_same_run_and_rows_say_what_the_table_says():
    one, same = train(QUICK), train(QUICK)
    assert_same_run(one, same)
    assert not same_parameters(one, train(QUICK, seed=2, jitter=0.5))
    assert set(one.curves) <= set(METRICS)
    assert one.extra["samples"] / (one.env_steps - 64) == pytest.approx(4.0, rel=0.12)


@pytest.mark.parametrize("learners", [1, 2])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, learners):
    config = replace(QUICK, checkpoint_every_s=0.03, num_learners=learners)
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))
    saved, save = [], Run.checkpoint

    def failing(run: Run) -> None:
        save(run)
        saved.append(run.env_steps)
        if len(saved) == 2:
            raise RuntimeError("the power fails")

    monkeypatch.setattr(Run, "checkpoint", failing)
    with pytest.raises(RuntimeError, match="power"):
        train(replace(config, run_dir=str(tmp_path / "cut")))
    assert saved[-1] < config.total_env_steps - 100
    monkeypatch.undo()
    resumed = train(replace(config, resume=str(tmp_path / "cut")))
    assert_same_run(whole, resumed)
    assert same_parameters(whole, Result.load(tmp_path / "cut"))


def test_actors_and_shards_may_die():
    whole = train(QUICK)
    crashes = [Crash(name, at_s=whole.wall_time_s / 2) for name in ("Actor 0", "MemoryShard 1")]
    result = train(QUICK, crashes=tuple(crashes))
    assert result.stopped_because == "total_env_steps"
    assert result.learner_steps > 0.5 * whole.learner_steps


def test_units_of_work_have_the_names_that_costs_have():
    units = apex_dpg.units_of_work(QUICK)
    assert units.keys() == apex_dpg.COSTS.keys()
    for work in units.values():
        work()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"env_id": "CartPole-v1"}, "apex_dpg needs a vector of float32"),
        ({"rate_tolerance": 15}, "rate_tolerance: must be at least half"),
        ({"noise_base": 1.5}, "noise_base: must be between 0"),
        ({"learning_starts": 501}, "learning_starts: must be at most replay_capacity"),
        ({"replay_capacity": 10**12}, "replay_capacity: .* need"),
    ],
)
def test_bad_settings_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        train(replace(QUICK, **settings))
