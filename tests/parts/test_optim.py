"""RMSProp: the papers' formulas, the difference to PyTorch's, and refusals."""

import numpy as np
import pytest
import torch

from rlbook.parts.optim import RMSProp
from rlbook.plumbing.shard import OPTIMIZERS


def steps(optimizer_class, gradients, **options):
    x = torch.zeros(len(gradients[0]), dtype=torch.float64)
    x.grad = torch.zeros_like(x)
    optimizer = optimizer_class([x], **options)
    for gradient in gradients:
        x.grad.copy_(torch.tensor(gradient))
        optimizer.step()
    return x.numpy()


def by_hand(gradients, lr, alpha, eps, centered):
    x = square = mean = np.zeros(len(gradients[0]))
    for gradient in np.asarray(gradients):
        square = alpha * square + (1 - alpha) * gradient**2
        mean = alpha * mean + (1 - alpha) * gradient
        x = x - lr * gradient / np.sqrt(square - centered * mean**2 + eps)
    return x


@pytest.mark.parametrize("centered", [False, True])
def test_three_steps_are_the_formulas(centered):
    gradients = [[1.0, -2.0, 0.0], [0.5, 3.0, 1e-4], [-1.0, 0.0, 2.0]]
    options = {"lr": 0.1, "alpha": 0.9, "eps": 0.01, "centered": centered}
    assert np.allclose(steps(RMSProp, gradients, **options), by_hand(gradients, **options))


def test_epsilon_is_inside_the_root_unlike_pytorchs():
    """First step from g = 1e-3: η g / √((1 − α) g² + ε) against η g / (√((1 − α) g²) + ε)."""
    mine = steps(RMSProp, [[1e-3]], lr=1.0, alpha=0.99, eps=0.1)
    theirs = steps(torch.optim.RMSprop, [[1e-3]], lr=1.0, alpha=0.99, eps=0.1)
    assert mine[0] == pytest.approx(-1e-3 / (0.01 * 1e-6 + 0.1) ** 0.5)
    assert theirs[0] == pytest.approx(-1e-3 / (0.1 * 1e-3 + 0.1))


def test_dqns_is_centred_with_its_published_numbers():
    gradients = [[1.0, -2.0], [0.5, 3.0]]
    mine = steps(OPTIMIZERS["dqn_rmsprop"], gradients, lr=0.1)
    assert np.allclose(mine, by_hand(gradients, 0.1, 0.95, 0.01, True))


def test_a_state_put_back_goes_on():
    gradient = torch.tensor([1.0, -1.0])
    vectors = []
    for interrupted in (False, True):
        x = torch.zeros(2)
        x.grad = gradient.clone()
        optimizer = RMSProp([x], centered=True)
        optimizer.step()
        if interrupted:
            kept = optimizer.state_dict()
            optimizer = RMSProp([x], centered=True)
            optimizer.load_state_dict(kept)
        optimizer.step()
        vectors.append(x)
    assert torch.equal(*vectors)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lr": -1.0}, "lr: must be at least 0, got -1.0"),
        ({"alpha": 1.5}, "alpha: must be between 0 and 1, got 1.5"),
        ({"eps": 0.0}, "eps: must be above 0, got 0.0"),
        ({"foreach": True}, "foreach: must be False"),
    ],
)
def test_bad_numbers_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        RMSProp([torch.zeros(1)], **wrong)
