"""An environment and a network that only count: any mix-up shows as unequal integers."""

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from rlbook.parts.envs import make_envs

TERMINATES, TRUNCATES = 5, 3
"""Steps of an episode that ends by itself, and of one that is cut."""


class CounterEnv(gym.Env):
    """Observation (copy, episode, step); reward 100 · copy + 10 · episode + step of arrival.

    Even episodes terminate after 5 steps, odd ones are truncated after 3.
    """

    observation_space = gym.spaces.Box(0, 1e6, (3,), np.float32)
    action_space = gym.spaces.Discrete(10)
    copies = 0

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.copy, self.episode, self.time = CounterEnv.copies, -1, 0
        self.lengths = (TERMINATES, TRUNCATES)
        self.actions: list[int] = []
        CounterEnv.copies += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self._seen(), {}

    def step(self, action):
        self.time += 1
        self.actions.append(int(action))
        even = self.episode % 2 == 0
        terminated = even and self.time == self.lengths[0]
        truncated = not even and self.time == self.lengths[1]
        reward = 100.0 * self.copy + 10.0 * self.episode + self.time
        return self._seen(), reward, terminated, truncated, {}

    def _seen(self):
        return np.array([self.copy, self.episode, self.time], np.float32)


class ContinuousEnv(CounterEnv):
    """The same with a continuous action."""

    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)


class FramesEnv(gym.Env):
    """Stacks of four frames [4, 2, 3], each frame unlike all others; the older ones of an episode's
    first are zeros. Episodes of 5, 3, 1 and 9 steps in turn, of which every second is cut.
    """

    observation_space = gym.spaces.Box(0, 2, (4, 2, 3), np.float32)
    action_space = gym.spaces.Discrete(2)
    lengths = (TERMINATES, TRUNCATES, 1, 9)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.copy, self.episode, self.time = -1, -1, 0
        self.stack = np.zeros((4, 2, 3), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.copy < 0:
            self.copy = int(self.np_random.integers(1 << 30))
        self.episode, self.time = self.episode + 1, 0
        self.stack = np.zeros_like(self.stack)
        return self._seen(), {}

    def step(self, action):
        self.time += 1
        over = self.time == self.lengths[self.episode % 4]
        cut = self.episode % 2 == 1
        reward = float(self.stack[-1, 0, 0] > 0.5) * (2 * int(action) - 1)
        return self._seen(), reward, over and not cut, over and cut, {}

    def _seen(self):
        rng = np.random.default_rng([self.copy, self.episode, self.time])
        frame = rng.random((1, 2, 3), np.float32) + np.float32(0.01)
        self.stack = np.concatenate([self.stack[1:], frame])
        return self.stack


def stacked_envs(*given, **settings):
    """`make_envs`, of environments that say that they show stacks of frames."""
    envs = make_envs(*given, **settings)
    envs.stacked = True
    return envs


class CounterNetwork(nn.Module):
    """Logits ten times as large for the action `step`; value 100 · copy + 10 · episode + step."""

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        copy, episode, step = observation.unbind(-1)
        logits = 100.0 * nn.functional.one_hot(step.long() % 10, 10)
        return logits, 100 * copy + 10 * episode + step


def register() -> None:
    """`test/Counter-v0`, `Continuous-v0` and `Frames-v0`; copies are counted from 0 again."""
    CounterEnv.copies = 0
    ContinuousEnv.copies = 0
    kinds = {"Counter": CounterEnv, "Continuous": ContinuousEnv, "Frames": FramesEnv}
    for name, kind in kinds.items():
        if f"test/{name}-v0" not in gym.registry:
            gym.register(f"test/{name}-v0", entry_point=kind, disable_env_checker=True)
