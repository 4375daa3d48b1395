"""A running environment saved, written, read and put back goes on as if nothing had happened."""

from collections import deque

import gymnasium as gym
import numpy as np
import pytest

from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.parts.env_state import restore, snapshot
from rlbook.parts.envs import make_envs

SAVABLE = [
    "CartPole-v1",
    "rlbook/Catch-v0",
    "rlbook/Memory-v0",
    "rlbook/GridWorld-v0",
    "Acrobot-v1",
    "MountainCar-v0",
    "FrozenLake-v1",
    "Blackjack-v1",
]


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize("env_id", SAVABLE)
def test_a_restored_vector_goes_on_bit_for_bit(env_id, mode, tmp_path):
    played = make_envs(env_id, 3, 1, autoreset_mode=mode)
    rng = np.random.default_rng(0)
    actions = rng.integers(played.action_space.n, size=(120, 3))
    for action in actions[:37]:
        played.transition(action)
    save_checkpoint(tmp_path / "envs.npz", played.state_dict())
    fresh = make_envs(env_id, 3, 99, autoreset_mode=mode)
    fresh.load_state_dict(load_checkpoint(tmp_path / "envs.npz"))
    assert not fresh.restarted
    played.episodes()
    for action in actions[37:]:
        for mine, theirs in zip(played.transition(action), fresh.transition(action), strict=True):
            assert np.array_equal(mine, theirs)
    assert played.episodes() == fresh.episodes()


def test_an_emulator_cannot_be_saved_and_begins_anew():
    played = make_envs("ALE/Pong-v5", 1, 1)
    played.transition(np.zeros(1, dtype=np.int64))
    state = played.state_dict()
    assert state["env"] is None
    fresh = make_envs("ALE/Pong-v5", 1, 1)
    fresh.load_state_dict(state)
    assert fresh.restarted and fresh.env_output.first.all()


class Holder(gym.Env):
    """An environment with attributes of all plain kinds."""

    def __init__(self, fill: int) -> None:
        self.number, self.text, self.nothing = fill, str(fill), None
        self.array = np.full(3, fill)
        self.row = [fill, [fill, np.full(2, fill)]]
        self.same_row = self.row
        self.pair = (fill, np.full(1, fill))
        self.recent = deque([fill] * fill, maxlen=4)
        self.table = {fill: {"x": fill}, "y": [fill]}
        self.rng = np.random.default_rng(fill)


def test_every_plain_kind_of_attribute_comes_back():
    state = snapshot(Holder(3))
    env = Holder(1)
    restore(env, state)
    assert (env.number, env.text, env.nothing) == (3, "3", None)
    assert env.array.tolist() == [3] * 3
    assert env.row[0] == 3 and env.row[1][1].tolist() == [3, 3]
    assert env.same_row is env.row, "two names of one list stay one list"
    assert isinstance(env.pair, tuple) and env.pair[1].tolist() == [3]
    assert env.recent == deque([3, 3, 3]) and env.recent.maxlen == 4
    assert env.table == {3: {"x": 3}, "y": [3]}
    assert env.rng.random() == np.random.default_rng(3).random()


def test_a_snapshot_is_a_copy():
    env = Holder(3)
    state = snapshot(env)
    env.array[:] = 7
    env.row.append(7)
    env.rng.random()
    other = Holder(1)
    restore(other, state)
    assert other.array.tolist() == [3] * 3 and len(other.row) == 2
    assert other.rng.random() == np.random.default_rng(3).random()


def test_what_cannot_be_copied_is_not_half_copied():
    env = Holder(3)
    env.engine = object()
    assert snapshot(env) is None
