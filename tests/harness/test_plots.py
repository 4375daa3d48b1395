"""The statistics under the curves, by hand; the curves themselves."""

from types import SimpleNamespace

import numpy as np
import pytest

from rlbook.harness.plots import (
    COLORS,
    CYCLE,
    bootstrap_interval,
    interquartile_mean,
    learning_curves,
    on_grid,
)


def naive_iqm(values: list[float]) -> float:
    """Each value four times in a sorted row; the first and last quarter of the row fall away."""
    row = sorted(values * 4)
    kept = row[len(values) : 3 * len(values)]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 5, 8, 10, 11])
def test_the_interquartile_mean_by_plain_arithmetic(seeds):
    values = np.random.default_rng(seeds).normal(size=(seeds, 3)) ** 3
    expected = [naive_iqm(column.tolist()) for column in values.T]
    assert np.allclose(interquartile_mean(values), expected)


def test_outliers_do_not_move_the_interquartile_mean():
    assert interquartile_mean(np.array([[0.0], [1.0], [2.0], [1e9]])) == (1.0 + 2.0) / 2
    assert interquartile_mean(np.array([[7.0]])) == 7.0


def test_the_bootstrap_covers_what_it_should():
    """Of many samples of one distribution, about 95 % of the intervals hold its centre."""
    rng, inside = np.random.default_rng(0), 0
    for trial in range(150):
        low, high = bootstrap_interval(rng.normal(size=(15, 1)), samples=200, seed=trial)
        assert low <= high
        inside += bool(low[0] <= 0.0 <= high[0])
    assert 0.85 <= inside / 150 <= 0.99


def test_more_confidence_is_wider_and_equal_seeds_have_no_width():
    values = np.random.default_rng(1).normal(size=(8, 4))
    (low, high), (low50, high50) = (bootstrap_interval(values, level=p) for p in (0.95, 0.5))
    assert (low < low50).all() and (high50 < high).all()
    low, high = bootstrap_interval(np.ones((5, 2)))
    assert (low == 1).all() and (high == 1).all()


def curve(steps: list[float], returns: list[float]) -> dict[str, np.ndarray]:
    return {"env_steps": np.array(steps), "episode_return_mean": np.array(returns)}


def test_seeds_meet_on_one_grid_and_a_solved_one_keeps_its_value():
    curves = [curve([0, 10], [0, 10]), curve([0, 20], [np.nan, 5]), curve([5, 20], [5, 20])]
    grid, values = on_grid(curves, "env_steps", "episode_return_mean", points=1 + 20)
    assert grid[0] == 20 and grid[-1] == 20  # the second has a single value, at 20
    curves[1] = curve([0, 20], [5, 5])
    grid, values = on_grid(curves, "env_steps", "episode_return_mean", points=1 + 15)
    assert grid.tolist() == list(range(5, 21))
    assert values[0].tolist() == [5, 6, 7, 8, 9, *[10] * 11]
    assert values[1].tolist() == [5] * 16 and values[2].tolist() == list(range(5, 21))
    with pytest.raises(ValueError, match="'loss'"):
        on_grid([{"env_steps": np.arange(2), "loss": np.full(2, np.nan)}], "env_steps", "loss")


def test_learning_curves_draw_the_mean_and_the_band():
    import matplotlib.pyplot as plt

    results = [SimpleNamespace(curves=curve([0, 10], [0, k])) for k in (10, 20, 30)]
    figure = learning_curves({"three": results, "one": results[:1]}, goal=15.0)
    (axes,) = figure.axes
    assert axes.lines[0].get_ydata()[-1] == naive_iqm([10, 20, 30])
    assert len(axes.collections) == 1, "a band for three seeds, none for one"
    assert axes.lines[2].get_ydata()[0] == 15.0
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["three", "one"]
    plt.close(figure)


def test_a_label_keeps_its_colour_from_figure_to_figure():
    import matplotlib.pyplot as plt
    from matplotlib.colors import to_hex

    results = [SimpleNamespace(curves=curve([0, 10], [0, k])) for k in (10, 20, 30)]
    runs = {"a": results[:1], "b": results[:1], "c": results}
    (axes,) = learning_curves(runs, colors={"c": "green", "b": "#123456"}).axes
    assert [line.get_color() for line in axes.lines] == [CYCLE[0], "#123456", COLORS["green"]]
    assert to_hex(axes.collections[0].get_facecolor()[0]) == COLORS["green"].lower()
    plt.close("all")


def test_an_unknown_metric_is_refused_with_the_known_ones():
    result = SimpleNamespace(curves=curve([0], [0]))
    with pytest.raises(ValueError, match="no metric 'profit'.*episode_return_mean"):
        learning_curves({"a": [result]}, y="profit")
