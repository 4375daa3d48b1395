"""Vectors of environments: rows, transitions in every autoreset mode, returns, refusals."""

import gymnasium as gym
import numpy as np
import pytest

from rlbook.parts.envs import Episode, make_envs, require_discrete
from tests import counters
from tests.counters import TERMINATES, TRUNCATES

MODES = ["next_step", "same_step", "disabled"]


@pytest.fixture(autouse=True)
def counting():
    counters.register()


def transitions(mode: str, steps: int, env_id: str = "test/Counter-v0") -> list[list[tuple]]:
    """What two copies did, in the mode, without the pseudo-steps: one list a copy."""
    envs = make_envs(env_id, 2, 0, autoreset_mode=mode)
    found: list[list[tuple]] = [[], []]
    for _ in range(steps):
        step = envs.transition(envs.env_output.observation[:, 0].astype(int) % 2)
        for copy in np.flatnonzero(step.valid):
            found[copy].append(
                (
                    step.obs_tm1[copy].tolist(),
                    int(step.a_tm1[copy]),
                    float(step.r_t[copy]),
                    float(step.discount_t[copy]),
                    step.obs_t[copy].tolist(),
                    bool(step.ended[copy]),
                )
            )
    return found


def by_hand(copy: int, episodes: int) -> list[tuple]:
    """The transitions of the counter environment, from its description."""
    rows = []
    for episode in range(episodes):
        even = episode % 2 == 0
        length = TERMINATES if even else TRUNCATES
        for time in range(length):
            last = time + 1 == length
            discount = 0.0 if last and even else 1.0  # a time limit is no termination
            reward = 100.0 * copy + 10.0 * episode + time + 1
            after = [float(copy), float(episode), float(time + 1)]
            before = [float(copy), float(episode), float(time)]
            rows.append((before, copy % 2, reward, discount, after, last))
    return rows


@pytest.mark.parametrize("mode", MODES)
def test_every_autoreset_mode_gives_the_transitions_counted_by_hand(mode):
    for copy, rows in enumerate(transitions(mode, 40)):
        assert len(rows) >= 30 and rows == by_hand(copy, 12)[: len(rows)]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "rlbook/Catch-v0", "FrozenLake-v1"])
def test_the_modes_agree_on_real_environments(env_id):
    """Lengths and discounts of the first episodes, which begin from the same seeds."""
    firsts = []
    for mode in MODES:
        envs = make_envs(env_id, 1, 3, autoreset_mode=mode)
        rows = []
        while not rows or not rows[-1][2]:
            step = envs.transition(np.ones(1, dtype=np.int64))
            rows.append((float(step.r_t[0]), float(step.discount_t[0]), bool(step.ended[0])))
        firsts.append(rows)
    assert firsts[0] == firsts[1] == firsts[2] and len(firsts[0]) > 1


def test_atari_gives_the_same_transitions_in_both_of_its_modes():
    pytest.importorskip("ale_py")
    played = []
    for mode in ("next_step", "same_step"):
        envs = make_envs("ALE/Pong-v5", 1, 0, autoreset_mode=mode)
        assert envs.observation_space.shape == (4, 84, 84)
        rows, after = [], 0
        while after < 5:
            step = envs.transition(np.zeros(1, dtype=np.int64))
            if step.valid[0]:
                frames = (step.obs_tm1.sum(dtype=int), step.obs_t.sum(dtype=int))
                rows.append((*frames, float(step.r_t[0]), float(step.discount_t[0])))
                # Frames move on by one: the youngest three are now the oldest three.
                assert np.array_equal(step.obs_tm1[0, 1:], step.obs_t[0, :-1])
                after += bool(after or step.ended[0])
        played.append(rows)
        envs.close()
    ends = [discount == 0.0 for *_, discount in played[0]]
    assert ends[-5] and sum(ends) == 1 and sum(row[2] for row in played[0]) == -21
    assert played[0][:-4] == played[1][:-4]  # what follows the reset has its own no-ops


def test_atari_without_resets_is_refused():
    with pytest.raises(ValueError, match="autoreset_mode"):
        make_envs("ALE/Pong-v5", 1, 0, autoreset_mode="disabled")


def test_step_marks_resets_and_keeps_final_observations():
    envs = make_envs("test/Counter-v0", 1, 0)
    rows = [envs.step(np.zeros(1, dtype=np.int64)) for _ in range(TERMINATES + 1 + TRUNCATES + 1)]
    times = [int(row.observation[0, 2]) for row in rows]
    assert times == [1, 2, 3, 4, 5, 0, 1, 2, 3, 0]
    assert [bool(row.first[0]) for row in rows] == [False] * 5 + [True] + [False] * 3 + [True]
    assert [float(row.discount[0]) for row in rows] == [1, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    assert rows[5].reward[0] == 0.0


@pytest.mark.parametrize("mode", ["same_step", "disabled"])
def test_unrolls_refuse_other_modes(mode):
    envs = make_envs("test/Counter-v0", 1, 0, autoreset_mode=mode)
    with pytest.raises(ValueError, match="autoreset_mode: unrolls need NEXT_STEP"):
        envs.step(np.zeros(1, dtype=np.int64))


@pytest.mark.parametrize("mode", MODES)
def test_episodes_count_valid_steps_and_unclipped_rewards(mode):
    envs = make_envs("test/Counter-v0", 1, 0, autoreset_mode=mode, reward_clip=1.0)
    seen = [envs.transition(np.zeros(1, dtype=np.int64)) for _ in range(12)]
    assert max(float(step.r_t[0]) for step in seen) == 1.0
    first, second = envs.episodes()[:2]
    assert first == Episode(0, 1.0 + 2 + 3 + 4 + 5, TERMINATES)
    assert second == Episode(0, (10.0 + 1) + (10 + 2) + (10 + 3), TRUNCATES)
    assert envs.episodes() == []


def test_rows_are_copies_that_later_steps_do_not_change():
    envs = make_envs("CartPole-v1", 2, 0)
    row = envs.step(np.zeros(2, dtype=np.int64))
    before = row.observation.copy()
    envs.step(np.zeros(2, dtype=np.int64))
    assert np.array_equal(row.observation, before) and row.observation.dtype == np.float32


@pytest.mark.parametrize(
    "env_id, size",
    [("FrozenLake-v1", 16), ("Blackjack-v1", 32 + 11 + 2), ("rlbook/GridWorld-v0", 11)],
)
@pytest.mark.parametrize("mode", MODES)
def test_observations_that_are_no_arrays_are_flattened(env_id, size, mode):
    envs = make_envs(env_id, 2, 0, autoreset_mode=mode)
    step = envs.transition(np.zeros(2, dtype=np.int64))
    assert step.obs_t.shape == (2, size) and step.obs_t.dtype == np.float32
    assert set(np.unique(step.obs_t)) == {0.0, 1.0}


def test_the_seed_decides():
    def play(seed: int) -> np.ndarray:
        return make_envs("Acrobot-v1", 3, seed).env_output.observation

    assert np.array_equal(play(1), play(1)) and not np.array_equal(play(1), play(2))
    assert len(np.unique(play(1), axis=0)) == 3  # each copy has a stream of its own


@pytest.mark.parametrize(
    "arguments, field",
    [
        ({"env_id": "NoSuchGame-v0"}, "env_id"),
        ({"env_id": "ALE/NoSuchGame-v5"}, "env_id"),
        ({"env_id": ""}, "env_id"),
        ({"num_envs": 0}, "num_envs"),
        ({"autoreset_mode": "never"}, "autoreset_mode"),
        ({"nonsense": 1}, "env_id"),
    ],
)
def test_bad_input_is_refused_by_name(arguments, field):
    good = {"env_id": "CartPole-v1", "num_envs": 1, "seed": 0}
    with pytest.raises(ValueError, match=f"^{field}:") as refusal:
        make_envs(**{**good, **arguments})
    assert "\n" not in str(refusal.value)


def test_a_misspelt_atari_game_gets_a_hint():
    with pytest.raises(ValueError, match="did you mean ALE/Pong-v5"):
        make_envs("ALE/Pongg-v5", 1, 0)


def test_continuous_actions_are_refused():
    with pytest.raises(ValueError, match="env_id: test/Continuous-v0 .* ppo needs a discrete one"):
        require_discrete(make_envs("test/Continuous-v0", 1, 0), "ppo")
    assert require_discrete(make_envs("test/Counter-v0", 1, 0), "ppo") == 10


def test_actions_that_do_not_count_from_zero_are_refused():
    envs = make_envs("test/Counter-v0", 1, 0)
    envs.action_space = gym.spaces.Discrete(3, start=1)
    with pytest.raises(ValueError, match="from 0"):
        require_discrete(envs, "dqn")


def test_an_environment_that_a_module_registers(tmp_path, monkeypatch):
    """Gymnasium's own syntax, `module:Env-v0`."""
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "gym.register('Mine-v0', entry_point=CartPoleEnv, max_episode_steps=7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    envs = make_envs("my_envs:Mine-v0", 2, 0)
    for _ in range(8):
        envs.step(np.zeros(2, int))
    assert envs.env_id == "my_envs:Mine-v0" and len(envs.episodes()) == 2
    for env_id, said in (("no_module:Mine-v0", "no_module"), ("my_envs:Other-v0", "Other")):
        with pytest.raises(ValueError, match=f"env_id: cannot make '{env_id}': .*{said}"):
            make_envs(env_id, 2, 0)
