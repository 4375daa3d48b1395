"""REINFORCE, baseline and A2C: advantages by loops, ends of both kinds, resuming, learning."""

import math

import numpy as np
import pytest
import torch

from rlbook import policy_gradient as pg
from rlbook.parts.envs import make_envs
from rlbook.parts.networks import ActorCritic
from tests.counters import CounterNetwork, register
from tests.runs import assert_same_run, ctrl_c_at, same_parameters
from tests.test_ppo import counter_unroll

QUICK = {"progress": False, "num_envs": 8, "log_every_env_steps": 700}
ALGORITHMS = ["a2c", "baseline", "reinforce"]
GAMMA = 0.9


class Counted(torch.nn.Module):
    """The counter network on rows `[N, 3]`, with a parameter that gradients can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, observation):
        logits, value = CounterNetwork()(observation)
        return 0.01 * self.scale * logits, self.scale * value


def estimates(config: pg.Config, unroll) -> tuple[torch.Tensor, torch.Tensor]:
    """The system's own advantages and targets of an unroll, values by the counter network."""
    seen, reward, discount, _ = (torch.from_numpy(column) for column in unroll.env_outputs)
    values = CounterNetwork()(seen)[1]
    valid = torch.from_numpy(unroll.valid)
    return pg.advantages(config, reward[1:], GAMMA * discount[1:], values[:-1], values[-1], valid)


@pytest.mark.parametrize("length", [1, 4, 9, 25])
def test_a2c_returns_by_loops_through_both_kinds_of_ends(length):
    """Rewards to the end of the unroll or episode, then V of what is there unless terminal."""
    unroll = counter_unroll(length)
    advantage, target = estimates(pg.Config(lambda_=1.0, discount=GAMMA), unroll)
    seen, reward, discount, first = unroll.env_outputs
    value = 100 * seen[..., 0] + 10 * seen[..., 1] + seen[..., 2]
    for t in range(length):
        for b in range(reward.shape[1]):
            if first[t + 1, b]:
                assert advantage[t, b] == 0
                continue
            total, weight, s = 0.0, 1.0, t
            while s < length and not first[s + 1, b]:
                total += weight * reward[s + 1, b]
                weight *= GAMMA * discount[s + 1, b]
                s += 1
            total += weight * value[s, b]
            assert np.isclose(target[t, b], total, rtol=1e-5)
            assert np.isclose(advantage[t, b], total - value[t, b], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("algorithm", ["baseline", "reinforce"])
def test_reinforce_returns_are_those_of_the_one_episode(algorithm):
    register()
    envs = make_envs("test/Counter-v0", 3, 0)
    for copy, env in enumerate(envs.vector_env.envs):
        env.unwrapped.episode = copy % 2
    config = pg.Config(algorithm=algorithm, discount=GAMMA, num_envs=3)
    unroll, valid, _ = pg.Actor(envs, ActorCritic((3,), 10), config).unroll()
    seen, reward, discount, _ = (torch.from_numpy(column) for column in unroll.env_outputs)
    value = CounterNetwork()(seen)[1]
    mask = torch.from_numpy(valid)
    advantage, target = pg.advantages(
        config, reward[1:], GAMMA * discount[1:], value[:-1], value[-1], mask
    )
    for b, length in enumerate(valid.sum(0)):
        for t in range(length):
            rest = [GAMMA**k * float(reward[t + 1 + k, b]) for k in range(length - t)]
            assert math.isclose(target[t, b], sum(rest), rel_tol=1e-5)
            baseline = float(value[t, b]) if algorithm == "baseline" else 0.0
            assert math.isclose(advantage[t, b], sum(rest) - baseline, rel_tol=1e-3, abs_tol=1e-2)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_loss_by_loops(algorithm):
    config = pg.Config(
        algorithm=algorithm, discount=GAMMA, value_cost=0.3, entropy_cost=0.02, lambda_=0.7
    )
    unroll, network = counter_unroll(9), Counted()
    mask = torch.from_numpy(unroll.valid)
    loss, metrics = pg.loss_function(network, unroll, mask, config)
    advantage, target = estimates(config, unroll)
    seen = torch.from_numpy(unroll.env_outputs.observation)
    policy = value = entropy = 0.0
    count = int(unroll.valid.sum())
    for t, b in np.argwhere(unroll.valid):
        logits, v = network(seen[t, b][None])
        p = logits[0].softmax(-1).tolist()
        policy -= advantage[t, b].item() * math.log(p[unroll.agent_outputs.action[t, b]]) / count
        value += 0.5 * (v.item() - target[t, b].item()) ** 2 / count
        entropy -= sum(x * math.log(x) for x in p) / count
    cost = 0.0 if algorithm == "reinforce" else 0.3
    assert math.isclose(metrics["policy_loss"].item(), policy, rel_tol=1e-4)
    assert math.isclose(loss.item(), policy + cost * value - 0.02 * entropy, rel_tol=1e-4)


def test_no_gradient_flows_through_targets():
    unroll, network = counter_unroll(6), Counted()
    config = pg.Config(discount=GAMMA, value_cost=1.0)
    mask = torch.from_numpy(unroll.valid)
    _, metrics = pg.loss_function(network, unroll, mask, config)
    metrics["value_loss"].backward()
    _, target = estimates(config, unroll)
    value = CounterNetwork()(torch.from_numpy(unroll.env_outputs.observation))[1][:-1]
    # d/ds ½ mean (s v − target)² at s = 1, the target held fast
    expected = ((value - target) * value)[mask].mean()
    assert torch.isclose(network.scale.grad, expected, rtol=1e-3)


def test_masked_rows_do_not_matter():
    unroll, network, config = counter_unroll(9), Counted(), pg.Config(discount=GAMMA)
    mask = torch.from_numpy(unroll.valid)
    before = pg.loss_function(network, unroll, mask, config)[0]
    unroll.agent_outputs.action[~unroll.valid] = 9
    assert torch.equal(before, pg.loss_function(network, unroll, mask, config)[0])
    unroll.agent_outputs.action[0, 0] = 9
    assert not torch.equal(before, pg.loss_function(network, unroll, mask, config)[0])


@pytest.mark.parametrize("algorithm", ["baseline", "reinforce"])
def test_one_episode_of_each_copy_counts_in_an_update(algorithm):
    """Those that others play while they wait are short: counting them would bias the mean."""
    result = pg.train(pg.Config(**QUICK, total_env_steps=2_000, algorithm=algorithm))
    assert result.metrics["episodes"] == result.learner_steps * QUICK["num_envs"]
    assert result.metrics["episode_return_mean"] == result.metrics["episode_length_mean"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_same_seed_is_the_same_run_and_another_is_not(algorithm):
    def run(seed: int):
        return pg.train(pg.Config(**QUICK, total_env_steps=1_500, seed=seed, algorithm=algorithm))

    first, again, other = run(3), run(3), run(4)
    assert_same_run(first, again)
    assert not same_parameters(first, other)


@pytest.mark.parametrize(
    "algorithm, env_id",
    [
        ("a2c", "CartPole-v1"),
        ("a2c", "Acrobot-v1"),
        ("reinforce", "CartPole-v1"),
        ("baseline", "rlbook/Catch-v0"),
    ],
)
def test_stopped_and_resumed_is_as_never_stopped(algorithm, env_id, tmp_path):
    settings = {**QUICK, "env_id": env_id, "algorithm": algorithm}
    whole, folder = pg.train(pg.Config(**settings, total_env_steps=3_000)), str(tmp_path / "run")
    half = pg.train(pg.Config(**settings, total_env_steps=1_500, run_dir=folder))
    assert not same_parameters(half, whole)
    resumed = pg.train(pg.Config(**settings, total_env_steps=3_000, resume=folder))
    assert_same_run(whole, resumed)


def test_an_interrupted_run_resumed_is_as_never_interrupted(tmp_path):
    settings = {**QUICK, "total_env_steps": 3_000}
    whole, folder = pg.train(pg.Config(**settings)), str(tmp_path / "run")
    with ctrl_c_at(1_000):
        half = pg.train(pg.Config(**settings, run_dir=folder))
    assert half.stopped_because == "interrupted"
    assert_same_run(whole, pg.train(pg.Config(**settings, resume=folder)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_learns_catch(algorithm):
    config = pg.Config(
        env_id="rlbook/Catch-v0",
        algorithm=algorithm,
        total_env_steps=300_000,
        stop_at_return=0.9,
        progress=False,
    )
    result = pg.train(config)
    assert result.stopped_because == "solved"
    assert result.evaluate(200, seed=5).mean >= 0.8
