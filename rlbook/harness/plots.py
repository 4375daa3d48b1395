"""Figures in one style: colours that all can tell apart, readable on light and dark pages.

Curves over seeds show the interquartile mean with a bootstrap interval (Agarwal et al., 2021, "Deep
reinforcement learning at the edge of the statistical precipice").
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

COLORS = {
    "blue": "#0072B2",
    "orange": "#D55E00",
    "green": "#009E73",
    "purple": "#9467BD",
    "sky": "#56B4E9",
    "yellow": "#E69F00",
    "pink": "#CC79A7",
    "grey": "#7F7F7F",
    "ink": "#22303C",
    "paper": "#FFFFFF",
}
"""The palette of Okabe and Ito, and the book's ink and paper."""

CYCLE = [
    COLORS[name] for name in ("blue", "orange", "green", "pink", "sky", "yellow", "purple", "grey")
]

LABELS = {
    "env_steps": "environment steps",
    "wall_time_s": "seconds of training",
    "episode_return_mean": "mean return of recent episodes",
    "learner_steps": "updates",
    "entropy": "entropy (nats)",
    "value_loss": "value loss",
    "policy_loss": "policy loss",
}


def use_style() -> None:
    """Makes matplotlib draw in the book's style from here on; in a notebook, with twice the pixels
    each way, for screens that have them, unless the reader chose another format.
    """
    shell: Any = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if hasattr(shell, "kernel"):
        from matplotlib_inline.config import InlineBackend

        backend = InlineBackend.instance(parent=shell)
        if backend.figure_formats == {"png"}:
            backend.figure_formats = {"retina"}
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 110,
            "savefig.dpi": 160,
            "savefig.bbox": "tight",
            "figure.facecolor": COLORS["paper"],
            "axes.facecolor": COLORS["paper"],
            "savefig.facecolor": COLORS["paper"],
            "axes.prop_cycle": cycler(color=CYCLE),
            "axes.edgecolor": COLORS["ink"],
            "axes.labelcolor": COLORS["ink"],
            "axes.titlecolor": COLORS["ink"],
            "text.color": COLORS["ink"],
            "xtick.color": COLORS["ink"],
            "ytick.color": COLORS["ink"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
            "axes.titleweight": "bold",
            "axes.titlepad": 10,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#D9DEE3",
            "grid.linewidth": 0.7,
            "lines.linewidth": 2.0,
            "legend.frameon": False,
            "font.family": "DejaVu Sans",
            "font.size": 10,
            "figure.constrained_layout.use": True,
            "svg.hashsalt": "rlbook",
        }
    )


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half over axis 0, `[seeds, points]` → `[points]`; ends weighted."""
    ordered = np.sort(values, axis=0)
    seeds = len(ordered)
    edges = np.arange(seeds + 1) / seeds
    weight = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0.0, None)
    return (weight[:, None] * ordered.reshape(seeds, -1)).sum(0).reshape(
        ordered.shape[1:]
    ) / weight.sum()


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, samples: int = 500, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of the interquartile mean over resampled seeds.

    `[seeds, points]` → low and high, `[points]` each.
    """
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(values), size=(samples, len(values)))
    means = np.stack([interquartile_mean(values[draw]) for draw in draws])
    tail = 50.0 * (1.0 - level)
    return np.percentile(means, tail, axis=0), np.percentile(means, 100.0 - tail, axis=0)


def on_grid(
    curves: Sequence[Mapping[str, np.ndarray]], x: str, y: str, points: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """Curves of several seeds at common places: (grid `[points]`, values `[seeds, points]`).

    The grid ends where the longest run ends; a run that stopped earlier (solved) keeps its last
    value.
    """
    kept = [(c[x][~np.isnan(c[y])], c[y][~np.isnan(c[y])]) for c in curves]
    kept = [(at, value) for at, value in kept if len(at)]
    if not kept:
        raise ValueError(f"no run has any value of {y!r}")
    grid = np.linspace(max(at[0] for at, _ in kept), max(at[-1] for at, _ in kept), points)
    return grid, np.stack([np.interp(grid, at, value) for at, value in kept])


def learning_curves(
    runs: Mapping[str, Sequence[Any]],
    *,
    x: str = "env_steps",
    y: str = "episode_return_mean",
    ax: Axes | None = None,
    title: str | None = None,
    goal: float | None = None,
    colors: Mapping[str, str] | None = None,
) -> Figure:
    """Interquartile mean over seeds with its 95 % bootstrap interval, one line a label.

    Args:
        runs: label → results (anything with `.curves`), one a seed.
        x: "env_steps" or "wall_time_s".
        y: a metric.
        ax: where to draw; a new figure by default.
        title: what the figure shows.
        goal: a dashed line at this value.
        colors: label → a name in `COLORS`, or any colour of matplotlib's; the cycle's by default.

    Raises:
        ValueError: a metric that no run has.
    """
    if ax is None:
        use_style()
        ax = plt.subplots()[1]
    for label, results in runs.items():
        if any(y not in result.curves or x not in result.curves for result in results):
            known = sorted(results[0].curves)
            raise ValueError(f"{label} has no metric {y!r} over {x!r}; it has {', '.join(known)}")
        grid, values = on_grid([result.curves for result in results], x, y)
        mine = (colors or {}).get(label)
        color = None if mine is None else COLORS.get(mine, mine)
        name = label.replace("_", " ")
        (line,) = ax.plot(grid, interquartile_mean(values), label=name, color=color)
        if len(values) > 1:
            low, high = bootstrap_interval(values)
            ax.fill_between(grid, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if goal is not None:
        ax.axhline(goal, color=COLORS["grey"], linestyle="--", linewidth=1.2)
    if x.endswith("_steps"):
        ax.xaxis.set_major_formatter(EngFormatter(sep=" "))
    ax.set_xlabel(LABELS.get(x, x))
    ax.set_ylabel(LABELS.get(y, y.replace("_", " ")))
    if title:
        ax.set_title(title)
    if len(runs) > 1:
        ax.legend()
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure
