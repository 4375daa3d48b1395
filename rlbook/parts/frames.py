"""Stacks of frames, told once: of a row of k planes only the newest is new.

    row t        x_{t-3} x_{t-2} x_{t-1} x_t           [k, H, W], here k = 4
    row t + 1            x_{t-2} x_{t-1} x_t x_{t+1}
    an unroll    x_{-3} x_{-2} x_{-1} │ x_0 x_1 … x_T  k − 1 older planes of row 0, then one a row

So T + k frames say what T + 1 rows of k planes say, in about 1/k of the bytes, exactly: where an
episode begins, all older planes are zeros. That this holds of Atari, `tests/parts/test_atari.py`
asks the emulator. Seed RL (Espeholt et al., 2020) stacks its frames at the learner as well.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # a replay memory of frames needs nothing of it
    from torch import Tensor


def packed(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The frames of an unroll: `[R + k − 1, B, H, W]`.

    Args:
        rows: R observations `[B, k, H, W]` that follow each other; of an episode's first one all
            but the last plane are zeros.
    """
    older, newest = rows[0][:, :-1], [row[:, -1] for row in rows]
    return np.concatenate([older.swapaxes(0, 1), np.stack(newest)])


def restacked(frames: "Tensor", first: np.ndarray) -> "Tensor":
    """The rows `[R, B, k, H, W]` that `packed` was given, on the device of the frames.

    Args:
        frames: `[R + k − 1, B, H, W]`.
        first: `[R, B]` bool on the host: the rows with which an episode begins.
    """
    import torch

    from rlbook.parts.on_device import there

    count = len(first)
    planes = len(frames) - count + 1
    rows = torch.stack([frames[age : age + count] for age in range(planes)], 2)
    hidden = before_an_episode(first, planes)
    if hidden.any():
        where = [there(index, frames.device) for index in np.nonzero(hidden)]
        rows[tuple(where)] = 0
    return rows


def before_an_episode(first: np.ndarray, planes: int) -> np.ndarray:
    """`[R, B, k]` bool: the planes of each row that are from before its episode began."""
    resets = np.cumsum(first, 0)
    hidden = np.zeros((*first.shape, planes), bool)
    for age in range(1, planes):  # plane k − 1 − age of row t was the newest of row t − age
        hidden[age:, :, planes - 1 - age] = resets[age:] > resets[:-age]
        hidden[:age, :, planes - 1 - age] = resets[:age] > 0
    return hidden
