"""Ape-X: reduction to DQN, priorities of actors, the ladder, rates, faults, checkpoints, Redis."""

import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlbook import apex, dqn
from rlbook.data import Transition, tree_nbytes
from rlbook.harness.log import METRICS
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.maths.exploration import epsilon_ladder
from rlbook.maths.priorities import importance_weights
from rlbook.parts.replay import PrioritizedReplay, Sample
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.faults import sigkill
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.memory_shard import MemoryShard, Part
from rlbook.plumbing.rate_limiter import RateLimiter
from rlbook.plumbing.replay_learner import Found
from rlbook.plumbing.runtime import RayRuntime
from rlbook.plumbing.virtual import VirtualRuntime
from tests.counters import register, stacked_envs
from tests.runs import assert_same_run, same_parameters

SHARED = {
    "progress": False,
    "num_envs": 4,
    "learning_starts": 64,
    "batch_size": 16,
    "hidden_sizes": (16,),
    "log_every_env_steps": 150,
    "target_period": 7,
    "replay_capacity": 400,
    "total_env_steps": 900,
    "n_step": 3,
    "dueling": True,
}
QUICK = apex.Config(
    **SHARED,
    num_actors=3,
    num_replays=2,
    unroll_length=5,
    updates_per_call=2,
    broadcast_period=2,
    rate_tolerance=80,
)


def virtual(seed=1, cores=8, **cluster) -> VirtualRuntime:
    return VirtualRuntime(seed, Cluster(nodes=(Node(cores=cores),), costs=apex.COSTS, **cluster))


def train(config: apex.Config, seed: int = 1, **cluster) -> Result:
    with virtual(seed, **cluster) as runtime:
        return apex.train(config, runtime)


# -- reductions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"double": False, "n_step": 1, "dueling": False},
        {"target_period": 1, "num_envs": 7, "seed": 5},
    ],
    ids=["default", "plain", "others"],
)
def test_one_actor_drawing_uniformly_in_turns_is_dqn(settings, monkeypatch):
    """With one ε for all: DQN is given a schedule that stands still."""
    monkeypatch.setattr(dqn, "linear_schedule", lambda *_, end, **__: end)
    shared = {**SHARED, **settings}
    theirs = dqn.train(dqn.Config(**shared, epsilon_end=0.4))
    config = apex.Config(
        **shared,
        num_actors=1,
        unroll_length=1,
        prioritized=False,
        samples_per_insert=shared["batch_size"] / shared["num_envs"],
        update_rule="sync",
        updates_per_call=1,
        calls_in_flight=1,
        broadcast_period=1,
        epsilon_base=0.4,
        epsilon_alpha=0.0,
    )
    mine = train(config)
    pairs = zip(mine.policy.network.parameters(), theirs.policy.network.parameters(), strict=True)
    for one, other in pairs:
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert (mine.env_steps, mine.learner_steps) == (theirs.env_steps, theirs.learner_steps)
    assert mine.metrics["episodes"] == theirs.metrics["episodes"]
    assert mine.learner_steps > 100
    moved = train(replace(config, samples_per_insert=2 * config.samples_per_insert))
    assert not same_parameters(mine, moved)


def test_equal_priorities_draw_and_weigh_as_no_priorities():
    """The uniform switch and α = 0 are one distribution: weights 1, P(i) = 1/N."""
    made = apex.Actor(QUICK, 0).play(apex.Learner(QUICK).newest())[1]
    drawn = []
    for settings in (
        replace(QUICK, prioritized=False).memory_settings,
        replace(QUICK, priority_exponent=0.0).memory_settings,
    ):
        shard = MemoryShard(settings, 0)
        size = shard.keep(made).size
        part = shard.draw(200, 1.0)[1]
        assert np.allclose(part.sample.probabilities, 1 / size)
        drawn.append(Counter(part.sample.keys.tolist()))
    assert drawn[0].keys() <= set(range(size)) and len(drawn[1]) == size
    assert max(drawn[1].values()) - min(drawn[1].values()) <= 4
    weights = importance_weights(np.full(9, 1 / size), size=size, exponent=0.4)
    assert (weights == 1).all()


# -- actors ----------------------------------------------------------------------------------------


def weights_of(vector: torch.Tensor, version: int = 0) -> Vector:
    return Vector(version, vector.numpy())


def test_priorities_are_n_step_errors_by_the_actors_own_parameters():
    """Of all transitions of a chunk but the first n − 1, by PyTorch on what was sent."""
    actor = apex.Actor(QUICK, 0)
    torch.manual_seed(3)
    vector = torch.randn(len(actor.flat.vector)) * 0.3
    actor.play(weights_of(vector))
    made = actor.play(weights_of(vector))[1]
    network = apex.make_network(QUICK, actor.envs)
    torch.nn.utils.vector_to_parameters(vector, network.parameters())
    rows = Transition(*map(torch.from_numpy, made.items))
    with torch.no_grad():
        q, after = network(rows.obs_tm1), network(rows.obs_t)
    chosen = q.gather(-1, rows.a_tm1[:, None])[:, 0]
    errors = (rows.r_t + rows.discount_t * after.max(-1).values - chosen).abs().numpy()
    assert np.allclose(made.priorities, errors + 1e-6, atol=1e-5)
    assert np.ptp(made.priorities) > 0.05


def test_no_forward_pass_is_made_for_priorities_but_the_last():
    actor = apex.Actor(QUICK, 0)
    calls, forward = [0], actor.forward

    def counting(seen):
        calls[0] += 1
        return forward(seen)

    actor.forward = counting
    actor.play(weights_of(actor.flat.vector.clone()))
    assert calls[0] == QUICK.unroll_length + 1
    uniform = apex.Actor(replace(QUICK, prioritized=False), 0)
    assert uniform.play(weights_of(uniform.flat.vector.clone()))[1].priorities is None


def test_every_copy_has_its_rung_and_the_score_is_of_the_least_exploring():
    config = replace(QUICK, scored_fraction=0.25)
    ladder, seen, scored = epsilon_ladder(12), [], []
    for index in range(3):
        actor = apex.Actor(config, index)
        seen += list(actor.epsilon)
        scored += list(actor.epsilon[actor.scored])
        assert actor.scored.sum() == 1  # every actor has all kinds
    assert sorted(seen) == sorted(ladder)
    assert sorted(scored) == sorted(ladder[-3:])
    actor = apex.Actor(config, 0)
    report = actor.play(weights_of(actor.flat.vector.clone()))[0]
    while not report.episodes:
        report = actor.play(weights_of(actor.flat.vector.clone()))[0]
    assert {episode.env for episode in report.episodes} <= set(np.flatnonzero(actor.scored))


def test_every_copy_acts_by_its_own_epsilon():
    actor, off = apex.Actor(QUICK, 0), []
    actor.epsilon = np.array([0.0, 1.0, 0.0, 1.0])
    step = actor.envs.transition

    def watching(action):
        off.append(action != actor.seen_q.argmax(-1))
        return step(action)

    values = actor.values

    def noting():
        actor.seen_q = values()
        return actor.seen_q

    actor.values, actor.envs.transition = noting, watching
    for _ in range(8):
        actor.play(weights_of(actor.flat.vector.clone()))
    counts = np.sum(off, 0)
    assert (counts[[0, 2]] == 0).all() and (counts[[1, 3]] > 5).all()  # of 40, half of them so


def test_every_actor_and_every_one_that_replaces_it_draws_anew():
    seen = set()
    for place in ((0, 0), (1, 0), (0, 1)):
        actor = apex.Actor(QUICK, *place)
        made = actor.play(weights_of(actor.flat.vector.clone()))[1]
        seen.add((made.items.obs_tm1.tobytes(), made.items.a_tm1.tobytes()))
    assert len({states for states, _ in seen}) == 3


# -- the learner -----------------------------------------------------------------------------------


def parts_of(rows: int, shards: int = 1, seed: int = 0) -> list[Part]:
    """Draws of random transitions, with unequal probabilities."""
    rng, parts = np.random.default_rng(seed), []
    for _ in range(shards):
        count = rows // shards
        items = Transition(
            rng.normal(size=(count, 4)).astype(np.float32),
            rng.integers(2, size=count),
            rng.normal(size=count).astype(np.float32),
            np.full(count, 0.9, np.float32),
            rng.normal(size=(count, 4)).astype(np.float32),
        )
        probabilities = rng.uniform(0.001, 0.01, count)
        sample = Sample(items, np.arange(count), probabilities, np.ones(count, np.float32))
        parts.append(Part(sample, 200, 0.001))
    return parts


def test_each_row_is_learnt_from_once_and_its_priority_returns_to_its_shard():
    config = replace(QUICK, learning_rate=0.0, updates_per_call=4)
    learner, parts = apex.Learner(config), parts_of(64, shards=2)
    metrics, _, *back = learner.learn(*parts)
    assert learner.updates == 4 and {"loss", "td_error_mean"} <= metrics.keys()
    for part, mine in zip(parts, back, strict=True):
        rows = Transition(*map(torch.from_numpy, part.sample.items))
        with torch.no_grad():
            best = learner.online(rows.obs_t).argmax(-1, keepdim=True)
            target = rows.r_t + 0.9 * learner.target(rows.obs_t).gather(-1, best)[:, 0]
            errors = target - learner.online(rows.obs_tm1).gather(-1, rows.a_tm1[:, None])[:, 0]
        assert np.array_equal(mine.keys, part.sample.keys)
        assert np.allclose(mine.values, errors.abs().numpy() + 1e-6, atol=1e-5)


def test_every_batch_of_a_draw_has_rows_of_all_strata():
    learner = apex.Learner(replace(QUICK, updates_per_call=4))
    seen = []
    found = Found(np.ones(16), 16, {"loss": 0.0})
    learner.gradient = lambda batch: seen.append(batch.sample.keys) or found
    for _ in range(50):
        learner.learn(*parts_of(64))
    assert all(np.array_equal(np.sort(keys) // 4, np.arange(16)) for keys in seen)
    places = np.array([keys % 4 for keys in seen[::4]])
    assert (np.abs(places.mean(0) - 1.5) < 0.6).all()  # by lot, and not always the first


@pytest.mark.parametrize("normalization", ["batch", "buffer"])
def test_weights_enter_the_loss(normalization):
    config = replace(QUICK, updates_per_call=1, weight_normalization=normalization)
    learner, (part,) = apex.Learner(config), parts_of(16)
    given = []
    gradient = apex.td_gradient

    def watching(flat, networks, sample, *rest, **more):
        given.append(sample.weights)
        return gradient(flat, networks, sample, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apex, "td_gradient", watching)
        learner.learn(part)
    probabilities = part.sample.probabilities
    least = probabilities.min() if normalization == "batch" else 0.001
    assert np.allclose(given[0], (least / probabilities) ** 0.4, rtol=1e-6)


def test_weights_for_actors_leave_when_their_period_is_over():
    learner = apex.Learner(replace(QUICK, updates_per_call=2, broadcast_period=5))
    sent = [learner.learn(*parts_of(32))[1] for _ in range(6)]
    assert [w and w.version for w in sent] == [None, None, 6, None, 10, None]


def test_the_target_is_copied_every_so_many_updates():
    learner = apex.Learner(replace(QUICK, updates_per_call=1, target_period=3))
    copies = []
    for update in range(1, 8):
        learner.learn(*parts_of(16))
        if torch.equal(learner.flat.vector, learner.flat_target.vector):
            copies.append(update)
    assert copies == [3, 6]


def test_the_optimiser_is_the_one_that_was_asked_for():
    settings = {"learning_rate": 0.01, "optimizer_epsilon": 0.5}
    found = []
    for name in ("adam", "rmsprop"):
        learner = apex.Learner(replace(QUICK, optimizer=name, **settings))
        learner.learn(*parts_of(32))
        rules = learner.optimizer.defaults
        assert (rules["lr"], rules["eps"]) == (0.01, 0.5)
        found.append((type(learner.optimizer).__name__, rules.get("centered")))
    assert found == [("Adam", None), ("RMSProp", True)]


def test_gradients_are_scaled_down_to_the_limit():
    given, updates = [], []
    for limit in (1e9, 1e-3):
        learner = apex.Learner(replace(QUICK, updates_per_call=1, max_gradient_norm=limit))
        given.append(learner.learn(*parts_of(16))[0]["gradient_norm"])
        updates.append(float(learner.flat.gradients.norm()))
    assert given[0] == pytest.approx(given[1]) and given[0] > 1e-2
    assert updates == pytest.approx([given[0], 1e-3], rel=1e-3)


# -- the virtual cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["async", "sync"])
def test_the_same_seed_gives_the_same_run_and_another_order_gives_another(rule):
    config = replace(QUICK, update_rule=rule)
    one, same = train(config), train(config)
    assert_same_run(one, same)
    assert one.wall_time_s == same.wall_time_s
    if rule == "async":
        assert not same_parameters(one, train(config, seed=2, jitter=0.5))


def test_in_turns_the_order_of_events_does_not_matter():
    one = train(replace(QUICK, update_rule="sync"))
    other = train(replace(QUICK, update_rule="sync"), seed=2, jitter=0.5)
    assert same_parameters(one, other) and one.env_steps == other.env_steps


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_the_replay_ratio_is_what_was_asked_for(ratio):
    result = train(replace(QUICK, samples_per_insert=ratio, total_env_steps=3_000))
    rows = result.env_steps - QUICK.learning_starts
    assert result.extra["samples"] == 16 * result.learner_steps
    assert result.extra["samples"] / rows == pytest.approx(ratio, rel=0.12)
    drawn = result.extra["samples"] / result.env_steps
    assert result.metrics["replay_ratio"] == pytest.approx(drawn, rel=0.05)


def test_actors_are_ahead_by_the_tolerance_and_a_chunk_at_most():
    """What is being played counts too: three actors may not all begin at the same gap."""
    owed, insert = [], RateLimiter.insert

    def watching(self, rows, size):
        insert(self, rows, size)
        owed.append(self.owed)

    config = replace(QUICK, samples_per_insert=4.0)
    slow = {**apex.COSTS, "learn": 20e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RateLimiter, "insert", watching)
        with VirtualRuntime(1, Cluster(nodes=(Node(cores=8),), costs=slow)) as runtime:
            apex.train(config, runtime)
    chunk = 4.0 * config.unroll_length * config.num_envs
    later = owed[15:]  # while the memory was filled, nobody counted
    assert config.rate_tolerance < max(later) <= config.rate_tolerance + chunk


def test_the_driver_sees_no_experience():
    """It gets reports and, at the end, parameters; rows, keys and priorities go by."""
    seen, get = [], VirtualRuntime.get

    def kinds(tree):
        yield type(tree).__name__
        if isinstance(tree, list | tuple):
            for branch in tree:
                yield from kinds(branch)

    def watching(self, references, **options):
        answer = get(self, references, **options)
        seen.extend(kinds(answer))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VirtualRuntime, "get", watching)
        train(QUICK)
    assert {"Report", "ShardReport"} <= set(seen) and seen.count("Vector") == 1
    assert not {"Made", "Part", "Priorities", "Sample", "Transition"} & set(seen)


def test_bytes_are_those_of_draws_chunks_and_parameters():
    result = train(QUICK)
    vector = sum(4 * p.numel() for p in result.policy.network.parameters())
    row = apex.item_bytes(QUICK) - 8
    assert row == 2 * 16 + 8 + 4 + 4
    chunks = result.env_steps / (QUICK.unroll_length * QUICK.num_envs)
    expected = result.extra["samples"] * (row + 8) + chunks * vector + result.env_steps * (row + 4)
    assert result.extra["wire_bytes"] == pytest.approx(expected, rel=0.05)
    assert result.metrics["bytes_per_env_step"] > 0
    assert result.extra["replay_nbytes"] == QUICK.replay_capacity * row


FRAMES = replace(QUICK, env_id="test/Frames-v0", replay_capacity=150)


@pytest.mark.parametrize(
    "changes",
    [{}, {"update_rule": "sync"}, {"prioritized": False, "n_step": 6}, {"num_learners": 2}],
    ids=["async", "sync", "uniform", "learners"],
)
def test_frames_that_are_told_once_change_nothing_but_the_bytes(monkeypatch, changes):
    """Across ends and time limits of episodes, in a memory that is overwritten many times."""
    register()
    config = replace(FRAMES, **changes)
    whole = train(config)
    monkeypatch.setattr(apex, "make_envs", stacked_envs)
    packed = train(config)
    assert whole.learner_steps > 50 and whole.metrics["replay_size"] >= 150
    assert same_parameters(packed, whole)
    assert packed.metrics["loss"] == whole.metrics["loss"]
    less = apex.item_bytes(config) - apex.kept_bytes(config)
    assert less > 2 * 96 - 2.8 * 24 - 20, "stacks are 96 bytes, frames 24"
    assert whole.extra["replay_nbytes"] - packed.extra["replay_nbytes"] == less * 150
    # Episodes are so short that a third of the frames is not needed by any transition.
    assert packed.extra["wire_bytes"] < whole.extra["wire_bytes"] - 0.5 * less * packed.env_steps


def test_frames_are_told_once_only_in_shards_and_only_of_stacks(monkeypatch):
    register()
    weights = apex.Learner(FRAMES).newest()
    whole = apex.Actor(FRAMES, 0).play(weights)[1].items
    assert isinstance(whole, Transition)
    assert (
        apex.kept_bytes(FRAMES) == apex.item_bytes(FRAMES) and not apex.settings_of(FRAMES).frames
    )
    monkeypatch.setattr(apex, "make_envs", stacked_envs)
    report, made = apex.Actor(FRAMES, 0).play(weights)
    assert made.items._fields[0] == "frames" and report.items == len(made.items.r_t)
    assert report.wire_bytes == weights.values.nbytes + tree_nbytes(made)
    assert apex.settings_of(FRAMES).frames == (5 + 3 - 1 + 4) / 5
    added = []

    class Client:
        def add(self, items, priorities):
            added.append(items)

    assert apex.Actor(FRAMES, 0, memory=Client()).play(weights)[1] is None
    assert all(np.array_equal(one, same) for one, same in zip(added[0], whole, strict=True))
    redis = replace(FRAMES, replay="redis")
    assert apex.kept_bytes(redis) == apex.item_bytes(redis) and not apex.settings_of(redis).frames
    units = apex.units_of_work(FRAMES)
    for work in units.values():
        work()


def test_a_hollow_chunk_is_as_heavy_as_one_of_frames_told_once(monkeypatch):
    register()
    config = replace(FRAMES, total_env_steps=3_000, update_rule="sync")
    cluster, sent = Cluster(nodes=(Node(cores=8),), costs=apex.COSTS), []
    for make in (apex.make_envs, stacked_envs):
        monkeypatch.setattr(apex, "make_envs", make)
        with VirtualRuntime(1, cluster, hollow=True) as runtime:
            result = apex.train(config, runtime)
            sent.append(runtime.nbytes)
    less = apex.item_bytes(config) - apex.kept_bytes(config)
    assert sent[0] - sent[1] == pytest.approx(less * result.env_steps, rel=0.1)


def test_the_ratio_is_known_in_every_row():
    """Also where no update came between two rows, or none at all."""
    result = train(replace(QUICK, total_env_steps=40))
    assert result.learner_steps == 0 and result.metrics["replay_ratio"] == 0.0
    rows = train(replace(QUICK, log_every_env_steps=20)).curves["replay_ratio"]
    assert np.isfinite(np.asarray(rows, float)).all()


def test_without_a_ratio_all_run_free():
    result = train(replace(QUICK, samples_per_insert=None))
    slower = {**apex.COSTS, "learn": 50e-3}
    with VirtualRuntime(1, Cluster(nodes=(Node(cores=8),), costs=slower)) as runtime:
        starved = apex.train(replace(QUICK, samples_per_insert=None), runtime)
    assert starved.metrics["replay_ratio"] < 0.3 * result.metrics["replay_ratio"]


def test_priorities_lag_by_the_draws_that_are_made_ahead():
    """What is drawn while the learner learns from `calls_in_flight` − 1 draws before it."""
    config = replace(QUICK, samples_per_insert=None, num_replays=1)
    for calls, lag in ((1, 0), (2, 2), (4, 6)):
        result = train(replace(config, calls_in_flight=calls))
        assert result.metrics["priority_lag_max"] == lag
        assert np.nanmax(result.curves["priority_lag_mean"]) <= lag


def test_what_was_learnt_from_gets_new_priorities():
    """Every row of every draw, at the shard that gave it, by the learner's |TD error|."""
    correct, rows, changed = MemoryShard.correct, [], []

    def watching(self, priorities):
        before = self.memory.total_priority
        rows.append(correct(self, priorities))
        changed.append(self.memory.total_priority != before)
        return rows[-1]

    config = replace(QUICK, replay_capacity=10_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryShard, "correct", watching)
        result = train(config)
    assert sum(rows) == result.extra["samples"] and all(changed)


TINY = {"num_actors": 1, "num_envs": 1, "unroll_length": 1, "num_replays": 1, "batch_size": 1}
TINY |= {"updates_per_call": 1, "learning_starts": 1, "rate_tolerance": 1, "total_env_steps": 60}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"update_rule": "sync"},
        {"n_step": 9},  # longer than a chunk
        {"replay_capacity": 1, "calls_in_flight": 1},
        {"num_actors": 3, "num_replays": 3, "replay_capacity": 3},
        {"prioritized": False, "scored_fraction": 0.0},
    ],
    ids=str,
)
def test_the_smallest_settings_run(settings):
    result = train(replace(QUICK, **{**TINY, **settings}))
    assert result.stopped_because == "total_env_steps" and 60 <= result.env_steps < 66
    assert 3 * (60 - 20) < result.learner_steps <= 3 * 66


def test_shards_hold_together_what_was_asked_for():
    """Else so many would never be there, and learning would never start."""
    config = replace(QUICK, num_replays=4, replay_capacity=101, learning_starts=101)
    assert train(config).learner_steps > 100


def test_a_hollow_run_predicts_the_same_clock():
    config = replace(QUICK, total_env_steps=2_000)
    real, cluster = train(config), Cluster(nodes=(Node(cores=8),), costs=apex.COSTS)
    with VirtualRuntime(1, cluster, hollow=True) as runtime:
        hollow = apex.train(config, runtime)
    ratio = hollow.metrics["env_steps_per_s"] / real.metrics["env_steps_per_s"]
    assert 0.85 < ratio < 1.15


def test_more_hollow_actors_bring_more_until_they_must_wait_for_the_learner():
    """On a quick wire, so that actors are what binds."""

    def steps_per_s(actors: int, ratio: float | None) -> float:
        config = replace(QUICK, num_actors=actors, samples_per_insert=ratio)
        config = replace(config, unroll_length=50, total_env_steps=60_000, rate_tolerance=2_000)
        cluster = Cluster(nodes=(Node(cores=80),), costs=apex.COSTS, latency_s=1e-5)
        with VirtualRuntime(1, cluster, hollow=True) as runtime:
            return apex.train(config, runtime).metrics["env_steps_per_s"]

    assert steps_per_s(32, None) > 3 * steps_per_s(4, None)
    assert steps_per_s(32, 4.0) < 1.2 * steps_per_s(8, 4.0)


def test_units_of_work_have_the_names_that_costs_have():
    for config in (QUICK, replace(QUICK, prioritized=False)):
        units = apex.units_of_work(config)
        assert units.keys() == apex.COSTS.keys()
        for work in units.values():
            work()


def test_rows_say_what_the_table_of_metrics_says():
    curves = train(QUICK).curves
    assert set(curves) <= set(METRICS)
    assert {"replay_ratio", "priority_lag_mean", "q_mean", "replay_size"} <= set(curves)


# -- faults ----------------------------------------------------------------------------------------


def test_actors_and_shards_may_die_while_others_go_on():
    config = replace(QUICK, total_env_steps=3_000)
    whole = train(config)
    at = [part * whole.wall_time_s for part in (0.02, 0.3, 0.5, 0.7)]
    crashes = (
        Crash("MemoryShard 0", at_s=at[0]),
        Crash("Actor 0", at_s=at[1]),
        Crash("MemoryShard 1", at_s=at[2]),
        Crash("Actor 2", at_s=at[3]),
    )
    result = train(config, crashes=crashes)
    assert result.stopped_because == "total_env_steps"
    assert result.learner_steps > 0.8 * whole.learner_steps
    assert {"Actor 3", "Actor 4", "MemoryShard 2", "MemoryShard 3"} <= {
        span.who for span in result.spans
    }


def test_the_only_shard_dies_and_is_filled_again():
    config = replace(QUICK, num_replays=1, total_env_steps=3_000)
    whole = train(config)
    result = train(config, crashes=(Crash("MemoryShard 0", at_s=0.5 * whole.wall_time_s),))
    assert result.stopped_because == "total_env_steps"
    assert 0.7 * whole.learner_steps < result.learner_steps < whole.learner_steps


def test_when_the_learner_dies_the_run_ends_with_an_error():
    whole = train(QUICK)
    with pytest.raises(RuntimeError, match="Learner 0 died"):
        train(QUICK, crashes=(Crash("Learner 0", at_s=0.5 * whole.wall_time_s),))


def test_real_processes_killed_by_sigkill_are_replaced(capfd):
    config = replace(QUICK, total_env_steps=20_000, samples_per_insert=1.0)
    with RayRuntime(num_cpus=4) as runtime:
        with sigkill("MemoryShard", after_s=0.5), sigkill("Actor", after_s=1.0):
            result = apex.train(config, runtime)
    assert result.stopped_because == "total_env_steps"
    assert result.learner_steps > 800
    assert capfd.readouterr() == ("", "")
    assert {"MemoryShard 2", "Actor 3"} <= {span.who for span in result.spans}


# -- checkpoints -----------------------------------------------------------------------------------


class StoppedError(Exception):
    """The power fails."""


@pytest.mark.parametrize(
    ("base", "rule", "learners"),
    [(QUICK, "async", 1), (QUICK, "sync", 1), (QUICK, "async", 2), (FRAMES, "async", 1)],
    ids=["async", "sync", "learners", "frames"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, base, rule, learners):
    register()
    if base is FRAMES:
        monkeypatch.setattr(apex, "make_envs", stacked_envs)
    config = replace(base, update_rule=rule, checkpoint_every_s=0.03, total_env_steps=1_500)
    config = replace(config, num_learners=learners)
    config = replace(config, broadcast_period=5)  # weights leave at odd draws
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

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", failing)
        patch.setattr(Run, "record", until)
        with pytest.raises(StoppedError):
            train(replace(config, run_dir=str(tmp_path / "cut")))
    assert saved[-1] < config.total_env_steps - 100
    resumed = train(replace(config, resume=str(tmp_path / "cut")))
    assert_same_run(whole, resumed)
    assert np.isclose(whole.wall_time_s, resumed.wall_time_s, rtol=1e-4, atol=0)
    assert same_parameters(whole, Result.load(tmp_path / "cut"))


# -- real processes --------------------------------------------------------------------------------


CATCH = apex.Config(
    env_id="rlbook/Catch-v0",
    progress=False,
    num_envs=8,
    unroll_length=10,
    learning_starts=500,
    batch_size=64,
    updates_per_call=4,
    rate_tolerance=640,
    hidden_sizes=(64,),
    n_step=3,
    total_env_steps=15_000,
)


def test_on_real_processes_it_learns_catch():
    with RayRuntime(num_cpus=4) as runtime:
        result = apex.train(replace(CATCH, num_replays=2), runtime)
    assert result.evaluate(50).mean > 0.5
    names = {"Actor 0", "Actor 1", "MemoryShard 0", "MemoryShard 1", "Learner 0", "driver"}
    assert {span.who for span in result.spans} >= names
    assert 0 <= result.metrics["learner_idle_fraction"] <= 1


# -- Redis -----------------------------------------------------------------------------------------

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")


@needs_redis
def test_on_a_redis_server_of_its_own_it_learns_catch():
    """Actors and learner speak to the server themselves: the driver sees neither rows nor keys."""
    result = train(replace(CATCH, replay="redis"), cores=4)
    assert result.evaluate(50).mean > 0.5
    assert result.metrics["priority_lag_max"] == CATCH.updates_per_call
    assert result.metrics["replay_size"] > 10_000


@needs_redis
def test_a_learner_draws_ahead_only_if_more_than_one_call_may_be_in_flight():
    from rlbook.plumbing.redis_replay import RedisMemory
    from rlbook.plumbing.redis_server import RedisServer

    actor = apex.Actor(QUICK, 0)
    made = actor.play(weights_of(actor.flat.vector.clone()))[1]
    with RedisServer(persistence="none") as server:
        memory = RedisMemory(server.settings, "drawn", 400, apex.example(QUICK))
        memory.add(*made)
        for calls in (1, 2):
            learner = apex.Learner(replace(QUICK, calls_in_flight=calls), memory=memory)
            learner.learn()
            assert (learner._next is not None) == (calls > 1)
            if learner._next is not None:
                assert len(learner._next.result().sample.keys) == 32
        assert memory.total_priority != pytest.approx((made.priorities**0.6).sum())


@needs_redis
def test_a_run_on_redis_is_resumed_with_what_the_server_held(tmp_path):
    config = replace(CATCH, replay="redis", total_env_steps=3_000, log_every_env_steps=100)
    first = train(replace(config, run_dir=str(tmp_path / "run")), cores=4)
    config = replace(config, resume=str(tmp_path / "run"), total_env_steps=4_000)
    resumed = train(config, cores=4)  # on another server
    assert resumed.metrics["replay_size"] > first.env_steps + 700
    more = resumed.learner_steps - first.learner_steps
    assert more * 64 == pytest.approx(3.0 * (resumed.env_steps - first.env_steps), rel=0.5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "memory: a client of a server goes with replay 'redis'"),
        ({"replay": "redis", "replay_capacity": 300}, "replay_capacity: is 300, but 400"),
        ({"replay": "redis", "priority_exponent": 0.5}, "priority_exponent: is 0.5 .* but 0.6"),
        ({"replay": "redis", "prioritized": False}, "priority_exponent: is 0 .* but 0.6"),
    ],
)
def test_a_memory_that_is_not_what_the_config_says_is_refused(settings, words):
    memory = PrioritizedReplay(400, 0.6)
    with virtual() as runtime, pytest.raises(ValueError, match=words):
        apex.train(replace(QUICK, **settings), runtime, memory)


@needs_redis
@pytest.mark.parametrize("persistence", ["none", "always"])
def test_a_redis_server_is_killed_and_training_goes_on_after_its_restart(persistence):
    from rlbook.plumbing.redis_replay import RedisMemory
    from rlbook.plumbing.redis_server import RedisServer

    config = replace(CATCH, replay="redis", total_env_steps=6_000)
    with RedisServer(persistence=persistence) as server:
        memory = RedisMemory(server.settings, "run", 50_000, apex.example(config))
        turn, held = apex.turn, []

        def killing(flow):
            if len(flow.replay) > 3_000 and not held:
                held.append(len(memory))
                server.kill()
                server.start()
                held.append(len(memory))
            return turn(flow)

        with pytest.MonkeyPatch.context() as patch, virtual(cores=4) as runtime:
            patch.setattr(apex, "turn", killing)
            result = apex.train(config, runtime, memory)
        kept = held[0] if persistence == "always" else 0
        assert held[0] > 3_000 and held[1] == kept
        assert len(memory) == pytest.approx(kept + result.env_steps - 3_000, rel=0.1)
    assert result.stopped_because == "total_env_steps"
    assert result.learner_steps * 64 > 2.5 * result.env_steps - 4 * 500


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"update_rule": "bounded"}, "update_rule: must be one of async, sync"),
        ({"replay": "disk"}, "replay: must be one of shards, redis"),
        ({"num_replays": 0}, "num_replays: must be at least 1"),
        ({"learning_starts": 500}, "learning_starts: must be at most replay_capacity"),
        ({"rate_tolerance": 15}, "rate_tolerance: must be at least half"),
        ({"samples_per_insert": 0.0}, "samples_per_insert: must be larger than 0"),
        ({"samples_per_insert": None, "update_rule": "sync"}, "samples_per_insert: must be a num"),
        ({"weight_normalization": "sum"}, "weight_normalization"),
        ({"env_id": "Pendulum-v1"}, "needs a discrete one"),
        ({"replay_capacity": 10**12}, "replay_capacity: .* need"),
    ],
)
def test_bad_settings_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        train(replace(QUICK, **settings))


def test_presets_say_what_the_paper_says():
    paper = apex.PRESETS["paper"]
    assert (paper.batch_size, paper.n_step, paper.target_period) == (512, 3, 2500)
    assert (paper.priority_exponent, paper.importance_exponent) == (0.6, 0.4)
    assert (paper.replay_capacity, paper.learning_starts) == (2_000_000, 50_000)
    assert (paper.epsilon_base, paper.epsilon_alpha, paper.max_gradient_norm) == (0.4, 7.0, 40.0)
    assert paper.dueling and paper.double and paper.samples_per_insert is None
