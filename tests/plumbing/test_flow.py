"""Fleets, flows and groups of learners with actors that only count."""

import numpy as np
import pytest

from rlbook.impala import Config
from rlbook.parts.flat import Flat
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.fleet import Fleet
from rlbook.plumbing.flow import Flow, Update, lag_metrics, remote_flow
from rlbook.plumbing.group import GroupBroken
from rlbook.plumbing.learner_group import LearnerGroup, Peer, Share, combined
from rlbook.plumbing.param_server import Alive
from rlbook.plumbing.runtime import ActorDiedError
from rlbook.plumbing.virtual import VirtualRuntime

COSTS = {"env_step": 1e-3, "inference": 0.0, "learn": 1e-3, "apply": 0.0}


class Actor(Alive):
    """Its unrolls are (who, how many it made, version)."""

    def __init__(self, config, place, born=0, metered=False) -> None:
        self.who, self.made = (place, born), 0

    def unroll(self, weights):
        self.made += 1
        return self.made, (self.who, self.made, weights.version)


class Learner(Peer):
    """Keeps what it was given; its parameters count updates."""

    def __init__(self, config, rank=0, metered=False) -> None:
        import torch

        super().__init__(Flat(torch.nn.Linear(1, 1, bias=False)), config, metered)
        self.flat.vector.zero_()
        self.got: list = []

    def backward(self, *unrolls):
        self.got.append(unrolls)
        self.flat.gradients.fill_(1.0)
        return float(len(unrolls)), {}

    def step(self, number):
        self.flat.vector += self.flat.gradients
        return {"number": number}

    def seen(self):
        return self.got


def flow_of(runtime: VirtualRuntime, **settings) -> Flow:
    config = Config(unroll_length=5, **settings)
    return remote_flow(runtime, Actor, Learner, config, np.zeros(1, np.float32), 0, 1)


def turns(flow: Flow, count: int) -> list:
    found = []
    for _ in range(count):
        while flow.has_batch():
            flow.learn(flow.updates)
        while flow.free:
            flow.act()
        found.append(flow.first())
    return found


def runtime(**cluster) -> VirtualRuntime:
    return VirtualRuntime(1, Cluster(nodes=(Node(cores=8),), costs=COSTS, **cluster))


@pytest.mark.parametrize("learners", [1, 2])
def test_every_finished_unroll_is_learnt_from_once_in_order(learners):
    with runtime(jitter=0.5) as rt:
        flow = flow_of(rt, num_actors=3, unrolls_per_batch=2, num_learners=learners)
        metrics = [t.metrics for t in turns(flow, 120) if isinstance(t.asked, Update)]
        drained = [t.metrics for t in flow.drain(-1) if isinstance(t.asked, Update)]
        got = [rt.get(learner.seen.remote()) for learner in flow.learners.learners]
        parameters = flow.learners.parameters()
    assert not flow.in_flight and not flow.queue and len(flow.free) == 3 * 2
    numbers = [m["number"] for m in metrics + drained]
    assert numbers == [*range(flow.updates - numbers.count(-1)), *[-1] * numbers.count(-1)]
    assert flow.updates > 20 and 0 < len(drained) < 10
    assert {len(batches) for batches in got} == {flow.updates}
    used = [unroll for batch in zip(*got, strict=True) for share in batch for unroll in share]
    assert len(set(used)) == len(used) == 2 * flow.updates
    for place in range(3):
        mine = [made for who, made, _ in used if who[0] == place]
        assert mine == sorted(mine)
    versions = [version for _, _, version in used]
    assert max(versions) > 10 and parameters == flow.updates
    assert flow.made == flow.updates == flow.state_dict()["updates"]


def test_who_waits_goes_on_from_the_update_that_its_unroll_made():
    with runtime() as rt:
        sync = {"update_rule": "sync", "unrolls_in_flight": 1, "num_actors": 3}
        flow = flow_of(rt, **sync, unrolls_per_batch=3)
        turns(flow, 41)
        flow.drain(0)
        (got,) = [rt.get(learner.seen.remote()) for learner in flow.learners.learners]
    for number, batch in enumerate(got):
        assert batch == tuple(((place, 0), number + 1, number) for place in range(3))


def test_a_dead_actor_is_replaced_and_gets_as_much_to_do():
    with runtime(crashes=(Crash("Actor 1", at_s=0.03),)) as rt:
        flow = flow_of(rt, num_actors=2, unrolls_in_flight=3)
        found = turns(flow, 150)
        lost = [t for t in found if not isinstance(t.asked, Update) and t.asked.report is None]
        flow.drain(0)
        got = rt.get(flow.learners.learners[0].seen.remote())
    assert 1 <= len(lost) <= 3 and flow.actors.born == [0, 1]
    assert len(flow.free) == 2 * 3
    newborn = [made for batch in got for who, made, _ in batch if who == (1, 1)]
    assert len(newborn) > 10


def test_an_actor_that_dies_at_rest_is_replaced_before_it_is_asked_what_it_knows():
    slow, crashes = {"Actor 0": 20.0}, (Crash("Actor 1", at_s=0.08),)
    with runtime(stragglers=slow, crashes=crashes) as rt:
        flow = flow_of(rt, num_actors=2, unrolls_in_flight=1)
        turns(flow, 3)
        assert rt.now < 0.08, "Actor 1 has nothing to do while Actor 0 finishes its unroll"
        flow.drain(0)
        assert rt.now > 0.1 and flow.actors.born == [0, 1]
        rt.get([actor.alive.remote() for actor in flow.actors.actors])


def test_a_fleet_gives_up_when_nobody_lives():
    crashes = tuple(Crash(f"Actor {i}", at_s=0.0) for i in range(40))
    with pytest.raises(ActorDiedError):
        with runtime(crashes=crashes) as rt:
            remote = rt.remote(Actor)
            fleet = Fleet(rt, lambda place, born: remote.remote(None, place, born), 2, "unroll")
            for _ in range(40):
                report, _ = fleet.ask(0, None)
                assert fleet.answer(0, report) is None


def test_a_hollow_flow_moves_bytes_of_the_right_size():
    cluster = Cluster(nodes=(Node(cores=1), Node(cores=8)), costs=COSTS, bandwidth=1e6)
    with VirtualRuntime(1, cluster, hollow=True) as rt:
        flow = flow_of(rt, num_actors=2, num_envs=4)
        turns(flow, 30)
        assert rt.nbytes > 0 and flow.updates > 5


def test_shares_are_weighed_by_rows_where_the_loss_is_a_mean():
    shares = [Share(np.array([3.0]), 1.0, {}), Share(np.array([6.0]), 2.0, {})]
    assert combined(shares, average=True) == (1 * 3 + 2 * 6) / 3
    assert combined(shares, average=False) == 1 * 3 + 2 * 6
    assert combined(shares[:1], average=True) is shares[0].gradient
    nothing = Share(np.array([0.0]), 0.0, {})
    assert combined([nothing, nothing], average=True) == 0.0, "rows between episodes alone"


class Failing(Alive):
    """A learner that raises what it was made with."""

    def __init__(self, error) -> None:
        self.error = error

    def update(self, arguments, *unrolls):
        raise self.error


@pytest.mark.parametrize("blamed", [0, 1])
def test_who_waited_in_vain_is_not_to_blame(blamed):
    errors = [GroupBroken("the others did not come")] * 2
    errors[blamed] = ValueError("a bad batch")
    for crashes in ((), (Crash(f"Failing {blamed}", at_s=0.01),)):
        with runtime(crashes=crashes) as rt:
            remote = rt.remote(Failing)
            group = LearnerGroup(rt, lambda rank: remote.remote(errors[rank]), 2)  # noqa: B023
            group._meets = True  # as if on real processes: each is asked for an update
            group.settle()
            rt.now = 0.02
            metrics, _ = group.update([0], [rt.put(0)] * 2)
            kind = ActorDiedError if crashes else ValueError
            with pytest.raises(kind, match="a bad batch|died"):
                group.answer(metrics)


def test_lags_are_counted():
    counts: dict = {}
    assert lag_metrics(counts, Update([], [0, 4], None)) == {
        "policy_lag_mean": 2.0,
        "policy_lag_max": 4.0,
    }
    lag_metrics(counts, Update([], [4], None))
    assert counts == {"policy_lag": {0: 1, 4: 2}}
