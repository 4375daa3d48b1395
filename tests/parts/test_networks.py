"""Shapes, the dueling identity, and what acting draws."""

import numpy as np
import pytest
import torch

from rlbook.parts.acting import make_actor_critic
from rlbook.parts.networks import (
    ActorCritic,
    GreedyPolicy,
    MLPTorso,
    NatureTorso,
    QNetwork,
    ResNetTorso,
    SamplingPolicy,
    action_values,
    greedy_action,
    make_torso,
    sample_action,
)
from rlbook.parts.recurrent_q import make_q_network


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


def resnet_sizes(channels, fields):
    """Weights and biases of IMPALA's deep network, written down from figure 3, by layer."""

    def conv(inputs, outputs):
        return outputs * (3 * 3 * inputs + 1)

    return [
        *(conv(channels, 16), *[conv(16, 16)] * 4),  # conv, then two blocks of two
        *(conv(16, 32), *[conv(32, 32)] * 4),
        *(conv(32, 32), *[conv(32, 32)] * 4),
        256 * (32 * fields + 1),
    ]


def test_resnet_is_the_papers():
    torso = make_torso((4, 84, 84), (), frames="resnet")
    assert isinstance(torso, ResNetTorso) and torso.features == 256
    layers = [m for m in torso.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    counted = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    assert len(layers) == 15 + 1, "15 convolutions (figure 3) and one full connection"
    assert counted == resnet_sizes(4, 11 * 11)  # 84 → 42 → 21 → 11, halved and rounded up
    assert sum(counted) == 592 + 9_280 + 4_640 + 36_992 + 9_248 + 36_992 + 991_488
    frames = torch.randint(256, (2, 4, 84, 84), dtype=torch.uint8)
    assert torso(frames).shape == (2, 256) and (torso(frames) >= 0).all()
    assert torch.allclose(torso(frames), torso.layers(frames.float() / 255))


def test_resnet_in_the_papers_lab_has_the_papers_number_of_parameters():
    """Figure 3 says 1.6 million, on 72 × 96 colours, with the LSTM and what it is told besides."""
    torso = ResNetTorso(3, (72, 96))
    assert torso(torch.zeros(1, 3, 72, 96, dtype=torch.uint8)).shape == (1, 256)
    assert sum(p.numel() for p in torso.parameters()) == sum(resnet_sizes(3, 9 * 12))
    told = 256 + 1 + 9 + 64  # features, last reward, last of 9 actions, the instruction
    lstm = 4 * 256 * (told + 256 + 1)
    words = 1000 * 20 + 4 * 64 * (20 + 64 + 1)  # an embedding and an LSTM of 64
    heads = (9 + 1) * (256 + 1)
    total = sum(resnet_sizes(3, 9 * 12)) + lstm + words + heads
    assert round(total / 1e6, 1) == 1.6


def test_residual_blocks_add_to_what_comes_in():
    block = ResNetTorso(1, (4, 4)).layers[2]
    x = torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        block.second.weight.zero_()
        block.second.bias.fill_(0.25)
    assert torch.equal(block(x), x + 0.25)
    torch.nn.init.dirac_(block.first.weight)
    torch.nn.init.constant_(block.first.bias, -0.5)
    torch.nn.init.dirac_(block.second.weight)
    expected = x + (x.clamp(min=0) - 0.5).clamp(min=0) + 0.25
    assert torch.allclose(block(x), expected, atol=1e-6)


@pytest.mark.parametrize("torso", ["nature", "resnet"])
def test_every_network_takes_a_torso_for_frames(torso):
    frames = torch.randint(256, (2, 3, 4, 84, 84), dtype=torch.uint8)
    first = torch.zeros(2, 3, dtype=torch.bool)
    for lstm_size in (0, 8):
        q = make_q_network((4, 84, 84), 6, (), lstm_size, torso=torso)
        policy = make_actor_critic((4, 84, 84), 6, (), lstm_size, torso)
        size = {"nature": 512, "resnet": 256}[torso]
        assert q.torso.features == policy.torso.features == size
        if lstm_size:
            assert q(frames, first, q.initial_state(3))[0].shape == (2, 3, 6)
            assert policy(frames, first, policy.initial_state(3))[1].shape == (2, 3)
        else:
            assert q(frames[0]).shape == (3, 6) and policy(frames[0])[1].shape == (3,)


def test_an_unknown_torso_is_refused_even_where_there_are_no_frames():
    with pytest.raises(ValueError, match="torso: must be one of nature, resnet; got 'alexnet'"):
        make_torso((4,), (8,), frames="alexnet")


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
