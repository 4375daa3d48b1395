"""Pictures of timelines: what is drawn where, in which colour, and for which stretch."""

from collections.abc import Iterator

import matplotlib.pyplot as plt
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from rlbook.harness.plots import COLORS
from rlbook.harness.timelines import MOST_ROWS, WAIT, draw_timeline
from rlbook.parts.timeline import DRIVER

SPANS = [
    ("Worker 10", "unroll", 0.0, 4.0),
    ("Worker 2", "unroll", 0.0, 3.0),
    ("Worker 2", "gradient", 3.0, 4.5),
    ("Shard 0", "push", 5.0, 6.0),
    (DRIVER, "wait", 0.0, 6.5),
    ("square", "__call__", 0.0, 2.0),
    ("square", "__call__", 1.0, 3.0),
]


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


def rows(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def bars(axes: Axes) -> list[tuple[int, float, float, str]]:
    """(row, start, end, colour) of all bars."""
    found = []
    for bar in axes.patches:
        row = round(bar.get_y() + bar.get_height() / 2)
        end = bar.get_x() + bar.get_width()
        found.append((row, round(bar.get_x(), 9), round(end, 9), to_hex(bar.get_facecolor())))
    return found


def legend(axes: Axes) -> dict[str, str]:
    shown = axes.get_legend()
    colors = [to_hex(patch.get_facecolor()) for patch in shown.get_patches()]
    return dict(zip([text.get_text() for text in shown.get_texts()], colors, strict=True))


def test_each_span_is_in_its_row_at_its_time_in_its_method_s_colour() -> None:
    (axes,) = draw_timeline(SPANS, title="All").axes
    # The driver first, then by kind and number; what overlaps has a row below, without a name.
    assert rows(axes) == [DRIVER, "Shard 0", "Worker 2", "Worker 10", "square", ""]
    color = legend(axes)
    assert len(set(color.values())) == len(color) == 5
    assert color["driver waits"] == WAIT.lower() == COLORS["orange"].lower()
    assert sorted(bars(axes)) == sorted(
        [
            (0, 0.0, 6.5, color["driver waits"]),
            (1, 5.0, 6.0, color["push"]),
            (2, 0.0, 3.0, color["unroll"]),
            (2, 3.0, 4.5, color["gradient"]),
            (3, 0.0, 4.0, color["unroll"]),
            (4, 0.0, 2.0, color["__call__"]),
            (5, 1.0, 3.0, color["__call__"]),
        ]
    )
    assert axes.get_xlabel().startswith("seconds")
    assert axes.get_title(loc="left") == "All"


def test_a_stretch_is_cut_at_its_edges_and_idle_processes_keep_their_row() -> None:
    (axes,) = draw_timeline(SPANS, start=4.0, end=4.75).axes
    assert rows(axes) == [DRIVER, "Shard 0", "Worker 2", "Worker 10", "square"]
    assert [bar[:3] for bar in sorted(bars(axes))] == [(0, 4000, 4750), (2, 4000, 4500)]
    assert axes.get_xlim() == (4000, 4750) and axes.get_xlabel().startswith("milliseconds")
    (axes,) = draw_timeline(SPANS, start=3.0).axes
    assert axes.get_xlim() == (3.0, 6.5)
    (axes,) = draw_timeline(SPANS, end=3.0).axes
    assert axes.get_xlim() == (0.0, 3.0)


def test_a_long_run_shows_some_eighty_spans_of_its_middle() -> None:
    """Though most of its calls are short ones at the beginning."""
    spans = [("Worker 0", "first", 0.01 * k, 0.01 * k + 0.009) for k in range(3000)]
    spans += [("Worker 1", "unroll", 30.0 + k, 30.9 + k) for k in range(400)]
    (axes,) = draw_timeline(spans).axes
    left, right = axes.get_xlim()
    assert left < (30.0 + 430.0) / 2 < right
    assert 60 <= len(bars(axes)) <= 100


def test_the_time_in_which_processes_start_is_not_the_middle_of_a_run() -> None:
    spans = [(DRIVER, "wait", 0.0, 20.0), ("Shard 0", "__init__", 5.0, 19.0)]
    spans += [("Worker 0", "unroll", 20.0 + k / 100, 20.009 + k / 100) for k in range(200)]
    (axes,) = draw_timeline(spans).axes
    left, right = axes.get_xlim()
    assert 20_500 < left < 21_000 < right < 21_500, "in milliseconds"


def test_more_methods_than_colours_share_the_grey() -> None:
    spans = [("Worker 0", f"method {k}", float(k), k + 1.0 - 0.01 * k) for k in range(12)]
    (axes,) = draw_timeline(spans).axes
    color = legend(axes)
    assert "method 0" in color and color["other methods"] == COLORS["grey"].lower()
    assert len(set(color.values())) == len(color) < 12 and "driver waits" not in color
    assert len(bars(axes)) == 12


def test_a_crowd_is_cut_and_said_to_be() -> None:
    spans = [(f"Worker {k}", "unroll", 0.0, 1.0) for k in range(MOST_ROWS + 5)]
    (axes,) = draw_timeline(spans).axes
    assert rows(axes) == [f"Worker {k}" for k in range(MOST_ROWS)]
    assert "(5 more processes not shown)" in axes.get_xlabel()


def test_axes_of_the_caller_are_used() -> None:
    figure, axes = plt.subplots()
    assert draw_timeline(SPANS, ax=axes) is figure and bars(axes)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="no spans"):
        draw_timeline([])
    with pytest.raises(ValueError, match="start must be before end"):
        draw_timeline(SPANS, start=2.0, end=2.0)
    with pytest.raises(ValueError, match="nothing happened between 8 s and 9 s.* 0 s to 6.5 s"):
        draw_timeline(SPANS, start=8.0, end=9.0)
