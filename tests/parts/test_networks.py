"""Shapes, the dueling identity, and what acting draws."""

import numpy as np
import pytest
import torch

from rlbook.parts.networks import (
    ActorCritic,
    GreedyPolicy,
    MLPTorso,
    NatureTorso,
    QNetwork,
    SamplingPolicy,
    action_values,
    greedy_action,
    make_torso,
    sample_action,
)


@pytest.mark.parametrize("shape, kind", [((4,), MLPTorso), ((1, 10, 5), MLPTorso)])
def test_small_observations_get_full_connection(shape, kind):
    torso = make_torso(shape, (8, 6))
    assert isinstance(torso, kind) and torso(torch.zeros(3, *shape)).shape == (3, 6)


def test_frames_get_the_papers_convolutions():
    torso = make_torso((4, 84, 84), ())
    assert isinstance(torso, NatureTorso)
    frames = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    assert torso(frames).shape == (2, 512)
    # 32·(8·8·4+1) + 64·(4·4·32+1) + 64·(3·3·64+1) + 512·(64·7·7+1), from the paper's sizes
    sizes = 32 * (256 + 1) + 64 * (512 + 1) + 64 * (576 + 1) + 512 * (3136 + 1)
    assert sum(p.numel() for p in torso.parameters()) == sizes
    assert torch.allclose(torso(frames), torso.layers(frames.float() / 255))


@pytest.mark.parametrize("shared", [True, False])
def test_actor_critic_shapes_and_torsos(shared):
    network = ActorCritic((4,), 3, (8,), shared_torso=shared)
    logits, values = network(torch.randn(5, 4))
    assert logits.shape == (5, 3) and values.shape == (5,)
    values.sum().backward()
    touched = any(p.grad is not None for p in network.torso.parameters())
    assert touched is shared, "the value reaches the policy's torso only if they share it"


def test_a_fresh_policy_is_almost_uniform():
    logits, _ = ActorCritic((4,), 5, (64, 64))(torch.randn(100, 4))
    assert (logits.softmax(-1) - 1 / 5).abs().max() < 0.05


def test_dueling_is_value_plus_centred_advantage():
    network = QNetwork((4,), 3, (8,), dueling=True)
    x = torch.randn(7, 4)
    features = network.torso(x)
    q, value = network(x), network.value_head(features)
    assert torch.allclose(q.mean(-1, keepdim=True), value, atol=1e-6)
    advantage = network.advantage_head(features)
    assert torch.allclose(q - value, advantage - advantage.mean(-1, keepdim=True), atol=1e-6)
    assert QNetwork((4,), 3, (8,)).value_head is None


def test_greedy_action_is_the_best_one():
    network = QNetwork((4,), 3, (8,))
    x = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    q = action_values(network, x)
    assert np.array_equal(q, network(torch.from_numpy(x)).detach().numpy())
    assert np.array_equal(greedy_action(network, x), q.argmax(-1))
    assert np.array_equal(GreedyPolicy(network).act(x, None, x, None)[0], q.argmax(-1))


class Biased(torch.nn.Module):
    """Always the same logits."""

    probabilities = (0.5, 0.3, 0.2)

    def forward(self, x):
        return torch.tensor(self.probabilities).log().expand(len(x), 3), x[:, 0]


def test_sampling_follows_the_policy():
    draws = 60_000
    output = sample_action(Biased(), np.ones((draws, 4), np.float32), np.random.default_rng(0))
    counts = np.bincount(output.action, minlength=3)
    expected = draws * np.array(Biased.probabilities)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 13.8  # 0.999 quantile, 2 degrees of freedom
    assert output.action.dtype == np.int64 and output.value[0] == 1.0


def test_sampling_uses_its_generator_alone():
    network, x = ActorCritic((4,), 3), np.ones((64, 4), np.float32)
    torch.manual_seed(0)
    first = sample_action(network, x, np.random.default_rng(1)).action
    torch.manual_seed(1)
    assert np.array_equal(sample_action(network, x, np.random.default_rng(1)).action, first)
    policy = SamplingPolicy(network)
    assert np.array_equal(policy.act(x, None, x, np.random.default_rng(1))[0], first)
    assert not np.array_equal(sample_action(network, x, np.random.default_rng(2)).action, first)
