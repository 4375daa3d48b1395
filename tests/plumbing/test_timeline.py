"""Timelines: totals by hand, Chrome's format, and notes that change nothing."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import pytest

from rlbook.plumbing import timeline as module
from rlbook.plumbing.timeline import DRIVER, Span, Timeline, Totals, timed

T = TypeVar("T")


@pytest.fixture
def timeline() -> Timeline:
    """An actor that works from 1 to 3 and 5 to 6, a function at work twice at once, a driver
    that waits from 0 to 7.
    """
    made = Timeline()
    for who, what, start, end in (
        ("Actor 0", "unroll", 1.0, 3.0),
        ("square", "__call__", 0.0, 4.0),
        ("square", "__call__", 2.0, 8.0),
        ("Actor 0", "unroll", 5.0, 6.0),
        (DRIVER, "wait", 0.0, 7.0),
    ):
        made.add(made.number(who), made.number(what), start, end)
    return made


def test_spans_come_back(timeline: Timeline) -> None:
    assert len(timeline) == 5
    assert list(timeline)[0] == Span("Actor 0", "unroll", 1.0, 3.0)
    assert [span.waiting for span in timeline] == [False] * 4 + [True]
    timeline.forget(4)
    assert list(timeline) == [Span(DRIVER, "wait", 0.0, 7.0)]


def test_totals_by_hand(timeline: Timeline) -> None:
    assert timeline.totals() == {
        "Actor 0": Totals(2, 2 + 1, 8 - (2 + 1)),
        "square": Totals(2, 4 + 6, 0.0),
        DRIVER: Totals(1, 8 - 7, 7),
    }
    # From 2 to 5.5: the spans are cut where they cross the edge.
    assert timeline.totals(2.0, 5.5) == {
        "Actor 0": Totals(2, (3 - 2) + (5.5 - 5), 3.5 - 1.5),
        "square": Totals(2, (4 - 2) + (5.5 - 2), 0.0),
        DRIVER: Totals(1, 0.0, 3.5),
    }
    assert timeline.totals()["Actor 0"].busy_fraction == 3 / 8
    assert Totals(0, 0.0, 0.0).busy_fraction == 0.0
    assert Timeline().totals() == {}
    assert timeline.totals(6.5)["Actor 0"] == Totals(0, 0.0, 8 - 6.5)


def test_chrome_format(timeline: Timeline, tmp_path: Path) -> None:
    trace = json.loads(timeline.save(tmp_path / "trace.json").read_text())
    events = trace["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert sorted(names.values()) == ["Actor 0", DRIVER, "square", "square"]
    work = [event for event in events if event["ph"] == "X"]
    assert len(work) == 5 and {event["pid"] for event in events} == {0}
    (wait,) = [event for event in work if event["cat"] == "wait"]
    assert (names[wait["tid"]], wait["name"], wait["ts"], wait["dur"]) == (DRIVER, "wait", 0, 7e6)
    rows: dict[int, list[tuple[float, float]]] = {}
    for event in work:
        rows.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in rows.values():  # viewers drop what overlaps in a row
        spans.sort()
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))


class Base(Generic[T]):
    """Documented."""

    limit = 3

    def __init__(self, start: int) -> None:
        self.count = start

    def add(self, amount: int = 1) -> int:
        """Adds."""
        self.count += amount
        return self.count

    def twice(self) -> int:
        self.add()
        return self.add()

    def fail(self) -> None:
        raise KeyError("on purpose")

    def _hidden(self) -> int:
        return self.count

    @property
    def double(self) -> int:
        return 2 * self.count

    @staticmethod
    def still() -> str:
        return "static"

    def each(self) -> Iterator[int]:
        yield self.count


def test_noting_changes_nothing() -> None:
    noted = timed(Base)
    assert issubclass(noted, Base) and noted.__name__ == "Base" and noted.__doc__ == "Documented."
    one = noted(5)
    assert [one.add(), one.add(amount=2), one.twice()] == [6, 8, 10]
    assert (one.double, one.still(), one._hidden(), list(one.each())) == (20, "static", 10, [10])
    with pytest.raises(KeyError, match="on purpose"):
        one.fail()
    spans = one.rlbook_spans()
    # twice calls add, which is part of it.
    assert [what for what, *_ in spans] == ["__init__", "add", "add", "twice", "fail"]
    times = np.array([span[1:] for span in spans]).ravel()
    assert (np.diff(times) >= 0).all()
    assert one.rlbook_spans() == []
    assert noted.add.__doc__ == "Adds."


def test_an_actor_remembers_its_newest_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 10)
    one = timed(Base)(0)
    for _ in range(1000):
        one.add()
    assert 10 <= len(one.rlbook_spans()) <= 20


def test_frozen_classes_can_be_noted() -> None:
    @dataclass(frozen=True)
    class Frozen:
        number: int

        def get(self) -> int:
            return self.number

    one = timed(Frozen)(3)
    assert one.get() == 3
    assert [what for what, *_ in one.rlbook_spans()] == ["__init__", "get"]
