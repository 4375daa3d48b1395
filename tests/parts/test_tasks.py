"""Several tasks behind one shape: what is padded, whose actions, whose scores."""

import numpy as np
import pytest

from rlbook.parts.envs import Episode, make_envs
from rlbook.parts.tasks import (
    TaskEnvs,
    common_shape,
    keep_returns,
    make_task_envs,
    padded,
    row_bytes,
    task_policy,
    task_scores,
)

TASKS = ("CartPole-v1", "rlbook/Catch-v0", "Acrobot-v1")


def test_the_shape_of_all_is_the_largest_of_each():
    assert common_shape(TASKS) == ((50,), 3, True)
    assert common_shape(("CartPole-v1",)) == ((4,), 2, False)
    assert common_shape(("CartPole-v1", "CartPole-v1")) == ((4,), 2, False)
    assert common_shape(("rlbook/Memory-v0", "MountainCar-v0")) == ((2,), 3, True)
    assert row_bytes(TASKS) == 4 * 50 + 4 * 3 + 21
    with pytest.raises(ValueError, match="frames"):
        common_shape(("CartPole-v1", "ALE/Pong-v5"))
    with pytest.raises(ValueError, match="Pendulum-v1 has the action space .* but impala"):
        common_shape(("CartPole-v1", "Pendulum-v1"), "impala")


def test_a_task_plays_as_it_is_with_zeros_behind():
    for index, task in enumerate(TASKS):
        mine, own = make_task_envs(TASKS, index, 3, 7), make_envs(task, 3, 7)
        assert mine.observation_space.shape == (50,) and mine.action_space.n == 3
        actions = own.action_space.n
        for turn in range(30):
            seen, plain = mine.env_output, own.env_output
            flat = plain.observation.reshape(3, -1)
            assert np.array_equal(seen.observation[:, : flat.shape[1]], flat)
            assert not seen.observation[:, flat.shape[1] :].any()
            for name in ("reward", "discount", "first"):
                assert np.array_equal(getattr(seen, name), getattr(plain, name))
            action = np.array([turn, turn + 1, turn + 2]) % 3
            mine.step(action)
            own.step(action % actions)
        assert mine.episodes() == own.episodes()


def test_tasks_alike_are_left_as_they_are():
    envs = make_task_envs(("CartPole-v1",), 5, 2, 0)
    assert not isinstance(envs, TaskEnvs)
    observation = np.ones((2, 4))
    assert padded(observation, (4,)) is observation

    class Policy:
        network = None

        def act(self, observation, state, first, rng):
            assert observation.shape == (2, 50)
            return np.array([1, 2]), state

    policy = Policy()
    assert task_policy(policy, "CartPole-v1", ("CartPole-v1",)) is policy
    action, _ = task_policy(policy, "CartPole-v1", TASKS).act(observation, None, None, None)
    assert action.tolist() == [1, 0], "CartPole has two actions"


def test_each_task_has_a_score_of_its_last_hundred_episodes():
    kept: dict = {}
    assert task_scores(kept) == {}
    keep_returns(kept, TASKS, 4, [])
    assert task_scores(kept) == {}
    keep_returns(kept, TASKS, 0, [Episode(0, 1.0, 1)])
    keep_returns(kept, TASKS, 3, [Episode(0, 3.0, 1)])
    keep_returns(kept, TASKS, 1, [Episode(0, float(i), 1) for i in range(150)])
    scores = task_scores(kept)
    assert scores == {
        "episode_return_mean/CartPole-v1": 2.0,
        "episode_return_mean/rlbook/Catch-v0": np.mean(range(50, 150)),
    }
    keep_returns(alone := {}, ("CartPole-v1",), 0, [Episode(0, 1.0, 1)])
    assert alone == {}
