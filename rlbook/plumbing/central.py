"""The inference service behind a server of streams: who is there, who waits, who may go on.

    loop's thread                                    learner's thread (the driver's)
    join(hello) · rows(place, …) · leave(worker)     take(n) ─► the oldest finished unrolls
      │ observe                                        (waits)
      │ wait for a batch, or for the time-out        release(places, weights)
      ├ act ──► reply(place, actions)    ◄───────────┘ who was held goes on
      └ settle: a finished unroll ──► queue ─────►

Back-pressure: a slot whose `unrolls_in_flight` unrolls are finished and not taken gets no actions.
With `update_rule` "sync" it gets none before the update is made that its unroll went into. Workers
wait for answers, so these go first, and the books are kept when they are on their way. All but
`take` runs in the thread of the loop, so that nothing is locked; new parameters are an attribute
that the other thread sets and this one copies before it next acts.
"""

import queue
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlbook.data import EnvOutput, Unroll, tree_nbytes
from rlbook.parts.envs import Episode
from rlbook.plumbing.inference import Inference, Request, Slot, Waiting, Who
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.timeline import KEPT, Timeline
from rlbook.plumbing.transport import ACTION, Introduction, Refused, invalid


class Report(NamedTuple):
    """What a driver learns of an unroll."""

    env_steps: int
    episodes: list[Episode]
    metrics: dict[str, float]


class Finished(NamedTuple):
    """An unroll from its end until a learner has it."""

    place: int
    versions: Any
    """`[T]`: of the parameters at each step."""
    unroll: Any
    """Itself, or a reference to it."""
    report: Report

    def state_dict(self) -> dict[str, Any]:
        """All of it (no reference), as plain values and arrays."""
        seen, said, *others = self.unroll
        env_steps, episodes, metrics = self.report
        told = env_steps, [tuple(one) for one in episodes], metrics
        return {"place": self.place, "unroll": [tuple(seen), tuple(said), *others], "report": told}

    @classmethod
    def of(cls, state: dict[str, Any], said: Any) -> "Finished":
        """From `state_dict`, with the type of what an agent says."""
        seen, spoken, *others = state["unroll"]
        env_steps, episodes, metrics = state["report"]
        report = Report(env_steps, [Episode(*one) for one in episodes], metrics)
        unroll = Unroll(EnvOutput(*seen), said(*spoken), *others)
        return cls(state["place"], unroll.version, unroll, report)


class Stepped(NamedTuple):
    """A worker's small report of a step."""

    steps: int | None
    """That it has taken in this life; None is believed."""
    episodes: list[Episode]


class Update(NamedTuple):
    """A batch that was learnt from."""

    batch: list[Finished]
    lags: Counter[int]
    """Updates between the parameters at each step and this one → steps of a slot."""

    @property
    def lag_metrics(self) -> dict[str, float]:
        """Mean and largest lag."""
        total = sum(lag * count for lag, count in self.lags.items())
        mean = total / self.lags.total()
        return {"policy_lag_mean": mean, "policy_lag_max": float(max(self.lags))}


class Turn(NamedTuple):
    """What came: an unroll, or an update with its metrics."""

    came: Finished | Update
    metrics: dict[str, float] | None = None


def check_waits(config: Any) -> None:
    """ValueError for settings with which somebody would wait for ever.

    Args:
        config: of the system; see `Central`, and `num_inference`, `num_envs`, `num_learners`,
            `unrolls_per_batch`.
    """
    slots, updates = config.num_workers * config.groups, config.unrolls_per_batch
    flying = slots * config.unrolls_in_flight
    if not config.num_learners <= updates <= flying:
        raise ValueError(
            f"unrolls_per_batch: {updates} must be one or more for each of {config.num_learners}"
            f" learners, and no more than the {flying} ever in flight"
        )
    if config.update_rule == "sync" and (updates, flying) != (slots, slots):
        raise ValueError(
            'update_rule: "sync" learns from one unroll of every group at once: it needs'
            " unrolls_in_flight 1 and as many unrolls_per_batch as there are groups"
        )
    if config.inference_timeout_s is not None:
        return
    # Each server's slots, as many as there are at least, and how many it takes to make a batch.
    here = config.num_workers // config.num_inference * config.groups
    needed = -(-config.inference_batch // config.num_envs)
    # Those that wait for one more leave the learner nothing but the others' unrolls.
    stuck = (needed - 1) * config.num_inference
    if needed > here or needed < here and updates > flying - stuck * config.unrolls_in_flight:
        raise ValueError(
            f"inference_batch: {config.inference_batch} rows may never wait at once, where a server"
            f" has {here} groups of {config.num_envs} and {updates} unrolls are learnt from"
            " together: it would wait for ever; set inference_timeout_s"
        )


Reply = Callable[[int, np.ndarray | None], None]
"""Sends a group its actions; None: rest."""


class Peer:
    """A connected worker."""

    def __init__(self, said: Introduction, reply: Reply) -> None:
        self.said, self.reply = said, reply
        first = said.worker * said.groups
        self.who = [Who(first + group, said.run_id) for group in range(said.groups)]
        """Of each group."""
        self.lane: int = 0
        """In the timeline."""
        self.owed: set[int] = set()
        """Groups whose rows wait for actions."""
        self.episodes: dict[int, list[Episode]] = {}
        """Ended in a group's unroll so far."""


class Central:
    """The service of one server.

    Args:
        inference: slots and agent.
        config: of the system: `num_workers`, `groups`; `inference_batch` and `inference_timeout_s`
            of `Waiting`; `unrolls_in_flight` and `update_rule`.
        finished: where unrolls go; shared by several servers.
        index: of this one.
    """

    def __init__(
        self,
        inference: Inference,
        config: Any,
        finished: "queue.SimpleQueue[Finished] | None" = None,
        index: int = 0,
    ) -> None:
        self.inference, self.config = inference, config
        self.waiting = Waiting(config.inference_batch, config.inference_timeout_s)
        self.soon: Callable[[Callable[[], None]], None] = lambda call: call()
        """Has something done in the loop's thread; set by the server."""
        self.peers: dict[int, Peer] = {}
        """Connected workers."""
        self.newest_runs: dict[int, int] = {}
        self.resting = False
        self.row_bytes: int | None = None
        """Of a row as it comes; set by the server."""
        self.dropped = 0
        """Unrolls that nobody learnt from."""
        self.finished: queue.SimpleQueue[Finished] = finished or queue.SimpleQueue()
        self.batches = Batches()
        self.timeline = Timeline()
        self._unkept: list[tuple[Peer, int, Slot]] = []
        """Groups with a row that no unroll has yet."""
        self._stepped: list[tuple[int, float, float]] = []
        """Lane of a step, its beginning and its end, and as many rows of each forward pass: not
        in the timeline yet."""
        self._acted: list[tuple[int, float, float]] = []
        self._held: dict[int, Request] = {}
        self._untaken: Counter[int] = Counter()
        self._newest: Vector | None = None
        self._acting: Vector | None = None
        self.name_of: Callable[[int], str] = lambda worker: f"EnvWorker {worker}"
        """What a worker is called in the timeline."""
        self._step = self.timeline.number("step")
        self._lane = self.timeline.number(f"Inference {index}"), self.timeline.number("act")

    # -- the loop's thread ---------------------------------------------------------------------

    def join(self, said: Introduction, reply: Reply) -> Peer:
        """A worker is there; `Refused` if there is no place for it."""
        config, worker = self.config, said.worker
        if worker >= config.num_workers:
            invalid(f"worker: must be below {config.num_workers}, got {worker}")
        if said.groups != config.groups:
            invalid(f"groups: must be {config.groups}, got {said.groups}")
        if said.run_id < self.newest_runs.get(worker, 0):
            newest = self.newest_runs[worker]
            raise Refused("FAILED_PRECONDITION", f"run_id: {said.run_id} is over, {newest} is here")
        if worker in self.peers:
            if said.run_id == self.peers[worker].said.run_id:
                raise Refused("ALREADY_EXISTS", f"worker {worker} is here already")
            self.leave(self.peers[worker])
        self.newest_runs[worker] = said.run_id
        peer = self.peers[worker] = Peer(said, reply)
        peer.lane = self.timeline.number(self.name_of(worker))
        return peer

    def rows(
        self, peer: Peer, group: int, row: EnvOutput, episodes: list[Episode], env_s: float = 0.0
    ) -> float | None:
        """Takes in a row that took so long to make; acts if there is a batch now. To be settled
        when the answers are on their way. `Refused` if it was not this one's turn.

        Returns:
            seconds until there will be another batch, as `serve` says.
        """
        said = peer.said
        if self.peers.get(said.worker) is not peer:
            raise Refused("ABORTED", f"worker {said.worker} has a newer stream")
        if group >= said.groups or group in peer.owed:
            invalid(f"group {group}: there is none, or it did not wait for its actions")
        peer.owed.add(group)
        who, now = peer.who[group], time.monotonic()
        slot = self.inference.observe_first(who, row)
        if slot.ends:
            self._untaken[who.place] += 1
        self._unkept.append((peer, group, slot))
        self._stepped.append((peer.lane, now - env_s, now))
        if episodes:
            peer.episodes.setdefault(group, []).extend(episodes)
        self._queue(Request(who, said.copies, now, (peer, group)))
        return self.serve(now)

    def settle(self) -> None:
        """Has all rows kept that came, whose answers are on their way; reports what is finished."""
        unkept, self._unkept = self._unkept, []
        for peer, group, slot in unkept:
            if (unroll := slot.keep()) is not None:
                self._note()
                self._finish(slot.place, unroll, peer.episodes.pop(group, []))

    def serve(self, now: float) -> float | None:
        """Acts for all batches that are due; seconds until the next will be, if time decides."""
        while (due_in := self.waiting.due_in(now)) == 0:
            if (newest := self._newest) is not self._acting:
                assert newest is not None
                self.inference.load(newest)
                self._acting = newest
            waited, begun = self.waiting.rows, time.monotonic()
            batch = self.waiting.take()
            actions = self.inference.act([request.who.place for request in batch])
            self._acted.append((waited - self.waiting.rows, begun, time.monotonic()))
            for request, action in zip(batch, actions, strict=True):
                self._answer(request, action)
        return due_in

    def leave(self, peer: Peer) -> None:
        """A worker's stream has ended: its slots are free, unless it rests."""
        self.settle()
        self._note()
        said = peer.said
        if self.peers.get(said.worker) is not peer:
            return
        del self.peers[said.worker]
        first = said.worker * said.groups
        places = range(first, first + said.groups)
        self.waiting.drop(lambda request: request.who.place in places)
        for place in places:
            self._held.pop(place, None)
            if not self.resting:
                self.dropped += self.inference.free(place)

    def rest(self) -> None:
        """From now on rows are answered by `rest`, those that wait too."""
        self.resting = True
        held = [*self.waiting.drop(lambda request: True), *self._held.values()]
        self._held.clear()
        for request in held:
            self._answer(request, None)

    def _queue(self, request: Request) -> None:
        place = request.who.place
        if self.resting:
            self._answer(request, None)
        elif self._untaken[place] >= self.config.unrolls_in_flight:
            self._held[place] = request
        else:
            self.waiting.add(request)

    def _answer(self, request: Request, action: np.ndarray | None) -> None:
        peer, group = request.carried
        peer.owed.discard(group)
        peer.reply(group, action)

    def _note(self) -> None:
        """What was done since the last time goes to the timeline: once an unroll is soon enough."""
        for lane, begun, ended in self._stepped:
            if begun < ended:
                self.timeline.add(lane, self._step, begun, ended)
        for rows, begun, ended in self._acted:
            self.batches.add(rows)
            self.timeline.add(*self._lane, begun, ended)
        self._stepped.clear()
        self._acted.clear()
        if len(self.timeline) > 10 * KEPT:
            self.timeline.forget(5 * KEPT)

    def _finish(self, place: int, unroll: Unroll, episodes: list[Episode]) -> None:
        report = report_of(unroll, episodes, self.row_bytes)
        report.metrics.update(self.batches.metrics())
        self.finished.put(Finished(place, unroll.version, unroll, report))

    def _release(self, places: list[int]) -> None:
        self._untaken.subtract(places)
        for place in places:
            if (request := self._held.pop(place, None)) is not None:
                self._queue(request)
        self.serve(time.monotonic())

    def _begin(self, untaken: Counter[int]) -> None:
        self.resting, self._untaken = False, Counter(untaken)

    # -- the learner's thread ------------------------------------------------------------------

    def release(self, places: list[int], weights: Vector | None = None) -> None:
        """Unrolls of these places are taken (learnt from, with "sync"): they may go on.

        `weights` act from now on.
        """
        if weights is not None:
            self._newest = weights
        if places:
            self.soon(lambda: self._release(places))

    def begin(self, untaken: Counter[int] | None = None) -> None:
        """After a rest: workers may come. All streams have ended.

        Args:
            untaken: place → its unrolls that are finished and were not learnt from.
        """
        self.soon(lambda: self._begin(untaken or Counter()))


def report_of(unroll: Unroll, episodes: list[Episode], row_bytes: int | None = None) -> Report:
    """What there is to say of an unroll whose rows came as so many bytes each (None: those that
    they have there).
    """
    env_steps, outputs, steps = int(unroll.valid.sum()), unroll.env_outputs, len(unroll.valid)
    # Each row came once (the last one is in two unrolls), and its actions went back.
    wire = (row_bytes or tree_nbytes(outputs) // (steps + 1)) * steps
    wire += unroll.agent_outputs.action.size * ACTION.itemsize
    return Report(env_steps, episodes, {"bytes_per_env_step": wire / max(env_steps, 1)})


class Batches:
    """How many rows forward passes have."""

    def __init__(self) -> None:
        self.passes = 0
        """That there were."""
        self._counts: Counter[int] = Counter()
        self._mean = 0.0

    def add(self, rows: int) -> None:
        """There was a pass of so many."""
        self.passes += 1
        self._counts[rows] += 1

    def metrics(self) -> dict[str, float]:
        """Their mean since the last call; the last one known, if there was none since."""
        if self._counts:
            rows = sum(size * count for size, count in self._counts.items())
            self._mean = rows / self._counts.total()
            self._counts.clear()
        return {"inference_batch_mean": self._mean} if self._mean else {}
