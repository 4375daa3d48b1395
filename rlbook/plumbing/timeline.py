"""Who worked on what, and who waited: the record that both runtimes keep of a run.

    timeline = runtime.timeline()
    timeline.totals()["Actor 0"].busy_fraction      0.93
    timeline.save("trace.json")                     open it at ui.perfetto.dev

Times are seconds since the runtime was made, on its own clock: the virtual one, or the wall's.
"""

from __future__ import annotations

import functools
import inspect
import json
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DRIVER = "driver"
"""The process that conducts. All its spans are waits; between them it works."""
KEPT = 200_000
"""A process on Ray remembers at least its newest so many calls."""


class Span(NamedTuple):
    """One stretch of a process's time."""

    who: str
    what: str
    start: float
    end: float

    @property
    def waiting(self) -> bool:
        """True where the driver waited, False where an actor worked."""
        return self.who == DRIVER


class Totals(NamedTuple):
    """How a process spent its time."""

    calls: int
    busy_s: float
    idle_s: float

    @property
    def busy_fraction(self) -> float:
        """Busy time by all time; 0 if there was no time."""
        whole = self.busy_s + self.idle_s
        return self.busy_s / whole if whole > 0 else 0.0


class Timeline:
    """Spans, in the order in which they became known; 32 bytes each."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._rows = array("d")
        """who, what, start, end; who, what, …"""

    def number(self, name: str) -> int:
        """The number by which :meth:`add` knows an actor's or a method's name."""
        if name not in self._numbers:
            self._numbers[name] = len(self.names)
            self.names.append(name)
        return self._numbers[name]

    def add(self, who: int, what: int, start: float, end: float) -> None:
        """Notes a span."""
        self._rows.extend((who, what, start, end))

    def forget(self, count: int) -> None:
        """Drops the oldest ``count`` spans."""
        del self._rows[: 4 * count]

    def __len__(self) -> int:
        return len(self._rows) // 4

    def __iter__(self) -> Iterator[Span]:
        rows = iter(self._rows)
        for who, what, start, end in zip(rows, rows, rows, rows, strict=True):
            yield Span(self.names[int(who)], self.names[int(what)], start, end)

    def totals(self, start: float = 0.0, end: float | None = None) -> dict[str, Totals]:
        """Calls, busy and idle seconds of each process between ``start`` and ``end`` (the last
        span's end by default).

        The calls of a remote *function* share a name: their busy time is the sum over cores.
        """
        who, _, starts, ends = np.array(self._rows).reshape(-1, 4).T
        last = float(ends.max(initial=start)) if end is None else end
        spent = np.clip(ends, start, last) - np.clip(starts, start, last)
        inside = (ends >= start) & (starts <= last)
        numbers = who.astype(np.int64)
        found = {}
        for number in np.unique(numbers):
            mine = inside & (numbers == number)
            noted = float(spent[mine].sum())
            rest = max(0.0, last - start - noted)
            name = self.names[number]
            busy, idle = (rest, noted) if name == DRIVER else (noted, rest)
            found[name] = Totals(int(mine.sum()), busy, idle)
        return found

    def chrome(self) -> dict[str, Any]:
        """The timeline in Chrome's trace event format (microseconds), a row for each process.

        Calls of one name that overlap (a remote function's) get rows of their own.
        """
        rows: dict[tuple[str, int], int] = {}
        until: dict[str, list[float]] = {}
        events: list[dict[str, Any]] = []
        for span in sorted(self, key=lambda span: (span.start, -span.end)):
            ends = until.setdefault(span.who, [])
            lane = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
            ends[lane : lane + 1] = [span.end]
            event = {
                "name": span.what,
                "cat": "wait" if span.waiting else "work",
                "ph": "X",
                "ts": 1e6 * span.start,
                "dur": 1e6 * (span.end - span.start),
                "pid": 0,
                "tid": rows.setdefault((span.who, lane), len(rows)),
            }
            events.append(event | {"cname": "grey"} if span.waiting else event)
        titles = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": who}}
            for (who, _), row in rows.items()
        ]
        return {"traceEvents": titles + events, "displayTimeUnit": "ms"}

    def save(self, path: str | Path) -> Path:
        """Writes :meth:`chrome` as JSON."""
        path = Path(path)
        path.write_text(json.dumps(self.chrome()))
        return path


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
