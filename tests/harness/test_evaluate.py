"""Fresh episodes: each counts by its beginning, whatever its length; videos."""

import numpy as np
import pytest

from rlbook.harness.evaluate import Evaluation, evaluate, rollout_frames, write_video
from rlbook.parts.envs import make_envs
from tests.counters import register


class Constant:
    """Always the same action; counts its calls and keeps what it was told."""

    def __init__(self, action: int = 0) -> None:
        self.action, self.seen = action, []

    def initial_state(self, num_envs):
        return np.zeros(num_envs)

    def act(self, observation, state, first, rng):
        self.seen.append((state.copy(), first.copy()))
        return np.full(len(observation), self.action), state + 1


def test_every_begun_episode_counts_once_whatever_its_length():
    """Copies whose episodes are short play several; only the first of each is counted."""
    register()
    envs = make_envs("test/Counter-v0", 6, 0)
    lengths = [5, 1, 5, 2, 5, 1]
    for env, length in zip(envs.vector_env.envs, lengths, strict=True):
        env.unwrapped.lengths = (length, length)
    found = evaluate(Constant(), "test/Counter-v0", episodes=6, seed=3, envs=envs)
    assert found.lengths.tolist() == lengths
    for copy, length in enumerate(lengths):
        expected = sum(100.0 * copy + 10.0 + t for t in range(1, length + 1))
        assert found.returns[copy] == expected, "episode 1, and not a later one"


def test_the_policy_sees_its_state_and_where_episodes_begin():
    register()
    policy = Constant()  # a fresh copy plays episode 1, which is cut after 3 steps
    evaluate(policy, "test/Counter-v0", episodes=2)
    states, firsts = zip(*policy.seen, strict=True)
    assert [state[0] for state in states] == [0, 1, 2]
    assert [first.all() for first in firsts] == [True, False, False]


def test_an_episode_without_end_is_cut_and_counts_so_far():
    register()
    found = evaluate(Constant(), "test/Counter-v0", episodes=1, max_steps=2)
    assert found.lengths.tolist() == [2] and found.returns.tolist() == [11.0 + 12.0]


def test_the_seed_decides():
    def play(seed: int) -> list[float]:
        return evaluate(Constant(), "CartPole-v1", episodes=10, seed=seed).lengths.tolist()

    assert play(1) == play(1) and play(1) != play(2)


def test_mean_error_and_words():
    found = Evaluation(np.array([1.0, 2.0, 6.0]), np.array([1, 1, 1]))
    assert found.mean == (1 + 2 + 6) / 3
    spread = ((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / (3 - 1)
    assert np.isclose(found.standard_error, (spread / 3) ** 0.5)
    assert str(found) == "return 3.0 ± 1.5 over 3 episodes (min 1.0, max 6.0)"
    assert Evaluation(np.ones(1), np.ones(1)).standard_error == 0.0


@pytest.mark.parametrize("bad", [{"episodes": 0}, {"env_id": "Nowhere-v0"}])
def test_bad_input_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        evaluate(Constant(), **{"env_id": "CartPole-v1", "episodes": 1, **bad})


@pytest.mark.parametrize("env_id", ["CartPole-v1", "rlbook/Catch-v0"])
def test_a_video_shows_one_episode(env_id, tmp_path):
    import imageio.v2 as imageio

    frames, episode_return = rollout_frames(Constant(), env_id, seed=1)
    played = evaluate(Constant(), env_id, episodes=1, seed=1)
    assert (len(frames) - 1, episode_return) == (played.lengths[0], played.returns[0])
    path = tmp_path / "episode.mp4"
    write_video(str(path), frames, fps=30)
    with imageio.get_reader(path) as reader:
        shown = list(reader.iter_data())
    assert abs(len(shown) - len(frames)) <= 1
    assert abs(shown[0].astype(float).mean() - frames[0].mean()) < 8
