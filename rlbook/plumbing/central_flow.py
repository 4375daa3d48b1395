"""Central inference over a runtime's calls, as a conducting driver holds it.

    worker i: step(actions) ─► report, rows        in_flight: report ──► who
                                        │
        Waiting (a batch, or time-out)  ▼
    server: act(weights, who, *rows) ─► note, actions of each ──► step(actions), at once
    server: observe(who, row) ─► report, unroll    where an unroll ends with a row
                                        │
    learners: update(…, *unrolls) ─► metrics, weights ──► go with the next act

The same protocol as on streams, in messages that a conductor hands on: rows and actions go from
worker to server and back as references that nobody here opens. It runs on Ray, where a step costs
calls, and on the virtual clock, where it can be replayed. A worker that died begins under a new
`run_id`; so does one that was made anew behind our back: its steps are counted from 0 again.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlbook.parts.envs import Episode
from rlbook.plumbing.central import Batches, Finished, Report, Stepped, Turn, Update
from rlbook.plumbing.fleet import Fleet
from rlbook.plumbing.inference import Request, Waiting, Who
from rlbook.plumbing.learner_group import LearnerGroup
from rlbook.plumbing.runtime import Reference, Runtime


class Step(NamedTuple):
    """A worker's step under way."""

    place: int
    expected: int | None
    """Steps that it will have taken; None where it only says where it stands."""
    rows: Reference


class Ending(NamedTuple):
    """An unroll's last row, on its way to the server."""

    place: int
    versions: list[int]
    unroll: Reference


class Learning(NamedTuple):
    """A batch at the learners."""

    update: Update
    weights: Reference


class Place:
    """What the driver knows of a worker's slot."""

    def __init__(self) -> None:
        self.run_id = 0
        self.steps: int | None = None
        """Taken in this life; None before it said so."""
        self.versions: list[int] = []
        """Of the parameters that acted in the unroll so far."""
        self.untaken = 0
        """Finished unrolls that hold this place up."""
        self.episodes: list[Episode] = []


def pause(seconds: float) -> None:
    """Takes that long on the virtual clock; elsewhere whoever asked looks at its own again."""


class CentralFlow:
    """References between workers, a server and learners.

    Args:
        runtime: where all live.
        workers: a fleet, asked for `step(actions)`; they have `here()` too.
        servers: handles of `CentralServer`s; number i modulo k acts for worker i.
        learners: answer (metrics, weights) to (arguments, unrolls).
        config: of the system; see `Central`; and `unrolls_per_batch`, `updates_in_flight`.
    """

    def __init__(
        self,
        runtime: Runtime,
        workers: Fleet,
        servers: Sequence[Any],
        learners: LearnerGroup,
        config: Any,
    ) -> None:
        self.runtime, self.workers, self.servers = runtime, workers, servers
        self.learners, self.config = learners, config
        self.waits = config.update_rule == "sync"
        self.in_flight: dict[Reference, Step | Ending | Learning] = {}
        self.queue: deque[Finished] = deque()
        self.updates = self.made = self.dropped = 0
        self.batches = Batches()
        """Rows of a forward pass → how many there were."""
        self._pause = runtime.remote(pause, costs=lambda seconds: seconds, num_cpus=0)
        workers.settle()
        learners.settle()
        self.places = [Place() for _ in range(len(workers))]
        self._weights: list[Reference | None] = []
        """That each server gets with its next call; None: it has the newest."""
        self._version: int | None = None
        """Updates that made what servers act with from their next calls on."""
        self._begin()

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds, when nothing is in flight."""
        known = {"flow": self, "workers": self.workers, "learners": self.learners}
        return known | {"runtime": self.runtime}

    @property
    def now(self) -> float:
        """The runtime's clock."""
        return self.runtime.now

    def pull(self) -> np.ndarray:
        """The parameters `[P]` after all updates so far."""
        return self.learners.parameters()

    def timeline(self) -> Any:
        """Who worked on what."""
        return self.runtime.timeline()

    def turn(self, env_steps: int) -> list[Turn]:
        """Whatever can go on goes on; then waits for whatever is first."""
        self.begin()
        while self.has_batch():
            self.learn(env_steps)  # references to the oldest unrolls
        self.act()  # with the newest weights there are
        turn = self.first()
        return [] if turn is None else [turn]

    def has_batch(self) -> bool:
        """Whether there are enough unrolls for an update, and the learners have room for it."""
        room = self.updates - self.made < self.config.updates_in_flight
        return room and len(self.queue) >= self.config.unrolls_per_batch

    def learn(self, *arguments: Any) -> None:
        """The oldest unrolls become an update."""
        batch = [self.queue.popleft() for _ in range(self.config.unrolls_per_batch)]
        if self.waits:
            batch.sort(key=lambda one: one.place)  # the same order every time
        else:
            self._release(batch)
        unrolls = [one.unroll for one in batch]
        metrics, weights = self.learners.update(arguments, unrolls)
        lags = Counter(self.updates - version for one in batch for version in one.versions)
        self.in_flight[metrics] = Learning(Update(batch, lags), weights)
        self.updates += 1

    def act(self) -> None:
        """The servers act for all batches that are due."""
        for index, waiting in enumerate(self.waiting):
            while waiting.due_in(self.runtime.now) == 0:  # enough rows, or they waited enough
                self._act(index, waiting.take())

    def _act(self, index: int, batch: list[Request]) -> None:
        self.batches.add(sum(request.rows for request in batch))
        if self._version is None:
            self._hand_over(self.learners.weights(), self.made)
        assert self._version is not None
        weights, self._weights[index] = self._weights[index], None
        whose = [request.who for request in batch]
        call = self.servers[index].answer.options(num_returns=1 + len(batch))
        _, *actions = call.remote(weights, whose, *[request.carried for request in batch])
        for who, action in zip(whose, actions, strict=True):
            place = self.places[who.place]
            place.versions.append(self._version)
            report, rows = self.workers.ask(who.place, action)
            steps = None if place.steps is None else place.steps + 1
            self.in_flight[report] = Step(who.place, steps, rows)

    def first(self) -> Turn | None:
        """Waits for the first of all that is in flight, and sees to what follows from it.

        None if nothing is to be booked, or a batch is due before anything came.
        """
        dues = [waiting.due_in(self.runtime.now) for waiting in self.waiting]
        known = [due for due in dues if due is not None]
        due_in = None if self._resting or not known else min(known)
        if not self.in_flight:
            self._pass(due_in)
            return None
        reference = self.learners.wait(self.in_flight, timeout=due_in)
        if reference is None:
            return None
        match asked := self.in_flight.pop(reference):
            case Step():
                self._stepped(asked, self.workers.answer(asked.place, reference))
            case Ending():
                return self._ended(asked, self.runtime.get(reference))
            case Learning():
                return self._learnt(asked, self.learners.answer(reference))
        return None

    def drain(self, *arguments: Any) -> list[Turn]:
        """Waits for all that is in flight and learns from it; what fills no batch is dropped.

        Then every worker says again where it stands: slots go on as they are.
        """
        turns, self._resting = [], True
        while self.in_flight or self.has_batch():
            while self.has_batch():
                self.learn(*arguments)
            if (turn := self.first()) is not None:
                turns.append(turn)
        self.learners.settle()
        self.dropped += len(self.queue)
        self.queue.clear()
        self._begin()
        return turns

    def state_dict(self) -> dict[str, Any]:
        """Counts, the servers, and what is known of each place; nothing may be in flight."""
        with self.runtime.off_the_clock():
            servers = self.runtime.get([server.state_dict.remote() for server in self.servers])
        places = [
            vars(place) | {"episodes": [*map(tuple, place.episodes)]} for place in self.places
        ]
        return {
            "updates": self.updates,
            "dropped": self.dropped,
            "servers": servers,
            "places": places,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.updates = self.made = state["updates"]
        self.dropped = state["dropped"]
        pairs = zip(self.servers, state["servers"], strict=True)
        with self.runtime.off_the_clock():
            self.runtime.get([server.load_state_dict.remote(kept) for server, kept in pairs])
        for place, kept in zip(self.places, state["places"], strict=True):
            vars(place).update(kept)
            place.episodes = [Episode(*one) for one in kept["episodes"]]

    def begin(self) -> None:
        """Workers say where they stand, if they rest."""
        if self._resting:
            self._resting = False
            for place in range(len(self.places)):
                self._ask_where(place)

    # -- what follows from what came -----------------------------------------------------------

    def _begin(self) -> None:
        """Nothing is in flight."""
        config = self.config
        limits = config.inference_batch, config.inference_timeout_s
        self.waiting = [Waiting(*limits) for _ in self.servers]
        """For each server."""
        self._held: dict[int, Request] = {}
        self._resting = True
        self._weights, self._version = [None] * len(self.servers), None
        for place in self.places:
            place.untaken = 0

    def _pass(self, seconds: float | None) -> None:
        """Lets the time go by until a batch is due."""
        if seconds is None:
            rows = [waiting.rows for waiting in self.waiting]
            raise RuntimeError(
                f"{rows} rows wait for a batch of {self.config.inference_batch}, none"
                " is under way, and inference_timeout_s sets no end: the driver would hang"
            )
        self.runtime.get(self._pause.remote(seconds))

    def _ask_where(self, index: int) -> None:
        here = self.workers.actors[index].here.options(num_returns=2)
        report, rows = here.remote()
        self.in_flight[report] = Step(index, None, rows)

    def _stepped(self, step: Step, report: Stepped | None) -> None:
        """A worker's rows are there."""
        place = self.places[step.place]
        if report is None:  # it died, or who should have told it what to do
            self.runtime.get(self._server(step.place).alive.remote())
            self._start_over(place)
            if not self._resting:
                self._ask_where(step.place)
            return
        expected = place.steps if step.expected is None else step.expected
        if expected is not None and report.steps not in (expected, None):
            self._start_over(place)  # another one answers, under the same name
        place.steps = report.steps
        place.episodes += report.episodes
        who = Who(step.place, place.run_id)
        if len(place.versions) == self.config.unroll_length:
            call = self._server(step.place).finish.options(num_returns=2)
            ended, unroll = call.remote(who, step.rows)
            self.in_flight[ended] = Ending(step.place, place.versions, unroll)
            place.versions = []
            place.untaken += 1
            self._queue(who, None)
        else:
            self._queue(who, step.rows)

    def _queue(self, who: Who, rows: Reference | None) -> None:
        request = Request(who, self.config.num_envs, self.runtime.now, rows)
        if self.places[who.place].untaken >= self.config.unrolls_in_flight:
            self._held[who.place] = request
        else:
            self.waiting[who.place % len(self.servers)].add(request)

    def _server(self, place: int) -> Any:
        return self.servers[place % len(self.servers)]

    def _start_over(self, place: Place) -> None:
        self.dropped += bool(place.versions)
        place.run_id += 1
        place.steps, place.versions, place.episodes = None, [], []

    def _ended(self, ending: Ending, report: Report) -> Turn:
        place = self.places[ending.place]
        metrics = report.metrics | self.batches.metrics()
        report = report._replace(episodes=place.episodes, metrics=metrics)
        place.episodes = []
        finished = Finished(ending.place, ending.versions, ending.unroll, report)
        self.queue.append(finished)
        return Turn(finished)

    def _learnt(self, learning: Learning, metrics: dict[str, float]) -> Turn:
        self.made += 1
        self._hand_over(learning.weights, self.made)
        if self.waits:
            self._release(learning.update.batch)
        return Turn(learning.update, metrics)

    def _release(self, batch: list[Finished]) -> None:
        for one in batch:
            self.places[one.place].untaken -= 1
            if (request := self._held.pop(one.place, None)) is not None:
                self._queue(request.who, request.carried)

    def _hand_over(self, weights: Reference, version: int) -> None:
        """Every server gets these with its next call."""
        self._weights, self._version = [weights] * len(self.servers), version
