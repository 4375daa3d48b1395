"""A2C through the parameter server: what it reduces to, who waits, what survives, what is sent."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlbook import parameter_server as ps
from rlbook import policy_gradient as pg
from rlbook.data import AgentOutput, EnvOutput, Unroll
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.codecs import Identity, decode
from rlbook.plumbing.faults import sigkill
from rlbook.plumbing.runtime import RayRuntime
from rlbook.plumbing.shard import Gradient, ServerSettings, Shard, Weights
from rlbook.plumbing.virtual import VirtualRuntime
from tests.runs import assert_same_run, same_parameters

QUICK = ps.Config(
    progress=False, num_envs=8, unroll_length=5, total_env_steps=4_000, log_every_env_steps=500
)
SYNC = replace(QUICK, update_rule="sync")


def virtual(seed=1, cores=8, **cluster) -> VirtualRuntime:
    return VirtualRuntime(seed, Cluster(nodes=(Node(cores=cores),), costs=ps.COSTS, **cluster))


def train(config: ps.Config, seed: int = 1, **cluster) -> Result:
    with virtual(seed, **cluster) as runtime:
        return ps.train(config, runtime)


# -- reductions ------------------------------------------------------------------------------------


def test_one_synchronous_worker_is_single_process_a2c_bit_for_bit():
    """Same rows of the log too: losses, norms and episodes."""
    mine = train(replace(SYNC, num_workers=1, optimizer="adam"))
    shared = {
        name: getattr(mine.config, name) for name in vars(pg.Config()) if hasattr(QUICK, name)
    }
    theirs = pg.train(pg.Config(**shared))
    assert same_parameters(mine, theirs)
    for name in ("env_steps", "loss", "entropy", "gradient_norm", "episode_return_mean"):
        assert np.array_equal(mine.curves[name], theirs.curves[name], equal_nan=True), name
    assert mine.env_steps == theirs.env_steps and mine.learner_steps == theirs.learner_steps
    other = pg.train(pg.Config(**{**shared, "seed": 2}))
    assert not same_parameters(mine, other)


class Doubled(torch.nn.Module):
    """A network in float64 that takes observations as they are."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(observation.double())


def in_float64(unroll: Unroll) -> Unroll:
    row = unroll.env_outputs
    return unroll._replace(
        env_outputs=EnvOutput(
            row.observation, row.reward.astype(float), row.discount.astype(float), row.first
        )
    )


def side_by_side(unrolls: list[Unroll]) -> Unroll:
    """[T, B] N times as [T, N·B]."""
    envs = zip(*[u.env_outputs for u in unrolls], strict=True)
    agents = zip(*[u.agent_outputs for u in unrolls], strict=True)
    return Unroll(
        EnvOutput(*(np.concatenate(column, axis=1) for column in envs)),
        AgentOutput(*(np.concatenate(column, axis=1) for column in agents)),
    )


@pytest.mark.parametrize("weighted", [True, False])
def test_n_synchronous_workers_are_one_with_an_n_fold_batch(weighted):
    """Ten updates in float64 on the same unrolls; without weights by samples it is not so."""
    config = replace(SYNC, num_workers=4, max_gradient_norm=1e9, unroll_length=30)
    workers = [ps.Worker(config, i) for i in range(4)]
    big = ps.Worker(config, 0)
    for worker in [*workers, big]:
        worker.network = Doubled(worker.network)
        worker.flat = ps.Flat(worker.network)
    start = big.flat.vector.numpy()
    settings = ServerSettings("adam", 0.01)
    many, one = Shard(start, settings), Shard(start, settings)
    largest = 0.0
    for _ in range(10):
        weights = many.pull()
        for worker in workers:
            worker._load([weights])
        big._load([one.pull()])
        unrolls = [
            in_float64(ps.collect_unroll(w.envs, w.act, config.unroll_length)) for w in workers
        ]
        samples = [int(u.valid.sum()) for u in unrolls]
        gradients = []
        for worker, unroll, count in zip(workers, unrolls, samples, strict=True):
            worker.differentiate(unroll)
            blob = Identity().encode(worker.flat.gradients.numpy())
            gradients.append(Gradient(blob, 0, count if weighted else 1, 1.0))
        many.push_together(*gradients)
        big.differentiate(side_by_side(unrolls))
        one.push(Gradient(Identity().encode(big.flat.gradients.numpy()), 0, 1, 1.0))
        assert len(set(samples)) > 1
        difference = decode(many.pull().blob) - decode(one.pull().blob)
        largest = max(largest, float(np.abs(difference).max()))
    assert (largest < 1e-6) == weighted


@pytest.mark.parametrize("rule", ["async", "sync", "bounded"])
def test_k_shards_train_as_one_does_bit_for_bit(rule):
    """With free pulls and pushes, so that the clock does not tell one from three."""
    costs = {**ps.COSTS, "apply": 0.0, "copy": 0.0}
    results = []
    for shards in (1, 3):
        cluster = Cluster(nodes=(Node(cores=16),), costs=costs, jitter=0.0, bandwidth=1e15)
        with VirtualRuntime(1, cluster) as runtime:
            config = replace(QUICK, update_rule=rule, num_workers=3, num_shards=shards)
            results.append(ps.train(config, runtime))
    assert same_parameters(*results)
    assert results[0].extra == results[1].extra


def test_local_servers_change_only_the_order_of_additions():
    flat = train(replace(SYNC, num_workers=4))
    grouped = train(replace(SYNC, num_workers=4, num_groups=2))
    mine, theirs = flat.policy.network.state_dict(), grouped.policy.network.state_dict()
    assert flat.env_steps == grouped.env_steps
    for name in mine:
        assert torch.allclose(mine[name], theirs[name], atol=5e-3), name


# -- the virtual cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["async", "sync", "bounded"])
def test_the_same_seed_gives_the_same_run_and_another_order_gives_another(rule):
    config = replace(QUICK, update_rule=rule, num_workers=4, calls_in_flight=2)
    one, same, other = train(config), train(config), train(config, seed=2, jitter=0.5)
    assert_same_run(one, same)
    assert one.wall_time_s == same.wall_time_s
    assert same_parameters(one, other) == (rule == "sync")  # who waits for all has one order


def test_nobody_gets_further_ahead_than_the_bound(monkeypatch):
    """Seen at every report: rounds finished and asked for, against the slowest."""
    spreads = []
    first = ps.Team.first

    def watching(team):
        asked = [sum(who == i for who, _ in team.in_flight.values()) for i in range(4)]
        spreads.append(
            max(r + a for r, a in zip(team.rounds, asked, strict=True)) - min(team.rounds)
        )
        return first(team)

    monkeypatch.setattr(ps.Team, "first", watching)
    straggler = {"Worker 1": 6.0}
    for bound in (0, 2):
        spreads.clear()
        config = replace(QUICK, update_rule="bounded", staleness_bound=bound, num_workers=4)
        result = train(config, stragglers=straggler)
        assert max(spreads) == bound + 1
        assert max(result.extra["staleness"]) <= 3 * (2 * bound + 1)
    spreads.clear()
    free = train(replace(QUICK, num_workers=4), stragglers=straggler)
    assert max(spreads) > 5 and max(free.extra["staleness"]) > 9


def test_each_rule_makes_of_a_straggler_what_it_says():
    """Virtual seconds for the same steps: sync waits for it, async does not, bounded in between."""
    seconds = {}
    for rule in ("async", "bounded", "sync"):
        config = replace(QUICK, update_rule=rule, num_workers=4, staleness_bound=3)
        seconds[rule] = train(config, stragglers={"Worker 0": 8.0}).wall_time_s
    assert seconds["async"] < 0.6 * seconds["bounded"] <= 0.65 * seconds["sync"]


def test_refused_gradients_are_counted_and_stop_nothing():
    config = replace(QUICK, num_workers=6, max_staleness=3)
    result = train(config)
    counts = result.extra["refused"]
    assert counts["stale"] > 0 and result.learner_steps > 20
    assert result.learner_steps == sum(result.extra["staleness"].values()) - counts["stale"]
    assert result.stopped_because == "total_env_steps"
    strict = train(replace(config, max_staleness=0))
    assert strict.learner_steps > 10


def test_a_hollow_run_predicts_the_same_clock():
    config = replace(QUICK, num_workers=4)
    real = train(config)
    with VirtualRuntime(1, Cluster(nodes=(Node(cores=8),), costs=ps.COSTS), hollow=True) as runtime:
        hollow = ps.train(config, runtime)
    ratio = hollow.metrics["env_steps_per_s"] / real.metrics["env_steps_per_s"]
    assert 0.9 < ratio < 1.1


def test_units_of_work_have_the_names_that_costs_have():
    units = ps.units_of_work(QUICK)
    assert units.keys() == ps.COSTS.keys()
    for work in units.values():
        work()


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_a_synchronous_run_does_not_notice_that_a_shard_died(shards):
    config = replace(SYNC, num_workers=3, num_shards=shards)
    undisturbed = train(config)
    crashed = train(config, crashes=(Crash("Shard 0", at_s=0.5 * undisturbed.wall_time_s),))
    assert same_parameters(undisturbed, crashed)
    assert undisturbed.env_steps == crashed.env_steps
    assert undisturbed.learner_steps == crashed.learner_steps


@pytest.mark.parametrize("weights", ["none", "topk:0.2"])
@pytest.mark.parametrize("rule", ["async", "bounded"])
def test_shards_and_workers_may_die_while_others_go_on(rule, weights):
    config = replace(
        QUICK, update_rule=rule, num_workers=3, num_shards=2, weights_compression=weights
    )
    whole = train(config).wall_time_s
    crashes = (
        Crash("Shard 1", at_s=0.3 * whole),
        Crash("Worker 0", at_s=0.5 * whole),
        Crash("Worker 2", at_s=0.51 * whole),
    )
    result = train(config, crashes=crashes)
    assert result.stopped_because == "total_env_steps"
    per_gradient = config.num_envs * config.unroll_length
    # Every gradient that was reported was applied: what died had at most one in hand.
    assert abs(result.learner_steps - result.env_steps / per_gradient) < 0.1 * result.learner_steps
    assert sum(result.extra["staleness"].values()) == result.learner_steps


def test_real_processes_killed_by_sigkill_cost_no_more_than_what_they_had_in_hand(capfd):
    config = replace(QUICK, num_envs=32, unroll_length=16, total_env_steps=250_000, num_shards=2)
    with RayRuntime(num_cpus=4) as runtime:
        with sigkill("Shard", after_s=0.3), sigkill("Worker", after_s=0.6):
            result = ps.train(config, runtime)
    assert result.stopped_because == "total_env_steps"
    assert sum(result.extra["staleness"].values()) == result.learner_steps
    assert result.learner_steps >= 250_000 // (32 * 16)
    assert capfd.readouterr() == ("", "")
    spans = {span.who for span in result.spans}
    assert "Shard 2" in spans and "Worker 2" in spans  # the new ones


# -- checkpoints -----------------------------------------------------------------------------------


class StoppedError(Exception):
    """The power fails."""


@pytest.mark.parametrize(
    "config",
    [
        SYNC,
        QUICK,
        replace(QUICK, update_rule="bounded", num_shards=2),
        replace(QUICK, compression="topk:0.1+fp16", weights_compression="int8"),
    ],
    ids=["sync", "async", "bounded", "compressed"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, config):
    """The power fails between two checkpoints; what is resumed ends as if it had not."""
    config = replace(config, num_workers=3, checkpoint_every_s=0.03)
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))
    saved = []
    save = Run.checkpoint

    def failing(run: Run) -> None:
        save(run)
        saved.append(run.env_steps)

    record = Run.record

    def until(run: Run, **turn) -> None:
        record(run, **turn)
        if len(saved) == 2 and run.env_steps > saved[-1] + 300:
            raise StoppedError

    monkeypatch.setattr(Run, "checkpoint", failing)
    monkeypatch.setattr(Run, "record", until)
    with pytest.raises(StoppedError):
        train(replace(config, run_dir=str(tmp_path / "cut")))
    assert saved[-1] < config.total_env_steps - 500
    monkeypatch.undo()
    resumed = train(replace(config, resume=str(tmp_path / "cut")))
    assert_same_run(whole, resumed)
    # To some nanoseconds: pickle may spell an equal value in a byte more or less.
    assert np.isclose(whole.wall_time_s, resumed.wall_time_s, rtol=1e-6, atol=0)
    assert same_parameters(whole, Result.load(tmp_path / "cut"))


def test_a_real_run_is_kept_and_goes_on(tmp_path):
    config = replace(QUICK, run_dir=str(tmp_path / "run"))
    with RayRuntime(num_cpus=3) as runtime:
        first = ps.train(config, runtime)
        loaded = Result.load(tmp_path / "run")
        assert same_parameters(first, loaded)
        more = replace(config, run_dir=None, resume=str(tmp_path / "run"), total_env_steps=8_000)
        second = ps.train(more, runtime)
    assert {s.who for s in first.spans}.isdisjoint({s.who for s in second.spans} - {"driver"})
    assert second.env_steps >= 8_000 > first.env_steps >= 4_000
    assert second.learner_steps > first.learner_steps
    assert not same_parameters(first, second)


# -- compression -----------------------------------------------------------------------------------


def test_compression_sends_fewer_bytes():
    sent = {}
    for codec in ("none", "fp16", "int8", "sign", "topk:0.01+fp16"):
        result = train(replace(QUICK, compression=codec, total_env_steps=1_000))
        sent[codec] = result.metrics["bytes_sent"]
    size = sum(p.numel() for p in result.policy.network.parameters())
    assert 4 * size <= sent["none"] <= 4 * size + 64
    assert sent["none"] / sent["fp16"] > 1.9
    assert sent["none"] / sent["int8"] > 3.5
    assert sent["none"] / sent["sign"] > 25
    assert sent["none"] / sent["topk:0.01+fp16"] > 50


def test_what_compression_holds_back_is_sent_later():
    """Σ sent + residual = Σ gradients, at the worker itself."""
    config = replace(QUICK, compression="topk:0.05", learning_rate=0.0)
    worker = ps.Worker(config, 0)
    weights = Weights(0, Identity().encode(worker.flat.vector.numpy()))
    whole, sent = 0.0, 0.0
    for _ in range(20):
        _, piece = worker.gradient(weights)
        whole = whole + worker.flat.gradients.numpy().astype(float)
        sent = sent + decode(piece.blob).astype(float)
    assert np.allclose(sent + worker.encoders[0].residual, whole, atol=1e-5)
    assert np.abs(whole - sent).max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"update_rule": "hogwild"}, "update_rule: must be one of async, sync, bounded"),
        ({"compression": "zip"}, "compression: "),
        ({"weights_compression": "topk:2"}, "weights_compression: "),
        ({"num_workers": 0}, "num_workers: must be at least 1"),
        ({"num_groups": 2}, 'num_groups: needs update_rule "sync"'),
        ({"num_groups": 3, "update_rule": "sync"}, "at most num_workers groups"),
        ({"max_staleness": -1}, "max_staleness"),
        ({"num_shards": 10**6}, "shards: must be 1 to"),
    ],
)
def test_bad_settings_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        train(replace(QUICK, **settings))
