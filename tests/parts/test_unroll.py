"""Counters: time, copy, episode and action are in every number, so a mix-up shows at once."""

import numpy as np
import pytest
import torch

from rlbook.data import AgentOutput
from rlbook.parts.envs import make_envs
from rlbook.parts.unroll import collect_unroll, joined
from rlbook.policy_gradient import collect_episodes
from tests.counters import TERMINATES, TRUNCATES, CounterNetwork, register

COPIES, LENGTH = 3, 4


def act(observation: np.ndarray) -> AgentOutput:
    """The counter network's output; the action is copy + step."""
    logits, value = CounterNetwork()(torch.from_numpy(observation))
    action = (observation[:, 0] + observation[:, 2]).astype(np.int64)
    return AgentOutput(action, logits.numpy(), value.numpy())


@pytest.fixture
def envs():
    register()
    return make_envs("test/Counter-v0", COPIES, 0)


def test_rows_of_unrolls_are_what_the_counters_say(envs):
    last = envs.env_output
    for _ in range(12):
        unroll = collect_unroll(envs, act, LENGTH)
        seen, reward, discount, first = unroll.env_outputs
        action, logits, value = unroll.agent_outputs
        assert seen.shape == (LENGTH + 1, COPIES, 3) and action.shape == (LENGTH, COPIES)
        assert np.array_equal(seen[0], last.observation), "unrolls overlap by one row"
        assert np.array_equal(first[0], last.first) and np.array_equal(reward[0], last.reward)
        copy, episode, step = seen[..., 0], seen[..., 1], seen[..., 2]
        assert np.array_equal(copy, np.broadcast_to(np.arange(COPIES), copy.shape))
        assert np.array_equal(action, (copy + step)[:-1]), "the action at t answers observation t"
        assert np.array_equal(logits.argmax(-1), step[:-1])
        assert np.array_equal(value, (100 * copy + 10 * episode + step)[:-1])
        went_on = ~first[1:]
        assert np.array_equal(unroll.valid, went_on)
        assert np.array_equal(step[1:][went_on], step[:-1][went_on] + 1)
        assert np.array_equal(episode[1:], episode[:-1] + ~went_on)
        assert (step[1:][~went_on] == 0).all() and (reward[1:][~went_on] == 0).all()
        earned = (100 * copy + 10 * episode + step)[1:]
        assert np.array_equal(reward[1:][went_on], earned[went_on])
        ended = (episode % 2 == 0) & (step == TERMINATES)
        assert np.array_equal(discount == 0, ended), "only a termination has discount 0"
        last = envs.env_output
    times = [t for episode in range(99) for t in range((TERMINATES, TRUNCATES)[episode % 2])]
    for copy, env in enumerate(envs.vector_env.envs):
        taken = env.unwrapped.actions
        assert len(taken) > 30 and taken == [copy + t for t in times[: len(taken)]]


def test_unrolls_do_not_share_memory(envs):
    first = collect_unroll(envs, act, LENGTH)
    kept = first.env_outputs.observation.copy()
    second = collect_unroll(envs, act, LENGTH)
    second.env_outputs.observation[:] = -1
    assert np.array_equal(first.env_outputs.observation, kept)


def test_whole_episodes_begin_together_and_end_alone(envs):
    envs.step(np.zeros(COPIES, dtype=np.int64))  # stands in the middle of an episode
    unroll, valid, taken = collect_episodes(envs, act)
    episode, step = (unroll.env_outputs.observation[..., k] for k in (1, 2))
    assert (step[0] == 0).all() and (episode[0] == 1).all(), "begun anew, in every copy"
    assert valid.tolist() == [[True] * COPIES] * TRUNCATES
    assert taken == TRUNCATES * COPIES and unroll.env_outputs.discount[-1].tolist() == [1.0] * 3


def test_what_a_copy_plays_while_it_waits_is_not_valid(envs):
    copies = envs.vector_env.envs
    copies[0].unwrapped.episode = 0  # its next episode is cut after 3, the others' end after 5
    for env in copies[1:]:
        env.unwrapped.episode = 1
    unroll, valid, taken = collect_episodes(envs, act)
    assert valid.sum(0).tolist() == [TRUNCATES, TERMINATES, TERMINATES]
    assert len(valid) == TERMINATES
    # Copy 0 waits two rows: its reset, then one step of an episode that is thrown away.
    assert taken == 5 + 5 + 3 + 1
    assert np.array_equal(valid[:, 0], np.arange(5) < TRUNCATES)


def test_two_unrolls_that_follow_each_other_join_to_the_one_that_they_are(envs):
    whole = collect_unroll(envs, act, 7)
    register()
    again = make_envs("test/Counter-v0", COPIES, 0)
    parts = [collect_unroll(again, act, steps) for steps in (3, 1, 3)]
    one = joined(joined(parts[0], parts[1]), parts[2])
    for mine, theirs in zip(
        one.env_outputs + one.agent_outputs, whole.env_outputs + whole.agent_outputs, strict=True
    ):
        assert np.array_equal(mine, theirs) and mine.dtype == theirs.dtype


def test_an_unroll_that_is_cut_is_shorter_and_the_next_goes_on(envs):
    asked = []
    unroll = collect_unroll(envs, act, 9, lambda step: asked.append(step) or step == 4)
    assert asked == [1, 2, 3, 4] and unroll.valid.shape == (4, COPIES)
    after = collect_unroll(envs, act, 2, lambda step: False)
    assert np.array_equal(after.env_outputs.observation[0], unroll.env_outputs.observation[-1])
