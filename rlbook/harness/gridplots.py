"""Pictures of tables: values as colours, policies as arrows, laid out on the map they belong to."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from rlbook.harness.plots import COLORS, use_style
from rlbook.parts.gridworld import MOVES, GridMap
from rlbook.parts.tabular import Floats, Ints


def draw_values(
    grid: GridMap,
    values: Floats | None = None,
    policy: Ints | None = None,
    *,
    title: str | None = None,
    ax: Axes | None = None,
    limits: tuple[float, float] | None = None,
    digits: int | None = 2,
) -> Axes:
    """A map with its values ``[S]`` as colours and numbers, and a policy ``[S]`` as arrows.

    ``limits`` fixes the range of the colours, so that several maps can be compared. ``digits``:
    decimals of the numbers, None for no numbers. Without ``values`` the states' numbers are shown.
    """
    if ax is None:
        use_style()
        height, width = grid.cells.shape
        _, ax = plt.subplots(figsize=(max(0.8 * width + 0.4, 5.0), 0.8 * height + 0.6))
    shown = grid.to_grid(np.zeros(len(grid.positions)) if values is None else values)
    low, high = limits or (np.nanmin(shown), np.nanmax(shown) + 1e-12)
    colours = plt.get_cmap("cividis" if values is not None else ListedColormap(["#E5EAF0"])).copy()
    colours.set_bad("white")
    ax.imshow(shown, cmap=colours, vmin=low, vmax=high)
    for row, column in np.argwhere(np.isnan(shown)):  # walls: a hatch that no value looks like
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fc="#E3E6EA", ec="#8A939D", hatch="////"))
    ax.set_xticks(np.arange(-0.5, shown.shape[1]), [])
    ax.set_yticks(np.arange(-0.5, shown.shape[0]), [])
    ax.grid(color="white", linewidth=1)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for state, (row, column) in enumerate(grid.positions):
        bright = values is None or shown[row, column] > low + 0.55 * (high - low)
        _fill_cell(grid, ax, state, (row, column), values, policy, digits, bright)
    if title:
        ax.set_title(title)
    return ax


def _fill_cell(
    grid: GridMap,
    ax: Axes,
    state: int,
    place: tuple[int, int],
    values: Floats | None,
    policy: Ints | None,
    digits: int | None,
    bright: bool,
) -> None:
    """The letter, number and arrow of one cell."""
    row, column = place
    ink = COLORS["ink"] if bright else "white"
    letter = str(grid.letters[state])
    if letter in "GP":
        name = "goal" if letter == "G" else "pit"
        colour = COLORS["green" if letter == "G" else "orange"]
        corner = (column - 0.5, row - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white"))
        ax.text(column, row, name, ha="center", va="center", color="white", fontsize=9)
        return
    text = f"{state}" if values is None else f"{values[state]:.{digits or 0}f}"
    if values is None or digits is not None:
        y = row - 0.3 if policy is not None else row
        ax.text(column, y, text, ha="center", va="center", color=ink, fontsize=8)
    if policy is not None:
        down, right = MOVES[policy[state]] * 0.28
        start = (column - right, row - down + 0.1)
        arrow = {"arrowstyle": "-|>", "color": ink, "linewidth": 1.4}
        ax.annotate("", (column + right, row + down + 0.1), start, arrowprops=arrow)
