"""Costly: CartPole whose step takes a millisecond of a core, as emulators and simulators do.

CartPole itself steps in a microsecond or less, so what is measured with it is everything else. Here
the environment is what costs, and the question is how much of a core's time a system leaves to it.

The millisecond is work, not sleep: the step turns in a loop until its thread has *used* that much
time of a core. On a core that others want too it takes longer, as real work would; a wait by the
wall's clock would be over all the same, and make any number of environments fit on one core.
"""

import time
from typing import Any

import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv


def burn(seconds: float) -> None:
    """Uses so much time of a core (0 or less: none)."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


class CostlyEnv(CartPoleEnv):
    """One CartPole; a step costs `step_ms` milliseconds of a core, a reset nothing.

    Args:
        step_ms: 0 or more.
        options: CartPole's.

    Raises:
        ValueError: step_ms below 0.
    """

    def __init__(self, step_ms: float = 1.0, **options: Any) -> None:
        super().__init__(**options)
        self.step_ms = checked(step_ms)

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """CartPole's, after the work."""
        burn(self.step_ms / 1e3)
        return super().step(action)


class CostlyVectorEnv(CartPoleVectorEnv):
    """B copies, one after the other: a step costs `step_ms` milliseconds for each that is not reset
    in it.

    Args:
        num_envs: B.
        step_ms: 0 or more.
        options: CartPole's.

    Raises:
        ValueError: step_ms below 0.
    """

    def __init__(self, num_envs: int = 1, step_ms: float = 1.0, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.step_ms = checked(step_ms)

    def step(self, action: np.ndarray) -> tuple[Any, ...]:
        """CartPole's, after the work."""
        burn(int(np.count_nonzero(~self.prev_done)) * self.step_ms / 1e3)
        return super().step(action)


def checked(step_ms: float) -> float:
    """The milliseconds; ValueError if they are below 0."""
    if not step_ms >= 0:
        raise ValueError(f"step_ms must be at least 0, got {step_ms}")
    return step_ms
