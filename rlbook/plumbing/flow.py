"""What is on its way between actors and learners, as a conducting driver holds it.

    while flow.has_batch():  flow.learn(…)    the oldest finished unrolls go to the learners
    while flow.free:         flow.act()       whoever is free begins another, with newest weights
    turn = flow.first()                       waits for whoever is first

    in_flight: reference ──► Asked (an unroll) or Update (a batch)      queue: finished, FIFO

Back-pressure is the size of what is in flight: an actor may have so many unrolls begun, finished or
waiting that have not gone to a learner; the learners so many batches. Data goes from actors to
learners by references that nobody here opens. The mean lag follows from those two numbers; its
maximum is bounded only where too old unrolls are dropped.
"""

from collections import Counter, deque
from typing import Any, NamedTuple

import numpy as np

from rlbook.plumbing.deeds import StandIn
from rlbook.plumbing.devices import placed
from rlbook.plumbing.fleet import Fleet
from rlbook.plumbing.learner_group import LearnerGroup, Vector
from rlbook.plumbing.param_server import alive
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime, Reference, Runtime


class Asked(NamedTuple):
    """An unroll, from the moment it is asked for until it goes to the learners."""

    actor: int
    version: int
    """Of the parameters to act with."""
    unroll: Reference
    report: Any = None
    """Of the actor, when it is finished."""


class Update(NamedTuple):
    """A batch at the learners."""

    batch: list[Asked]
    lags: list[int]
    """Updates between the parameters that acted and this one, for each unroll."""
    weights: Reference


class Turn(NamedTuple):
    """What came: an unroll, or an update with its metrics."""

    asked: Asked | Update
    """An unroll has no report if its actor died, or if it was lost with the host that kept it."""
    metrics: dict[str, float] | None = None


class Flow:
    """References between a fleet and a group of learners.

    Args:
        runtime: where both live.
        actors: answer (report, unroll) to (weights).
        learners: answer (metrics, weights) to (arguments, unrolls).
        config: of the system, says who may be asked when: `fresh_unrolls` of an update;
            `unrolls_in_flight` of an actor, until they are handed to the learners;
            `updates_in_flight`; `update_rule` "sync" if an actor goes on only when the update is
            made that its unroll went into; `broadcast_period`, updates between two weights for the
            actors; `policy_delay`, updates by which the learners hold them back; `max_policy_lag`:
            unrolls that are more updates old are dropped, if it is not None.
    """

    def __init__(
        self, runtime: Runtime, actors: Fleet, learners: LearnerGroup, config: Any
    ) -> None:
        self.runtime, self.actors, self.learners, self.config = runtime, actors, learners, config
        self.waits = config.update_rule == "sync"
        self.in_flight: dict[Reference, Asked | Update] = {}
        """Reference to a report or to metrics → what was asked."""
        self.queue: deque[Asked] = deque()
        """Finished unrolls, oldest first."""
        self.free: deque[int] = deque()
        """Actors that may begin an unroll, once for each that they may begin."""
        self.updates = 0
        """Handed to the learners so far."""
        self.made = 0
        """Of them, those that are made."""
        self.dropped = 0
        """Unrolls that nobody learnt from."""
        self.weights: Reference | None = None
        self.version = 0
        """Updates that made `weights`."""
        actors.settle()
        learners.settle()
        self._begin()

    def has_batch(self) -> bool:
        """Whether there are enough unrolls for an update, and the learners have room for it."""
        self._drop(self._too_old())
        room = self.updates - self.made < self.config.updates_in_flight
        return room and len(self.queue) >= self.config.fresh_unrolls

    def learn(self, *arguments: Any) -> None:
        """The oldest unrolls become an update."""
        batch = [self.queue.popleft() for _ in range(self.config.fresh_unrolls)]
        if self.waits:
            batch.sort(key=lambda asked: asked.actor)  # the same order every time
        else:
            self.free.extend(asked.actor for asked in batch)
        metrics, weights = self.learners.update(arguments, [asked.unroll for asked in batch])
        lags = [self.updates - asked.version for asked in batch]
        self.in_flight[metrics] = Update(batch, lags, weights)
        self.updates += 1

    def act(self) -> None:
        """The next free actor begins an unroll."""
        if self.weights is None:
            self._hand_out(self.learners.weights())
        actor = self.free.popleft()
        report, unroll = self.actors.ask(actor, self.weights)
        self.in_flight[report] = Asked(actor, self.version, unroll)

    def first(self) -> Turn:
        """Waits for the first of all that is in flight, and sees to what follows from it."""
        reference = self.learners.wait(self.in_flight)
        asked = self.in_flight.pop(reference)
        if isinstance(asked, Asked):
            report = self.actors.answer(asked.actor, reference)
            if report is None:
                self.free.append(asked.actor)
            else:
                asked = asked._replace(report=report)
                self.queue.append(asked)
            return Turn(asked)
        try:
            metrics = self.learners.answer(reference)
        except ActorDiedError:
            if not self._alone_and_alive():
                raise
            return self._lost(asked)
        self.made += 1
        if self.made % self.config.broadcast_period == 0:
            self._hand_out(asked.weights)
        if self.waits:
            self.free.extend(one.actor for one in asked.batch)
        return Turn(asked, metrics)

    def drain(self, *arguments: Any) -> list[Turn]:
        """Waits for all that is in flight and learns from it; what fills no batch is dropped.

        Then every actor is free, and begins with the weights of that moment.
        """
        turns = []
        while self.in_flight or self.has_batch():
            while self.has_batch():
                self.learn(*arguments)
            turns.append(self.first())
        self.learners.settle()
        self.actors.settle()  # one may have died since it gave its unroll
        self._drop(list(self.queue))
        self._begin()
        return turns

    def state_dict(self) -> dict[str, int]:
        """Counts; nothing may be in flight."""
        return {"updates": self.updates, "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from `state_dict`."""
        self.updates = self.made = state["updates"]
        self.dropped = state["dropped"]

    def _begin(self) -> None:
        """Nothing is in flight."""
        times = range(self.config.unrolls_in_flight)
        self.free = deque([place for _ in times for place in range(len(self.actors))])
        self.weights = None

    def _alone_and_alive(self) -> bool:
        """Whether there is one learner, which lives: then an update that died never began. Where
        several meet, the others wait for the one without data, and the run ends.
        """
        learners = self.learners.learners
        return len(learners) == 1 and alive(self.runtime, learners[0])

    def _lost(self, update: Update) -> Turn:
        """Data of an update is gone with the host that kept it: so are the unrolls of its batch."""
        self.updates -= 1
        self.dropped += len(update.batch)
        if self.waits:
            self.free.extend(one.actor for one in update.batch)
        return Turn(update.batch[0]._replace(report=None))

    def _hand_out(self, weights: Reference) -> None:
        self.weights, self.version = weights, max(0, self.made - self.config.policy_delay)

    def _too_old(self) -> list[Asked]:
        """Finished unrolls that no update may use any more."""
        if (most := self.config.max_policy_lag) is None:
            return []
        return [asked for asked in self.queue if self.updates - asked.version > most]

    def _drop(self, unrolls: list[Asked]) -> None:
        for asked in unrolls:
            self.queue.remove(asked)
            self.dropped += 1
            self.free.append(asked.actor)


def remote_flow(
    runtime: Runtime,
    actor: type,
    learner: type,
    config: Any,
    parameters: np.ndarray,
    report: Any,
    row_bytes: int,
) -> Flow:
    """Actors and learners on a runtime, and the flow between them.

    On a virtual cluster an unroll costs T times "env_step" and "inference"; an update costs each
    learner a "learn" for each unroll of its share, and an "apply".

    Learners get GPUs as `config` says (see :func:`~rlbook.plumbing.devices.placed`).

    Args:
        runtime: where they live; on real processes they measure where their time goes.
        actor: class with ``unroll(weights) -> (report, unroll)``.
        learner: a `Peer`.
        config: of the system; see `Flow`.
        parameters: `[P]`, to begin with.
        report: what stands for an actor's report in a hollow run.
        row_bytes: of one row of an unroll, likewise.
    """
    steps, metered = config.unroll_length, isinstance(runtime, RayRuntime)
    unroll = StandIn(row_bytes * (steps + 1) * config.num_envs)
    actors = runtime.remote(
        actor,
        costs={"unroll": {"env_step": steps, "inference": steps}},
        returns={"unroll": (report, unroll)},
        spread=True,
    )
    share = {"learn": config.unrolls_per_batch / config.num_learners}
    vector = Vector(0, parameters)
    made: tuple[Any, ...] = ({}, StandIn(parameters.nbytes))
    learners = runtime.remote(
        learner,
        costs={"update": {**share, "apply": 1}, "gradient": share, "apply": {"apply": 1}},
        returns={"update": made, "apply": made}
        | {"gradient": vector, "weights": vector, "newest": vector},
        spread=config.num_learners > 1,
        **placed(config),
    )

    def make_actor(place: int, born: int) -> Any:
        return actors.remote(config, place, born, metered)

    def make_learner(rank: int) -> Any:
        return learners.remote(config, rank, metered)

    fleet = Fleet(runtime, make_actor, config.num_actors, "unroll")
    group = LearnerGroup(runtime, make_learner, config.num_learners)
    return Flow(runtime, fleet, group, config)


def lag_metrics(counts: dict[str, Any], update: Update) -> dict[str, float]:
    """Adds an update's lags to a run's histogram "policy_lag" (lag → unrolls); its metrics."""
    counts["policy_lag"] = dict(Counter(counts.get("policy_lag", {})) + Counter(update.lags))
    mean = sum(update.lags) / len(update.lags)
    return {"policy_lag_mean": mean, "policy_lag_max": float(max(update.lags))}
