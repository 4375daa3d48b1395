"""How much to explore: schedules over time for one actor, a ladder over actors for many."""

import numpy as np
from numpy.typing import NDArray


def linear_schedule(step: int, *, start: float, end: float, steps: int) -> float:
    """From `start` at step 0 along a straight line to `end` at `steps`, and `end` ever after.

    Mnih et al., Nature 518 (2015): ε from 1 to 0.1 over the first million steps (which
    the paper calls frames).

    Raises:
        ValueError: step < 0 or steps < 1.
    """
    return start + (end - start) * _progress(step, steps)


def exponential_schedule(step: int, *, start: float, end: float, steps: int) -> float:
    """From `start` to `end` by one *factor* a step: start (end/start)^(step/steps), then `end`.

    Raises:
        ValueError: step < 0, steps < 1, or start or end is not positive.
    """
    if not (start > 0 and end > 0):
        raise ValueError(f"start and end must be positive, not {start} and {end}")
    return float(start * (end / start) ** _progress(step, steps))


def epsilon_ladder(
    num_actors: int, *, base: float = 0.4, alpha: float = 7.0
) -> NDArray[np.float64]:
    """ε_i = base^(1 + α i/(N-1)) for actor i of N (Ape-X, Horgan et al., arXiv:1803.00933).

    Each actor keeps its ε for the whole run, so that there are always actors that explore and
    actors that nearly follow the greedy policy. One actor alone gets `base`.

    Returns:
        float64 `[num_actors]`, the most exploring first.

    Raises:
        ValueError: num_actors < 1, base outside [0, 1], or alpha < 0.
    """
    if num_actors < 1:
        raise ValueError(f"num_actors must be at least 1, not {num_actors}")
    if not 0.0 <= base <= 1.0:
        raise ValueError(f"base must be a probability in [0, 1], not {base}")
    if not alpha >= 0.0:
        raise ValueError(f"alpha must be at least 0, not {alpha}")
    position = np.arange(num_actors) / max(1, num_actors - 1)
    return np.asarray(base ** (1.0 + alpha * position), dtype=np.float64)


def _progress(step: int, steps: int) -> float:
    if step < 0 or steps < 1:
        raise ValueError(f"step must be >= 0 and steps >= 1, not {step} and {steps}")
    return min(1.0, step / steps)
