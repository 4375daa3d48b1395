"""CartPole without its velocities: what is seen at one moment does not say where things are going.

    CartPole shows   position · velocity of the cart · angle · angular velocity of the pole
    this shows       position ·                        angle ·

The dynamics, the rewards and the time limit of 500 steps are CartPole-v1's. Two positions in a row
give the velocity back, so an agent with memory loses nothing; one without it cannot tell a pole
that rises from one that falls. A standard test of recurrent agents (Wierstra et al., 2007, "Solving
deep memory POMDPs with recurrent policy gradients").
"""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv
from gymnasium.vector.utils import batch_space

SEEN = [0, 2]
"""Position and angle, among CartPole's four."""


def _seen_of(space: gym.Space) -> gym.spaces.Box:
    assert isinstance(space, gym.spaces.Box)
    return gym.spaces.Box(space.low[SEEN], space.high[SEEN], dtype=np.float32)


class MaskedCartPoleVectorEnv(CartPoleVectorEnv):
    """B copies: observations `[B, 2]` float32 (position, angle), actions 0 left and 1 right.

    Args:
        num_envs: B.
        options: of Gymnasium's `CartPoleVectorEnv`.
    """

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        super().__init__(num_envs, **options)
        self.single_observation_space = _seen_of(self.single_observation_space)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every copy."""
        observation, info = super().reset(seed=seed, options=options)
        return observation[:, SEEN], info

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step; NEXT_STEP autoreset."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation[:, SEEN], reward, terminated, truncated, info


class MaskedCartPoleEnv(CartPoleEnv):
    """One copy, `rlbook/MaskedCartPole-v0`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.observation_space = _seen_of(self.observation_space)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode."""
        observation, info = super().reset(seed=seed, options=options)
        return observation[SEEN], info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step."""
        observation, reward, terminated, truncated, info = super().step(action)
        return observation[SEEN], reward, terminated, truncated, info
