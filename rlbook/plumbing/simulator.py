"""When things happen on a cluster: calls travel, queue, run and answer on a virtual clock.

    submit ──► arguments there? ──► wire ──► actor free? core free? ──► run ──► wire ──► answer
               (else wait for them)          (else wait in line)

Each step is an event ``(time, number, action, subject)`` in one heap. The number counts events as
they are made and breaks ties, so that nothing but the seed decides the order. What a call *does*
is left to ``perform``: real work and hollow work follow the same schedule.

A node with a core for each of its actors has no line for cores: there the end of a call is known
when it is sent, and one event plays it. A node with fewer cores needs three.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from rlbook.plumbing.cast import Actor, Call, Room
from rlbook.plumbing.cluster import Cluster, Crash
from rlbook.plumbing.runtime import ActorDiedError
from rlbook.plumbing.timeline import Timeline
from rlbook.plumbing.wire import Bundle, Message, VirtualReference, pack

Event = tuple[float, int, Callable[[float, Any], None], Any]


class Simulator:
    """The events of a cluster. ``perform(call)`` does a call's work and fills its reference."""

    def __init__(
        self, seed: int, cluster: Cluster, perform: Callable[[Call], None], timeline: Timeline
    ) -> None:
        self.cluster = cluster
        self.events: list[Event] = []
        self.ready: deque[VirtualReference] = deque()
        """Answers in the order in which the driver learns of them."""
        self.rooms = [Room(node, cluster.bandwidth) for node in cluster.nodes]
        self.timeline: Timeline | None = timeline
        self._perform = perform
        self._latency, self._delay_mean = cluster.latency_s, cluster.delay_s
        self.number = 0
        """Counts events."""
        seeds = np.random.SeedSequence(seed).spawn(3)
        self._jitter_rng, self._delay_rng, self._crash_rng = map(np.random.default_rng, seeds)
        self.generators = {
            "jitter": self._jitter_rng,
            "delay": self._delay_rng,
            "crash": self._crash_rng,
        }
        self.jitters: list[float] = []
        """Drawn, not yet used."""

    def schedule(self, at: float, action: Callable[[float, Any], None], subject: Any) -> None:
        """``action(at, subject)`` will be done at ``at``."""
        self.number += 1
        heapq.heappush(self.events, (at, self.number, action, subject))

    def action(self, name: str) -> Callable[[float, Any], None]:
        """What an event does, by name. Raises ``ValueError`` for a name that no event has."""
        actions = self._runnable, self._end, self._release, self._answer, self._crash, self.settle
        for action in actions:
            if action.__name__ == name:
                return action
        raise ValueError(f"no event does {name!r}")

    def play(self) -> None:
        """The next event."""
        at, _, action, subject = heapq.heappop(self.events)
        action(at, subject)

    def settle(self, at: float, reference: VirtualReference) -> None:
        """The driver learns that a call is over, and sends the calls that waited for that."""
        if type(reference) is Bundle:
            for part in reference.split():
                self.settle(at, part)
            return
        reference.at = at
        self.ready.append(reference)
        if reference.callers is not None:
            callers, reference.callers = reference.callers, None
            for caller in callers:
                caller.missing -= 1
                unsent = caller.actor.unsent
                while unsent and not unsent[0].missing:
                    self._send(at, unsent.popleft())

    # -- a call's way ----------------------------------------------------------------------

    def submit(self, at: float, call: Call) -> None:
        """The driver makes a call. It leaves when its arguments exist, in the order of calls."""
        for reference in call.needs:
            if reference.at == math.inf:
                reference.callers = reference.callers or []
                reference.callers.append(call)
                call.missing += 1
        unsent = call.actor.unsent
        if call.missing or unsent:
            unsent.append(call)
        else:
            self._send(at, call)

    def _send(self, at: float, call: Call) -> None:
        """Over the wire, with its arguments. An argument that failed fails the call instead.

        What is on its way holds up nobody: the wire is taken while bytes go onto it, not until
        they have arrived.
        """
        lag = self._latency
        if self._delay_mean:
            lag += self._delay_rng.exponential(self._delay_mean)
        left = at
        if call.arguments is not None:
            for reference in call.needs:
                if reference.error is not None:
                    if call.method.name == "__init__":  # then there is no actor, and never will be
                        call.actor.up_at = math.inf
                    return self._refuse(at, call, reference.error)
            room = call.actor.room
            if isinstance(call.arguments, Message):
                left = room.receive(left, call.arguments.nbytes)
            for reference in call.needs:
                left = room.fetch(reference, left)
        arrive = left + lag
        if arrive < call.actor.up_at:
            self._refuse(arrive + self._latency, call, _obituary(call.actor))
        else:
            self._arrive(arrive, call)

    def _arrive(self, at: float, call: Call) -> None:
        """Into the actor's line."""
        actor = call.actor
        call.arrive = at
        if actor.room.shared:
            actor.backlog.append(call)
            if len(actor.backlog) == 1:
                self.schedule(max(at, actor.free_at), self._runnable, call)
        else:
            call.start = at if at > actor.free_at else actor.free_at
            call.finish = actor.free_at = call.start + self._duration(call)
            self._reply(call)

    def _runnable(self, at: float, call: Call) -> None:
        """Nothing is before the call on its actor: it takes a core, or waits for one."""
        room = call.actor.room
        if room.idle:
            room.idle -= 1
            self._start(at, call)
        else:
            room.line.append(call)

    def _start(self, at: float, call: Call) -> None:
        """The call has its core, and keeps it to the end."""
        call.start, call.finish = at, at + self._duration(call)
        self.schedule(call.finish, self._end, call)

    def _end(self, at: float, call: Call) -> None:
        """The call is done: its core and its actor are free for the next."""
        actor = call.actor
        actor.free_at = at
        if actor.birth is None:
            actor.room.guests -= 1
        actor.backlog.popleft()
        self._release(at, actor.room)
        if actor.backlog:
            following = actor.backlog[0]
            self.schedule(max(at, following.arrive), self._runnable, following)
        self._reply(call)

    def _release(self, at: float, room: Room) -> None:
        """A core goes to the first in line."""
        if room.line:
            self._start(at, room.line.popleft())
        else:
            room.idle += 1

    def _reply(self, call: Call) -> None:
        """The answer goes back over the wire; those of one actor stay in order."""
        at = call.finish + self._latency
        if self._delay_mean:
            at = max(at + self._delay_rng.exponential(self._delay_mean), call.actor.answered_at)
            call.actor.answered_at = at
        self.schedule(at, self._answer, call)

    def _answer(self, at: float, call: Call) -> None:
        """The driver learns that the call is done. Its work is done only now, in the real world:
        a crash before this moment undoes nothing.
        """
        self._perform(call)
        if self.timeline is not None:
            self.timeline.add(call.actor.lane, call.method.word, call.start, call.finish)
        self.settle(at, call.reference)

    def _refuse(self, at: float, call: Call, error: Message) -> None:
        """The driver will learn at ``at`` that the call failed, if it was the one who made it."""
        if call.actor.birth is None:
            call.actor.room.guests -= 1
        call.reference.error = error
        if call.method.name != "__init__":
            self.schedule(at, self.settle, call.reference)

    def _duration(self, call: Call) -> float:
        """Declared cost × pace of the actor × noise, in seconds."""
        if not self.jitters:
            self.jitters = self._jitter_rng.lognormal(0.0, self.cluster.jitter, 4096).tolist()
        method = call.method
        seconds = method.seconds
        if method.price is not None:
            args, kwargs = call.open()
            seconds = method.price(*args, **kwargs)
        return seconds * self.jitters.pop()

    # -- nodes and faults ------------------------------------------------------------------

    def place(self, node: int | None, is_class: bool) -> Room:
        """The node that was asked for, or the one with fewest actors (or calls) for each core."""
        if node is not None:
            return self.rooms[node]
        if is_class:
            return min(self.rooms, key=lambda room: len(room.actors) / room.cores)
        return min(self.rooms, key=lambda room: room.guests / room.cores)

    def settle_in(self, at: float, actor: Actor) -> None:
        """The actor takes its place on its node, with its fate."""
        room = actor.room
        room.actors.append(actor)
        if len(room.actors) > room.cores:
            self.share(at, room)
        for crash in self.cluster.crashes:
            if crash.actor == actor.name:
                when = crash.at_s
                if when is None:
                    when = self._crash_rng.uniform(0.0, crash.before_s)
                self.schedule(max(at, when), self._crash, (actor, crash))

    def share(self, at: float, room: Room) -> None:
        """From now on cores are counted. Calls in flight were promised one."""
        if room.shared:
            return
        room.shared = True
        for actor in room.actors:
            if actor.free_at > at:
                room.idle -= 1
                self.schedule(actor.free_at, self._release, room)

    def _crash(self, at: float, subject: tuple[Actor, Crash]) -> None:
        """Everything that the actor was told and has not finished fails; its state is gone."""
        actor, crash = subject
        if actor.up_at == math.inf:
            return
        lost = self._take_back(at, actor)
        actor.free_at = at
        actor.up_at = math.inf if crash.restart_s is None else at + crash.restart_s
        for call in lost:
            if self.timeline is not None and call.start < at:
                self.timeline.add(actor.lane, call.method.word, call.start, at)
            self._refuse(at + self._latency, call, _obituary(actor))
        if crash.restart_s is not None and actor.birth is not None:
            self._arrive(actor.up_at, actor.birth())

    def _take_back(self, at: float, actor: Actor) -> list[Call]:
        """Removes the actor's unfinished calls from everywhere and returns them, oldest first."""
        running, promised = False, []
        for _, _, action, call in self.events:
            if isinstance(call, Call) and call.actor is actor:
                running |= action == self._end
                if action == self._answer and call.finish > at:
                    promised.append(call)
        lost = sorted(promised, key=lambda call: call.start) + list(actor.backlog)
        gone = set(lost)
        actor.backlog.clear()
        self.events[:] = [event for event in self.events if event[3] not in gone]
        heapq.heapify(self.events)
        room = actor.room
        room.line = deque(call for call in room.line if call not in gone)
        if running:
            self._release(at, room)
        return lost


def _obituary(actor: Actor) -> Message:
    """What a call to a dead actor gets."""
    return pack(ActorDiedError(f"{actor.name} died, and what it was told died with it"))
