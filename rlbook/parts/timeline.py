"""Who worked on what, and who waited: spans of time, in this house's form and in Chrome's.

    timeline = runtime.timeline()
    timeline.totals()["Actor 0"].busy_fraction      0.93
    timeline.save("trace.json")                     open it at ui.perfetto.dev

Times are seconds on the clock of whoever noted them: virtual, or the wall's.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DRIVER = "driver"
"""The process that conducts. All its spans are waits; between them it works."""


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

    @classmethod
    def of(cls, spans: Iterable[tuple[str, str, float, float]]) -> Timeline:
        """A timeline of its own with these spans ``(who, what, start, end)``."""
        made = cls()
        if isinstance(spans, Timeline):
            made.names, made._numbers = spans.names[:], dict(spans._numbers)
            made._rows = spans._rows[:]
            return made
        for who, what, start, end in spans:
            made.add(made.number(who), made.number(what), start, end)
        return made

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

    def newest(self, count: int) -> Timeline:
        """At most ``count`` spans, those that ended last: what happened from some moment on."""
        kept = Timeline.of(self)
        if len(self) > count:
            rows = np.array(self._rows).reshape(-1, 4)
            last = np.sort(np.argsort(rows[:, 3], kind="stable")[len(rows) - count :])
            kept._rows = array("d", rows[last].ravel())
        return kept

    def columns(self) -> np.ndarray:
        """``[4, n]``: numbers of who and of what (in ``names``), start and end, in seconds."""
        return np.array(self._rows).reshape(-1, 4).T

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
        who, _, starts, ends = self.columns()
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

    def lanes(self) -> Iterator[tuple[Span, int]]:
        """Spans by their start, each with the first lane of its process that is free then.

        That is lane 0, but for the calls of a remote function that overlap.
        """
        until: dict[str, list[float]] = {}
        for span in sorted(self, key=lambda span: (span.start, -span.end)):
            ends = until.setdefault(span.who, [])
            lane = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
            ends[lane : lane + 1] = [span.end]
            yield span, lane

    def chrome(self) -> dict[str, Any]:
        """The timeline in Chrome's trace event format (microseconds), a row for each process.

        Calls of one name that overlap (a remote function's) get rows of their own.
        """
        rows: dict[tuple[str, int], int] = {}
        events: list[dict[str, Any]] = []
        for span, lane in self.lanes():
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

    @classmethod
    def read(cls, path: str | Path) -> Timeline:
        """What :meth:`save` wrote, to a billionth of a second, by start.

        ValueError if the file is missing or no such trace.
        """
        try:
            events = json.loads(Path(path).read_text())["traceEvents"]
            names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
            work = [e for e in events if e["ph"] == "X"]
            ends = [e["ts"] + e["dur"] for e in work]
            rows = zip(work, ends, strict=True)
            return cls.of((names[e["tid"]], e["name"], e["ts"] / 1e6, end / 1e6) for e, end in rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: missing or damaged ({type(error).__name__})") from error
