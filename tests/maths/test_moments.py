"""Moments: of parts merged against the whole, in any order; where plain sums lose their digits."""

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbook.maths.moments import Moments, merge_moments, moments


def close(found: Moments, rows: np.ndarray, **tolerance) -> bool:
    count = np.full(rows.shape[1:], len(rows))
    mean = rows.mean(0) if len(rows) else np.zeros(rows.shape[1:])
    squares = ((rows - mean) ** 2).sum(0)
    return all(
        np.allclose(mine, theirs, **tolerance)
        for mine, theirs in zip(found, (count, mean, squares), strict=True)
    )


@given(st.lists(st.integers(0, 7), min_size=1, max_size=6), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_of_parts_merged_is_of_the_whole(sizes, seed):
    rng = np.random.default_rng(seed)
    rows = rng.normal(3.0, 2.0, size=(sum(sizes), 2))
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    found = [moments(torch.from_numpy(part)) for part in parts]
    whole = reduce(merge_moments, found)
    assert close(whole, rows) and close(moments(torch.from_numpy(rows)), rows)
    turned = reduce(merge_moments, reversed(found))
    assert all(torch.allclose(a, b) for a, b in zip(whole, turned, strict=True))
    if len(rows):
        assert np.allclose(whole.variance, rows.var(0))


def test_by_hand():
    found = merge_moments(moments(torch.tensor([1.0, 3.0])), moments(torch.tensor([8.0])))
    assert found == (3.0, (1 + 3 + 8) / 3, (1 - 4) ** 2 + (3 - 4) ** 2 + (8 - 4) ** 2)


def test_nothing_merged_changes_no_bit():
    some, none = moments(torch.rand(5) / 3), moments(torch.zeros(0))
    assert none == (0.0, 0.0, 0.0) and none.variance == 0.0
    assert merge_moments(some, none) == some == merge_moments(none, some)


def test_a_large_mean_costs_no_digits():
    """Σx²/n − mean² would be wrong by more than the variance itself."""
    rows = 1e9 + np.array([4.0, 7.0, 13.0, 16.0])
    found = merge_moments(moments(torch.from_numpy(rows[:2])), moments(torch.from_numpy(rows[2:])))
    assert found.variance.item() == pytest.approx(22.5)
    assert abs((rows**2).sum() / 4 - rows.mean() ** 2 - 22.5) > 22.5


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="b_mean has shape"):
        merge_moments(moments(torch.rand(3, 2)), moments(torch.rand(3)))
