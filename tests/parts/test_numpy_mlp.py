"""The forward pass in numpy: the same numbers as PyTorch's, on the same memory."""

import numpy as np
import pytest
import torch
from torch import nn

from rlbook.parts.flat import Flat
from rlbook.parts.networks import ActorCritic, QNetwork
from rlbook.parts.numpy_mlp import numpy_action_values, numpy_forward
from rlbook.parts.recurrent import RecurrentActorCritic


@pytest.mark.parametrize("shape", [(4,), (3, 5)])
@pytest.mark.parametrize("hidden", [(16,), (64, 64), (32, 16, 8)])
def test_numpy_says_what_pytorch_says(shape, hidden):
    torch.manual_seed(0)
    network = ActorCritic(shape, 3, hidden)
    nn.init.normal_(network.policy_head.bias)
    nn.init.normal_(network.value_head.bias)
    forward = numpy_forward(network)
    observation = np.random.default_rng(0).normal(size=(32, *shape)).astype(np.float32)
    before = observation.copy()
    logits, values = forward(observation)
    wanted = network(torch.from_numpy(observation))
    assert np.allclose(logits, wanted[0].detach().numpy(), atol=1e-6)
    assert np.allclose(values, wanted[1].detach().numpy(), atol=1e-6)
    assert logits.dtype == np.float32 and (logits.shape, values.shape) == ((32, 3), (32,))
    assert np.array_equal(observation, before)


def test_it_follows_the_parameters():
    network = ActorCritic((4,), 2, (8,))
    flat = Flat(network)
    forward = numpy_forward(network)
    x = np.ones((1, 4), np.float32)
    flat.vector.copy_(torch.randn(len(flat.vector)))
    assert np.allclose(forward(x)[0], network(torch.from_numpy(x))[0].detach().numpy(), atol=1e-5)


def test_what_it_cannot_do_is_left_to_pytorch():
    assert numpy_forward(ActorCritic((4, 84, 84), 2)) is None
    assert numpy_forward(ActorCritic((4,), 2, shared_torso=False)) is None
    assert numpy_forward(RecurrentActorCritic((4,), 2)) is None


@pytest.mark.parametrize("dueling", [True, False])
def test_action_values_in_numpy_are_those_of_pytorch(dueling):
    torch.manual_seed(0)
    flat = Flat(network := QNetwork((4,), 3, (32, 16), dueling))
    forward = numpy_action_values(network)
    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    for _ in range(2):
        wanted = network(torch.from_numpy(x)).detach().numpy()
        assert np.allclose(forward(x), wanted, atol=1e-6) and forward(x).dtype == np.float32
        flat.vector.copy_(torch.randn(len(flat.vector)) * 0.1)
    assert numpy_action_values(QNetwork((4, 84, 84), 3)) is None
    assert numpy_action_values(ActorCritic((4,), 2)) is None
