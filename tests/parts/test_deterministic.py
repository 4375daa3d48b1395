"""A deterministic policy and its critic: bounds, noise, and a gradient of each in its own place."""

import numpy as np
import pytest
import torch

from rlbook.data import Transition
from rlbook.parts.deterministic import (
    BEST,
    TAKEN,
    ActionTrail,
    DeterministicNetwork,
    DeterministicPolicy,
    dpg_gradient,
    noisy_actions,
    require_bounded,
)
from rlbook.parts.envs import make_envs
from rlbook.parts.flat import Flat
from rlbook.parts.replay import Sample

LOW, HIGH = np.array([-1.0, 2.0], np.float32), np.array([3.0, 2.5], np.float32)
ROWS = 12


def network(seed: int) -> DeterministicNetwork:
    torch.manual_seed(seed)
    made = DeterministicNetwork((3,), LOW, HIGH, (8,))
    for parameter in made.parameters():
        parameter.data.mul_(3.0)
    return made


def batch(seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    seen, after = rng.normal(size=(2, ROWS, 3)).astype(np.float32)
    actions = rng.uniform(LOW, HIGH, (ROWS, 2)).astype(np.float32)
    reward = rng.normal(size=ROWS).astype(np.float32)
    items = Transition(seen, actions, reward, np.full(ROWS, 0.9, np.float32), after)
    weights = rng.uniform(0.1, 1, ROWS).astype(np.float32)
    return Sample(items, np.arange(ROWS), np.full(ROWS, 0.1), weights)


def test_actions_stay_within_their_bounds_and_without_noise_are_the_policys():
    one, seen = network(1), 5 * np.random.default_rng(0).normal(size=(400, 3)).astype(np.float32)
    rng = np.random.default_rng(1)
    plain, _ = DeterministicPolicy(one).act(seen, None, np.zeros(400, bool), rng)
    assert (plain >= LOW).all() and (plain <= HIGH).all() and plain.dtype == np.float32
    quiet, _ = noisy_actions(one, seen, np.zeros(400), rng)
    assert np.array_equal(quiet, plain)
    loud, _ = noisy_actions(one, seen, np.full(400, 5.0), rng)
    assert (loud >= LOW).all() and (loud <= HIGH).all() and (loud == LOW).any()


def test_noise_is_in_halves_of_the_range_and_each_copys_own():
    one, seen = network(1), np.zeros((4_000, 3), np.float32)
    for parameter in one.policy_head.parameters():
        parameter.data.zero_()  # the middle of the range: nothing is cut off
    scale = np.repeat([0.01, 0.2], 2_000)
    actions, _ = noisy_actions(one, seen, scale, np.random.default_rng(0))
    off = (actions - (LOW + HIGH) / 2) / ((HIGH - LOW) / 2)
    assert off[:2_000].std(0) == pytest.approx([0.01, 0.01], rel=0.1)
    assert off[2_000:].std(0) == pytest.approx([0.2, 0.2], rel=0.1)
    assert abs(np.corrcoef(off[2_000:].T)[0, 1]) < 0.1


def test_values_are_of_the_action_taken_and_of_the_policys_own():
    one, seen = network(1), np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    actions, q = noisy_actions(one, seen, np.ones(5), np.random.default_rng(1))
    with torch.no_grad():
        rows = torch.from_numpy(seen)
        taken, best = one.value(rows, torch.from_numpy(actions)), one.value(rows, one(rows))
    assert np.allclose(q[:, TAKEN], taken, atol=1e-5) and np.allclose(q[:, BEST], best, atol=1e-5)
    trail = ActionTrail(3, 0.9)
    assert np.array_equal(trail.best(q), q[:, BEST])
    assert np.array_equal(trail.taken(q, actions), q[:, TAKEN])


@pytest.mark.parametrize("steepness", [0.1, 30.0])  # ∇_a Q within ±1, and clipped
def test_each_part_gets_its_own_gradient(steepness):
    """By the chain rule on networks that share nothing."""
    online, target, sample = network(1), network(2), batch()
    online.critic_head.weight.data.mul_(steepness)
    seen, actions, reward, discount, after = map(torch.from_numpy, sample.items)
    with torch.no_grad():
        goal = reward + discount * target.value(after, target(after))
    errors = goal - online.value(seen, actions)
    loss = (torch.from_numpy(sample.weights) * errors**2).mean() / 2
    critic = [p for name, p in online.named_parameters() if name.startswith("critic")]
    policy = [p for name, p in online.named_parameters() if not name.startswith("critic")]
    expected = dict(zip(critic, torch.autograd.grad(loss, critic), strict=True))
    chosen = online(seen).detach().requires_grad_()
    (slope,) = torch.autograd.grad(online.value(seen, chosen).sum(), chosen)
    assert bool((slope.abs() > 1).any()) == (steepness > 1)
    climbed = -(slope.clamp(-1, 1) * online(seen)).sum() / ROWS
    expected |= dict(zip(policy, torch.autograd.grad(climbed, policy), strict=True))
    wanted = torch.cat([expected[p].reshape(-1) for p in online.parameters()])
    flat = Flat(online)
    absolute, metrics = dpg_gradient(flat, (online, target), sample)
    assert torch.allclose(flat.gradients, wanted, rtol=1e-4, atol=1e-6)
    assert np.allclose(absolute, errors.detach().abs().numpy(), atol=1e-4)
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    worth = online.value(seen, chosen).mean().item()
    assert metrics["policy_loss"].item() == pytest.approx(-worth, rel=1e-4)


def test_environments_without_bounded_vectors_of_numbers_are_refused():
    assert require_bounded(make_envs("Pendulum-v1", 1, 0), "x").shape == (1,)
    with pytest.raises(ValueError, match="but x needs a vector of float32 between finite bounds"):
        require_bounded(make_envs("CartPole-v1", 1, 0), "x")
