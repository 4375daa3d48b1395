"""Timelines: totals by hand, lanes, the newest spans, Chrome's format and the way back."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlbook.parts.timeline import DRIVER, Span, Timeline, Totals


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


def test_a_saved_timeline_comes_back(timeline: Timeline, tmp_path: Path) -> None:
    again = Timeline.read(timeline.save(tmp_path / "trace.json"))
    wanted = sorted(timeline, key=lambda span: (span.start, -span.end))
    assert [span[:2] for span in again] == [span[:2] for span in wanted]
    times = [span[2:] for span in again]
    assert np.allclose(times, [span[2:] for span in wanted], rtol=0, atol=1e-9)
    assert again.totals() == timeline.totals()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"traceEvents": [{"ph": "X", "ts": 1}]}'])
def test_a_damaged_trace_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ValueError, match="trace.json: missing or damaged"):
        Timeline.read(tmp_path / "trace.json")
    with pytest.raises(ValueError, match="missing or damaged"):
        Timeline.read(tmp_path / "none.json")


def test_a_copy_of_spans_stands_alone(timeline: Timeline) -> None:
    spans = list(timeline)
    for source in (timeline, spans, [(s.who, s.what, s.start, s.end) for s in spans]):
        copy = Timeline.of(source)
        assert list(copy) == spans
        copy.add(copy.number("Actor 9"), copy.number("rest"), 9.0, 10.0)
        assert len(copy) == 6 and list(timeline) == spans
        assert "Actor 9" not in timeline.names


def test_the_newest_spans_are_those_that_ended_last(timeline: Timeline) -> None:
    """Whoever noted them first or last: on Ray each actor hands its notes over in one go."""
    assert list(timeline.newest(2)) == [
        Span("square", "__call__", 2.0, 8.0),
        Span(DRIVER, "wait", 0.0, 7.0),
    ]
    assert list(timeline.newest(5)) == list(timeline) == list(timeline.newest(99))
    assert len(timeline.newest(0)) == 0 and len(timeline) == 5


def test_what_overlaps_gets_lanes_of_its_own(timeline: Timeline) -> None:
    lanes = [(span.who, span.start, lane) for span, lane in timeline.lanes()]
    assert lanes == [
        (DRIVER, 0.0, 0),
        ("square", 0.0, 0),
        ("Actor 0", 1.0, 0),
        ("square", 2.0, 1),
        ("Actor 0", 5.0, 0),
    ]
