"""k learners with replay make the updates of one together; one that fails ends the run."""

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlbook import apex, apex_dpg, r2d2
from rlbook.data import tree_map
from rlbook.maths.priorities import importance_weights
from rlbook.parts.flat import Flat
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.faults import sigkill
from rlbook.plumbing.memory_shard import (
    Deal,
    Made,
    MemoryShard,
    Part,
    Priorities,
    dealt,
    whole,
)
from rlbook.plumbing.replay_group import ReplayGroup
from rlbook.plumbing.replay_server import Draw
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime
from rlbook.plumbing.virtual import VirtualRuntime
from tests.runs import assert_same_run, network_of

SHARED: dict[str, Any] = {
    "progress": False,
    "num_envs": 4,
    "batch_size": 8,
    "updates_per_call": 3,
    "broadcast_period": 3,
    "target_period": 2,
    "learning_starts": 64,
    "max_gradient_norm": 0.2,  # every step is clipped
    "hidden_sizes": (16,),
    "total_env_steps": 900,
    "log_every_env_steps": 150,
    "num_actors": 3,
    "num_replays": 2,
}
APEX = apex.Config(**SHARED, replay_capacity=2_000, unroll_length=5, rate_tolerance=80)
DPG = apex_dpg.Config(**SHARED, replay_capacity=2_000, unroll_length=5, rate_tolerance=80)
R2D2 = r2d2.Config(
    **{**SHARED, "learning_starts": 8, "env_id": "CartPole-v1"}, lstm_size=8, unroll_length=10
)
SYSTEMS = {"apex": (apex, APEX), "apex_dpg": (apex_dpg, DPG), "r2d2": (r2d2, R2D2)}
each_system = pytest.mark.parametrize(("system", "config"), SYSTEMS.values(), ids=SYSTEMS)


def virtual(system: Any, cores: int = 16, **cluster: Any) -> VirtualRuntime:
    return VirtualRuntime(1, Cluster(nodes=(Node(cores=cores),), costs=system.COSTS, **cluster))


def train(system: Any, config: Any, **cluster: Any) -> Any:
    with virtual(system, **cluster) as runtime:
        return system.train(config, runtime)


def in_float64(tree: Any) -> Any:
    return tree_map(lambda x: x.astype(float) if x.dtype == np.float32 else x, tree)


def doubled(learner: Any) -> Any:
    """With parameters in float64."""
    networks = (
        learner.networks if hasattr(learner, "networks") else (learner.online, learner.target)
    )
    learner.flat, learner.flat_target = (Flat(network.double()) for network in networks)
    learner.optimizer = torch.optim.Adam([learner.flat.vector], lr=1e-2)
    return learner


def shards_of(system: Any, config: Any, count: int) -> list[MemoryShard]:
    """Equal memories of what an actor made, in float64, with priorities that are far apart."""
    actor, weights = system.Actor(config, 0), system.Learner(config).newest()
    made = [one for _ in range(20) if (one := actor.play(weights)[1]) is not None]
    settings = getattr(config, "memory_settings", None) or r2d2.MemorySettings(2_000)
    shards = [MemoryShard(settings, 5) for _ in range(count)]
    rng = np.random.default_rng(3)
    for one in made:
        items = Made(in_float64(one.items), rng.exponential(1.0, len(one.priorities)) ** 3)
        for shard in shards:
            shard.keep(items)
    return shards


def by_hand(group: list[Any], parts: list[tuple[Part, ...]], updates: int) -> list[tuple[Any, ...]]:
    """What the driver asks of learners that cannot wait for one another."""
    lowest = [learner.begin(*part) for learner, part in zip(group, parts, strict=True)]
    for _ in range(updates):
        found = [learner.share(None, *lowest) for learner in group]
        found = [one._replace(gradient=one.gradient.copy()) for one in found]  # they travel
        for learner in group:
            learner.apply(*found)
    return [learner.finish(None, *lowest) for learner in group]


# -- arithmetic ------------------------------------------------------------------------------------


@each_system
@pytest.mark.parametrize("learners", [2, 4])
def test_k_learners_make_the_updates_of_one_with_prioritised_draws(system, config, learners):
    """In float64, over several draws of three batches; weights are unequal, and so are the rows
    that count in the parts of R2D2's batches.
    """
    one, many = doubled(system.Learner(config)), replace(config, num_learners=learners)
    group = [doubled(system.Learner(many, rank)) for rank in range(learners)]
    ours, theirs = shards_of(system, config, 2)
    deal, rows = Deal(learners, config.updates_per_call), 8 * config.updates_per_call
    for _ in range(6):
        part, parts = ours.draw(rows, 1.0)[1], theirs.draw(rows, 1.0, deal, 0)[1:]
        metrics, weights, back = one.learn(part)
        answers = by_hand(group, [(part,) for part in parts], config.updates_per_call)
        for rank, (_, _, mine) in enumerate(answers):
            places = np.arange(rows).reshape(-1, config.updates_per_call)[rank::learners].ravel()
            assert np.array_equal(mine.keys, back.keys[places])
            assert np.allclose(mine.values, back.values[places], rtol=0, atol=1e-9)
        assert answers[0][0]["gradient_norm"] == pytest.approx(metrics["gradient_norm"], rel=1e-9)
        assert np.ptp(part.sample.probabilities) > 1e-3
        for learner in group:
            assert np.abs(learner.newest().values - weights.values).max() < 1e-9
            assert torch.allclose(learner.flat_target.vector, one.flat_target.vector, atol=1e-9)
        assert answers[0][1].version == weights.version and answers[1][1] is None
        assert ours.correct(back) == theirs.correct(back) == rows  # of equal keys the last counts


def test_weights_are_divided_by_the_largest_of_the_whole_batch():
    """The rarest row of each batch is with one learner; the others know of it."""
    config = replace(APEX, num_learners=2, updates_per_call=2, batch_size=8)
    group = [apex.Learner(config, rank) for rank in range(2)]
    (shard,) = shards_of(apex, config, 1)
    _, *parts = narrowed(shard.draw(16, 1.0, Deal(2, 2), 0))
    for part, factor in zip(parts, (1.0, 0.01), strict=True):
        part.sample.probabilities[:] = factor * np.linspace(0.5, 1.0, 8)
    seen: list[list[np.ndarray]] = [[], []]
    for rank, learner in enumerate(group):
        inner = learner.gradient

        def noting(batch, rank=rank, inner=inner):
            how = {"size": batch.size, "exponent": 0.4, "smallest": batch.smallest}
            seen[rank].append(importance_weights(batch.sample.probabilities, **how))
            return inner(batch)

        learner.gradient = noting
    by_hand(group, [(part,) for part in parts], 2)
    for update in range(2):
        assert max(seen[1][update]) == 1.0
        assert max(seen[0][update]) < 0.25  # (0.01)^0.4 is 0.16


def narrowed(answer: Any) -> list[Any]:
    report, *parts = answer
    narrow = [
        part._replace(
            sample=part.sample._replace(
                items=tree_map(
                    lambda x: x.astype(np.float32) if x.dtype == float else x, part.sample.items
                )
            )
        )
        for part in parts
    ]
    return [report, *narrow]


def test_a_draw_is_dealt_in_groups_to_each_learner_in_turn():
    """Over two shards, of which the first gives a broken number of groups."""
    (shard,) = shards_of(apex, APEX, 1)
    sample = shard.draw(24, 1.0)[1].sample
    sample = sample._replace(keys=np.arange(24))
    first, second = (
        tree_map(lambda column, at=at: column[at], sample) for at in (slice(7), slice(7, None))
    )
    deal = Deal(learners=4, together=3)
    halves = dealt(first, 7, deal, 0), dealt(second, 17, deal, 7)
    for rank, pair in enumerate(zip(*halves, strict=True)):
        joined = whole([Part(one, 100) for one in pair])
        groups = [3 * rank, 3 * (rank + 4)]
        assert joined.sample.keys.tolist() == [g + i for g in groups for i in range(3)]
    assert halves[0][3] is None  # the first shard has no row for the last learner


@pytest.fixture
def the_largest_counts(monkeypatch):
    """Of an item that was drawn twice: else its new priority is that of the learner asked last."""
    correct = MemoryShard.correct

    def sorting(self, *priorities):
        keys, values = (np.concatenate([one[i] for one in priorities if one]) for i in range(2))
        order = np.lexsort((values, keys))
        return correct(self, Priorities(keys[order], values[order]))

    monkeypatch.setattr(MemoryShard, "correct", sorting)


def furthest(one: Any, other: Any) -> float:
    """The largest difference of two runs' parameters."""
    mine, theirs = (
        torch.nn.utils.parameters_to_vector(network_of(x).parameters()) for x in (one, other)
    )
    return float((mine - theirs).detach().abs().max())


@each_system
def test_two_learners_run_as_one_but_for_the_last_bits(system, config, the_largest_counts):
    """A whole run in turns, with shards, actors and all."""
    config = replace(config, update_rule="sync", total_env_steps=600)
    one = train(system, config)
    two = train(system, replace(config, num_learners=2))
    assert (one.env_steps, one.learner_steps) == (two.env_steps, two.learner_steps)
    assert one.learner_steps > 30 and furthest(one, two) < 1e-5
    assert {"Learner 0", "Learner 1"} <= {span.who for span in two.spans}


@each_system
def test_the_same_seed_gives_the_same_run(system, config):
    config = replace(config, num_learners=2)
    assert_same_run(train(system, config), train(system, config))


def test_uniform_draws_and_weights_by_the_buffer_are_dealt_too(the_largest_counts):
    for settings in ({"prioritized": False}, {"weight_normalization": "buffer"}):
        config = replace(APEX, update_rule="sync", **settings)
        one, four = train(apex, config), train(apex, replace(config, num_learners=4))
        assert furthest(one, four) < 1e-5


def test_a_hollow_run_predicts_the_same_clock():
    config = replace(APEX, num_learners=2, total_env_steps=2_000)
    real, cluster = train(apex, config), Cluster(nodes=(Node(cores=16),), costs=apex.COSTS)
    with VirtualRuntime(1, cluster, hollow=True) as runtime:
        hollow = apex.train(config, runtime)
    ratio = hollow.metrics["env_steps_per_s"] / real.metrics["env_steps_per_s"]
    assert 0.85 < ratio < 1.15


# -- a server that learners draw from themselves ---------------------------------------------------


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")
def test_clients_of_a_server_draw_each_their_part():
    """By lots of their own; weights are of the whole batch; who finds nothing stops all."""
    from rlbook.plumbing.redis_replay import RedisMemory
    from rlbook.plumbing.redis_server import RedisServer

    config = replace(APEX, num_learners=2, calls_in_flight=1)
    actor = apex.Actor(APEX, 0)
    made = [actor.play(apex.Learner(APEX).newest())[1] for _ in range(8)]
    with RedisServer(persistence="none") as server:
        memory = RedisMemory(server.settings, "dealt", 2_000, apex.example(APEX))
        sent = [pickle.loads(pickle.dumps(memory)) for _ in range(2)]
        group = [apex.Learner(config, rank, memory=mine) for rank, mine in enumerate(sent)]
        nothing = [learner.begin() for learner in group]
        assert [learner.share(None, *nothing).weight for learner in group] == [0.0, 0.0]
        assert [learner.finish(None, *nothing) for learner in group] == [(None, None)] * 2
        for one in made:
            memory.add(*one)
        before = memory.total_priority
        lowest = [learner.begin() for learner in group]
        keys = [tuple(learner._draw.part.sample.keys) for learner in group]
        assert keys[0] != keys[1] and len(keys[0]) == len(keys[1]) == 12
        half = [
            learner.finish(None, nothing[0], low)
            for learner, low in zip(group, lowest, strict=True)
        ]
        assert half == [(None, None)] * 2 and memory.total_priority == before
        answers = by_hand(group, [()] * 2, config.updates_per_call)
        assert [learner.updates for learner in group] == [3, 3] and answers[0][0]["loss"] > 0
        assert torch.equal(group[0].flat.vector, group[1].flat.vector)
        assert memory.total_priority != before
    result = train(apex, replace(config, replay="redis"))
    assert result.learner_steps > 100 and result.metrics["replay_size"] > 500


# -- precision and devices -------------------------------------------------------------------------


@each_system
def test_in_bfloat16_the_parameters_stay_float32_and_move_alike(system, config):
    """Every part of the network, those before a burn-in without gradient too."""
    vectors, sizes = {}, []
    for precision in ("float32", "bfloat16"):
        learner = system.Learner(replace(config, precision=precision))
        before, (shard,) = learner.flat.vector.clone(), shards_of(system, config, 1)
        answer = learner.learn(narrowed(shard.draw(24, 1.0))[1])
        assert answer[2].values.dtype == np.float64 and np.isfinite(answer[2].values).all()
        assert learner.flat.vector.dtype == torch.float32
        vectors[precision] = learner.flat.vector - before
        network = learner.networks[0] if hasattr(learner, "networks") else learner.online
        sizes.append([float(parameter.grad.norm()) for parameter in network.parameters()])
    assert np.allclose(np.log2(sizes[0]), np.log2(sizes[1]), atol=1.0)
    likeness = torch.nn.functional.cosine_similarity(*vectors.values(), dim=0)
    assert 0.9 < likeness < 1.0


def test_what_is_asked_is_compiled_and_it_learns_the_same():
    """Of Ape-X DPG the critic too, which no forward pass asks. (Compiled without a compiler.)"""
    learner = apex_dpg.Learner(replace(DPG, compile=True))
    online, target = learner.networks
    parts = [online.torso, online.critic_torso, target.torso, target.critic_torso]
    assert all(part._compiled_call_impl is not None for part in parts)
    assert apex.Learner(replace(APEX, compile=True)).target._compiled_call_impl is not None
    recurrent = r2d2.Learner(replace(R2D2, compile=True)).online
    assert recurrent._compiled_call_impl is None is not recurrent.torso._compiled_call_impl
    ends = []
    for one in (learner, apex_dpg.Learner(DPG)):
        if one is learner:
            for part in parts:
                part.compile(backend="eager")
        (shard,) = shards_of(apex_dpg, DPG, 1)
        one.learn(narrowed(shard.draw(24, 1.0))[1])
        ends.append(one.flat.vector)
    assert torch.allclose(*ends, rtol=0, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_system
def test_on_a_gpu_it_learns_what_it_learns_on_the_cpu(system, config):
    answers, learners = [], []
    for device in ("cpu", "cuda"):
        learner = system.Learner(replace(config, device=device))
        (shard,) = shards_of(system, config, 1)
        answers.append(learner.learn(narrowed(shard.draw(24, 1.0))[1]))
        learners.append(learner)
    assert learners[1].flat.vector.is_cuda
    assert np.allclose(answers[0][1].values, answers[1][1].values, rtol=0, atol=1e-4)
    assert np.allclose(answers[0][2].values, answers[1][2].values, rtol=1e-3, atol=1e-4)
    state = learners[1].state_dict()
    learners[0].load_state_dict(state)  # what is saved there can be loaded here
    assert np.array_equal(learners[0].newest().values, learners[1].newest().values)


# -- faults ----------------------------------------------------------------------------------------


@each_system
def test_a_shard_may_die_and_all_learners_go_on(system, config):
    config = replace(config, num_learners=2, total_env_steps=1_500)
    whole_run = train(system, config)
    crashes = (Crash("MemoryShard 0", at_s=0.6 * whole_run.wall_time_s),)
    result = train(system, config, crashes=crashes)
    assert result.stopped_because == "total_env_steps"
    assert result.learner_steps > 0.5 * whole_run.learner_steps
    assert "MemoryShard 2" in {span.who for span in result.spans}


@each_system
@pytest.mark.parametrize("learner", [0, 1])
def test_the_death_of_a_learner_ends_the_run_and_says_who(system, config, learner):
    config = replace(config, num_learners=2)
    at = 0.6 * train(system, config).wall_time_s
    with pytest.raises(ActorDiedError, match=f"Learner {learner} died"):
        train(system, config, crashes=(Crash(f"Learner {learner}", at_s=at),))


@pytest.mark.parametrize("learner", [0, 1])
def test_an_error_of_any_learner_is_raised_with_its_words(learner):
    def failing(self: apex.Learner, batch: Part) -> Any:
        if self.rank == learner and self.updates > 5:
            raise ArithmeticError(f"learner {self.rank} cannot count")
        return gradient(self, batch)

    gradient: Callable[..., Any] = apex.Learner.gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apex.Learner, "gradient", failing)
        with pytest.raises(ArithmeticError, match=f"learner {learner} cannot count"):
            train(apex, replace(APEX, num_learners=2))


# -- real processes --------------------------------------------------------------------------------


def on_ray(runtime: RayRuntime, system: Any, config: Any) -> ReplayGroup:
    remote, size = runtime.remote(system.Learner), config.num_learners
    return ReplayGroup(
        runtime, lambda rank: remote.remote(config, rank), size, config.updates_per_call
    )


def as_draw(runtime: RayRuntime, parts: list[Part]) -> Draw:
    rows = sum(len(part.sample.keys) for part in parts)
    return Draw([runtime.put(part) for part in parts], rows)


def test_real_learners_reduce_among_themselves_and_one_that_fails_ends_it():
    """Gloo's sums are those of one learner; the others of one that fails are not kept waiting."""
    config = replace(APEX, num_learners=2)
    one, (ours, theirs) = apex.Learner(APEX), shards_of(apex, APEX, 2)
    with RayRuntime(num_cpus=2) as runtime:
        group = on_ray(runtime, apex, config)
        for _ in range(4):
            _, part = narrowed(ours.draw(24, 1.0))
            _, *parts = narrowed(theirs.draw(24, 1.0, group.deal, 0))
            metrics, weights, back = one.learn(part)
            answer = group.learn(as_draw(runtime, parts))
            found = group.learnt(answer[0])
            assert found["gradient_norm"] == pytest.approx(metrics["gradient_norm"], rel=1e-4)
            assert np.allclose(runtime.get(answer[1]).values, weights.values, rtol=0, atol=1e-5)
            assert [len(mine.keys) for mine in runtime.get(answer[2])] == [12, 12]
            assert ours.correct(back) == theirs.correct(back) == 24
        states = runtime.get([learner.state_dict.remote() for learner in group.learners])
        for name in ("online", "target"):
            assert np.array_equal(states[0][name], states[1][name])
        assert states[0]["updates"] == states[1]["updates"] == 12
        assert states[0]["rng"] == states[1]["rng"] and group.state_dict()["updates"] == 12
        result = apex.train(replace(config, total_env_steps=3_000), runtime)
        broken = parts[1]._replace(sample=parts[1].sample._replace(probabilities=None))
        metrics, *_ = group.learn(Draw([runtime.put(parts[0]), runtime.put(broken)], 24))
        with pytest.raises(TypeError, match="object of type 'NoneType' has no len"):
            group.learnt(group.first([metrics]))
    assert result.stopped_because == "total_env_steps" and result.learner_steps > 300
    assert {"Learner 2", "Learner 3"} <= {span.who for span in result.spans}


@pytest.mark.parametrize("which", [0, 1])
def test_a_real_learner_killed_by_sigkill_ends_the_run_at_once(which, capfd):
    """Without a word of Ray's, and long before gloo would give up (two minutes)."""
    config = replace(APEX, num_learners=2, total_env_steps=5_000_000, samples_per_insert=1.0)
    with RayRuntime(num_cpus=4) as runtime, pytest.raises(ActorDiedError):
        with sigkill("Learner", after_s=1.0, which=which) as fault:
            apex.train(config, runtime)
    assert fault.killed and capfd.readouterr() == ("", "")


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_learners": 0}, "num_learners: must be at least 1"),
        ({"num_learners": 3}, "batch_size: must be a multiple of num_learners, which is 3"),
        ({"device": "gpu"}, "device: must be"),
        ({"precision": "half"}, "precision: must be one of float32, bfloat16"),
    ],
)
@each_system
def test_bad_settings_are_refused_in_words(system, config, settings, words):
    with pytest.raises(ValueError, match=words):
        replace(config, **settings)
