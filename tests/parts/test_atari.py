"""Atari as the papers have it, each setting checked against the emulator."""

import os

import numpy as np
import pytest

from rlbook.parts.atari import PREPROCESSING
from rlbook.parts.envs import Envs, make_envs

pytest.importorskip("ale_py")
PONG, BREAKOUT = "ALE/Pong-v5", "ALE/Breakout-v5"
NOOP, FIRE = 0, 1


def frames_of(envs: Envs, steps: int, action: int = NOOP) -> list[list[int]]:
    """Frames of its episode that the emulator counts after each step."""
    seen = []
    for _ in range(steps):
        *_, info = envs.vector_env.step(np.full(envs.num_envs, action))
        seen.append(info["episode_frame_number"].tolist())
    return seen


def played(envs: Envs, steps: int, seed: int = 0) -> list:
    """Rows of random play."""
    rng, actions = np.random.default_rng(seed), envs.action_space.n
    return [envs.step(rng.integers(actions, size=envs.num_envs)) for _ in range(steps)]


def test_an_action_is_taken_for_four_frames():
    envs = make_envs(PONG, 2, 0, noop_max=1)
    assert frames_of(envs, 3) == [[4, 4], [8, 8], [12, 12]]


def test_episodes_begin_with_up_to_thirty_no_ops():
    envs = make_envs(PONG, 12, 0)
    begun = [frames - 4 for frames in frames_of(envs, 1)[0]]
    assert min(begun) >= 0 and 15 <= max(begun) <= 30 and len(set(begun)) > 4
    others = [frames - 4 for frames in frames_of(make_envs(PONG, 12, 1_000), 1)[0]]
    assert begun != others, "and the seed decides how many"


def test_a_row_is_the_last_four_frames_and_begins_with_zeros():
    """What lets a stack be put together again from single frames."""
    for env_id in (PONG, BREAKOUT):
        envs = make_envs(env_id, 2, 0)
        before, resets = envs.env_output.observation, 0
        assert before.shape == (2, 4, 84, 84) and before.dtype == np.uint8
        assert not before[:, :3].any() and before[:, 3].any()
        for row in played(envs, 1_000):
            resets += int(row.first.sum())
            assert not row.observation[row.first, :3].any()
            rest = ~row.first
            assert np.array_equal(row.observation[rest, :3], before[rest, 1:])
            before = row.observation
        assert resets >= (1 if env_id == PONG else 5)


def test_a_frame_is_the_maximum_of_two():
    """The darker of two flickering frames never wins; averaging over pixels keeps the order."""
    pooled, single = (make_envs(PONG, 1, 0, noop_max=1, maxpool=on) for on in (True, False))
    assert PREPROCESSING["maxpool"] is True
    brighter = 0
    for _ in range(200):
        a, b = (e.step(np.ones(1, int)).observation[0, 3].astype(int) for e in (pooled, single))
        assert (a >= b - 1).all()
        brighter += int((a > b + 1).sum())
    assert brighter > 0


@pytest.mark.parametrize(
    "sticky, alike", [({}, True), ({"repeat_action_probability": 0.25}, False)]
)
def test_no_action_is_sticky(sticky, alike):
    """Without chance in the game itself all copies see the same, whatever their seeds."""
    envs = make_envs(BREAKOUT, 4, 0, noop_max=1, **sticky)
    rng = np.random.default_rng(0)
    rows = [envs.step(np.full(4, rng.integers(4))).observation for _ in range(100)]
    assert all((row == row[:1]).all() for row in rows) is alike


def test_the_action_set_is_the_games_own():
    counts = [make_envs(env_id, 1, 0).action_space.n for env_id in (PONG, BREAKOUT)]
    assert counts == [6, 4]
    assert make_envs(PONG, 1, 0, full_action_space=True).action_space.n == 18


def test_nobody_presses_the_button_for_the_player():
    """Breakout's ball waits for FIRE: without it no life is lost."""
    lives = []
    for pressed in ({}, {"use_fire_reset": True}):
        envs = make_envs(BREAKOUT, 1, 0, **pressed)
        for _ in range(100):
            *_, info = envs.vector_env.step(np.zeros(1, int))
        lives.append(int(info["lives"][0]))
    assert lives[0] == 5 and lives[1] < 5


def test_the_time_limit_is_of_frames_and_no_termination():
    assert PREPROCESSING["max_num_frames_per_episode"] == 108_000  # 27,000 steps
    envs = make_envs(BREAKOUT, 1, 0, noop_max=1, max_num_frames_per_episode=80)
    rows = [envs.step(np.zeros(1, int)) for _ in range(21)]
    assert [int(row.first[0]) for row in rows] == [0] * 20 + [1]
    assert all(row.discount[0] == 1.0 for row in rows)
    assert [episode.length for episode in envs.episodes()] == [20]


def test_the_learner_sees_clipped_rewards_and_the_score_does_not():
    envs = make_envs("ALE/SpaceInvaders-v5", 4, 0)
    rows = played(envs, 700)
    assert {float(r) for row in rows for r in row.reward} == {0.0, 1.0}
    scores = [episode.episode_return for episode in envs.episodes()]
    assert scores and all(score % 5 == 0 and score >= 5 for score in scores)
    unclipped = make_envs("ALE/SpaceInvaders-v5", 4, 0, reward_clip=np.inf)
    assert max(float(row.reward.max()) for row in played(unclipped, 300)) >= 5


@pytest.mark.parametrize("ends", [False, True])
def test_a_life_may_be_an_end_to_the_learner_while_the_game_goes_on(ends):
    envs = make_envs(BREAKOUT, 2, 0, life_loss_ends=ends)
    rows = played(envs, 600)
    episodes = envs.episodes()
    zeros, resets = (
        sum(int(found.sum()) for found in column)
        for column in zip(*((row.discount == 0, row.first) for row in rows), strict=True)
    )
    games = len(episodes)
    assert games >= 4 and resets in (games, games - 1, games - 2), "a reset follows each game alone"
    assert zeros == games if not ends else 5 * games <= zeros <= 5 * games + 2 * 4
    assert not any((row.discount[row.first] == 0).any() for row in rows), "new lives are no loss"


def test_transitions_know_of_lives_too():
    """In every mode, with the loss of a life as an end of what is bootstrapped, not of the game."""
    for mode in ("next_step", "same_step"):
        envs = make_envs(BREAKOUT, 1, 0, autoreset_mode=mode, life_loss_ends=True)
        rng, zeros, ended = np.random.default_rng(0), 0, 0
        while not ended:
            step = envs.transition(rng.integers(4, size=1))
            zeros, ended = zeros + int(step.discount_t[0] == 0), int(step.ended[0])
        assert zeros == 5


def test_rows_stay_what_they_were():
    envs = make_envs(PONG, 1, 0)
    rows = played(envs, 8)
    copies = [row.observation.copy() for row in rows]
    played(envs, 50)
    assert all(
        np.array_equal(row.observation, copy) for row, copy in zip(rows, copies, strict=True)
    )


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="counts threads as Linux shows them"
)
@pytest.mark.parametrize(
    "word, threads",
    [("1", 1), ("2", min(2, os.cpu_count() or 1)), ("", min(8, os.cpu_count() or 1))],
)
def test_as_many_threads_step_as_the_process_was_told(monkeypatch, word, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", word)
    before = len(os.listdir("/proc/self/task"))
    envs = make_envs(PONG, 8, 0)
    assert len(os.listdir("/proc/self/task")) - before == threads
    envs.close()
