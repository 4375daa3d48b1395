"""Catch: a ball falls, a paddle moves; tiny pixels, learnt in seconds.

    . . o . .      o  the ball falls one row a step, from a random column of the top row
    . . . . .      =  the paddle in the bottom row moves left, stays, or moves right
    . . . . .
    . = . . .      reward +1 if the ball lands on the paddle, −1 if not; then the episode terminates

After a game of Mnih et al. (2014), "Recurrent Models of Visual Attention", in the small form that
bsuite gave it (Osband et al., 2020, `catch`). An episode lasts `rows − 1` steps. The best return is
+1; a random policy gets −0.6 on average on five columns.
"""

from typing import Any

import gymnasium as gym
import numpy as np

from rlbook.parts.tiny import SingleEnv, TinyVectorEnv


class CatchVectorEnv(TinyVectorEnv):
    """B games of Catch.

    Observations `[B, 1, rows, columns]` float32 of 0 and 1; actions 0 left, 1 stay, 2 right.
    """

    def __init__(
        self, num_envs: int = 1, rows: int = 10, columns: int = 5, render_mode: str | None = None
    ) -> None:
        if rows < 2 or columns < 2:
            raise ValueError(f"rows and columns must be at least 2, got {rows} × {columns}")
        space = gym.spaces.Box(0.0, 1.0, (1, rows, columns), np.float32)
        super().__init__(num_envs, space, gym.spaces.Discrete(3), render_mode)
        self.rows, self.columns = rows, columns
        self.index = np.arange(num_envs)
        self.ball_row = np.zeros(num_envs, dtype=np.int64)
        self.ball_column = np.zeros(num_envs, dtype=np.int64)
        self.paddle = np.zeros(num_envs, dtype=np.int64)

    def _begin(self, which: np.ndarray) -> None:
        self.ball_row[which] = 0
        self.ball_column[which] = self.np_random.integers(self.columns, size=int(which.sum()))
        self.paddle[which] = self.columns // 2

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.paddle = np.clip(self.paddle + action - 1, 0, self.columns - 1)
        self.ball_row = np.minimum(self.ball_row + 1, self.rows - 1)
        landed = self.ball_row == self.rows - 1
        caught = np.where(self.paddle == self.ball_column, np.float32(1), np.float32(-1))
        return np.where(landed, caught, np.float32(0)), landed

    def _observe(self) -> np.ndarray:
        board = np.zeros((self.num_envs, 1, self.rows, self.columns), dtype=np.float32)
        board[self.index, 0, self.ball_row, self.ball_column] = 1.0
        board[self.index, 0, self.rows - 1, self.paddle] = 1.0
        return board

    def _draw(self, index: int) -> np.ndarray:
        image = np.full((self.rows, self.columns, 3), 245, dtype=np.uint8)
        image[self.ball_row[index], self.ball_column[index]] = (213, 94, 0)
        image[self.rows - 1, self.paddle[index]] = (0, 114, 178)
        return image.repeat(24, axis=0).repeat(24, axis=1)


class CatchEnv(SingleEnv):
    """One game of Catch, `rlbook/Catch-v0`."""

    vector_type: Any = CatchVectorEnv
