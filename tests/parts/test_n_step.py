"""n-step transitions of a stretch: those that a window gives, with priorities by a naive loop."""

import numpy as np
import pytest

from rlbook.parts.envs import make_envs
from rlbook.parts.n_step import Trail
from rlbook.parts.q_learning import NStepWindow, joined
from tests.counters import register


def q_of(observation: np.ndarray) -> np.ndarray:
    """Two action values for each observation of the counting environment."""
    copy, episode, step = observation.T
    return np.stack([7 * copy + 3 * episode - step, copy - episode + 2 * step], -1).astype("f4")


def play(n: int, chunks: tuple[int, ...], prioritized: bool = True):
    """Two copies, whose episodes terminate after 5 steps or are cut after 3, by both ways."""
    register()
    envs = make_envs("test/Counter-v0", 2, seed=0)
    window, trail, rng = NStepWindow(n, 0.9), Trail(n, 0.9), np.random.default_rng(0)
    slow, fast, steps = [], [], []
    for chunk in chunks:
        turns = []
        for _ in range(chunk):
            q = q_of(envs.env_output.observation)
            step = envs.transition(rng.integers(2, size=2))
            turns.append(window.push(step))
            trail.push(step, q)
            steps.append(step)
        slow.append(joined(turns))
        fast.append(trail.fold(q_of(envs.env_output.observation) if prioritized else None))
    return slow, fast, steps


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("chunks", [(1,) * 30, (4, 9, 1, 16), (30,)])
def test_a_stretch_gives_what_a_window_gives_bit_for_bit(n, chunks):
    slow, fast, _ = play(n, chunks)
    for theirs, mine in zip(slow, fast, strict=True):
        assert (theirs is None) == (mine is None)
        if mine is not None:
            for one, other in zip(mine[0], theirs, strict=True):
                assert np.array_equal(one, other) and one.dtype == other.dtype


@pytest.mark.parametrize("n", [1, 3, 7])
def test_priorities_are_n_step_errors_of_the_values_of_acting(n):
    """By a loop over single steps: bootstrap where the steps really taken led, nothing after a
    termination."""
    _, fast, steps = play(n, (4, 9, 1, 16))
    found = np.concatenate([part[1] for part in fast if part is not None])
    expected = []
    for start in range(len(steps) - n + 1):
        for copy in range(2):
            if not steps[start].valid[copy]:
                continue
            total, discount = 0.0, 1.0
            for step in steps[start : start + n]:
                total += discount * step.r_t[copy]
                discount *= 0.9 * step.discount_t[copy]
                last = step
                if step.ended[copy]:
                    break
            begin = steps[start]
            value = q_of(begin.obs_tm1)[copy, begin.a_tm1[copy]]
            expected.append(abs(total + discount * q_of(last.obs_t)[copy].max() - value))
    assert len(expected) > 30
    assert np.allclose(found, expected, rtol=1e-5)


def test_without_values_there_are_no_priorities_and_the_state_goes_on():
    _, fast, steps = play(3, (10,), prioritized=False)
    assert fast[0][1] is None
    trail, other = Trail(3, 0.9), Trail(3, 0.9)
    for step in steps[:5]:
        trail.push(step, q_of(step.obs_tm1))
    trail.fold(q_of(steps[4].obs_t))
    other.load_state_dict(trail.state_dict())
    for step in steps[5:]:
        trail.push(step, q_of(step.obs_tm1))
        other.push(step, q_of(step.obs_tm1))
    end = q_of(steps[-1].obs_t)
    for one, same in zip(*(t.fold(end)[0] for t in (trail, other)), strict=True):
        assert np.array_equal(one, same)
