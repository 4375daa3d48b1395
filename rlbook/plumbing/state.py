"""The state of a virtual cluster between two calls, as plain values: what a checkpoint keeps of it.

    state = state_of(simulator)        nothing that the driver asked for may be under way
    restore(simulator, state)          on a cluster with the same actors, made in the same order

What the actors themselves know is theirs to save; references are not kept at all.
"""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np

from rlbook.plumbing.cast import Actor, Call, Room
from rlbook.plumbing.runtime import ActorDiedError
from rlbook.plumbing.simulator import Event, Simulator
from rlbook.plumbing.wire import pack

State = dict[str, Any]


def state_of(simulator: Simulator) -> State:
    """Dicts, lists, arrays, numbers and text.

    Raises ``RuntimeError`` while a call is under way. The constructor of an actor that is being
    restarted may be: nobody can wait for that one.
    """
    pending = _pending(simulator)
    busy = {id(one) for one in pending if not _is_birth(one)}
    busy |= {id(call) for room in simulator.rooms for a in room.actors for call in a.unsent}
    if busy:
        raise RuntimeError(
            f"{len(busy)} calls are under way: wait for all of them before the runtime's state is "
            "saved or loaded"
        )
    return {
        "number": simulator.number,
        "jitters": np.array(simulator.jitters),
        "generators": {
            name: generator.bit_generator.state for name, generator in simulator.generators.items()
        },
        "rooms": [_room_state(room) for room in simulator.rooms],
        "births": {call.actor.name: _birth_state(call) for call in pending},
        "events": [_event_state(simulator, event) for event in sorted(simulator.events)],
    }


def restore(simulator: Simulator, state: State) -> None:
    """Puts the cluster where :func:`state_of` found one.

    Raises ``ValueError`` if the actors are not the same, and ``RuntimeError`` while a call is
    under way.
    """
    state_of(simulator)
    names = [[actor["name"] for actor in room["actors"]] for room in state["rooms"]]
    found = [[actor.name for actor in room.actors] for room in simulator.rooms]
    if names != found:
        raise ValueError(
            f"the saved run had the actors {names} (by node), this one has {found}: make the same, "
            "in the same order, before the state is loaded"
        )
    simulator.number = int(state["number"])
    simulator.jitters = [float(jitter) for jitter in state["jitters"]]
    for name, generator in simulator.generators.items():
        generator.bit_generator.state = state["generators"][name]
    actors = {actor.name: actor for room in simulator.rooms for actor in room.actors}
    births = {name: _reborn(actors[name], birth) for name, birth in state["births"].items()}
    for room, saved in zip(simulator.rooms, state["rooms"], strict=True):
        _restore_room(room, saved, births)
    simulator.events[:] = [_event(simulator, event, actors, births) for event in state["events"]]
    heapq.heapify(simulator.events)


def cancel_crashes(simulator: Simulator) -> None:
    """Those still to come do not come."""
    others = [event for event in simulator.events if not isinstance(event[3], tuple)]
    simulator.events[:] = others
    heapq.heapify(simulator.events)


def await_births(simulator: Simulator, now: float, *, again: bool) -> float:
    """Plays until no actor is under construction; with ``again``, no actor that is restarted
    either. Returns the time then, ``now`` or later.
    """
    while simulator.events and any(
        _is_birth(one) and (again or one.actor.up_at == 0.0) for one in _pending(simulator)
    ):
        now = max(now, simulator.events[0][0])
        simulator.play()
    return now


def _pending(simulator: Simulator) -> list[Any]:
    """Calls on their way, and references that will be settled."""
    pending = [event[3] for event in simulator.events if not isinstance(event[3], tuple | Room)]
    pending += [call for room in simulator.rooms for call in room.line]
    actors = [actor for room in simulator.rooms for actor in room.actors]
    return pending + [call for actor in actors for call in (*actor.unsent, *actor.backlog)]


def _is_birth(one: Any) -> bool:
    return isinstance(one, Call) and one.method.name == "__init__"


def _room_state(room: Room) -> State:
    return {
        "wire_free": room.wire_free,
        "nbytes": room.nbytes,
        "idle": room.idle,
        "shared": room.shared,
        "line": [call.actor.name for call in room.line],
        "actors": [
            {
                "name": actor.name,
                "free_at": actor.free_at,
                "answered_at": actor.answered_at,
                "up_at": actor.up_at,
                "error": None if actor.error is None else str(actor.error.open()),
            }
            for actor in room.actors
        ],
    }


def _restore_room(room: Room, saved: State, births: dict[str, Call]) -> None:
    room.wire_free, room.nbytes = saved["wire_free"], saved["nbytes"]
    room.idle, room.shared = saved["idle"], saved["shared"]
    room.line.clear()
    room.line.extend(births[name] for name in saved["line"])
    for actor, fields in zip(room.actors, saved["actors"], strict=True):
        actor.free_at, actor.answered_at = fields["free_at"], fields["answered_at"]
        actor.up_at = fields["up_at"]
        if fields["error"] is not None:
            actor.error = pack(ActorDiedError(fields["error"]))


def _birth_state(call: Call) -> State:
    return {
        "arrive": call.arrive,
        "start": call.start,
        "finish": getattr(call, "finish", math.inf),
        "waits": call in call.actor.backlog,
    }


def _reborn(actor: Actor, saved: State) -> Call:
    """The call of the constructor, where it was on its way."""
    assert actor.birth is not None
    call = actor.birth()
    call.arrive, call.start, call.finish = saved["arrive"], saved["start"], saved["finish"]
    actor.backlog.clear()
    if saved["waits"]:
        actor.backlog.append(call)
    return call


def _event_state(simulator: Simulator, event: Event) -> State:
    at, number, action, subject = event
    saved: State = {"at": at, "number": number, "action": action.__name__}
    if isinstance(subject, Room):
        return saved | {"room": simulator.rooms.index(subject)}
    if isinstance(subject, tuple):
        actor, crash = subject
        return saved | {"actor": actor.name, "crash": simulator.cluster.crashes.index(crash)}
    return saved | {"birth": subject.actor.name}


def _event(
    simulator: Simulator, saved: State, actors: dict[str, Actor], births: dict[str, Call]
) -> Event:
    subject: Any
    if "room" in saved:
        subject = simulator.rooms[saved["room"]]
    elif "crash" in saved:
        subject = actors[saved["actor"]], simulator.cluster.crashes[saved["crash"]]
    else:
        subject = births[saved["birth"]]
    return saved["at"], saved["number"], simulator.action(saved["action"]), subject
