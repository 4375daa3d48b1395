"""The book's drawing language: processes as boxes, references as arrows, who waits in a second
colour.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from rlbook.harness.plots import COLORS, use_style

KINDS = {
    "process": "#DCEBF5",
    "data": "#FFF3D6",
    "waits": "#FBDDCB",
    "lit": "#D55E00",
    "dim": "#EEF1F4",
}
"""Fill of a box: a process, data at rest, a process that waits; in the family tree lit or dim."""


class Box(NamedTuple):
    """A box of a drawing, its centre at (x, y), in units of about a character's height."""

    x: float
    y: float
    text: str
    kind: str = "process"
    width: float = 3.2
    height: float = 1.2


class Arrow(NamedTuple):
    """An arrow from box to box (by name); `bend` curves it, `shift` moves its label."""

    start: str
    end: str
    label: str = ""
    bend: float = 0.0
    shift: tuple[float, float] = (0.0, 0.25)
    color: str = "ink"


def draw(
    boxes: Mapping[str, Box],
    arrows: Sequence[Arrow] = (),
    *,
    title: str | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """Boxes and arrows as a figure.

    Args:
        boxes: name → box; `kind` is one of `KINDS`.
        arrows: what flows from where to where.
        title: what the drawing shows.
        size: inches; by default it follows from the boxes.

    Raises:
        ValueError: an arrow names a box that is not there, or a box has an unknown kind.
    """
    use_style()
    left = min(b.x - b.width / 2 for b in boxes.values()) - 0.4
    right = max(b.x + b.width / 2 for b in boxes.values()) + 0.4
    low = min(b.y - b.height / 2 for b in boxes.values()) - 0.5
    high = max(b.y + b.height / 2 for b in boxes.values()) + 0.5
    figure, ax = plt.subplots(figsize=size or ((right - left) * 0.5, (high - low) * 0.5))
    ax.set(xlim=(left, right), ylim=(low, high), aspect="equal")
    ax.axis("off")
    for box in boxes.values():
        _draw_box(ax, box)
    for arrow in arrows:
        missing = {arrow.start, arrow.end} - set(boxes)
        if missing:
            raise ValueError(
                f"arrow: there is no box {missing.pop()!r}; boxes are {', '.join(boxes)}"
            )
        _draw_arrow(ax, boxes[arrow.start], boxes[arrow.end], arrow)
    if title:
        ax.set_title(title)
    return figure


def _draw_box(ax: Axes, box: Box) -> None:
    if box.kind not in KINDS:
        raise ValueError(f"kind: must be one of {', '.join(KINDS)}, got {box.kind!r}")
    lit, dim = box.kind == "lit", box.kind == "dim"
    corner = (box.x - box.width / 2, box.y - box.height / 2)
    edge = "#B5BEC7" if dim else COLORS["ink"]
    shape = "round,pad=0,rounding_size=0.18"
    ax.add_patch(
        FancyBboxPatch(
            corner,
            box.width,
            box.height,
            boxstyle=shape,
            facecolor=KINDS[box.kind],
            edgecolor=edge,
            linewidth=1.2,
            zorder=2,
        )
    )
    color = "white" if lit else "#5B6670" if dim else COLORS["ink"]
    weight = "bold" if lit else "normal"
    ax.text(
        box.x,
        box.y,
        box.text,
        ha="center",
        va="center",
        color=color,
        weight=weight,
        fontsize=9,
        zorder=3,
        linespacing=1.25,
    )


def _draw_arrow(ax: Axes, start: Box, end: Box, arrow: Arrow) -> None:
    color = COLORS.get(arrow.color, arrow.color)
    begin, finish = _edge(start, end), _edge(end, start)
    ax.add_patch(
        FancyArrowPatch(
            begin,
            finish,
            arrowstyle="-|>",
            mutation_scale=11,
            color=color,
            linewidth=1.3,
            connectionstyle=f"arc3,rad={arrow.bend}",
            shrinkA=1,
            shrinkB=1,
            zorder=1.5,
        )
    )
    if arrow.label:
        dx, dy = finish[0] - begin[0], finish[1] - begin[1]
        x = (begin[0] + finish[0]) / 2 + arrow.bend * dy / 2 + arrow.shift[0]
        y = (begin[1] + finish[1]) / 2 - arrow.bend * dx / 2 + arrow.shift[1]
        ax.text(
            x,
            y,
            arrow.label,
            ha="center",
            va="center",
            fontsize=8,
            color=color,
            zorder=4,
            bbox={"facecolor": COLORS["paper"], "edgecolor": "none", "pad": 1.0},
        )


def _edge(box: Box, toward: Box) -> tuple[float, float]:
    """Where the line between two centres leaves a box."""
    dx, dy = toward.x - box.x, toward.y - box.y
    if dx == 0 and dy == 0:
        return box.x, box.y
    scale_x = box.width / 2 / abs(dx) if dx else float("inf")
    scale_y = box.height / 2 / abs(dy) if dy else float("inf")
    scale = min(scale_x, scale_y)
    return box.x + scale * dx, box.y + scale * dy


FAMILY = {
    "01_mdp": Box(0.0, 2.2, "01 MDP\nexact planning"),
    "02_td": Box(0.0, 0.0, "02 TD\nsamples, tables"),
    "03_dqn": Box(4.4, 2.2, "03 DQN\n2013–15"),
    "04_policy_gradient": Box(4.4, 0.0, "04 policy gradient\nA2C, PPO"),
    "05_parallelism": Box(0.0, -2.2, "05 parallelism\nRay, virtual cluster", width=3.6),
    "06_parameter_server": Box(4.4, -2.2, "06 parameter server\n2012–14", width=3.6),
    "07_gorila": Box(8.8, 2.2, "07 Gorila\n2015"),
    "08_a3c": Box(8.8, 0.0, "08 A3C\n2016"),
    "09_dppo": Box(8.8, -2.2, "09 distributed PPO\n2017–19", width=3.6),
    "10_apex": Box(13.2, 2.2, "10 Ape-X\n2018"),
    "11_impala": Box(13.2, 0.0, "11 IMPALA\n2018"),
    "12_r2d2": Box(17.6, 2.2, "12 R2D2\n2019"),
    "13_seed_rl": Box(17.6, 0.0, "13 SEED RL\n2020"),
    "14_multi_gpu": Box(17.6, -2.2, "14 several GPUs\nlearner groups", width=3.4),
}
"""The systems that the book has so far, by chapter."""

DESCENT = [
    Arrow("01_mdp", "02_td"),
    Arrow("02_td", "03_dqn"),
    Arrow("02_td", "04_policy_gradient"),
    Arrow("04_policy_gradient", "06_parameter_server"),
    Arrow("05_parallelism", "06_parameter_server"),
    Arrow("03_dqn", "07_gorila"),
    Arrow("06_parameter_server", "07_gorila"),
    Arrow("04_policy_gradient", "08_a3c"),
    Arrow("06_parameter_server", "08_a3c"),
    Arrow("04_policy_gradient", "09_dppo"),
    Arrow("06_parameter_server", "09_dppo"),
    Arrow("07_gorila", "10_apex"),
    Arrow("08_a3c", "11_impala"),
    Arrow("10_apex", "12_r2d2"),
    Arrow("11_impala", "13_seed_rl"),
    Arrow("12_r2d2", "13_seed_rl"),
    Arrow("09_dppo", "14_multi_gpu"),
    Arrow("11_impala", "14_multi_gpu"),
    Arrow("13_seed_rl", "14_multi_gpu"),
]


def family_tree(lit: str | None = None) -> Figure:
    """The family tree of the systems, one chapter's place lit.

    Args:
        lit: a chapter's stem; None lights none.

    Raises:
        ValueError: there is no such chapter in the tree.
    """
    if lit is not None and lit not in FAMILY:
        raise ValueError(f"lit: must be one of {', '.join(FAMILY)}, got {lit!r}")
    boxes = {
        name: box._replace(kind="lit" if name == lit else "process" if lit is None else "dim")
        for name, box in FAMILY.items()
    }
    arrows = [arrow._replace(color="grey") for arrow in DESCENT]
    return draw(boxes, arrows)
