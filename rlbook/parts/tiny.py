"""Small environments written once, as vectors: all B copies step in a few numpy calls.

A subclass says how episodes begin (`_begin`), what a step does (`_advance`) and what is seen
(`_observe`); this base adds Gymnasium's NEXT_STEP autoreset, and `SingleEnv` shows the same
dynamics as an ordinary one-copy environment, so that `gymnasium.make` and `gymnasium.make_vec` give
the same episodes.
"""

from abc import abstractmethod
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space


class TinyVectorEnv(gym.vector.VectorEnv):
    """B copies of one small environment.

    Args:
        num_envs: B.
        observation_space: of one copy.
        action_space: of one copy.
        render_mode: None or "rgb_array".
    """

    metadata: dict[str, Any] = {
        "autoreset_mode": AutoresetMode.NEXT_STEP,
        "render_modes": ["rgb_array"],
        "render_fps": 8,
    }

    def __init__(
        self,
        num_envs: int,
        observation_space: gym.Space,
        action_space: gym.Space,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.ended = np.zeros(num_envs, dtype=bool)

    @abstractmethod
    def _begin(self, which: np.ndarray) -> None:
        """Starts new episodes in the copies where `which` (`[B]` bool) is True."""

    @abstractmethod
    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One step of every copy: returns reward `[B]` float32 and terminated `[B]` bool."""

    @abstractmethod
    def _observe(self) -> np.ndarray:
        """The observations `[B, ...]`, newly allocated."""

    @abstractmethod
    def _draw(self, index: int) -> np.ndarray:
        """Copy `index` as an RGB image `[height, width, 3]` uint8."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every copy."""
        super().reset(seed=seed)
        self.ended = np.zeros(self.num_envs, dtype=bool)
        self._begin(np.ones(self.num_envs, dtype=bool))
        return self._observe(), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step; copies whose episode ended one step ago are reset instead, with reward 0."""
        restarted = self.ended
        reward, terminated = self._advance(np.asarray(action))
        if restarted.any():
            self._begin(restarted)
            reward = np.where(restarted, np.float32(0), reward)
            terminated = terminated & ~restarted
        self.ended = terminated
        return self._observe(), reward, terminated, np.zeros(self.num_envs, dtype=bool), {}

    def render(self) -> tuple[np.ndarray, ...]:
        """One RGB image for each copy."""
        return tuple(self._draw(index) for index in range(self.num_envs))


class SingleEnv(gym.Env):
    """One copy of a `TinyVectorEnv` as an ordinary Gymnasium environment (no autoreset)."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 8}
    vector_type: type[TinyVectorEnv]

    def __init__(self, render_mode: str | None = None, **options: Any) -> None:
        self.copy = self.vector_type(num_envs=1, render_mode=render_mode, **options)
        self.render_mode = render_mode
        self.observation_space = self.copy.single_observation_space
        self.action_space = self.copy.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode."""
        super().reset(seed=seed)
        observation, info = self.copy.reset(seed=seed, options=options)
        return observation[0], info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step."""
        reward, terminated = self.copy._advance(np.asarray([action]))
        return self.copy._observe()[0], float(reward[0]), bool(terminated[0]), False, {}

    def render(self) -> np.ndarray:
        """The environment as an RGB image."""
        return self.copy._draw(0)
