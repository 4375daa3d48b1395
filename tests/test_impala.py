"""IMPALA: what it reduces to, V-trace in its loss, what is in flight, who dies, who remembers."""

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from rlbook import impala as ip
from rlbook import policy_gradient as pg
from rlbook.data import AgentOutput, EnvOutput, Unroll
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.parts.acting import Sampler
from rlbook.parts.flat import Flat
from rlbook.parts.recurrent import unrolled
from rlbook.parts.unroll_replay import side_by_side
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.crew import Crew, CrewError
from rlbook.plumbing.faults import sigkill
from rlbook.plumbing.flow import Flow
from rlbook.plumbing.learner_group import LearnerGroup
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime
from rlbook.plumbing.virtual import VirtualRuntime
from tests import oracles
from tests.counters import register
from tests.runs import assert_same_run, same_parameters

QUICK = ip.Config(
    progress=False,
    num_envs=8,
    unroll_length=5,
    entropy_cost=0.02,
    total_env_steps=4_000,
    log_every_env_steps=500,
)
SYNC = replace(QUICK, update_rule="sync", unrolls_in_flight=1, unrolls_per_batch=2)
ALONE = replace(SYNC, num_actors=1, unrolls_per_batch=1, lambda_=1.0)
COUNTED = {"env_id": "test/Counter-v0", "num_envs": 3, "unroll_length": 17}
"""Both ends of episodes come within an unroll, again and again."""


def virtual(seed=1, cores=8, hollow=False, **cluster) -> VirtualRuntime:
    nodes = (Node(cores=cores),)
    return VirtualRuntime(seed, Cluster(nodes=nodes, costs=ip.COSTS, **cluster), hollow=hollow)


def train(config: ip.Config, seed: int = 1, **cluster) -> Result:
    with virtual(seed, **cluster) as runtime:
        return ip.train(config, runtime)


class Doubled(torch.nn.Module):
    """A network in float64 that takes observations as they are."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network.double()

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # Counter's observations are large: scaled, so that nothing saturates.
        return self.network(observation.double() / 50)


def in_float64(unroll: Unroll) -> Unroll:
    row, said = unroll.env_outputs, unroll.agent_outputs
    rewards, discounts = row.reward.astype(float), row.discount.astype(float)
    return unroll._replace(
        env_outputs=EnvOutput(row.observation, rewards, discounts, row.first),
        agent_outputs=said._replace(logits=said.logits.astype(float)),
    )


def doubled(part):
    """An actor or a learner in float64."""
    network = part.sampler.network if isinstance(part, ip.Actor) else part.network
    network = Doubled(network)
    part.flat = Flat(network)
    if isinstance(part, ip.Actor):
        part.sampler = Sampler(network, part.config.num_envs, part.sampler.rng)
    else:
        part.network, part.optimizer = network, ip.make_optimizer(part.config, part.flat)
        part.history.append(part.newest())
    return part


def actor_and_learner(config: ip.Config) -> tuple[ip.Actor, ip.Learner]:
    """In float64; Counter's copies are counted from 0."""
    register()
    actor = doubled(ip.Actor(config, 0))
    return actor, doubled(ip.Learner(config))


def a2c_of(config: ip.Config, **changes) -> pg.Config:
    shared = {name: getattr(config, name) for name in vars(pg.Config()) if hasattr(config, name)}
    return pg.Config(**{**shared, **changes})


# -- the loss --------------------------------------------------------------------------------------


def off_policy_unroll(config: ip.Config, seed: int = 3) -> tuple[Unroll, ip.Learner]:
    """Of other parameters than the learner's, in float64."""
    actor, learner = actor_and_learner(config)
    generator = torch.Generator().manual_seed(seed)
    other = learner.flat.vector + 0.3 * torch.randn(
        learner.flat.vector.shape, generator=generator, dtype=torch.float64
    )
    actor.unroll(learner.weights()._replace(values=other.numpy()))
    _, unroll = actor.unroll(learner.weights()._replace(values=other.numpy()))
    return in_float64(unroll), learner


@pytest.mark.parametrize("correction", ["vtrace", "none"])
@pytest.mark.parametrize(("rho_bar", "c_bar", "lambda_"), [(1.0, 1.0, 1.0), (2.0, 0.5, 0.8)])
def test_the_loss_is_the_papers_by_loops(correction, rho_bar, c_bar, lambda_):
    """With both ends of episodes in the unroll; against sums written out, O(T²)."""
    config = replace(
        QUICK,
        **COUNTED,
        correction=correction,
        rho_bar=rho_bar,
        c_bar=c_bar,
        lambda_=lambda_,
        value_cost=0.3,
    )
    unroll, learner = off_policy_unroll(config)
    loss, metrics = ip.loss_function(learner.network, unroll, config)
    with torch.no_grad():
        logits, values = unrolled(learner.network, unroll)
    behaviour = torch.from_numpy(unroll.agent_outputs.logits)
    actions = torch.from_numpy(unroll.agent_outputs.action)[..., None]
    log_pi = logits[:-1].log_softmax(-1).gather(-1, actions)[..., 0]
    log_rhos = log_pi - behaviour.log_softmax(-1).gather(-1, actions)[..., 0]
    assert log_rhos.exp().max() > 1.2 and log_rhos.exp().min() < 0.8
    rows = {
        "log_rhos": log_rhos if correction == "vtrace" else torch.zeros_like(log_rhos),
        "rewards": torch.from_numpy(unroll.env_outputs.reward[1:]),
        "discounts": config.discount * torch.from_numpy(unroll.env_outputs.discount[1:]),
        "values": values[:-1],
        "valid": torch.from_numpy(unroll.valid),
    }
    clips = {"rho_bar": rho_bar, "c_bar": c_bar, "pg_rho_bar": rho_bar, "lambda_": lambda_}
    tail = {"bootstrap_value": values[-1]}
    vs, advantages = oracles.columns(oracles.vtrace, rows, tail=tail, **clips)
    ended = unroll.env_outputs.discount[1:] == 0
    assert ended.any() and (~unroll.valid).sum() > ended.sum(), "terminations and truncations"
    policy = value = entropy = 0.0
    for t, b in np.argwhere(unroll.valid):
        p = logits[t, b].softmax(-1).tolist()
        policy -= (advantages[t, b] * log_pi[t, b]).item()
        value += 0.5 * (values[t, b] - vs[t, b]).item() ** 2
        entropy -= sum(x * math.log(x) for x in p)
    count = int(unroll.valid.sum())
    assert math.isclose(metrics["policy_loss"].item(), policy / count, rel_tol=1e-6)
    assert math.isclose(metrics["value_loss"].item(), value / count, rel_tol=1e-6)
    assert math.isclose(loss.item(), (policy + 0.3 * value - 0.02 * entropy) / count, rel_tol=1e-6)
    summed, _ = ip.loss_function(learner.network, unroll, replace(config, loss_reduction="sum"))
    assert math.isclose(summed.item(), policy + 0.3 * value - 0.02 * entropy, rel_tol=1e-6)


def test_rows_between_episodes_do_not_matter():
    config = replace(QUICK, **COUNTED)
    unroll, learner = off_policy_unroll(config)
    before = ip.loss_function(learner.network, unroll, config)[0]
    unroll.agent_outputs.action[~unroll.valid] = 9
    unroll.agent_outputs.logits[~unroll.valid] = 7.0
    assert torch.equal(before, ip.loss_function(learner.network, unroll, config)[0])
    unroll.agent_outputs.logits[0, 0, unroll.agent_outputs.action[0, 0]] += 1.0
    assert not torch.equal(before, ip.loss_function(learner.network, unroll, config)[0])


def test_no_gradient_flows_through_targets_and_ratios():
    """With targets held fast, the gradient of the policy part is −Σ A ∇ log π / n."""
    config = replace(QUICK, **COUNTED, value_cost=0.0, entropy_cost=0.0)
    unroll, learner = off_policy_unroll(config)
    learner.flat.gradients.zero_()
    loss, _ = ip.loss_function(learner.network, unroll, config)
    loss.backward()
    found = learner.flat.gradients.clone()
    value_head = learner.network.network.value_head
    assert not value_head.weight.grad.any() and found.norm() > 1e-3
    shifted = replace(config, value_cost=1.0)
    learner.flat.gradients.zero_()
    ip.loss_function(learner.network, unroll, shifted)[0].backward()
    assert value_head.weight.grad.any()


# -- reductions ------------------------------------------------------------------------------------


def test_on_policy_the_loss_is_that_of_n_step_a2c():
    config = replace(ALONE, **COUNTED)
    actor, learner = actor_and_learner(config)
    for _ in range(3):
        _, unroll = actor.unroll(learner.weights())
        unroll = in_float64(unroll)
        mine, metrics = ip.loss_function(learner.network, unroll, config)
        mask = torch.from_numpy(unroll.valid)
        theirs, expected = pg.loss_function(learner.network, unroll, mask, a2c_of(config))
        for name, value in expected.items():
            assert torch.isclose(metrics[name], value, rtol=1e-9), name
        gradients = []
        for loss in (mine, theirs):
            learner.flat.gradients.zero_()
            loss.backward()
            gradients.append(learner.flat.gradients.clone())
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "test/Counter-v0"])
def test_without_lag_updates_are_those_of_n_step_a2c(env_id, optimizer):
    """Forty updates of one synchronous actor and learner in float64, each acting for itself."""
    config = replace(ALONE, env_id=env_id, optimizer=optimizer, max_gradient_norm=0.3)
    actor, learner = actor_and_learner(config)
    register()
    theirs = a2c_of(config)
    envs = pg.make_envs(env_id, config.num_envs, config.seed)
    network = Doubled(pg.make_network(theirs, envs))
    a2c_actor, a2c = pg.Actor(envs, network, theirs), pg.Learner(network, theirs)
    start = a2c.flat.vector.clone()
    assert torch.equal(start, learner.flat.vector)
    for _ in range(40):
        report, unroll = actor.unroll(learner.weights())
        learner.update([0], in_float64(unroll))
        played, valid, env_steps = a2c_actor.unroll()
        a2c.update(in_float64(played), valid)
        assert report.env_steps == env_steps
        assert np.array_equal(unroll.agent_outputs.action, played.agent_outputs.action)
    assert (learner.flat.vector - a2c.flat.vector).abs().max() < 1e-6
    assert (start - a2c.flat.vector).abs().max() > 1e-2


def test_a_synchronous_run_is_a2c_but_for_the_last_bits():
    """In float32 numpy and PyTorch round apart; the run stays the same run for a while."""
    config = replace(ALONE, total_env_steps=1_000)
    mine = train(config)
    theirs = pg.train(a2c_of(config))
    assert set(mine.extra["policy_lag"]) == {0}
    assert mine.env_steps == theirs.env_steps and mine.learner_steps == theirs.learner_steps
    a, b = mine.policy.network.state_dict(), theirs.policy.network.state_dict()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-4), name
    other = pg.train(a2c_of(config, seed=2)).policy.network.state_dict()
    assert not torch.allclose(a["policy_head.weight"], other["policy_head.weight"], atol=1e-4)


def fresh_unrolls(config: ip.Config, count: int) -> list[Unroll]:
    """On-policy unrolls of several actors in float64, of unequal numbers of valid rows."""
    register()
    actors = [doubled(ip.Actor(config, index)) for index in range(count)]
    weights = doubled(ip.Learner(config)).weights()
    for index, actor in enumerate(actors):
        for _ in range(index):
            actor.unroll(weights)
    return [in_float64(actor.unroll(weights)[1]) for actor in actors]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("learners", [2, 3])
def test_k_learners_make_the_updates_of_one(learners, reduction):
    config = replace(
        QUICK, env_id="test/Counter-v0", num_actors=4, unrolls_per_batch=4, unroll_length=7
    )
    config = replace(config, loss_reduction=reduction, max_gradient_norm=0.2)
    batch = fresh_unrolls(config, 4)
    assert len({int(unroll.valid.sum()) for unroll in batch}) > 1
    one = doubled(ip.Learner(config))
    many = replace(config, num_learners=learners)
    group = [doubled(ip.Learner(many, rank)) for rank in range(learners)]
    for _ in range(10):
        metrics, weights = one.update([0], *batch)
        shares = [group[rank].gradient(*batch[rank::learners]) for rank in range(learners)]
        shares = [share._replace(gradient=share.gradient.copy()) for share in shares]  # they travel
        found = [learner.apply([0], *shares) for learner in group]
        assert math.isclose(found[0][0]["gradient_norm"], metrics["gradient_norm"], rel_tol=1e-9)
        for _, theirs in found:
            assert np.abs(theirs.values - weights.values).max() < 1e-6
    shares = [group[rank].gradient(*batch[rank::learners]) for rank in range(learners)]
    group[0].apply([0], *[share._replace(weight=1.0) for share in shares])
    one.update([0], *batch)
    same = np.abs(group[0].newest().values - one.newest().values).max() < 1e-6
    assert same == (reduction == "sum"), "a mean must weigh by rows"


def test_real_learners_reduce_among_themselves():
    """Gloo's gradients are those of one learner, and all end with the same parameters."""
    config = replace(QUICK, num_actors=4, unrolls_per_batch=4, unroll_length=12, num_learners=2)
    actors = [ip.Actor(config, index) for index in range(4)]
    one = ip.Learner(replace(config, num_learners=1))
    with RayRuntime(num_cpus=2) as runtime:
        remote = runtime.remote(ip.Learner)
        group = LearnerGroup(runtime, lambda rank: remote.remote(config, rank), 2)
        for _ in range(5):
            batch = [actor.unroll(one.weights())[1] for actor in actors]
            one.update([0], *batch)
            metrics, _ = group.update([0], [runtime.put(unroll) for unroll in batch])
            assert group.answer(metrics)["gradient_norm"] > 0
        states = group.state_dict()["learners"]
        found = group.parameters()
        broken, _ = group.update([0], [runtime.put(unroll) for unroll in (batch[0], "no unroll")])
        with pytest.raises(AttributeError, match="'str' object has no attribute"):
            group.answer(broken)
        result = ip.train(replace(config, total_env_steps=20_000), runtime)
    assert result.stopped_because == "total_env_steps" and np.isfinite(result.metrics["loss"])
    assert {"Learner 2", "Learner 3"} <= {span.who for span in result.spans}
    assert np.array_equal(states[0]["parameters"], states[1]["parameters"])
    assert np.allclose(found, one.newest().values, atol=1e-5)
    assert states[0]["version"] == states[1]["version"] == 5


def test_real_learners_without_a_row_stay_and_one_that_fails_keeps_nobody_waiting():
    config = replace(QUICK, num_learners=2, unrolls_per_batch=2)
    actor, one = ip.Actor(config, 0), ip.Learner(config)
    _, unroll = actor.unroll(one.weights())
    row = unroll.env_outputs
    nothing = unroll._replace(env_outputs=row._replace(first=np.ones_like(row.first)))
    with Crew(ip.Learner, lambda rank, _: (config, rank), 2) as learners:
        learners.ask(0, "host", "127.0.0.1")
        _, port = learners.first()
        learners.each("meet", [("127.0.0.1", port, rank, 2) for rank in range(2)])
        for metrics, weights in learners.each("update", [([0], nothing)] * 2):
            assert metrics["gradient_norm"] == 0.0
            assert np.array_equal(weights.values, one.weights().values)
        for metrics, weights in learners.each("update", [([0], nothing), ([0], unroll)]):
            assert metrics["gradient_norm"] > 0.0 and np.isfinite(weights.values).all()
        learners.ask(0, "update", [0], unroll)
        learners.ask(1, "update", [0], "no unroll")
        words = []
        for _ in range(2):  # with the limit of two minutes, if it is not told
            with pytest.raises(CrewError) as failed:
                learners.first()
            words.append(str(failed.value))
    assert "AttributeError" in words[0] + words[1]
    assert "GroupBroken" in words[0] + words[1] and "Timed out" not in words[0] + words[1]


def test_every_actor_draws_for_itself_one_that_replaces_another_too():
    """Environments and actions."""
    born = [ip.Actor(QUICK, 0), ip.Actor(QUICK, 1), ip.Actor(QUICK, 0, born=1)]
    seen = {actor.envs.env_output.observation.tobytes() for actor in born}
    draws = {actor.sampler.rng.random() for actor in born}
    assert len(seen) == len(draws) == 3
    again = ip.Actor(QUICK, 0)
    assert (
        again.envs.env_output.observation.tobytes() in seen and again.sampler.rng.random() in draws
    )


# -- what is in flight -----------------------------------------------------------------------------


@contextmanager
def lags_of_the_data(monkeypatch):
    """What learners see: their version less the unroll's, however the driver counts."""
    seen: Counter[int] = Counter()
    gradient = ip.Learner.backward

    def seeing(self, *unrolls):
        seen.update(self.version - unroll.version for unroll in unrolls)
        return gradient(self, *unrolls)

    with monkeypatch.context() as patch:
        patch.setattr(ip.Learner, "backward", seeing)
        yield seen


@pytest.mark.parametrize(
    ("config", "lags"),
    [
        (SYNC, {0}),
        (replace(SYNC, policy_delay=4), {0, 1, 2, 3, 4}),
        (replace(SYNC, broadcast_period=3), {0, 1, 2}),
        (replace(QUICK, num_actors=3, unrolls_in_flight=1), {0, 1, 2, 3}),
        (replace(QUICK, updates_in_flight=3), {0, 1, 2, 3, 4, 5, 6}),
    ],
    ids=["sync", "delay", "broadcast", "async", "queued"],
)
def test_the_lag_that_is_recorded_is_the_lag_of_the_data(config, lags, monkeypatch):
    with lags_of_the_data(monkeypatch) as seen:
        result = train(config)
    found = result.extra["policy_lag"]
    assert found == seen and set(found) == lags
    assert sum(found.values()) == result.learner_steps * config.unrolls_per_batch
    assert result.metrics["policy_lag_max"] <= max(lags)
    if config.policy_delay:  # only at the beginning there is nothing so old
        assert [found[lag] for lag in range(4)] == [2] * 4 and found[4] > 20


def test_more_in_flight_is_more_lag():
    means = []
    for count in (1, 2, 4):
        lags = train(replace(QUICK, unrolls_in_flight=count)).extra["policy_lag"]
        means.append(sum(lag * n for lag, n in lags.items()) / sum(lags.values()))
    assert all(more > less + 1 for less, more in pairwise(means))


def test_unrolls_are_learnt_from_first_in_first_out_and_never_more_than_allowed(monkeypatch):
    finished, learnt, most = [], [], []
    first, learn = Flow.first, Flow.learn

    def finishing(flow):
        asked = [one for one in flow.in_flight.values() if hasattr(one, "actor")]
        held = Counter(one.actor for one in [*asked, *flow.queue])
        most.append(max(held.values()))
        turn = first(flow)
        if getattr(turn.asked, "report", None) is not None:
            finished.append(turn.asked.unroll)
        return turn

    def learning(flow, *arguments):
        learn(flow, *arguments)
        *_, update = flow.in_flight.values()
        learnt.extend(asked.unroll for asked in update.batch)

    monkeypatch.setattr(Flow, "first", finishing)
    monkeypatch.setattr(Flow, "learn", learning)
    config = replace(QUICK, num_actors=4, unrolls_in_flight=3, unrolls_per_batch=5)
    result = train(config, jitter=0.5, stragglers={"Actor 2": 5.0})
    assert learnt == finished[: len(learnt)] and len(learnt) > 50
    assert max(most) == 3
    assert result.extra["unrolls_dropped"] == len(finished) - len(learnt) < 5


def test_unrolls_that_are_too_old_are_dropped_and_stop_nothing(monkeypatch):
    config = replace(QUICK, num_actors=6)
    assert max(train(config).extra["policy_lag"]) > 8
    with lags_of_the_data(monkeypatch) as seen:
        bounded = train(replace(config, max_policy_lag=3))
    assert max(seen) == 3 and bounded.extra["unrolls_dropped"] > 10
    assert bounded.learner_steps > 20
    strict = train(replace(config, max_policy_lag=0))
    assert set(strict.extra["policy_lag"]) == {0} and strict.learner_steps > 1


def test_a_straggler_holds_up_only_those_who_wait_for_it():
    seconds = {}
    for rule, config in (("async", QUICK), ("sync", SYNC)):
        config = replace(config, num_actors=4, unrolls_per_batch=4)
        whole = train(config).wall_time_s
        seconds[rule] = train(config, stragglers={"Actor 0": 200.0}).wall_time_s / whole
    assert seconds["async"] < 1.5 < 4 < seconds["sync"]


# -- the virtual cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", [QUICK, SYNC], ids=["async", "sync"])
def test_the_same_seed_gives_the_same_run_and_another_order_gives_another(base):
    config = replace(base, num_actors=4, unrolls_per_batch=4, num_learners=2)
    one, same, other = train(config), train(config), train(config, seed=2, jitter=0.5)
    assert_same_run(one, same)
    assert one.wall_time_s == same.wall_time_s
    assert same_parameters(one, other) == (base is SYNC)  # who waits for all has one order


def test_two_learners_run_as_one_but_for_the_last_bits():
    """Without lag the order of events decides nothing."""
    config = replace(SYNC, num_actors=4, unrolls_per_batch=4, total_env_steps=1_500)
    one, two = train(config), train(replace(config, num_learners=2))
    a, b = one.policy.network.state_dict(), two.policy.network.state_dict()
    assert one.env_steps == two.env_steps
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-4), name


def test_a_hollow_run_predicts_the_same_clock_and_the_same_lag():
    config = replace(QUICK, num_actors=4)
    found = []
    for hollow in (False, True):
        with virtual(hollow=hollow) as runtime:
            result = ip.train(config, runtime)
        lags = result.extra["policy_lag"]
        mean = sum(lag * count for lag, count in lags.items()) / sum(lags.values())
        found.append((result.metrics["env_steps_per_s"], mean))
    (rate, lag), (hollow_rate, hollow_lag) = found
    assert 0.9 < hollow_rate / rate < 1.1 and abs(hollow_lag - lag) < 0.3


def test_a_thousand_actors_are_played_hollow():
    """Slow environments: more actors help until the learner has enough, then more learners do."""

    def rate(actors: int, learners: int) -> float:
        config = replace(
            QUICK,
            num_actors=actors,
            num_learners=learners,
            unrolls_per_batch=4,
            total_env_steps=8_000 + 5 * 40 * actors,
        )
        costs = {**ip.COSTS, "env_step": 10e-3}
        cluster = Cluster(nodes=(Node(cores=actors + learners),), costs=costs)
        with VirtualRuntime(1, cluster, hollow=True) as runtime:
            return ip.train(config, runtime).metrics["env_steps_per_s"]

    few, more, many = rate(2, 1), rate(12, 1), rate(1_000, 1)
    assert 5.5 * few < more < 6.5 * few
    assert more < many < 0.4 * 1_000 / 12 * more, "one learner cannot use a thousand actors"
    assert 2 * many < rate(1_000, 4) < 4 * many


def test_units_of_work_have_the_names_that_costs_have():
    units = ip.units_of_work(QUICK)
    assert units.keys() == ip.COSTS.keys()
    for work in units.values():
        work()


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [QUICK, SYNC], ids=["async", "sync"])
def test_actors_may_die_while_others_go_on(base):
    config = replace(base, num_actors=3, unrolls_per_batch=3)
    whole = train(config).wall_time_s
    crashes = (Crash("Actor 0", at_s=0.3 * whole), Crash("Actor 2", at_s=0.5 * whole))
    result = train(config, crashes=crashes)
    assert result.stopped_because == "total_env_steps"
    assert {"Actor 0", "Actor 2", "Actor 3", "Actor 4"} <= {span.who for span in result.spans}
    used = sum(result.extra["policy_lag"].values())
    steps = (used + result.extra["unrolls_dropped"]) * config.num_envs * config.unroll_length
    assert 0.8 * steps < result.env_steps <= steps, "what was reported was learnt from, or counted"


def test_an_actor_that_cannot_live_ends_the_run():
    crashes = tuple(Crash(f"Actor {i}", at_s=0.0) for i in range(60))
    with pytest.raises(Exception, match="died"):
        with virtual(crashes=crashes) as runtime:
            ip.train(QUICK, runtime)


@pytest.mark.parametrize("learner", [0, 1])
def test_the_death_of_a_learner_ends_the_run_and_says_who(learner):
    config = replace(QUICK, num_learners=2, unrolls_per_batch=2)
    with pytest.raises(ActorDiedError, match=f"Learner {learner} died"):
        train(config, crashes=(Crash(f"Learner {learner}", at_s=0.1),))


def test_real_actors_killed_by_sigkill_are_replaced(capfd):
    config = replace(QUICK, num_envs=32, unroll_length=16, total_env_steps=250_000)
    with RayRuntime(num_cpus=4) as runtime:
        with sigkill("Actor", after_s=0.5):
            result = ip.train(config, runtime)
    assert result.stopped_because == "total_env_steps"
    assert {"Actor 2", "Learner 0"} <= {span.who for span in result.spans}  # the new one
    assert capfd.readouterr() == ("", "")
    used = sum(result.extra["policy_lag"].values())
    assert used == result.learner_steps >= 250_000 // (32 * 16) - 1


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SYNC,
        replace(QUICK, unrolls_per_batch=3, optimizer="adam"),
        replace(QUICK, unrolls_per_batch=4, num_learners=2, policy_delay=3, broadcast_period=2),
        replace(QUICK, unrolls_per_batch=4, replay_unrolls=10, lstm_size=8),
        replace(QUICK, env_id="rlbook/Catch-v0", env_ids=("rlbook/Memory-v0", "rlbook/Catch-v0")),
    ],
    ids=["sync", "async", "delayed", "replay", "tasks"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, config):
    """The power fails after a checkpoint; what is resumed ends as if it had not."""
    config = replace(config, num_actors=3 if config.update_rule == "async" else 2)
    config = replace(config, checkpoint_every_s=0.05, anneal_learning_rate=True)
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


# -- memory and replay -----------------------------------------------------------------------------


MEMORY = replace(ip.MEMORY, progress=False, num_envs=5, unroll_length=13)


def test_the_learner_recomputes_what_the_actors_said():
    """Unrolls begin in the middle of episodes: the state before them travels with them."""
    learner, actors = ip.Learner(MEMORY), [ip.Actor(MEMORY, index) for index in range(3)]
    torch.nn.init.orthogonal_(learner.network.policy_head.weight)
    weights = learner.newest()
    for _ in range(4):
        unrolls = [actor.unroll(weights)[1] for actor in actors]
        batch = side_by_side(unrolls)
        with torch.no_grad():
            logits, values = unrolled(learner.network, batch)
        assert np.allclose(logits[:-1].numpy(), batch.agent_outputs.logits, atol=1e-5)
        assert np.allclose(values[:-1].numpy(), batch.agent_outputs.value, atol=1e-5)
    assert batch.env_outputs.first[1:].any() and not batch.env_outputs.first[0].any()
    wrong = side_by_side(unrolls[::-1])
    mixed = batch._replace(agent_state=wrong.agent_state)
    with torch.no_grad():
        assert not np.allclose(
            unrolled(learner.network, mixed)[0][:-1].numpy(), batch.agent_outputs.logits, atol=1e-4
        )


def test_memory_is_learnt_with_an_lstm_and_not_without():
    config = replace(ip.PRESETS["memory"], progress=False, stop_at_return=0.9)
    config = replace(config, total_env_steps=150_000)
    assert train(config).stopped_because == "solved"
    without = train(replace(config, lstm_size=0, total_env_steps=30_000))
    assert abs(without.evaluate(400).mean) < 0.2


def test_frames_and_memory_go_through_one_network():
    config = replace(QUICK, env_id="ALE/Pong-v5", lstm_size=16, num_envs=2, unroll_length=3)
    actor, learner = ip.Actor(config, 0), ip.Learner(config)
    _, unroll = actor.unroll(learner.weights())
    assert unroll.env_outputs.observation.dtype == np.uint8
    before = learner.newest().values
    metrics, weights = learner.update([0], unroll, unroll)
    assert np.isfinite(metrics["loss"]) and weights.version == 1
    assert not np.array_equal(before, weights.values)


def test_replayed_unrolls_fill_their_part_of_a_batch(monkeypatch):
    sizes, drawn = [], Counter()
    loss_function = ip.loss_function

    def seeing(network, unroll, config):
        sizes.append(unroll.env_outputs.reward.shape[1])
        return loss_function(network, unroll, config)

    monkeypatch.setattr(ip, "loss_function", seeing)
    config = replace(QUICK, unrolls_per_batch=4, replay_unrolls=6, replay_fraction=0.5)
    assert config.fresh_unrolls == 2
    result = train(config)
    assert sizes[0] == 2 * 8 and set(sizes[1:]) == {4 * 8}
    assert sum(result.extra["policy_lag"].values()) == 2 * result.learner_steps
    learner = ip.Learner(config)
    actor = ip.Actor(config, 0)
    for number in range(20):
        learner.replay.add([actor.unroll(learner.weights())[1]._replace(version=number)])
    for unroll in learner.replay.draw(6_000):
        drawn[unroll.version] += 1
    assert set(drawn) == set(range(14, 20)), "the last six"
    assert min(drawn.values()) > 850


def test_learners_share_out_what_is_replayed_and_draw_each_for_itself():
    config = replace(QUICK, num_actors=4, num_learners=2, unrolls_per_batch=6, replay_unrolls=9)
    learners = [ip.Learner(config, rank) for rank in range(2)]
    assert config.fresh_unrolls == 3 and [learner.drawn for learner in learners] == [2, 1]
    _, unroll = ip.Actor(config, 0).unroll(learners[0].weights())
    for learner in learners:
        learner.replay.add([unroll._replace(version=number) for number in range(9)])
    first, second = ([u.version for u in learner.replay.draw(30)] for learner in learners)
    assert first != second


# -- several tasks ---------------------------------------------------------------------------------


def test_several_tasks_are_learnt_by_one_network_with_a_score_each():
    config = replace(ip.PRESETS["multitask"], progress=False, total_env_steps=20_000)
    assert len(config.tasks) == 2
    result = train(config)
    for task in config.tasks:
        scores = result.curves[f"episode_return_mean/{task}"]
        returns = result.extra["task_returns"][task]
        assert len(returns) == 100 and np.isclose(scores[-1], np.mean(returns))
    assert result.evaluate(5).lengths.min() > 0
    actors = [ip.Actor(config, index) for index in range(3)]
    names = [actor.envs.env_id for actor in actors]
    assert names == [config.tasks[0], config.tasks[1], config.tasks[0]]
    sizes = {
        actor.unroll(ip.Learner(config).weights())[1].env_outputs.observation.shape[2:]
        for actor in actors
    }
    assert len(sizes) == 1


# -- real processes --------------------------------------------------------------------------------


def test_a_real_run_learns_says_nothing_and_goes_on(tmp_path, capfd):
    config = replace(
        ip.Config(), progress=False, total_env_steps=150_000, run_dir=str(tmp_path / "run")
    )
    with RayRuntime(num_cpus=4) as runtime:
        first = ip.train(config, runtime)
        more = {"run_dir": None, "resume": str(tmp_path / "run"), "total_env_steps": 170_000}
        assert same_parameters(first, Result.load(tmp_path / "run"))
        second = ip.train(replace(config, **more), runtime)
    assert capfd.readouterr() == ("", "")
    assert first.metrics["episode_return_mean"] > 60
    assert sum(first.extra["policy_lag"].values()) == first.learner_steps
    assert second.learner_steps > first.learner_steps and not same_parameters(first, second)
    parts = [first.metrics[f"{part}_time_fraction"] for part in ("env", "inference")]
    assert min(parts) > 0.05 and 0 < first.metrics["learner_idle_fraction"] < 1
    assert 40 < first.metrics["bytes_per_env_step"] < 200
    assert str(first.why()).startswith("Bound by ")


# -- settings --------------------------------------------------------------------------------------


def test_the_step_size_falls_to_zero_and_the_sum_is_clipped_as_a_sum():
    config = replace(QUICK, anneal_learning_rate=True, total_env_steps=1_000, loss_reduction="sum")
    learner, actor = ip.Learner(config), ip.Actor(config, 0)
    _, unroll = actor.unroll(learner.weights())
    strides, norms = [], []
    for env_steps in (0, 500, 999, 1_000, 1_200):
        learner.optimizer = ip.make_optimizer(config, learner.flat)
        before = learner.newest().values
        metrics, after = learner.update([env_steps], unroll)
        strides.append(float(np.abs(after.values - before).max()))
        norms.append(metrics["gradient_norm"])
    assert strides[0] > 1.8 * strides[1] > 100 * strides[2] > 0 == strides[3] == strides[4]
    mean = ip.Learner(replace(config, loss_reduction="mean"))
    share = mean.gradient(unroll)
    assert np.isclose(np.linalg.norm(share.gradient) * unroll.valid.sum(), norms[0], rtol=1e-4)


def test_a_step_of_rmsprop_by_hand():
    config = replace(QUICK, learning_rate=0.1, rmsprop_decay=0.6, rmsprop_epsilon=0.25)
    learner = ip.Learner(config)
    before, learner.flat.gradients[0] = learner.newest().values[0], 0.4
    learner.step(0)
    expected = before - 0.1 * 0.4 / math.sqrt((1 - 0.6) * 0.4**2 + 0.25)
    assert math.isclose(learner.newest().values[0], expected, rel_tol=1e-5)


def test_a_policy_that_is_said_to_be_new_learns_from_old_data_as_if_it_were():
    """Far from the behaviour policy, V-trace trusts the data less: its advantages are smaller."""
    config = replace(QUICK, **COUNTED, lambda_=1.0, entropy_cost=0.0)
    unroll, learner = off_policy_unroll(config)
    with_it, _ = ip.loss_function(learner.network, unroll, config)
    without, _ = ip.loss_function(learner.network, unroll, replace(config, correction="none"))
    assert not torch.isclose(with_it, without, rtol=1e-3)
    said = unroll.agent_outputs
    with torch.no_grad():
        logits, _ = unrolled(learner.network, unroll)
    own = unroll._replace(agent_outputs=AgentOutput(said.action, logits[:-1].numpy(), said.value))
    on_policy, _ = ip.loss_function(learner.network, own, config)
    assert torch.isclose(on_policy, without, rtol=1e-9)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"update_rule": "hogwild"}, "update_rule: must be one of async, sync"),
        ({"correction": "retrace"}, "correction: must be one of vtrace, none"),
        ({"loss_reduction": "max"}, "loss_reduction: must be one of mean, sum"),
        ({"optimizer": "sgd"}, "optimizer: must be one of rmsprop, adam"),
        ({"runtime": "mpi"}, "runtime: must be one of ray, virtual"),
        ({"num_actors": 0}, "num_actors: must be at least 1"),
        ({"updates_in_flight": 0}, "updates_in_flight: must be at least 1"),
        ({"policy_delay": -1}, "policy_delay: must be at least 0"),
        ({"rho_bar": 0.0}, "rho_bar: must be larger than 0"),
        ({"c_bar": -1.0}, "c_bar: must be at least 0"),
        ({"lambda_": 1.5}, "lambda_: must be between"),
        ({"replay_fraction": 2.0}, "replay_fraction: must be between"),
        ({"max_policy_lag": 1, "policy_delay": 2}, "max_policy_lag: must be at least 2"),
        ({"max_policy_lag": 1, "broadcast_period": 3}, "max_policy_lag: must be at least 2"),
        ({"replay_unrolls": 9}, "replay_unrolls: of 1 unrolls_per_batch none"),
        ({"unrolls_per_batch": 5}, "unrolls_per_batch: 5 new unrolls a batch"),
        ({"num_learners": 2}, "unrolls_per_batch: 1 new unrolls a batch"),
        ({"update_rule": "sync"}, 'update_rule: "sync" learns from one unroll of every actor'),
        ({"env_ids": ("rlbook/Catch-v0",)}, "env_ids: must hold env_id"),
        ({"env_ids": "CartPole-v1"}, "env_ids: must be a tuple of words"),
        ({"env_ids": ("CartPole-v1",) * 3}, "env_ids: .* an actor for each task"),
        ({"env_ids": ("CartPole-v1",), "stop_at_return": 1.0}, "stop_at_return"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ip.Config(**settings)


def test_presets_are_what_they_say():
    paper = ip.PRESETS["paper"]
    assert (paper.unroll_length, paper.num_envs * paper.unrolls_per_batch) == (20, 32)
    assert (paper.discount, paper.lambda_, paper.learning_rate) == (0.99, 1.0, 6e-4)
    assert (paper.rmsprop_decay, paper.rmsprop_epsilon) == (0.99, 0.01)
    assert (paper.entropy_cost, paper.value_cost, paper.max_gradient_norm) == (0.01, 0.5, 40.0)
    assert paper.loss_reduction == "sum" and paper.anneal_learning_rate
    assert ip.PRESETS["memory"].lstm_size > 0 and len(ip.PRESETS["multitask"].env_ids) > 1
    assert ip.PRESETS["throughput"].num_envs == 128
