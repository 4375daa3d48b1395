"""Costly is CartPole to the bit, and its steps use the time of a core that they say."""

import time

import gymnasium as gym
import numpy as np
import pytest

from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.parts.costly import CostlyEnv, CostlyVectorEnv
from rlbook.parts.envs import make_envs, register_own_envs


def used(action) -> float:
    """Milliseconds of a core that a call takes."""
    begun = time.thread_time()
    action()
    return 1e3 * (time.thread_time() - begun)


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_it_is_cartpole(mode):
    costly = make_envs("rlbook/Costly-v0", 3, 7, autoreset_mode=mode, step_ms=0.0)
    plain = make_envs("CartPole-v1", 3, 7, autoreset_mode=mode)
    rng = np.random.default_rng(0)
    for _ in range(100):
        actions = rng.integers(2, size=3)
        for mine, theirs in zip(costly.transition(actions), plain.transition(actions), strict=True):
            assert np.array_equal(mine, theirs)
    assert costly.episodes() == plain.episodes() != []


def test_an_episode_is_cut_after_500_steps():
    register_own_envs()
    assert gym.make("rlbook/Costly-v0").spec.max_episode_steps == 500
    vector = gym.make_vec("rlbook/Costly-v0", 2, vectorization_mode="vector_entry_point")
    assert vector.max_episode_steps == 500 and vector.step_ms == 1.0


def test_a_step_uses_the_core_and_a_reset_does_not():
    one, many = CostlyEnv(step_ms=5.0), CostlyVectorEnv(4, step_ms=5.0)
    one.reset(seed=0)
    many.reset(seed=0)
    assert used(lambda: one.step(0)) >= 5.0
    assert used(lambda: many.step(np.zeros(4, dtype=np.int64))) >= 20.0
    many.prev_done[:3] = True  # three episodes have just ended: this step resets them
    assert 5.0 <= used(lambda: many.step(np.zeros(4, dtype=np.int64))) < 20.0


def test_a_restored_vector_goes_on_bit_for_bit(tmp_path):
    played = make_envs("rlbook/Costly-v0", 3, 1, step_ms=0.0)
    actions = np.random.default_rng(0).integers(2, size=(60, 3))
    for action in actions[:30]:
        played.step(action)
    save_checkpoint(tmp_path / "envs.npz", played.state_dict())
    fresh = make_envs("rlbook/Costly-v0", 3, 99, step_ms=0.0)
    fresh.load_state_dict(load_checkpoint(tmp_path / "envs.npz"))
    assert not fresh.restarted
    for action in actions[30:]:
        for mine, theirs in zip(played.step(action), fresh.step(action), strict=True):
            assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("kind", [CostlyEnv, CostlyVectorEnv])
def test_time_cannot_be_given_back(kind):
    with pytest.raises(ValueError, match="at least 0"):
        kind(step_ms=-1.0)
