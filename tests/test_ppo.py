"""PPO: its batch and loss against loops, truncation, same seed = same run, resuming, learning."""

import math

import numpy as np
import pytest
import torch

from rlbook import ppo
from rlbook.data import AgentOutput
from rlbook.maths.losses import normalize_advantages
from rlbook.parts.envs import make_envs
from rlbook.parts.networks import ActorCritic
from rlbook.parts.unroll import collect_unroll
from tests.counters import CounterNetwork, register
from tests.runs import assert_same_run, ctrl_c_at, same_parameters

QUICK = {"progress": False, "num_envs": 8, "log_every_env_steps": 700}
ENVS = ["CartPole-v1", "rlbook/Catch-v0", "Acrobot-v1"]


def counter_unroll(length: int, copies: int = 3):
    register()
    envs = make_envs("test/Counter-v0", copies, 0)

    def act(observation):
        logits, value = CounterNetwork()(torch.from_numpy(observation))
        return AgentOutput(observation[:, 2].astype(np.int64), logits.numpy(), value.numpy())

    return collect_unroll(envs, act, length)


def advantages_by_loops(unroll, gamma: float, lambda_: float) -> list[float]:
    """Σ_k (γλ)^k δ_{t+k} over the rest of the episode within the unroll, row by row.

    A termination ends the sum with δ = r − V; a truncation with δ = r + γ V(final) − V.
    """
    seen, reward, discount, first = unroll.env_outputs
    values = 100 * seen[..., 0] + 10 * seen[..., 1] + seen[..., 2]
    found = []
    for t in range(len(reward) - 1):
        for b in range(reward.shape[1]):
            if first[t + 1, b]:
                continue
            total, weight = 0.0, 1.0
            for s in range(t, len(reward) - 1):
                if first[s + 1, b]:
                    break
                after = gamma * discount[s + 1, b] * values[s + 1, b]
                total += weight * (reward[s + 1, b] + after - values[s, b])
                weight *= gamma * lambda_
                if discount[s + 1, b] == 0:
                    break
            found.append(total)
    return found


@pytest.mark.parametrize("length", [1, 2, 7, 25])
@pytest.mark.parametrize("gamma, lambda_", [(0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_by_loops_through_both_kinds_of_ends(length, gamma, lambda_):
    unroll = counter_unroll(length)
    config = ppo.Config(discount=gamma, gae_lambda=lambda_)
    batch = ppo.make_batch(CounterNetwork(), unroll, config)
    expected = advantages_by_loops(unroll, gamma, lambda_)
    assert len(batch.advantage) == len(expected) == unroll.valid.sum()
    assert np.allclose(batch.advantage, expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(batch.target, batch.advantage + batch.behaviour_value)
    assert torch.equal(batch.action, batch.observation[:, 2].long()), "rows stay together"
    assert torch.equal(batch.behaviour_value, CounterNetwork()(batch.observation)[1])


@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_the_loss_by_loops(value_clip):
    torch.manual_seed(0)
    network, n = ActorCritic((4,), 3, (8,)).double(), 11
    config = ppo.Config(clip=0.1, value_cost=0.7, entropy_cost=0.03, value_clip=value_clip)
    batch = ppo.Batch(
        torch.randn(n, 4, dtype=torch.float64),
        torch.randint(3, (n,)),
        torch.randn(n, dtype=torch.float64) * 0.3 - 1,
        torch.randn(n, dtype=torch.float64),
        torch.randn(n, dtype=torch.float64),
        torch.randn(n, dtype=torch.float64),
    )
    loss, metrics = ppo.loss_function(network, batch, config)
    logits, values = network(batch.observation)
    advantages = normalize_advantages(batch.advantage)
    policy = value = entropy = clipped = 0.0
    for i in range(n):
        p = logits[i].softmax(-1).tolist()
        ratio = p[batch.action[i]] / math.exp(batch.behaviour_log_prob[i])
        a, v = advantages[i].item(), values[i].item()
        policy -= min(ratio * a, min(max(ratio, 0.9), 1.1) * a) / n
        clipped += (abs(ratio - 1) > 0.1) / n
        error = (v - batch.target[i].item()) ** 2
        if value_clip is not None:
            old = batch.behaviour_value[i].item()
            near = old + min(max(v - old, -value_clip), value_clip)
            error = max(error, (near - batch.target[i].item()) ** 2)
        value += 0.5 * error / n
        entropy -= sum(x * math.log(x) for x in p) / n
    assert math.isclose(loss.item(), policy + 0.7 * value - 0.03 * entropy, rel_tol=1e-9)
    assert math.isclose(metrics["entropy"].item(), entropy, rel_tol=1e-9)
    assert math.isclose(metrics["clip_fraction"].item(), clipped, rel_tol=1e-9)
    assert 0 < clipped < 1


def test_advantages_stay_as_they_are_on_request():
    torch.manual_seed(0)
    network, batch = ActorCritic((4,), 3), ppo.Batch(*torch.randn(6, 11, 4).unbind())
    rows = ppo.Batch(batch.observation, torch.randint(3, (11,)), *(c[:, 0] for c in batch[2:]))
    plain = ppo.Config(normalize_advantages=False)
    normal = rows._replace(advantage=normalize_advantages(rows.advantage))
    default, _ = ppo.loss_function(network, rows, ppo.Config())
    assert torch.equal(ppo.loss_function(network, normal, plain)[0], default)
    assert not torch.equal(ppo.loss_function(network, rows, plain)[0], default)


def test_minibatches_visit_every_sample_once_an_epoch():
    learner = ppo.Learner(ActorCritic((4,), 2), ppo.Config(epochs=3, minibatch_size=10))
    parts = [part.tolist() for part in learner.minibatches(34)]
    assert len(parts) == 3 * round(34 / 10) and {len(part) for part in parts} == {11, 12}
    for epoch in range(3):
        visited = sum(parts[3 * epoch : 3 * epoch + 3], [])
        assert sorted(visited) == list(range(34)) and visited != list(range(34))
    assert parts[:3] != parts[3:6], "each epoch has an order of its own"


def test_the_step_size_falls_to_zero_if_it_is_annealed():
    config = ppo.Config(**QUICK, total_env_steps=4_000, anneal=True, env_id="rlbook/Catch-v0")
    sizes = []
    update = ppo.Learner.update

    def watching(self, unroll):
        metrics = update(self, unroll)
        sizes.append(self.optimizer.param_groups[0]["lr"] / config.learning_rate)
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo.Learner, "update", watching)
        ppo.train(config)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 0.9 and sizes[-1] == 0.0


def test_a_batch_without_a_valid_row_changes_nothing():
    """One copy and T = 1: now and then the only row leads to a reset."""
    config = ppo.Config(
        env_id="rlbook/Catch-v0", num_envs=1, unroll_length=1, total_env_steps=40, progress=False
    )
    network = ppo.train(config).policy.network
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_the_same_seed_is_the_same_run_and_another_is_not():
    def run(seed: int):
        return ppo.train(ppo.Config(**QUICK, total_env_steps=2_500, seed=seed))

    first, again, other = run(3), run(3), run(4)
    assert_same_run(first, again)
    assert not same_parameters(first, other)
    assert first.curves["loss"].tolist() != other.curves["loss"].tolist()


@pytest.mark.parametrize("env_id", ENVS)
def test_stopped_and_resumed_is_as_never_stopped(env_id, tmp_path):
    settings = {**QUICK, "env_id": env_id}
    whole = ppo.train(ppo.Config(**settings, total_env_steps=4_000))
    folder = str(tmp_path / "run")
    half = ppo.train(ppo.Config(**settings, total_env_steps=2_000, run_dir=folder))
    assert half.env_steps < 2_400 and not same_parameters(half, whole)
    resumed = ppo.train(ppo.Config(**settings, total_env_steps=4_000, resume=folder))
    assert_same_run(whole, resumed)


def test_an_annealed_run_interrupted_and_resumed_is_as_never_interrupted(tmp_path):
    settings = {**QUICK, "total_env_steps": 4_000, "anneal": True, "epochs": 3}
    whole, folder = ppo.train(ppo.Config(**settings)), str(tmp_path / "run")
    with ctrl_c_at(1_500):
        half = ppo.train(ppo.Config(**settings, run_dir=folder))
    assert half.stopped_because == "interrupted" and 1_500 <= half.env_steps < 1_800
    assert_same_run(whole, ppo.train(ppo.Config(**settings, resume=folder)))


def test_it_learns_catch():
    config = ppo.Config(
        env_id="rlbook/Catch-v0", total_env_steps=200_000, stop_at_return=0.9, progress=False
    )
    result = ppo.train(config)
    assert result.stopped_because == "solved"
    assert result.evaluate(200, seed=5).mean >= 0.8
