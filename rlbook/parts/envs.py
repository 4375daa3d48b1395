"""Vectors of environments behind one step: any Gymnasium id, the book's own, and Atari.

    action [B] ──► Envs.step ──► EnvOutput [B]       rows of an unroll (NEXT_STEP autoreset)
    action [B] ──► Envs.transition ──► Step [B]      single transitions for a replay (any mode)

Gymnasium's vectors reset ended episodes by themselves, in one of three ways (`AutoresetMode`):

- NEXT_STEP (the default here): the final observation is returned as it is; the *next* step ignores
  the action and returns the reset observation with reward 0. That pseudo-step is marked by `first`
  and is no valid step.
- SAME_STEP: the step that ends an episode already returns the reset observation; the final one is
  in `info["final_obs"]`.
- DISABLED: nothing is reset; `transition` resets what has ended.

Unrolls need NEXT_STEP, where bootstrapping through a time limit needs no special case: `step`
refuses the others.
"""

import importlib
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from rlbook.data import EnvOutput
from rlbook.parts.atari import is_stacked, make_atari
from rlbook.parts.env_state import restore, snapshot

OWN_ENVS = {
    "rlbook/Catch-v0": "rlbook.parts.catch:Catch",
    "rlbook/MaskedCartPole-v0": "rlbook.parts.masked_cartpole:MaskedCartPole",
    "rlbook/Memory-v0": "rlbook.parts.memory:Memory",
    "rlbook/Costly-v0": "rlbook.parts.costly:Costly",
}
TIME_LIMITS = {"rlbook/Costly-v0": 500, "rlbook/MaskedCartPole-v0": 500}
"""Steps after which an episode is cut, where the environment does not end it by itself."""


def register_own_envs() -> None:
    """Makes the book's environments known to Gymnasium (once)."""
    for env_id, entry_point in OWN_ENVS.items():
        if env_id not in gym.registry:
            gym.register(
                env_id,
                entry_point=f"{entry_point}Env",
                vector_entry_point=f"{entry_point}VectorEnv",
                max_episode_steps=TIME_LIMITS.get(env_id),
            )
    from rlbook.parts import gridworld

    gridworld.register()


class Episode(NamedTuple):
    """One finished training episode."""

    env: int
    episode_return: float
    """Sum of the rewards as the environment gave them, before any clipping."""
    length: int
    """Valid steps."""


class Step(NamedTuple):
    """One step of B copies as single transitions, alike in all autoreset modes: `[B, ...]`."""

    obs_tm1: np.ndarray
    a_tm1: np.ndarray
    r_t: np.ndarray
    discount_t: np.ndarray
    """0.0 on termination, else 1.0."""
    obs_t: np.ndarray
    """What the action led to: at an episode's end its final observation, never the reset one."""
    ended: np.ndarray
    """True if the episode ended here, by termination or by truncation."""
    valid: np.ndarray
    """False on NEXT_STEP's pseudo-step from a final observation to a reset."""


class Envs:
    """B copies of an environment, with their running returns.

    Args:
        vector_env: a Gymnasium `VectorEnv`.
        env_id: its name, for messages.
        seed: seeds the first reset; copy i gets its own stream.
        reward_clip: clips the rewards that the learner sees to ±this; episode returns stay
            unclipped.
        fresh: the vector returns new arrays from each step, so that none need be copied.
        life_loss_ends: to the learner the loss of a life is the end (discount 0), while the game,
            and the episode that is counted, go on.
        stacked: an observation is a stack of frames, `[k, H, W]`, as `parts.frames` has them.
    """

    def __init__(
        self,
        vector_env: gym.vector.VectorEnv,
        *,
        env_id: str,
        seed: int,
        reward_clip: float | None = None,
        fresh: bool = False,
        life_loss_ends: bool = False,
        stacked: bool = False,
    ) -> None:
        self.vector_env, self.fresh, self.stacked = vector_env, fresh, stacked
        self.life_loss_ends = life_loss_ends
        self.env_id = env_id
        self.num_envs = vector_env.num_envs
        self.observation_space = vector_env.single_observation_space
        self.action_space = vector_env.single_action_space
        self.autoreset_mode = AutoresetMode(vector_env.metadata["autoreset_mode"])
        self.reward_clip = reward_clip
        self.seed = seed
        uint8 = self.observation_space.dtype == np.uint8
        self._observation_type = np.uint8 if uint8 else np.float32
        self.restarted = False
        """True if `load_state_dict` had to begin new episodes."""
        self.reset(seed)

    def reset(self, seed: int | None = None) -> EnvOutput:
        """Starts an episode in every copy and returns the first rows `[B]`.

        Without a seed the random streams go on.
        """
        observation, info = self.vector_env.reset(seed=seed)
        self._lives = np.array(info.get("lives", 0))
        self._ended = np.zeros(self.num_envs, dtype=bool)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, dtype=np.int64)
        self._episodes: list[Episode] = []
        self.env_output = EnvOutput(
            self._observation(observation),
            np.zeros(self.num_envs, dtype=np.float32),
            np.ones(self.num_envs, dtype=np.float32),
            np.ones(self.num_envs, dtype=bool),
        )
        return self.env_output

    def step(self, action: np.ndarray) -> EnvOutput:
        """One row `[B]` of an unroll. Needs NEXT_STEP autoreset (ValueError otherwise)."""
        if self.autoreset_mode is not AutoresetMode.NEXT_STEP:
            raise ValueError(
                f"autoreset_mode: unrolls need NEXT_STEP, where the final observation is a row of"
                f" its own, but {self.env_id} was made with {self.autoreset_mode.name}"
            )
        first = self._ended
        observation, reward, terminated, truncated, info = self.vector_env.step(action)
        reward = self._book(reward, terminated | truncated, first)
        discount = self._discount(terminated, info)
        self.env_output = EnvOutput(self._observation(observation), reward, discount, first)
        return self.env_output

    def transition(self, action: np.ndarray) -> Step:
        """One step as transitions, in any autoreset mode."""
        before = self.env_output.observation
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        waits = self.autoreset_mode is AutoresetMode.NEXT_STEP
        first = self._ended if waits else np.zeros(self.num_envs, dtype=bool)
        observation, reward, terminated, truncated, info = self.vector_env.step(action)
        ended = terminated | truncated
        reward = self._book(reward, ended, first)
        discount = self._discount(terminated, info)
        after = seen = self._observation(observation)
        if same_step and ended.any():
            after = seen.copy()
            after[ended] = np.stack(list(info["final_obs"][ended]))
        if self.autoreset_mode is AutoresetMode.DISABLED and ended.any():
            seen = after.copy()
            fresh, _ = self.vector_env.reset(options={"reset_mask": ended.copy()})
            seen[ended] = self._observation(fresh)[ended]
        self.env_output = EnvOutput(seen, reward, discount, first)
        return Step(before, np.asarray(action), reward, discount, after, ended, ~first)

    def episodes(self) -> list[Episode]:
        """The episodes that have ended since the last call."""
        finished, self._episodes = self._episodes, []
        return finished

    @property
    def planes(self) -> int:
        """k, where an observation is a stack of k frames; else 1: it is all new."""
        return self.observation_space.shape[0] if self.stacked else 1  # type: ignore[index]

    @property
    def ended(self) -> np.ndarray:
        """`[B]` bool: whose episode ended with the last step."""
        return self._ended

    def running_returns(self) -> np.ndarray:
        """`[B]`: what the episodes under way have returned so far."""
        return self._returns.copy()

    def frame(self) -> np.ndarray:
        """Copy 0 as an RGB image (needs render_mode "rgb_array"; Atari gives a grey frame)."""
        images = self.vector_env.render() if self.vector_env.render_mode else None
        if images is not None and len(images):
            return np.asarray(images[0])
        grey = self.env_output.observation[0][-1]
        return np.repeat(np.repeat(grey, 4, 0), 4, 1)[..., None].repeat(3, -1)

    def close(self) -> None:
        """Frees what the environments hold."""
        self.vector_env.close()

    def state_dict(self) -> dict[str, Any]:
        """The state of every copy, or None in "env" where the environment cannot be saved."""
        return {
            "env": snapshot(self.vector_env),
            "output": self.env_output._asdict(),
            "ended": self._ended.copy(),
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, or with fresh episodes if it has no "env"."""
        if state["env"] is None:
            self.restarted = True
            self.reset(seed=int(state["seed"]) + 1_000_003)
            return
        restore(self.vector_env, state["env"])
        # Copies: what comes from another process is read-only.
        self.env_output = EnvOutput(**{name: x.copy() for name, x in state["output"].items()})
        self._ended = state["ended"].copy()
        self._returns = state["returns"].copy()
        self._lengths = state["lengths"].copy()

    def _observation(self, observation: np.ndarray) -> np.ndarray:
        """What later steps cannot change, float32 unless uint8."""
        if self.fresh:
            return observation
        return np.array(observation, dtype=self._observation_type)

    def _discount(self, terminated: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        """0.0 on termination, and where a life was lost if that is an end; else 1.0."""
        if self.life_loss_ends:
            lives, self._lives = self._lives, info["lives"].copy()
            terminated = terminated | (self._lives < lives)
        return np.where(terminated, np.float32(0), np.float32(1))

    def _book(self, reward: np.ndarray, ended: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Adds a step to the running returns, notes ended episodes, gives the learner's reward."""
        reward = np.asarray(reward, dtype=np.float32)
        self._returns += reward
        self._lengths += 1
        if first.any():
            self._lengths[first] = 0
        if ended.any():
            for env in np.flatnonzero(ended):
                self._episodes.append(
                    Episode(int(env), float(self._returns[env]), int(self._lengths[env]))
                )
            self._returns[ended] = 0.0
            self._lengths[ended] = 0
        self._ended = ended
        if self.reward_clip is not None:
            reward = np.clip(reward, -self.reward_clip, self.reward_clip)
        return reward


def make_envs(
    env_id: str,
    num_envs: int,
    seed: int,
    *,
    autoreset_mode: str = "next_step",
    render_mode: str | None = None,
    reward_clip: float | None = None,
    life_loss_ends: bool = False,
    **options: Any,
) -> Envs:
    """A vector of `num_envs` copies of a Gymnasium environment.

    Args:
        env_id: any Gymnasium id, with the module that registers it before it (`module:Env-v0`);
            `rlbook/Catch-v0`, `rlbook/GridWorld-v0`, `rlbook/Memory-v0`,
            `rlbook/MaskedCartPole-v0`, `rlbook/Costly-v0`; Atari as `ALE/Pong-v5` (needs the extra
            `atari`), with the preprocessing of Mnih et al. (2015): grey 84 × 84 frames, the maximum
            of two, four stacked, each action four times, up to 30 no-ops at the start, no sticky
            actions, no button pressed for the player, the game's own actions, a time limit of
            108,000 frames, which are 27,000 steps. As many threads step the copies as
            OMP_NUM_THREADS says (Ray, and the book where it starts processes itself, set it to 1
            for their processes), where it says nothing one for each core.
        num_envs: B.
        seed: of the first reset.
        autoreset_mode: "next_step", "same_step" or "disabled"; environments with a native vector
            have NEXT_STEP alone and are stepped one by one for the others.
        render_mode: None or "rgb_array".
        reward_clip: clips the learner's rewards to ±this; default 1.0 for Atari, none elsewhere.
        life_loss_ends: Atari: the loss of a life is the end to the learner, as in Mnih et al.
            (2015) and with IMPALA: its discount is 0. The game goes on; nothing is reset.
        options: passed on to the environment.

    Raises:
        ValueError: unknown environment, num_envs < 1, unknown mode, or an observation that is no
            array.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs: must be at least 1, got {num_envs}")
    modes = {mode.name.lower(): mode for mode in AutoresetMode}
    if autoreset_mode not in modes:
        raise ValueError(f"autoreset_mode: must be one of {sorted(modes)}, got {autoreset_mode!r}")
    mode = modes[autoreset_mode]
    register_own_envs()
    if env_id.startswith("ALE/"):
        envs = make_atari(env_id, num_envs, mode, options)
        clip = 1.0 if reward_clip is None else reward_clip
        kind = {"fresh": True, "life_loss_ends": life_loss_ends, "stacked": is_stacked(options)}
        return Envs(envs, env_id=env_id, seed=seed, reward_clip=clip, **kind)
    envs = _make_gymnasium(env_id, num_envs, mode, render_mode, options)
    return Envs(envs, env_id=env_id, seed=seed, reward_clip=reward_clip)


def require_discrete(envs: Envs, system: str) -> int:
    """The number of actions; ValueError where the action space is not discrete."""
    if not isinstance(envs.action_space, gym.spaces.Discrete):
        raise ValueError(
            f"env_id: {envs.env_id} has the action space {envs.action_space}, but {system} needs a"
            f" discrete one"
        )
    if envs.action_space.start != 0:
        raise ValueError(f"env_id: the actions of {envs.env_id} must be counted from 0")
    return int(envs.action_space.n)


def _make_gymnasium(
    env_id: str,
    num_envs: int,
    mode: AutoresetMode,
    render_mode: str | None,
    options: dict[str, Any],
) -> gym.vector.VectorEnv:
    sync: dict[str, Any] = {"vectorization_mode": "sync", "vector_kwargs": {"autoreset_mode": mode}}
    flat = {**sync, "wrappers": [gym.wrappers.FlattenObservation]}
    module, _, name = env_id.rpartition(":")
    try:
        if module:  # which registers it when it is imported
            importlib.import_module(module)
        native = gym.spec(name).vector_entry_point is not None
        native = native and mode is AutoresetMode.NEXT_STEP
        how: dict[str, Any] = {"vectorization_mode": "vector_entry_point"} if native else sync
        envs = gym.make_vec(name, num_envs, render_mode=render_mode, **how, **options)
        if not isinstance(envs.single_observation_space, gym.spaces.Box):
            envs.close()
            envs = gym.make_vec(name, num_envs, render_mode=render_mode, **flat, **options)
    except (gym.error.Error, ImportError, TypeError) as error:
        raise ValueError(f"env_id: cannot make {env_id!r}: {_one_line(error)}") from error
    if not isinstance(envs.single_observation_space, gym.spaces.Box):
        space = envs.single_observation_space
        raise ValueError(f"env_id: {env_id} has the observation space {space}, which is no array")
    return envs


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
