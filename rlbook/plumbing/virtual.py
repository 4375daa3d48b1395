"""Ray's four verbs on a virtual clock: one thread plays a whole cluster, and can play it again.

    with VirtualRuntime(seed=1, cluster=Cluster(nodes=(Node(cores=64),))) as runtime:
        worker = runtime.remote(Worker, costs={"work": 0.005}).remote(7)
        reference = worker.work.remote(data)          now + latency: it reaches the worker
        ready, pending = runtime.wait([reference])    plays events until it is done
        result = runtime.get(reference)               a copy, as from another process

The very ``train()`` that runs on :class:`~rlbook.plumbing.runtime.RayRuntime` runs here. Calls
really run, one after the other, in the order in which the virtual cluster finishes them, on copies
of their arguments; only time is made up, from declared costs. The same seed gives the same run,
bit for bit; another seed another order. So asynchrony can be tested, replayed and debugged.

With ``hollow=True`` calls cost time but run nothing: thousands of actors, predicted in seconds.

Processes share one Python here. What a program sets for its whole process (seeds of the global
generators, threads of torch) it sets for all actors: draw from generators of your own.
"""

from __future__ import annotations

import heapq
import math
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Self

from rlbook.plumbing.cast import Actor, Call, Method
from rlbook.plumbing.cluster import Cluster
from rlbook.plumbing.deeds import StandIn, pretend, work
from rlbook.plumbing.handles import (
    Pending,
    VirtualActor,
    VirtualTarget,
    as_arguments,
    split,
)
from rlbook.plumbing.simulator import Simulator
from rlbook.plumbing.state import await_births, cancel_crashes, restore, state_of
from rlbook.plumbing.timeline import DRIVER, Timeline
from rlbook.plumbing.wire import Bundle, VirtualReference, pack

__all__ = ["StandIn", "VirtualReference", "VirtualRuntime"]


class VirtualRuntime:
    """The four verbs on a virtual clock.

    ``seed`` decides every random duration, delay and crash, and so the order of events.
    ``cluster``: nodes, wire, costs and faults. ``hollow``: no method runs; calls return what the
    ``returns`` of :meth:`remote` says. ``trace``: keep a timeline (32 bytes a call).
    """

    def __init__(
        self, seed: int, cluster: Cluster | None = None, *, hollow: bool = False, trace: bool = True
    ) -> None:
        self.cluster = Cluster() if cluster is None else cluster
        self.hollow = hollow
        self.now = 0.0
        """Seconds on the virtual clock, as the driver lives them."""
        self._timeline = Timeline()
        self._lane = self._timeline.number(DRIVER)
        self._words = {verb: self._timeline.number(verb) for verb in ("get", "wait")}
        perform = pretend if hollow else self._work
        self._simulator = Simulator(seed, self.cluster, perform, self._timeline)
        if not trace:
            self._simulator.timeline = None
        self._made: Counter[str] = Counter()
        self._calls = 0
        self._inside: str | None = None
        # Known references that wait in no queue: returned before, or nobody has asked for them.
        self._aside: set[weakref.ref[VirtualReference]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """No process is left: there was none. A fault for an actor that never was is an error."""
        named = {*self.cluster.stragglers, *(crash.actor for crash in self.cluster.crashes)}
        missed = sorted(name for name in named if not self._was_made(name))
        if missed and kind is None:
            raise RuntimeError(f"stragglers and crashes name actors that were never made: {missed}")

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("the runtime stays with the driver: actor methods never get or wait")

    # -- the verbs -------------------------------------------------------------------------

    def remote(
        self,
        target: Any,
        *,
        costs: Any = None,
        returns: Any = None,
        node: int | None = None,
        **options: Any,
    ) -> VirtualTarget:
        """A class whose instances are actors, or a function whose calls run elsewhere.

        ``costs``: method → work, or a function of its arguments; for a function its own. What is
        not named takes no time. ``returns``: what hollow calls return, likewise: a value, a
        :class:`StandIn`, or a function of the arguments. ``node``: where; by default the node
        with most room. Ray's own ``options`` are accepted and mean nothing here.
        """
        return VirtualTarget(self, target, costs, returns, node)

    def put(self, value: Any) -> VirtualReference:
        """A copy of ``value``, as it is now, for everybody to read."""
        self._begin("put")
        reference = self._reference()
        reference.message = pack(value)
        reference.at = self.now = self._simulator.rooms[0].fetch(reference, self.now)
        self._set_aside(reference)
        return reference

    def get(self, references: Any, *, timeout: float | None = None) -> Any:
        """The value behind a reference, or a list of values; an exception of the call is raised
        here. ``timeout`` in virtual seconds; ``TimeoutError`` when it passes.
        """
        self._begin("get")
        begun, simulator = self.now, self._simulator
        wanted = [references] if isinstance(references, VirtualReference) else references
        if not isinstance(wanted, list):
            raise ValueError(f"get: must have a reference or a list of them, got {references!r}")
        limit = math.inf if timeout is None else begun + timeout
        for reference in wanted:
            if not isinstance(reference, VirtualReference):
                raise TypeError(f"get: {reference!r} is no reference of this runtime")
            while reference.at == math.inf:
                if not self._can_play(limit):
                    self.now = limit
                    raise TimeoutError(f"get: {reference} after {timeout} virtual seconds")
                simulator.play()
        while simulator.ready:
            self._set_aside(simulator.ready.popleft())
        self.now = max([self.now, *(reference.at for reference in wanted)])
        try:
            values = [self._fetch(reference) for reference in wanted]
        finally:
            self._waited("get", begun)
        return values[0] if isinstance(references, VirtualReference) else values

    def wait(
        self,
        references: Collection[VirtualReference],
        *,
        num_returns: int = 1,
        timeout: float | None = None,
    ) -> tuple[list[VirtualReference], Sequence[VirtualReference]]:
        """Plays on until ``num_returns`` references are done, or ``timeout`` virtual seconds have
        passed. Returns (done, not done), in the order of a list, or in which the calls were made.

        Give it the dict or set of all that is in flight: then each reference returned costs the
        same, however many are in flight, and "not done" is a live view of the collection. A list
        is searched for each answer, and "not done" is a new list.
        """
        self._begin("wait")
        if not references:
            return [], []
        if not 1 <= num_returns <= len(references):
            raise ValueError(f"num_returns: must be 1 to {len(references)}, got {num_returns}")
        if num_returns > 1 and len(set(references)) < len(references):
            raise ValueError("wait: the same reference is there twice")
        begun, simulator = self.now, self._simulator
        limit = math.inf if timeout is None else begun + timeout
        ready, events, pop = simulator.ready, simulator.events, heapq.heappop
        found = self._recall(references, num_returns) if self._aside else []
        while len(found) < num_returns:
            if ready:
                reference = ready.popleft()
                self._set_aside(reference)
                if reference in references:
                    found.append(reference)
            elif events and events[0][0] <= limit:
                at, _, action, subject = pop(events)
                action(at, subject)
            elif not self._can_play(limit):
                self.now = limit
                break
        for reference in found:
            if reference.at > self.now:
                self.now = reference.at
        self._waited("wait", begun)
        if isinstance(references, list | tuple):
            return split(references, found)
        if num_returns > 1:
            found.sort(key=lambda reference: reference.number)
        return found, Pending(references, found)

    def timeline(self) -> Timeline:
        """Who worked on what so far, and when the driver waited."""
        return self._timeline

    @property
    def nbytes(self) -> int:
        """Bytes that went over the wire so far."""
        return sum(room.nbytes for room in self._simulator.rooms)

    # -- saving ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The clock and all that decides what comes, as plain values and arrays: for a checkpoint.

        What is not in it: what actors know (ask them, :meth:`off_the_clock`), references (drop
        them in the run that goes on too, and put anew) and the timeline. Raises ``RuntimeError``
        while a call is under way: wait for all first.
        """
        self._catch_up()
        made, simulator = dict(self._made), state_of(self._simulator)
        return {"now": self.now, "calls": self._calls, "made": made, "simulator": simulator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on as the run whose state this is would have gone on, bit for bit.

        First make the same actors, in the same order; wait for what else they were asked. Raises
        ``ValueError`` if they are not the same and ``RuntimeError`` while a call is under way. The
        timeline begins anew.
        """
        self._catch_up()
        if state["made"] != self._made:
            raise ValueError(f"the saved run made {state['made']}, this one {dict(self._made)}")
        await_births(self._simulator, self.now, again=True)
        restore(self._simulator, state["simulator"])
        self.now, self._calls = state["now"], state["calls"]
        self._timeline.forget(len(self._timeline))

    @contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """A block whose calls take no time, leave no trace and meet no crash: saving, restoring.

        Only what the actors come to know stays. All its calls must be waited for; so are new
        actors' constructors before it begins, on the clock. A call to an actor that is down fails
        here too. Drop the block's references with it.
        """
        self.state_dict()  # nothing is under way
        simulator = self._simulator
        self.now = await_births(simulator, self.now, again=False)
        before = self.state_dict()
        timeline, simulator.timeline = simulator.timeline, None
        cancel_crashes(simulator)
        try:
            yield
        finally:
            simulator.timeline = timeline
        self._catch_up()
        restore(simulator, before["simulator"])
        self.now, self._calls = before["now"], before["calls"]

    def _catch_up(self) -> None:
        """Plays what has happened by now."""
        while self._simulator.events and self._simulator.events[0][0] <= self.now:
            self._simulator.play()

    # -- behind the verbs ------------------------------------------------------------------

    def _begin(self, verb: str) -> None:
        """What each verb does first: refuse to be called from inside a call, take its time."""
        if self._inside is not None:
            raise RuntimeError(
                f"{self._inside} called {verb}: only the driver does. Hand references to actors "
                "as arguments, and return results"
            )
        self.now += self.cluster.driver_call_s
        simulator = self._simulator
        while simulator.events and simulator.events[0][0] <= self.now:
            simulator.play()

    def _reference(self) -> VirtualReference:
        self._calls += 1
        return VirtualReference(self._calls)

    def _set_aside(self, reference: VirtualReference) -> None:
        """Keeps a known reference findable, for as long as somebody holds it."""
        self._aside.add(weakref.ref(reference, self._aside.discard))

    def _recall(self, references: Collection[Any], num_returns: int) -> list[VirtualReference]:
        """The first ``num_returns`` of ``references`` that were known before this call."""
        if len(references) < len(self._aside):
            known = [r for r in references if weakref.ref(r) in self._aside]
        else:
            known = [r for weak in list(self._aside) if (r := weak()) in references]
        if len(known) > 1:
            known.sort(key=lambda reference: (reference.at, reference.number))
            # The others are next: what was searched for once is not searched for again.
            self._aside.difference_update(map(weakref.ref, known[num_returns:]))
            self._simulator.ready.extendleft(reversed(known[num_returns:]))
        return known[:num_returns]

    def _can_play(self, limit: float) -> bool:
        """Whether anything happens up to ``limit``; an error if nothing ever will."""
        events = self._simulator.events
        if not events and limit == math.inf:
            raise RuntimeError("nothing is under way that could answer: the driver would hang")
        return bool(events) and events[0][0] <= limit

    def _fetch(self, reference: VirtualReference) -> Any:
        """Brings a value to the driver."""
        if reference.error is not None:
            raise reference.error.open()
        assert reference.message is not None
        self.now = self._simulator.rooms[0].fetch(reference, self.now)
        return reference.message.open()

    def _waited(self, verb: str, begun: float) -> None:
        timeline = self._simulator.timeline
        if timeline is not None and self.now > begun:
            timeline.add(self._lane, self._words[verb], begun, self.now)

    def _made_remote(self, target: VirtualTarget, args: Any, kwargs: Any) -> Any:
        """An actor is made, or a function called."""
        self._begin("remote")
        simulator, arguments = self._simulator, as_arguments(args, kwargs)
        room = simulator.place(target.node, target.is_class)
        name = target.name
        if target.is_class:
            name = f"{target.name} {self._made[target.name]}"
            self._made[target.name] += 1
        pace = self.cluster.stragglers.get(name, 1.0) / room.speed
        actor = Actor(name, room, pace, self._timeline.number(name), target.target)
        method = self._method(actor, target, "__init__" if target.is_class else "__call__")
        if not target.is_class:  # as if by an actor that does one call
            room.guests += 1
            simulator.share(self.now, room)
            call = Call(method, self._reference(), *arguments)
            simulator.submit(self.now, call)
            return call.reference
        actor.birth = lambda: Call(method, self._reference(), *arguments)
        simulator.settle_in(self.now, actor)
        simulator.submit(self.now, actor.birth())
        return VirtualActor(self, actor, target)

    def _method(self, actor: Actor, target: VirtualTarget, name: str) -> Method:
        return target.method(actor, name, self._timeline.number(name), self.cluster)

    def _call(self, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call leaves the driver."""
        self._begin("remote")
        reference = self._reference()
        call = Call(method, reference, *as_arguments(args, kwargs))
        self._simulator.submit(self.now, call)
        return reference

    def _call_many(
        self, method: Method, num_returns: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[VirtualReference]:
        """A call of several results leaves the driver."""
        self._begin("remote")
        bundle = Bundle([self._reference() for _ in range(num_returns)])
        self._simulator.submit(self.now, Call(method, bundle, *as_arguments(args, kwargs)))
        return bundle.parts

    def _work(self, call: Call) -> None:
        """Does what a call says; it finds out who calls a verb there."""
        self._inside = f"{call.actor.name}.{call.method.name}"
        try:
            work(call)
        finally:
            self._inside = None

    def _was_made(self, name: str) -> bool:
        kind, _, number = name.rpartition(" ")
        return int(number) < self._made[kind]
