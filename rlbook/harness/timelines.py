"""Timelines as figures: one row a process, one colour a method, waits in orange, idle time blank.

    result.timeline()                  some eighty calls in the middle of the run
    result.timeline(0.5, 0.6)          a tenth of a second

For more than a stretch of a few processes, open the run's `trace.json` at ui.perfetto.dev.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rlbook.harness.plots import COLORS, CYCLE, use_style
from rlbook.parts.timeline import DRIVER, Span, Timeline

SHOWN_SPANS = 80
"""So many calls are still told apart on a page."""
MOST_ROWS = 40
WAIT = COLORS["orange"]
METHOD_COLORS = [color for color in CYCLE if color not in (WAIT, COLORS["grey"])]
OTHERS = COLORS["grey"]

Row = tuple[str, int]
"""A process and its lane (above 0 for the calls of a remote function that overlap)."""


def draw_timeline(
    spans: Iterable[tuple[str, str, float, float]],
    *,
    start: float | None = None,
    end: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Who worked on what, and when the driver waited.

    Args:
        spans: (who, what, start, end), seconds.
        start: where the picture begins; by default such that some eighty spans of the middle of
            the run are in it (with `end` given, at the first span).
        end: where it ends; with `start` given by default at the last span.
        title: what the figure shows.
        ax: where to draw; by default a new figure, as high as it has rows.

    Raises:
        ValueError: no span, or none between `start` and `end`.
    """
    timeline = Timeline.of(spans)
    if not timeline:
        raise ValueError("timeline: there are no spans")
    left, right = _stretch(timeline, start, end)
    inside = Timeline.of(span for span in timeline if span.start < right and span.end > left)
    if not inside:
        whole = timeline.columns()
        raise ValueError(
            f"timeline: nothing happened between {left:g} s and {right:g} s;"
            f" the spans are from {whole[2].min():.6g} s to {whole[3].max():.6g} s"
        )
    shown = list(inside.lanes())
    alive = {(timeline.names[int(who)], 0) for who in np.unique(timeline.columns()[0])}
    rows = sorted(alive | {(span.who, lane) for span, lane in shown}, key=_order)
    hidden, rows = len(rows) - len(rows[:MOST_ROWS]), rows[:MOST_ROWS]
    if ax is None:
        use_style()
        ax = plt.subplots(figsize=(7.0, 1.15 + 0.34 * len(rows)))[1]
    scale, unit = (1e3, "milliseconds") if right - left < 1.0 else (1.0, "seconds")
    colors = _colors([span for span, _ in shown], left, right)
    places = {row: place for place, row in enumerate(rows)}
    for span, lane in shown:
        if (span.who, lane) in places:
            _draw_span(ax, span, places[span.who, lane], colors, (left, right), scale)
    lines = _dress(ax, rows, colors, (scale * left, scale * right))
    more = f" ({hidden} more processes not shown)" if hidden else ""
    ax.set_xlabel(f"{unit} on the run's clock{more}")
    if title:
        ax.set_title(title, pad=8 + 16 * lines)
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _stretch(timeline: Timeline, start: float | None, end: float | None) -> tuple[float, float]:
    """The time to show; ValueError if it is none."""
    _, _, starts, ends = timeline.columns()
    left, right = float(starts.min()), float(ends.max())
    work = [span for span in timeline if not span.waiting and span.what != "__init__"]
    if start is None and end is None and work and len(timeline) > SHOWN_SPANS:
        # The middle of the time, not of the calls: half of them may come in the first moments;
        # and of the time of work: on Ray it takes seconds until all processes are there.
        left, right = min(span.start for span in work), max(span.end for span in work)
        order = np.sort(starts)
        middle = int(np.searchsorted(order, (left + right) / 2))
        first = min(max(0, middle - SHOWN_SPANS // 2), len(order) - SHOWN_SPANS)
        last = first + SHOWN_SPANS
        left, right = float(order[first]), float(order[last]) if last < len(order) else right
    left, right = left if start is None else start, right if end is None else end
    if not left < right:
        raise ValueError(f"timeline: start must be before end, got {left:g} s and {right:g} s")
    return left, right


def _order(row: Row) -> tuple[bool, str, int, int]:
    """The driver first, then each kind by its numbers."""
    who, lane = row
    kind, number = re.fullmatch(r"(.*?) ?(\d*)", who).groups()  # type: ignore[union-attr]
    return who != DRIVER, kind, int(number or 0), lane


def _colors(spans: list[Span], left: float, right: float) -> dict[str, str]:
    """A colour for each method, in order of the time that they take; the rarest share grey."""
    taken: Counter[str] = Counter()
    for span in spans:
        if not span.waiting:
            taken[span.what] += min(span.end, right) - max(span.start, left)  # type: ignore[assignment]
    methods = [what for what, _ in taken.most_common()]
    free = METHOD_COLORS + [OTHERS] * len(methods)
    return dict(zip(methods, free, strict=False))


def _draw_span(
    ax: Axes,
    span: Span,
    place: int,
    colors: dict[str, str],
    edges: tuple[float, float],
    scale: float,
) -> None:
    """One bar: full height for work, thin for a wait, so that the two differ without colour."""
    left, right = max(span.start, edges[0]), min(span.end, edges[1])
    height = 0.26 if span.waiting else 0.72
    color = WAIT if span.waiting else colors[span.what]
    wide = right - left > 0.004 * (edges[1] - edges[0])
    ax.barh(
        place,
        scale * (right - left),
        left=scale * left,
        height=height,
        color=color,
        edgecolor=COLORS["paper"] if wide else color,  # a short one keeps a visible width
        linewidth=0.6 if wide else 0.8,
    )


def _dress(ax: Axes, rows: list[Row], colors: dict[str, str], edges: tuple[float, float]) -> int:
    """Names of the rows, the edges, what the colours mean; returns the lines of the legend."""
    ax.set_yticks(range(len(rows)), [who if lane == 0 else "" for who, lane in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(*edges)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    ax.ticklabel_format(axis="x", useOffset=False, style="plain")
    named = [(what, color) for what, color in colors.items() if color != OTHERS]
    if len(named) < len(colors):
        named.append(("other methods", OTHERS))
    if any(who == DRIVER for who, _ in rows):
        named.append(("driver waits", WAIT))
    handles = [Patch(facecolor=color, label=what) for what, color in named]
    above: Any = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
    ax.legend(handles=handles, ncols=5, handlelength=1.2, columnspacing=1.4, **above)
    return -(-len(handles) // 5)
