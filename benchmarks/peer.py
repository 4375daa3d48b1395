"""One training run of stable-baselines3 in a fresh process, on the same clock and rules as ours.

    python -m benchmarks.peer ppo --seed 1 --goal 475 --seconds 60

The clock starts with the first environment step and stands still during evaluations. "Solved" is
that of the book: the mean of the last max(100, 2 × copies) training episodes reaches the goal, then
100 fresh episodes, counted by their start, must average it too (else a new window begins).
"""

import argparse
import json
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CONFIRMING_EPISODES = 100


@dataclass(frozen=True)
class Settings:
    """What stable-baselines3 is told: RL Zoo's tuned settings for CartPole-v1, departures named."""

    num_envs: int
    total_steps: int
    """Length that linear schedules and ε refer to."""
    greedy: bool
    """Evaluate without sampling (ε = 0); stochastic policies sample, as ours do."""
    note: str
    options: dict[str, Any] = field(default_factory=dict)


SETTINGS = {
    "ppo": Settings(
        num_envs=8,
        total_steps=100_000,
        greedy=False,
        note="RL Zoo: 8 envs, 32 steps, 20 epochs, batch 256, GAE 0.8, γ 0.98, lr and clip linear"
        " over 100k steps (kept at their last tenth after it)",
        options={
            "n_steps": 32,
            "batch_size": 256,
            "n_epochs": 20,
            "gae_lambda": 0.8,
            "gamma": 0.98,
            "ent_coef": 0.0,
            "learning_rate": 1e-3,
            "clip_range": 0.2,
        },
    ),
    "a2c": Settings(
        num_envs=8,
        total_steps=500_000,
        greedy=False,
        note="RL Zoo: 8 envs, the library's defaults (5 steps, RMSProp, lr 7e-4, γ 0.99)",
        options={"ent_coef": 0.0},
    ),
    "dqn": Settings(
        num_envs=1,
        total_steps=50_000,
        greedy=True,
        note="RL Zoo: batch 64, lr 2.3e-3, 128 updates every 256 steps, target every 10, net"
        " 256 × 256; final ε 0.01 in place of 0.04, which keeps the training mean below 475",
        options={
            "learning_rate": 2.3e-3,
            "batch_size": 64,
            "buffer_size": 100_000,
            "learning_starts": 1_000,
            "gamma": 0.99,
            "target_update_interval": 10,
            "train_freq": 256,
            "gradient_steps": 128,
            "exploration_fraction": 0.16,
            "exploration_final_eps": 0.01,
            "policy_kwargs": {"net_arch": [256, 256]},
        },
    ),
}


def make_model(system: str, env_id: str, seed: int) -> Any:
    """The peer's agent with its own vector of monitored environments."""
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env

    settings = SETTINGS[system]
    options = dict(settings.options)
    if system == "ppo":
        # The schedules end where RL Zoo's run ends; a run that goes on keeps a tenth of them.
        for name in ("learning_rate", "clip_range"):
            options[name] = falling(options[name], settings.total_steps)
    if system == "dqn":
        options["exploration_fraction"] *= settings.total_steps / LONGEST_RUN
    algorithm = getattr(stable_baselines3, system.upper())
    envs = make_vec_env(env_id, n_envs=settings.num_envs, seed=seed)
    return algorithm("MlpPolicy", envs, seed=seed, device="cpu", **options)


LONGEST_RUN = 100_000_000
"""Steps that the library is asked for; the callback ends the run."""


def falling(start: float, steps: int) -> Any:
    """From `start` linearly to a tenth of it over `steps` of `LONGEST_RUN`, constant after them."""
    return lambda left: start * max(0.1, 1.0 - (1.0 - left) * LONGEST_RUN / steps)


class PredictPolicy:
    """The peer's policy as `rlbook.harness.evaluate` wants one."""

    def __init__(self, model: Any, greedy: bool) -> None:
        self.model, self.greedy = model, greedy

    def initial_state(self, num_envs: int) -> None:
        """No memory."""

    def act(self, observation: np.ndarray, state: Any, first: np.ndarray, rng: Any) -> Any:
        """Actions `[B]` for observations `[B, ...]`."""
        return self.model.predict(observation, deterministic=self.greedy)[0], state


class Clock:
    """Counts steps and seconds of a peer's training, and says when the run is over.

    Args:
        policy: acts with the parameters as they are at the moment.
        num_envs: copies of the environment, all together.
        seed: of the run.
        env_id: Gymnasium id.
        goal: mean return that ends the run; None for no such end.
        seconds: after so many the run ends anyway.
    """

    def __init__(
        self, policy: Any, num_envs: int, seed: int, env_id: str, goal: float | None, seconds: float
    ) -> None:
        self.policy, self.seed, self.env_id = policy, seed, env_id
        self.goal, self.seconds = goal, seconds
        self.returns: deque[float] = deque(maxlen=max(CONFIRMING_EPISODES, 2 * num_envs))
        self.env_steps = self.evaluations = 0
        self.begun: float | None = None
        self.wall_time_s = self.paused_s = 0.0
        self.evaluation_return_mean: float | None = None

    def start(self) -> None:
        """Called before the first environment step; calling it again does nothing."""
        if self.begun is None:
            self.begun = time.perf_counter()

    def book(self, env_steps: int, returns: Sequence[float]) -> bool:
        """Enters steps and the returns of the episodes that ended in them; False ends the run."""
        self.env_steps += env_steps
        self.returns.extend(returns)
        self.wall_time_s = time.perf_counter() - float(self.begun or 0.0) - self.paused_s
        if returns and self.goal is not None and self._full_and_good() and self._confirm():
            return False
        return self.wall_time_s < self.seconds

    def row(self) -> dict[str, Any]:
        """What it shows, as entries of a table's row."""
        return {
            "solved": self.evaluation_return_mean is not None,
            "env_steps": self.env_steps,
            "wall_time_s": self.wall_time_s,
            "env_steps_per_s": self.env_steps / self.wall_time_s,
            "evaluation_return_mean": self.evaluation_return_mean,
            "evaluations": self.evaluations,
        }

    def _full_and_good(self) -> bool:
        full = len(self.returns) == self.returns.maxlen
        return full and float(np.mean(self.returns)) >= float(self.goal or 0.0)

    def _confirm(self) -> bool:
        from rlbook.harness.evaluate import evaluate

        begun = time.perf_counter()
        self.evaluations += 1
        evaluation = evaluate(
            self.policy,
            self.env_id,
            episodes=CONFIRMING_EPISODES,
            seed=1_000_000 + 1_000 * self.seed + self.evaluations,
        )
        self.paused_s += time.perf_counter() - begun
        if evaluation.mean < float(self.goal or 0.0):
            self.returns.clear()
            return False
        self.evaluation_return_mean = evaluation.mean
        return True


def run(
    system: str, seed: int, goal: float | None, seconds: float, env_id: str, threads: int
) -> dict[str, Any]:
    """Trains and gives the row of a table."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    from rlbook.harness.records import peak_memory_mb

    torch.set_num_threads(threads)
    model, settings = make_model(system, env_id, seed), SETTINGS[system]
    policy = PredictPolicy(model, settings.greedy)
    clock = Clock(policy, settings.num_envs, seed, env_id, goal, seconds)

    class Watch(BaseCallback):
        """Hands the library's steps on to the clock."""

        def _on_rollout_start(self) -> None:
            clock.start()

        def _on_step(self) -> bool:
            infos = self.locals["infos"]
            ended = [info["episode"]["r"] for info in infos if "episode" in info]
            return clock.book(len(infos), ended)

    model.learn(LONGEST_RUN, callback=Watch())
    return {
        "system": system,
        "seed": seed,
        **clock.row(),
        "num_envs": settings.num_envs,
        "memory_mb": peak_memory_mb(),
    }


def main() -> None:
    """One run; its row goes to stdout as JSON."""
    parser = argparse.ArgumentParser(description="One training run of stable-baselines3.")
    parser.add_argument("system", choices=sorted(SETTINGS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--goal", type=float, default=None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--env-id", default="CartPole-v1")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    row = run(
        options.system,
        options.seed,
        options.goal,
        options.seconds,
        options.env_id,
        options.threads,
    )
    print(json.dumps(row))


if __name__ == "__main__":
    main()
