"""Frames packed and stacked again are what they were, also across episodes."""

import numpy as np
import pytest
import torch

from rlbook.data import AgentOutput
from rlbook.parts.envs import make_envs
from rlbook.parts.frames import before_an_episode, packed, restacked
from rlbook.parts.unroll import collect_unroll
from rlbook.parts.unroll_replay import side_by_side


def a_stream(steps, copies, planes, seed, resets=0.3):
    """Rows [B, k, 2, 3] as an emulator gives them, and which begin an episode."""
    rng = np.random.default_rng(seed)
    row, rows, firsts = np.zeros((copies, planes, 2, 3), np.uint8), [], []
    for _ in range(steps + planes):
        first = rng.random(copies) < resets
        row = np.concatenate([row[:, 1:], rng.integers(1, 256, (copies, 1, 2, 3), np.uint8)], 1)
        row[first, :-1] = 0
        rows.append(row)
        firsts.append(first)
    return rows[-steps:], np.stack(firsts[-steps:])


@pytest.mark.parametrize("planes", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 2, 3, 9])
@pytest.mark.parametrize("resets", [0.0, 0.3, 1.0])
def test_packing_loses_nothing(planes, steps, resets):
    for seed in range(5):
        rows, first = a_stream(steps, 3, planes, seed, resets)
        frames = packed(rows)
        assert frames.shape == (steps + planes - 1, 3, 2, 3) and frames.dtype == np.uint8
        again = restacked(torch.from_numpy(frames), first)
        assert again.dtype == torch.uint8 and np.array_equal(again.numpy(), np.stack(rows))


def test_what_is_hidden_by_hand():
    first = np.array([[0], [0], [1], [0], [0], [0]], bool)
    hidden = before_an_episode(first, 4)[:, 0].astype(int).tolist()
    assert hidden[:2] == [[0, 0, 0, 0]] * 2
    assert hidden[2:] == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_an_unroll_of_atari_packed_is_the_unroll():
    pytest.importorskip("ale_py")
    unrolls = []
    for pack in (False, True):
        envs, rng = make_envs("ALE/Breakout-v5", 2, 0), np.random.default_rng(0)

        def agent(seen, rng=rng):
            logits, value = np.zeros((2, 4), np.float32), np.zeros(2, np.float32)
            return AgentOutput(rng.integers(4, size=2), logits, value)

        unrolls.append([collect_unroll(envs, agent, 60, pack=pack) for _ in range(6)])
    resets = 0
    for whole, small in zip(*unrolls, strict=True):
        assert small.env_outputs.observation.shape == (64, 2, 84, 84)
        frames = torch.from_numpy(small.env_outputs.observation)
        again = restacked(frames, small.env_outputs.first)
        assert np.array_equal(again.numpy(), whole.env_outputs.observation)
        assert np.array_equal(small.env_outputs.reward, whole.env_outputs.reward)
        resets += int(whole.env_outputs.first.sum())
    assert resets >= 4
    beside = side_by_side([unrolls[1][0], unrolls[1][1]])
    assert np.asarray(beside.env_outputs.observation).shape == (64, 4, 84, 84)


def test_other_observations_are_never_packed():
    envs = make_envs("rlbook/Catch-v0", 2, 0)
    assert not envs.stacked
