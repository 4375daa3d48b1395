"""How the timeline of a run comes to be: every actor notes its own calls.

What is noted is a :class:`~rlbook.parts.timeline.Timeline`, which the harness reads and draws.
"""

from __future__ import annotations

import functools
import inspect
import time
from typing import Any

from rlbook.parts.timeline import DRIVER, Span, Timeline, Totals

__all__ = ["DRIVER", "KEPT", "Span", "Timeline", "Totals", "timed"]

KEPT = 200_000
"""A process on Ray remembers at least its newest so many calls."""


def timed(cls: type) -> type:
    """A subclass of ``cls`` that notes when its constructor and public methods began and ended,
    and behaves as ``cls`` does otherwise.

    ``rlbook_spans()`` hands the notes over, ``(method, start, end)`` with times of the wall clock,
    and forgets them. Only the outermost of nested calls is noted; coroutines and generators, which
    end before their work does, are left as they are.
    """

    def noting(name: str, method: Any) -> Any:
        @functools.wraps(method)
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            own = self.__dict__
            if own.get("_rlbook_busy"):
                return method(self, *args, **kwargs)
            spans = own.setdefault("_rlbook_spans", [])
            own["_rlbook_busy"], start = True, time.time()
            try:
                return method(self, *args, **kwargs)
            finally:
                spans.append((name, start, time.time()))
                own["_rlbook_busy"] = False
                if len(spans) > 2 * KEPT:
                    del spans[:-KEPT]

        return noted

    def rlbook_spans(self: Any) -> list[tuple[str, float, float]]:
        notes = self.__dict__.get("_rlbook_spans", [])
        spans = list(notes)
        notes.clear()
        return spans

    members: dict[str, Any] = {"rlbook_spans": rlbook_spans, "__module__": cls.__module__}
    members |= {"__doc__": cls.__doc__, "__qualname__": cls.__qualname__}
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if inspect.isfunction(method) and (name == "__init__" or not name.startswith("_")):
            if not (inspect.iscoroutinefunction(method) or _generates(method)):
                members[name] = noting(name, method)
    return type(cls)(cls.__name__, (cls,), members)


def _generates(method: Any) -> bool:
    return inspect.isgeneratorfunction(method) or inspect.isasyncgenfunction(method)
