"""What is on its way between actors, a replay memory and learners, as a driver conducts it.

    while flow.may_learn():  flow.learn()     a draw goes to the learners, before they have asked
    while flow.may_act():    flow.act()       whoever is free plays on, with the newest weights
    turn = flow.first()                       waits for whoever is first

    in_flight: reference ──► Chunk (experience), Stored, or Update (a draw at the learners)

Back-pressure is the size of what is in flight: each actor has one chunk; as many may wait to be
stored as there are actors; the learners have so many draws, of which all but one are being made and
sent while they learn. A `RateLimiter` keeps acting and learning in step. Data goes by in references
that nobody here opens.
"""

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from rlbook.plumbing.deeds import StandIn
from rlbook.plumbing.devices import placed
from rlbook.plumbing.fleet import Fleet
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.rate_limiter import RateLimiter
from rlbook.plumbing.replay_group import ReplayGroup
from rlbook.plumbing.replay_server import Draw, Replay
from rlbook.plumbing.runtime import RayRuntime, Reference, Runtime


class Chunk(NamedTuple):
    """What an actor is asked for."""

    actor: int
    version: int
    """Updates that made the parameters that it acts with."""
    made: Reference
    report: Any = None
    """Of the actor, when it is finished: has `items`, how many it made."""


class Stored(NamedTuple):
    """A chunk on its way into the memory."""

    actor: int
    report: None = None


class Update(NamedTuple):
    """A draw at the learner."""

    draw: Draw
    drawn_at: int
    """Updates that had been made when it was drawn."""
    weights: Reference
    priorities: list[Reference]


class Turn(NamedTuple):
    """What came: a chunk, word that one is stored, or updates with their metrics."""

    asked: Chunk | Stored | Update
    """A chunk has no report if its actor died."""
    metrics: dict[str, float] | None = None
    """None for a chunk, and for a draw of which a part was lost with its shard."""


class ReplayFlow:
    """References between a fleet, a replay memory and learners.

    Args:
        runtime: where they live.
        actors: answer (report, made) to (weights).
        learners: `ReplayLearner`s.
        replay: where experience goes.
        limiter: says who may start.
        chunk_rows: rows that a chunk counts as for the limiter.
        config: of the system, with `batch_size`; `updates_per_call`: batches of one draw;
            `calls_in_flight`: draws at the learner; `broadcast_period`: updates between two
            weights for the actors; `update_rule`: with "sync" all actors play a chunk, then all
            is learnt that is owed, and so on.
    """

    def __init__(
        self,
        runtime: Runtime,
        actors: Fleet,
        learners: ReplayGroup,
        replay: Replay,
        limiter: RateLimiter,
        chunk_rows: float,
        config: Any,
    ) -> None:
        self.runtime, self.actors, self.learners = runtime, actors, learners
        self.replay, self.limiter = replay, limiter
        self.chunk_rows, self.config = chunk_rows, config
        self.waits = config.update_rule == "sync"
        self.rows = config.batch_size * config.updates_per_call
        """Of a draw."""
        self.in_flight: dict[Reference, Chunk | Stored | Update] = {}
        """Reference to a report or to metrics → what was asked."""
        self.playing = self.storing = self.learning = 0
        """Chunks, chunks on their way into the memory, and updates in flight."""
        self.made = 0
        """Updates made so far."""
        self.weights: Reference | None = None
        self.version = 0
        """Updates that made `weights`."""
        actors.settle()
        learners.settle()
        replay.mend()
        self._begin()

    def may_learn(self) -> bool:
        """Whether enough is owed, and the learner has room for it."""
        if self.learning >= self.config.calls_in_flight or self.waits and self.playing:
            return False
        return self.limiter.may_draw(self.rows, len(self.replay))

    def learn(self) -> None:
        """The learners are given a draw, unless all died that there was to draw from."""
        if (draw := self.replay.sample(self.rows, self.learners.deal)) is None:
            return
        self.limiter.draw(self.rows)
        metrics, weights, priorities = self.learners.learn(draw)
        self.in_flight[metrics] = Update(draw, self.made, weights, priorities)
        self.learning += 1

    def may_act(self) -> bool:
        """Whether somebody is free, and acting is not too far ahead of learning."""
        if not self.free or self.storing >= len(self.actors):
            return False
        if self.waits:
            return not (self.learning or self.finished or self.may_learn())
        return self.limiter.may_insert(self.chunk_rows * self.playing, len(self.replay))

    def act(self) -> None:
        """The next free actor begins a chunk."""
        if self.weights is None:
            self.weights, self.version = self.learners.weights(), self.made
        actor = self.free.popleft()
        report, made = self.actors.ask(actor, self.weights)
        self.in_flight[report] = Chunk(actor, self.version, made)
        self.playing += 1

    def first(self) -> Turn:
        """Waits for the first of all that is in flight, and sees to what follows from it."""
        reference = self.learners.first(self.in_flight)
        asked = self.in_flight.pop(reference)
        if isinstance(asked, Update):
            self.learning -= 1
            return Turn(asked, self._learnt(reference, asked))
        if isinstance(asked, Stored):
            self.storing -= 1
            self.replay.stored(reference)
            return Turn(asked)
        self.playing -= 1
        asked = asked._replace(report=self.actors.answer(asked.actor, reference))
        self.finished.append(asked)
        if not (self.waits and self.playing):
            for chunk in sorted(
                self.finished, key=lambda chunk: chunk.actor
            ):  # the same order every time
                self._keep(chunk)
            self.finished.clear()
        return Turn(asked)

    def drain(self) -> list[Turn]:
        """Waits for all that is in flight; with "sync" what is owed is learnt too. Then every actor
        is free, and begins with the weights of that moment.
        """
        turns = []
        while self.in_flight or self.waits and self.may_learn():
            if not self.in_flight:
                self.learn()
            turns += [self.first()] if self.in_flight else []
        self.actors.settle()
        self.replay.mend()
        self._begin()
        return turns

    def parameters(self) -> np.ndarray:
        """`[P]`, after all updates so far."""
        return self.learners.parameters()

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        parts = {"flow": self, "actors": self.actors, "learner": self.learners}
        return parts | {"replay": self.replay, "runtime": self.runtime}

    def state_dict(self) -> dict[str, Any]:
        """Counts; nothing may be in flight."""
        return {"made": self.made, "limiter": self.limiter.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.made = state["made"]
        self.limiter.load_state_dict(state["limiter"])

    def _begin(self) -> None:
        """Nothing is in flight."""
        self.free = deque(range(len(self.actors)))
        self.finished: list[Chunk] = []
        self.weights = None

    def _keep(self, chunk: Chunk) -> None:
        """Hands on what an actor made, and lets it go on."""
        self.free.append(chunk.actor)
        if chunk.report is not None:
            added = self.replay.add(chunk.made, chunk.report.items)
            if added is not None:
                self.in_flight[added] = Stored(chunk.actor)
                self.storing += 1
            self.limiter.insert(self.chunk_rows, len(self.replay))

    def _learnt(self, reference: Reference, update: Update) -> dict[str, float] | None:
        """Priorities go back; metrics, with what is known here alone."""
        if (metrics := self.learners.learnt(reference)) is None:
            self.replay.mend()
            return None
        lag = float(self.made - update.drawn_at)
        before, period = self.made, self.config.broadcast_period
        self.made += self.config.updates_per_call
        if self.made // period > before // period:
            self.weights, self.version = update.weights, self.made
        self.replay.update_priorities(update.draw, update.priorities)
        size = float(len(self.replay))
        return metrics | {
            "priority_lag_mean": lag,
            "priority_lag_max": lag,
            "replay_size": size,
        }


def remote_flow(
    runtime: Runtime,
    actor: type,
    learner: type,
    replay: Replay,
    config: Any,
    parameters: np.ndarray,
    *,
    report: Any,
    made_bytes: int,
    chunk_rows: float,
    forwards: int,
) -> ReplayFlow:
    """Actors and learners on a runtime, and the flow between them and a replay memory.

    On a virtual cluster a chunk costs T times "env_step", `forwards` times "inference", and a
    "fold"; a draw costs each of k learners 1/k of a "learn" for each of its batches, and the
    gradients that it hands on travel.

    Args:
        runtime: where they live; on real processes they measure where their time goes.
        actor: class with ``play(weights) -> (report, made)``, made from (config, place, how many
            died there, metered, and a client of the memory if there is one).
        learner: a `ReplayLearner`, made from (config, rank, metered, likewise a client).
        replay: where experience goes.
        config: of the system, as `ReplayFlow` has it, with `unroll_length` (T), `num_actors`,
            `samples_per_insert`, `learning_starts` and `rate_tolerance` (see `RateLimiter`), and
            `num_learners`.
        parameters: `[P]`, to begin with.
        report: what stands for an actor's report in a hollow run.
        made_bytes: of a chunk, likewise.
        chunk_rows: what a chunk counts as for the limiter.
        forwards: passes of the network for a chunk.

    Raises:
        ValueError: "sync" without a ratio, of which nothing would ever be owed.
    """
    if config.update_rule == "sync" and config.samples_per_insert is None:
        raise ValueError("samples_per_insert: must be a number with update_rule 'sync', got None")
    metered = isinstance(runtime, RayRuntime)
    client = () if replay.memory is None else (replay.memory,)
    actors = runtime.remote(
        actor,
        costs={"play": {"env_step": config.unroll_length, "inference": forwards, "fold": 1}},
        returns={"play": (report, StandIn(made_bytes))},
        spread=True,
    )
    learners = _remote_learners(runtime, learner, replay.parts, config, parameters)

    def make_actor(place: int, born: int) -> Any:
        return actors.remote(config, place, born, metered, *client)

    def make_learner(rank: int) -> Any:
        return learners.remote(config, rank, metered, *client)

    fleet = Fleet(runtime, make_actor, config.num_actors, "play")
    tolerance = 0 if config.update_rule == "sync" else config.rate_tolerance
    limiter = RateLimiter(config.samples_per_insert, config.learning_starts, tolerance)
    group = ReplayGroup(runtime, make_learner, config.num_learners, config.updates_per_call)
    return ReplayFlow(runtime, fleet, group, replay, limiter, chunk_rows, config)


def _remote_learners(
    runtime: Runtime, learner: type, parts: int, config: Any, parameters: np.ndarray
) -> Any:
    """The class of learners on a runtime; `parts` of a draw for each."""
    vector, size = StandIn(parameters.nbytes, Vector(0, parameters)), config.num_learners
    updates, rows = config.updates_per_call, config.batch_size * config.updates_per_call
    answer = {}, vector, *[StandIn(16 * rows // max(parts, 1) // size)] * parts
    answers = {"learn": answer, "finish": answer, "share": vector, "newest": vector}
    return runtime.remote(
        learner,
        costs={"learn": {"learn": updates}, "share": {"learn": 1 / size}},
        returns={**answers, "begin": StandIn(8 * (1 + updates))},
        spread=size > 1,
        **placed(config),
    )
