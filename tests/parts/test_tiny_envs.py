"""Catch and Memory by hand, one copy against the vector, and what no memoryless policy can do."""

from itertools import product

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlbook.parts.catch import CatchEnv, CatchVectorEnv
from rlbook.parts.envs import make_envs, register_own_envs
from rlbook.parts.memory import MemoryEnv, MemoryVectorEnv

KINDS = [(CatchEnv, CatchVectorEnv), (MemoryEnv, MemoryVectorEnv)]


@pytest.mark.parametrize("single, vector", KINDS)
def test_one_copy_plays_like_the_vector(single, vector):
    one, many = single(), vector(num_envs=1)
    seen_one, seen_many = one.reset(seed=5)[0], many.reset(seed=5)[0]
    rng = np.random.default_rng(0)
    for _ in range(60):
        assert np.array_equal(seen_one, seen_many[0])
        action = int(rng.integers(one.action_space.n))
        seen_one, reward, terminated, _, _ = one.step(action)
        seen_many, rewards, ends, _, _ = many.step(np.array([action]))
        assert (reward, terminated) == (float(rewards[0]), bool(ends[0]))
        if terminated:
            assert np.array_equal(seen_one, seen_many[0])
            seen_one = one.reset()[0]
            seen_many, rewards, ends, _, _ = many.step(np.array([action]))
            assert rewards[0] == 0 and not ends[0]


@pytest.mark.parametrize("env_id", ["rlbook/Catch-v0", "rlbook/Memory-v0"])
def test_gymnasium_knows_them_and_finds_nothing_to_complain(env_id):
    register_own_envs()
    env = gym.make(env_id, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    assert env.render().dtype == np.uint8 and env.render().shape[-1] == 3
    vector = gym.make_vec(env_id, 3, vectorization_mode="vector_entry_point")
    assert vector.reset(seed=0)[0].shape == (3, *env.observation_space.shape)


def test_catch_by_hand():
    env = CatchVectorEnv(num_envs=1, rows=4, columns=3)
    board = env.reset(seed=0)[0][0, 0]
    ball, paddle = int(board[0].argmax()), int(board[3].argmax())
    assert board.sum() == 2 and paddle == 1
    for step in range(1, 4):
        move = int(np.sign(ball - paddle)) + 1
        paddle += move - 1
        board, reward, terminated, truncated, _ = env.step(np.array([move]))
        assert board[0, 0, min(step, 3), ball] == 1 and not truncated[0]
        assert bool(terminated[0]) == (step == 3) and reward[0] == (1.0 if step == 3 else 0.0)
    fresh, reward, terminated, _, _ = env.step(np.array([0]))
    assert reward[0] == 0 and not terminated[0] and fresh[0, 0, 0].sum() == 1


def test_the_paddle_stays_on_the_board_and_a_miss_costs_one():
    env = CatchVectorEnv(num_envs=64, rows=6, columns=5)
    env.reset(seed=0)
    for _ in range(5):
        board, reward, terminated, _, _ = env.step(np.zeros(64, dtype=int))
    assert terminated.all() and (env.paddle == 0).all()
    assert np.array_equal(reward, np.where(env.ball_column == 0, 1, -1))
    assert set(env.ball_column) == {0, 1, 2, 3, 4}


def test_no_memoryless_policy_gets_anything_from_memory():
    """All deterministic policies of the observation, over both cues: the mean is exactly 0."""
    sights = [(-1.0, 0.0), (1.0, 0.0), (0.0, 0.0), (0.0, 1.0)]
    for choice in product([0, 1], repeat=len(sights)):
        policy = dict(zip(sights, choice, strict=True))
        env = MemoryVectorEnv(num_envs=2, delay=3)
        env.reset(seed=0)
        env.cue = np.float32([-1, 1])
        seen, total = env._observe(), 0.0
        for _ in range(env.delay + 1):
            actions = np.array([policy[tuple(row.tolist())] for row in seen])
            seen, reward, terminated, _, _ = env.step(actions)
            total += float(reward.sum())
        assert terminated.all() and total == 0.0


def test_memory_pays_the_one_who_remembers():
    envs = make_envs("rlbook/Memory-v0", 16, 0)
    cue = envs.env_output.observation[:, 0].copy()
    assert set(cue) == {-1.0, 1.0}
    for _ in range(8 + 1):
        row = envs.step((cue > 0).astype(int))
    assert (row.reward == 1).all() and (row.discount == 0).all()


@pytest.mark.parametrize(
    "make", [lambda: CatchVectorEnv(1, rows=1), lambda: MemoryVectorEnv(1, delay=0)]
)
def test_bad_sizes_are_refused(make):
    with pytest.raises(ValueError, match="at least"):
        make()


# -- CartPole without velocities -------------------------------------------------------------------


def test_masked_cartpole_is_cartpole_with_two_of_four_numbers():
    masked, whole = (make_envs(name, 6, 3) for name in ("rlbook/MaskedCartPole-v0", "CartPole-v1"))
    rng = np.random.default_rng(0)
    for _ in range(700):
        mine, theirs = masked.env_output, whole.env_output
        assert mine.observation.shape == (6, 2)
        assert np.array_equal(mine.observation, theirs.observation[:, [0, 2]])
        for name in ("reward", "discount", "first"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name))
        action = rng.integers(2, size=6)
        masked.step(action), whole.step(action)
    assert masked.episodes() == whole.episodes()


def test_one_masked_cartpole_plays_like_cartpole_and_ends_at_500():
    register_own_envs()
    one, whole = gym.make("rlbook/MaskedCartPole-v0"), gym.make("CartPole-v1")
    check_env(one.unwrapped, skip_render_check=True)
    seen, _ = one.reset(seed=4)
    wanted, _ = whole.reset(seed=4)
    steps, theirs = 0, [0.0, False, False]
    while not (theirs[1] or theirs[2]):
        steps += 1
        assert np.array_equal(seen, wanted[[0, 2]])
        action = int(wanted[2] + 0.3 * wanted[3] + 0.1 * wanted[1] > 0)  # keeps the pole up
        wanted, *theirs, _ = whole.step(action)
        seen, *mine, _ = one.step(action)
        assert mine == theirs
    assert theirs[2] and steps == 500, "truncated, not terminated"


def test_masked_cartpole_is_saved_and_restored():
    envs, other = (make_envs("rlbook/MaskedCartPole-v0", 3, seed) for seed in (1, 2))
    for _ in range(40):
        envs.step(np.array([0, 1, 0]))
    other.load_state_dict(envs.state_dict())
    assert not other.restarted
    for _ in range(60):
        action = np.array([1, 0, 1])
        mine, theirs = envs.step(action), other.step(action)
        assert np.array_equal(mine.observation, theirs.observation)
