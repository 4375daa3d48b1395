"""The cast of a virtual cluster: nodes at work, actors, their methods, and calls.

    Room (a node) ◄── Actor ◄── Method ◄── Call ──► VirtualReference

They hold what the simulator knows of each; :mod:`rlbook.plumbing.simulator` says when they act.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from rlbook.plumbing.cluster import Node
from rlbook.plumbing.wire import Message, VirtualReference


class Room:
    """A node at work: who runs, who waits for a core, what is on the wire to it."""

    def __init__(self, node: Node, bandwidth: float) -> None:
        self.cores, self.idle, self.speed = node.cores, node.cores, node.speed
        self.bandwidth = bandwidth
        self.actors: list[Actor] = []
        self.shared = False
        """There are fewer cores than actors: cores are counted."""
        self.line: deque[Call] = deque()
        """Calls that wait for a core."""
        self.guests = 0
        """Calls of functions that were sent here and have not ended."""
        self.wire_free = 0.0
        self.nbytes = 0
        """Bytes that came here."""

    def receive(self, at: float, nbytes: int) -> float:
        """When ``nbytes`` that could leave at ``at`` are here: one value at a time."""
        self.nbytes += nbytes
        self.wire_free = max(at, self.wire_free) + nbytes / self.bandwidth
        return self.wire_free

    def fetch(self, reference: VirtualReference, at: float) -> float:
        """When a reference's value, wanted at ``at``, is here. It comes once."""
        if reference.places is None:
            reference.places = {}
        here = reference.places.get(self)
        if here is None:
            here = reference.places[self] = self.receive(at, reference.nbytes)
        return here if here > at else at


class Actor:
    """A process with a state of its own, which does one call at a time, in order."""

    def __init__(self, name: str, room: Room, pace: float, lane: int, target: Any) -> None:
        self.name, self.room, self.lane, self.target = name, room, lane, target
        self.instance = target
        """The class until its constructor has run; for a function, the function."""
        self.error: Message | None = None
        """Why the constructor failed, if it did."""
        self.pace = pace
        """Seconds here for a second of work on a core of speed 1."""
        self.unsent: deque[Call] = deque()
        """Calls that still wait for an argument, and those behind them."""
        self.backlog: deque[Call] = deque()
        """Calls sent and not finished; kept only where cores are shared."""
        self.free_at = self.answered_at = 0.0
        self.up_at = 0.0
        """Calls that arrive earlier find nobody."""
        self.birth: Callable[[], Call] | None = None
        """Makes the call of its constructor; None for a function's one call."""


class Method:
    """A method of one actor: what it costs there, and what stands in for its result."""

    __slots__ = ("actor", "name", "price", "seconds", "stand_in", "word")

    def __init__(self, actor: Actor, name: str, word: int) -> None:
        self.actor, self.name, self.word = actor, name, word
        self.seconds = 0.0
        self.price: Callable[..., float] | None = None
        """Where the cost depends on the arguments."""
        self.stand_in: Message | Callable[..., Any] | None = None


class Call:
    """A call on its way through the cluster."""

    __slots__ = (
        *("actor", "method", "reference", "arguments", "needs", "missing"),
        *("arrive", "start", "finish"),
    )
    arrive: float
    start: float
    finish: float

    def __init__(
        self, method: Method, reference: VirtualReference, arguments: Any, needs: tuple[Any, ...]
    ) -> None:
        self.actor, self.method, self.reference = method.actor, method, reference
        self.arguments = arguments
        """A message; None for no arguments; ``(args, kwargs)`` if all of them are references."""
        self.needs = needs
        """References among the arguments, whose values the call gets."""
        self.missing = 0
        self.start = math.inf

    def open(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Copies of the arguments."""
        if self.arguments is None:
            return (), {}
        whole = self.arguments
        args, kwargs = whole.open() if isinstance(whole, Message) else whole
        if self.needs:
            args = tuple(map(_value, args))
            kwargs = {name: _value(value) for name, value in kwargs.items()}
        return args, kwargs


def _value(argument: Any) -> Any:
    """The value behind a reference; anything else is its own."""
    if type(argument) is not VirtualReference:
        return argument
    return argument.message.open() if argument.message is not None else None
