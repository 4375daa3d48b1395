"""What a call on the virtual clock does when its time has come: its work, or as if.

    work(call)      opens copies of the arguments, calls the method, packs what comes out
    pretend(call)   hollow: packs what ``returns`` says

Either fills the call's reference, with a value or with an error.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from rlbook.plumbing.cast import Call
from rlbook.plumbing.runtime import ActorDiedError
from rlbook.plumbing.wire import Bundle, Message, pack, pack_error

NOTHING = pack(None)


class StandIn(NamedTuple):
    """What a hollow call returns: ``value``, as heavy on the wire as ``nbytes``."""

    nbytes: int
    value: Any = None

    def message(self) -> Message:
        """The value as a message of that size."""
        if self.nbytes < 0:
            raise ValueError(f"nbytes: must be 0 or more, got {self.nbytes}")
        return pack(self.value)._replace(nbytes=self.nbytes)


def as_message(value: Any) -> Message:
    """What a hollow call returns, on the wire."""
    return value.message() if isinstance(value, StandIn) else pack(value)


def work(call: Call) -> None:
    """Does what a call says, on copies, and packs what comes out."""
    actor, name, reference = call.actor, call.method.name, call.reference
    if actor.error is not None and name != "__init__":
        reference.error = actor.error
        return
    try:
        args, kwargs = call.open()
        result = None
        if name == "__init__":
            actor.instance, actor.error = actor.target(*args, **kwargs), None
        else:
            result = getattr(actor.instance, name)(*args, **kwargs)
        if type(reference) is Bundle:
            reference.fill(result, pack)
        else:
            reference.message = NOTHING if result is None else pack(result)
    except Exception as error:
        where = f"{actor.name}.{name} at {call.finish:.6f} s of virtual time"
        reference.error = pack_error(error, where)
        if name == "__init__":
            reason = f"{actor.name} died in its constructor: {error!r}"
            actor.error = pack(ActorDiedError(reason))


def pretend(call: Call) -> None:
    """Gives a hollow call its stand-in; one of several results, a tuple of them."""
    stand_in, reference = call.method.stand_in, call.reference
    if type(reference) is Bundle:
        _pretend_many(call, reference)
    elif callable(stand_in):
        args, kwargs = call.open()
        reference.message = as_message(stand_in(*args, **kwargs))
    else:
        reference.message = stand_in


def _pretend_many(call: Call, bundle: Bundle) -> None:
    """Each result its own stand-in; undeclared ones are None."""
    stand_in = call.method.stand_in
    if callable(stand_in):
        args, kwargs = call.open()
        values = stand_in(*args, **kwargs)
    elif stand_in is NOTHING:
        values = (None,) * len(bundle.parts)
    else:
        assert stand_in is not None
        values = stand_in.open()
    bundle.fill(values, as_message)
