"""Several tasks for one network: observations flattened and padded, actions counted to the most.

    CartPole-v1   [4]       2 actions  ─┐
    Catch-v0      [10, 5]   3 actions  ─┼─►  observation [50], zeros behind;  actions 0, 1, 2
    Acrobot-v1    [6]       3 actions  ─┘

An action that a task does not have, it takes modulo the number of its own. Tasks that are alike
already are left as they are. Nothing says which task it is but what is seen of it.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from rlbook.parts.envs import Envs, Episode, make_envs, require_discrete


class Shape(NamedTuple):
    """What a network for all tasks sees and says."""

    observation: tuple[int, ...]
    num_actions: int
    padded: bool
    """The tasks differ."""


@cache
def common_shape(tasks: tuple[str, ...], system: str = "this system") -> Shape:
    """The shape that fits all tasks; `system` is named in messages.

    Raises:
        ValueError: unknown task, actions that are not discrete, or frames beside other things.
    """
    made = [make_envs(task, 1, 0) for task in tasks]
    actions = [require_discrete(envs, system) for envs in made]
    spaces = [envs.observation_space for envs in made]
    for envs in made:
        envs.close()
    shapes = [space.shape or () for space in spaces]
    if len(set(zip(shapes, actions, strict=True))) == 1:
        return Shape(shapes[0], actions[0], False)
    frames = [task for task, s in zip(tasks, spaces, strict=True) if s.dtype == np.uint8]
    if frames and len(set(shapes)) > 1:
        raise ValueError(f"env_ids: {frames[0]} shows frames, and others do not")
    if len(set(shapes)) == 1:
        return Shape(shapes[0], max(actions), True)
    return Shape((max(int(np.prod(shape)) for shape in shapes),), max(actions), True)


def padded(observation: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Observations `[B, ...]` as `[B, *shape]`, with zeros behind."""
    if observation.shape[1:] == shape:
        return observation
    rows = observation.reshape(len(observation), -1)
    wide = np.zeros((len(rows), *shape), rows.dtype)
    wide[:, : rows.shape[1]] = rows
    return wide


class TaskEnvs(Envs):
    """B copies of one task as all tasks' network sees them.

    Args:
        envs: the task as it is; its vector is taken over.
        shape: of all tasks.
    """

    def __init__(self, envs: Envs, shape: Shape) -> None:
        self._shape, self._own_actions = shape, require_discrete(envs, "the system")
        super().__init__(
            envs.vector_env,
            env_id=envs.env_id,
            seed=envs.seed,
            reward_clip=envs.reward_clip,
            life_loss_ends=envs.life_loss_ends,
            stacked=envs.stacked,
        )
        kind = self.observation_space.dtype
        assert kind is not None
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, shape.observation, kind.type)
        self.action_space = gym.spaces.Discrete(shape.num_actions)

    def _observation(self, observation: np.ndarray) -> np.ndarray:
        return padded(super()._observation(observation), self._shape.observation)

    def step(self, action: np.ndarray) -> Any:
        """One row `[B]` of an unroll."""
        return super().step(action % self._own_actions)


def make_task_envs(
    tasks: tuple[str, ...], index: int, num_envs: int, seed: int, life_loss_ends: bool = False
) -> Envs:
    """B copies of the task of actor `index` (tasks in turn), for a network for all of them."""
    envs = make_envs(tasks[index % len(tasks)], num_envs, seed, life_loss_ends=life_loss_ends)
    shape = common_shape(tasks)
    return TaskEnvs(envs, shape) if shape.padded else envs


class TaskPolicy:
    """Plays one task as it is with the policy of a network for all.

    Args:
        policy: of the network.
        task: Gymnasium id.
        shape: of all tasks.
    """

    def __init__(self, policy: Any, task: str, shape: Shape) -> None:
        self.policy, self.shape = policy, shape
        self.network = policy.network
        self.num_actions = require_discrete(make_envs(task, 1, 0), "the system")

    def initial_state(self, num_envs: int) -> Any:
        """The policy's."""
        return self.policy.initial_state(num_envs)

    def act(
        self, observation: np.ndarray, state: Any, first: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, Any]:
        """One action of the task's own for each row, and the next state."""
        seen = padded(observation, self.shape.observation)
        action, state = self.policy.act(seen, state, first, rng)
        return action % self.num_actions, state


def task_policy(policy: Any, task: str, tasks: tuple[str, ...]) -> Any:
    """The policy that plays one of the tasks as it is."""
    shape = common_shape(tasks)
    return TaskPolicy(policy, task, shape) if shape.padded else policy


def keep_returns(
    kept: dict[str, Any], tasks: Sequence[str], index: int, episodes: Sequence[Episode]
) -> None:
    """Notes the episodes that actor `index` has finished; nothing where there is but one task.

    Args:
        kept: of a run; its entry "task_returns" (task → returns of the last 100 episodes) grows.
        tasks: all.
        index: of the actor.
        episodes: finished ones.
    """
    if len(tasks) > 1:
        task, returns = tasks[index % len(tasks)], kept.setdefault("task_returns", {})
        mine = [episode.episode_return for episode in episodes]
        returns[task] = [*returns.get(task, []), *mine][-100:]


def task_scores(kept: dict[str, Any]) -> dict[str, float]:
    """Metric `episode_return_mean/TASK` of each task of which something is known."""
    known = {task: found for task, found in kept.get("task_returns", {}).items() if found}
    return {f"episode_return_mean/{task}": float(np.mean(known[task])) for task in sorted(known)}


def row_bytes(tasks: tuple[str, ...], packed: bool = False) -> int:
    """Bytes of one row of an unroll: what was seen, what was said, and the rest.

    Args:
        tasks: Gymnasium ids.
        packed: of a stack of frames each is told once.
    """
    shape, envs = common_shape(tasks), make_envs(tasks[0], 1, 0)
    seen = shape.observation[1:] if packed and envs.stacked else shape.observation
    size = 1 if envs.observation_space.dtype == np.uint8 else 4
    return int(np.prod(seen)) * size + 4 * shape.num_actions + 21
