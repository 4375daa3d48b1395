"""An environment and a network that only count: any mix-up shows as unequal integers."""

import gymnasium as gym
import numpy as np
import torch
from torch import nn

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


class CounterNetwork(nn.Module):
    """Logits ten times as large for the action `step`; value 100 · copy + 10 · episode + step."""

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        copy, episode, step = observation.unbind(-1)
        logits = 100.0 * nn.functional.one_hot(step.long() % 10, 10)
        return logits, 100 * copy + 10 * episode + step


def register() -> None:
    """`test/Counter-v0` and `test/Continuous-v0`; copies are counted from 0 again."""
    CounterEnv.copies = 0
    ContinuousEnv.copies = 0
    for name, kind in (("Counter", CounterEnv), ("Continuous", ContinuousEnv)):
        if f"test/{name}-v0" not in gym.registry:
            gym.register(f"test/{name}-v0", entry_point=kind, disable_env_checker=True)
