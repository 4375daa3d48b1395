"""One step of an optimiser on a vector, as a function of what it remembers.

An optimiser that keeps its statistics where several processes share them cannot own them: these
functions get the statistics and return new ones. Each moves parameters by −scale · along / root,
elementwise.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlbook.maths.checks import check_floats, check_number


class Move(NamedTuple):
    """Where parameters go, and what is remembered."""

    statistics: Tensor
    """`[S, P]`, updated."""
    along: Tensor
    """`[P]`."""
    root: Tensor
    """`[P]`, positive."""
    scale: float
    """Parameters move by −scale · along / root."""


@torch.no_grad()
def rmsprop_move(
    *,
    statistics: Tensor,
    gradient: Tensor,
    learning_rate: float,
    decay: float = 0.99,
    epsilon: float = 0.1,
) -> Move:
    """g ← α g + (1 − α) d²; θ moves by −η d / √(g + ε) (Mnih et al., 2016, equations 8 and 9).

    ε is inside the root, unlike in PyTorch's `RMSprop`.

    Args:
        statistics: `[S, P]`, of which row 0 is g; zeros before the first step. Others stay.
        gradient: `[P]`, d.
        learning_rate: η.
        decay: α in [0, 1].
        epsilon: ε > 0.

    Raises:
        ValueError: shapes or dtypes differ, or a number is out of range.
    """
    check_number("decay", decay, least=0.0, most=1.0)
    check_number("epsilon", epsilon, least=0.0, open_left=True)
    check_floats(**{"row of statistics": statistics[0]}, gradient=gradient)
    statistics = statistics.clone()
    square = statistics[0].mul_(decay).addcmul_(gradient, gradient, value=1 - decay)
    return Move(statistics, gradient, square.add(epsilon).sqrt_(), learning_rate)


@torch.no_grad()
def adam_move(
    *,
    statistics: Tensor,
    gradient: Tensor,
    learning_rate: float,
    step: int,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
) -> Move:
    """m and v of Adam, both corrected for their start at 0 (Kingma & Ba, 2015, algorithm 1).

    Args:
        statistics: `[2, P]`, v and m; zeros before the first step.
        gradient: `[P]`.
        learning_rate: α in their paper.
        step: t ≥ 1, how many gradients are in m and v, this one included.
        beta_1: decay of m.
        beta_2: decay of v.
        epsilon: added outside the root.

    Raises:
        ValueError: shapes or dtypes differ, or a number is out of range.
    """
    check_number("step", step, least=1)
    check_floats(**{"row of statistics": statistics[0]}, gradient=gradient)
    statistics = statistics.clone()
    square, mean = statistics
    mean.lerp_(gradient, 1 - beta_1)
    square.mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
    root = (square.sqrt() / (1 - beta_2**step) ** 0.5).add_(epsilon)
    return Move(statistics, mean, root, learning_rate / (1 - beta_1**step))
