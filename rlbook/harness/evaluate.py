"""Fresh episodes of a policy: what it is worth, counted by begun episodes, not by ended ones."""

import os
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlbook.parts.envs import Envs, make_envs


class Policy(Protocol):
    """What acts: deterministic given its random generator; recurrent policies carry a state."""

    def initial_state(self, num_envs: int) -> Any:
        """The recurrent state for `num_envs` fresh episodes (None without memory)."""

    def act(
        self, observation: np.ndarray, state: Any, first: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, Any]:
        """Observation `[B, ...]`, state, first `[B]` → actions `[B]` and the next state."""


@dataclass(frozen=True)
class Evaluation:
    """Returns and lengths of fresh episodes."""

    returns: np.ndarray
    """`[episodes]`: undiscounted, unclipped."""
    lengths: np.ndarray
    """`[episodes]`: steps."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean return."""
        return (
            float(self.returns.std(ddof=1) / np.sqrt(len(self.returns)))
            if len(self.returns) > 1
            else 0.0
        )

    def __str__(self) -> str:
        """One line for people."""
        low, high = self.returns.min(), self.returns.max()
        return (
            f"return {self.mean:.1f} ± {self.standard_error:.1f} over {len(self.returns)} episodes"
            f" (min {low:.1f}, max {high:.1f})"
        )


def evaluate(
    policy: Policy,
    env_id: str,
    *,
    episodes: int = 100,
    seed: int = 0,
    max_steps: int = 200_000,
    envs: Envs | None = None,
    **options: Any,
) -> Evaluation:
    """Runs `episodes` episodes, each in a copy of its own and all begun together.

    Counting the first N episodes that *end* would favour short ones; here every begun episode
    counts.

    Args:
        policy: acts.
        env_id: Gymnasium id.
        episodes: how many (one copy of the environment each).
        seed: of the environments and of the policy's draws.
        max_steps: an episode that lasts longer is cut there.
        envs: `episodes` copies to use instead of making them.
        options: passed on to `make_envs`.

    Raises:
        ValueError: episodes < 1, or an unknown environment.
    """
    if episodes < 1:
        raise ValueError(f"episodes: must be at least 1, got {episodes}")
    own = envs is None
    envs = make_envs(env_id, episodes, seed, **options) if envs is None else envs
    row = envs.reset(seed)
    rng = np.random.default_rng([seed, 0xE7A1])
    state = policy.initial_state(episodes)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    running = np.ones(episodes, dtype=bool)
    for _ in range(max_steps):
        action, state = policy.act(row.observation, state, row.first, rng)
        row = envs.step(action)
        for episode in envs.episodes():
            if running[episode.env]:
                returns[episode.env], lengths[episode.env] = episode.episode_return, episode.length
                running[episode.env] = False
        if not running.any():
            break
    else:
        returns[running], lengths[running] = envs.running_returns()[running], max_steps
    if own:
        envs.close()
    return Evaluation(returns, lengths)


def rollout_frames(
    policy: Policy, env_id: str, *, seed: int = 0, max_steps: int = 2_000, **options: Any
) -> tuple[list[np.ndarray], float]:
    """One episode as images: (frames `[height, width, 3]` uint8, return)."""
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory, on no screen
    os.environ.setdefault("SDL_AUDIODRIVER", "dummy")
    envs = make_envs(env_id, 1, seed, render_mode="rgb_array", **options)
    row, state = envs.env_output, policy.initial_state(1)
    rng = np.random.default_rng([seed, 0xF11A])
    frames = [envs.frame()]
    episode_return = 0.0
    for _ in range(max_steps):
        action, state = policy.act(row.observation, state, row.first, rng)
        row = envs.step(action)
        finished = envs.episodes()
        frames.append(envs.frame())
        if finished:
            episode_return = finished[0].episode_return
            break
    else:
        episode_return = float(envs.running_returns()[0])
    envs.close()
    return frames, episode_return


def write_video(path: str, frames: list[np.ndarray], fps: int) -> None:
    """Frames as an mp4 (H.264) that browsers play; sides are cut to even numbers of pixels."""
    import imageio.v2 as imageio

    height, width = (side - side % 2 for side in frames[0].shape[:2])
    with imageio.get_writer(
        path, fps=fps, codec="libx264", quality=7, macro_block_size=2, ffmpeg_log_level="error"
    ) as writer:
        for frame in frames:
            writer.append_data(frame[:height, :width])  # type: ignore[attr-defined]
