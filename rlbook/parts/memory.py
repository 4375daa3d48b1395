"""Memory: a cue is shown once and asked for much later; without memory no policy beats a coin.

    step         0      1     2    …   delay
    cue         ±1      0     0          0       seen at the first step alone
    question     0      0     0          1       now the action must name the cue
    reward       0      0     0         ±1       +1 if action = (cue > 0), else −1; then the end

A policy that sees the present observation alone sees the same thing at the question whatever the
cue was, so its expected return is exactly 0; with memory it is 1. Actions before the question
change nothing.
"""

from typing import Any

import gymnasium as gym
import numpy as np

from rlbook.parts.tiny import SingleEnv, TinyVectorEnv


class MemoryVectorEnv(TinyVectorEnv):
    """B games of Memory: observations `[B, 2]` float32 (cue, question), actions 0 and 1.

    Args:
        num_envs: B.
        delay: steps between the cue and the question (an episode lasts delay + 1 steps).
        render_mode: None or "rgb_array".
    """

    def __init__(self, num_envs: int = 1, delay: int = 8, render_mode: str | None = None) -> None:
        if delay < 1:
            raise ValueError(f"delay must be at least 1, got {delay}")
        space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        super().__init__(num_envs, space, gym.spaces.Discrete(2), render_mode)
        self.delay = delay
        self.time = np.zeros(num_envs, dtype=np.int64)
        self.cue = np.ones(num_envs, dtype=np.float32)

    def _begin(self, which: np.ndarray) -> None:
        self.time[which] = 0
        self.cue[which] = 2 * self.np_random.integers(2, size=int(which.sum())) - 1

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        asked = self.time >= self.delay
        right = (action == 1) == (self.cue > 0)
        self.time = self.time + 1
        return np.where(asked, np.where(right, 1, -1), 0).astype(np.float32), asked

    def _observe(self) -> np.ndarray:
        cue = np.where(self.time == 0, self.cue, np.float32(0))
        return np.stack([cue, (self.time == self.delay).astype(np.float32)], axis=1)

    def _draw(self, index: int) -> np.ndarray:
        image = np.full((48, 96, 3), 245, dtype=np.uint8)
        cue, question = self._observe()[index]
        if cue:
            image[8:40, 8:40] = (213, 94, 0) if cue > 0 else (0, 114, 178)
        if question:
            image[8:40, 56:88] = (0, 158, 115)
        return image


class MemoryEnv(SingleEnv):
    """One game of Memory, `rlbook/Memory-v0`."""

    vector_type: Any = MemoryVectorEnv
