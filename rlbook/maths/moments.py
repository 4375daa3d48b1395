"""Mean and variance of numbers that lie in several places, as if they lay in one.

Each place sums up its own numbers as (rows, mean, sum of squared deviations). Two such summaries
make one, exactly (Chan, Golub and LeVeque, 1979, "Updating formulae and a pairwise algorithm for
computing sample variances", equations 1.5):

    n = n_a + n_b        d = mean_b − mean_a
    mean = mean_a + d n_b / n
    M2 = M2_a + M2_b + d² n_a n_b / n

The plain sums Σx and Σx² would do on paper. In floating point Σx²/n − mean² loses all digits where
the mean is large against the deviation; here nothing of the kind is subtracted.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlbook.maths.checks import check_floats


class Moments(NamedTuple):
    """A summary of n numbers, or of n rows element by element: float64 `[...]` each."""

    rows: Tensor
    """n; 0 where there was none."""
    mean: Tensor
    squares: Tensor
    """Σ (x − mean)², M2 above."""

    @property
    def variance(self) -> Tensor:
        """Σ (x − mean)² / n; 0 where there was none."""
        return self.squares / self.rows.clamp(min=1)


@torch.no_grad()
def moments(x: Tensor) -> Moments:
    """Of `x` `[N, ...]` over its first axis: `[...]`; N may be 0. Sums are made in x's dtype."""
    check_floats(x=x)
    rows = torch.full(x.shape[1:], float(len(x)), dtype=torch.float64)
    divisor = max(len(x), 1)
    squares = (x - x.sum(0) / divisor).square().sum(0)
    return Moments(rows, x.sum(0).double() / divisor, squares.double())


@torch.no_grad()
def merge_moments(a: Moments, b: Moments) -> Moments:
    """Of all numbers of `a` and `b` together; ValueError if shapes or dtypes differ."""
    check_floats(a_mean=a.mean, b_mean=b.mean, a_rows=a.rows, b_rows=b.rows)
    rows = a.rows + b.rows
    share = b.rows / rows.clamp(min=1)
    distance = b.mean - a.mean
    squares = a.squares + b.squares + distance.square() * a.rows * share
    return Moments(rows, a.mean + distance * share, squares)
