"""n-step windows against plain loops, and ε-greedy actions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbook.parts.envs import Step, make_envs
from rlbook.parts.q_learning import NStepWindow, epsilon_greedy
from tests.counters import register


@st.composite
def histories(draw) -> tuple[list[Step], int]:
    """Random steps of random copies with random ends, as NEXT_STEP autoreset makes them."""
    copies, length = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps, ended, time = [], np.zeros(copies, bool), np.zeros(copies, np.float32)
    end = draw(st.sampled_from([0.0, 0.3, 0.9]))
    for _ in range(length):
        before, valid = time[:, None].copy(), ~ended
        time = time + 1
        terminated = valid & (rng.random(copies) < end / 2)
        ended = terminated | (valid & (rng.random(copies) < end / 2))
        reward = np.where(valid, rng.integers(1, 9, copies), 0).astype(np.float32)
        discount = np.where(terminated, 0.0, 1.0).astype(np.float32)
        action = rng.integers(0, 5, copies)
        steps.append(Step(before, action, reward, discount, time[:, None].copy(), ended, valid))
    return steps, draw(st.integers(1, 5))


def by_loops(steps: list[Step], n: int, gamma: float, start: int, b: int) -> tuple:
    """One n-step transition by its definition."""
    total, weight, k = 0.0, 1.0, start
    while True:
        total += weight * steps[k].r_t[b]
        weight *= gamma * steps[k].discount_t[b]
        if steps[k].ended[b] or k + 1 == start + n:
            break
        k += 1
    first = steps[start]
    return first.obs_tm1[b, 0], int(first.a_tm1[b]), total, weight, steps[k].obs_t[b, 0]


@settings(max_examples=150, deadline=None)
@given(histories())
def test_windows_by_loops(history):
    steps, n = history
    window, gamma = NStepWindow(n, 0.9), 0.9
    for t, step in enumerate(steps):
        kept = [np.copy(column) for column in step]
        found = window.push(step)
        if t < n - 1:
            assert found is None
            continue
        start = t - n + 1
        expected = [by_loops(steps, n, gamma, start, b) for b in np.flatnonzero(steps[start].valid)]
        assert len(found.r_t) == len(expected)
        for row, wanted in zip(zip(*found, strict=True), expected, strict=True):
            assert np.allclose([float(np.squeeze(x)) for x in row], wanted, rtol=1e-5)
        assert all(map(np.array_equal, kept, step)), "the steps themselves stay as they are"


@pytest.mark.parametrize("mode", ["next_step", "same_step", "disabled"])
def test_replay_holds_the_same_transitions_in_every_autoreset_mode(mode):
    """A truncation keeps γ^k and the final observation, a termination has discount 0."""
    register()
    envs = make_envs("test/Counter-v0", 1, 0, autoreset_mode=mode)
    window, rows = NStepWindow(2, 0.5), []
    for _ in range(20):
        found = window.push(envs.transition(np.zeros(1, dtype=np.int64)))
        if found is not None and len(found.r_t):
            rows.append((found.obs_tm1[0, 1:].tolist(), found.r_t[0], found.discount_t[0]))
            rows[-1] += (found.obs_t[0, 1:].tolist(),)
    assert rows[:8] == [
        ([0, 0], 1 + 0.5 * 2, 0.25, [0, 2]),
        ([0, 1], 2 + 0.5 * 3, 0.25, [0, 3]),
        ([0, 2], 3 + 0.5 * 4, 0.25, [0, 4]),
        ([0, 3], 4 + 0.5 * 5, 0.0, [0, 5]),  # two steps to the termination
        ([0, 4], 5, 0.0, [0, 5]),  # one step
        ([1, 0], 11 + 0.5 * 12, 0.25, [1, 2]),
        ([1, 1], 12 + 0.5 * 13, 0.25, [1, 3]),  # two steps to the time limit
        ([1, 2], 13, 0.5, [1, 3]),  # one step
    ]


def test_epsilon_greedy_is_greedy_but_for_epsilon():
    q = np.tile(np.array([[0.0, 3.0, 1.0]]), (20_000, 1))
    rng = np.random.default_rng(0)
    assert (epsilon_greedy(q, 0.0, rng) == 1).all()
    counts = np.bincount(epsilon_greedy(q, 0.3, rng), minlength=3) / 20_000
    assert np.allclose(counts, [0.1, 0.8, 0.1], atol=0.02)


def test_each_row_may_have_an_epsilon_of_its_own():
    q, epsilon = np.tile(np.array([[0.0, 3.0]]), (20_000, 1)), np.tile([0.0, 0.5], 10_000)
    other = epsilon_greedy(q, epsilon, np.random.default_rng(0)) == 0
    assert not other[::2].any() and abs(other[1::2].mean() - 0.25) < 0.02
