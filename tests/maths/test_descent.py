"""Optimisers as functions: against the formulas by hand, and against those that own their state."""

import numpy as np
import pytest
import torch

from rlbook.maths.descent import adam_move, rmsprop_move
from rlbook.parts.optim import RMSProp


def gradients(steps: int = 5, size: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for _ in range(steps)]


def test_two_steps_of_rmsprop_by_hand():
    statistics = torch.zeros(1, 1)
    first = rmsprop_move(
        statistics=statistics,
        gradient=torch.tensor([3.0]),
        learning_rate=0.5,
        decay=0.9,
        epsilon=0.1,
    )
    assert torch.allclose(first.statistics, torch.tensor([[0.1 * 9]]))
    assert torch.allclose(first.root, torch.tensor([(0.1 * 9 + 0.1) ** 0.5]))  # ε inside the root
    assert first.along.item() == 3.0 and first.scale == 0.5
    assert statistics.item() == 0.0, "what is shared must not be changed under others' eyes"
    second = rmsprop_move(
        statistics=first.statistics,
        gradient=torch.tensor([-1.0]),
        learning_rate=0.5,
        decay=0.9,
        epsilon=0.1,
    )
    assert torch.allclose(second.statistics, torch.tensor([[0.9 * 0.9 + 0.1 * 1]]))


def moved(parameters: torch.Tensor, move) -> torch.Tensor:
    return parameters.addcdiv(move.along, move.root, value=-move.scale)


def test_rmsprop_and_adam_move_as_the_optimisers_do_bit_for_bit():
    start = torch.linspace(-1, 1, 7)
    cases = (
        (RMSProp, {"eps": 0.01}, lambda step: (rmsprop_move, {"epsilon": 0.01}), 1),
        (torch.optim.Adam, {}, lambda step: (adam_move, {"step": step}), 2),
    )
    for optimizer_type, options, rule_at, kinds in cases:
        theirs = start.clone()
        theirs.grad = torch.zeros_like(theirs)
        optimizer = optimizer_type([theirs], lr=0.03, **options)
        mine, statistics = start.clone(), torch.zeros(kinds, 7)
        for step, gradient in enumerate(gradients(), start=1):
            theirs.grad.copy_(gradient)
            optimizer.step()
            rule, more = rule_at(step)
            move = rule(statistics=statistics, gradient=gradient, learning_rate=0.03, **more)
            mine, statistics = moved(mine, move), move.statistics
            assert torch.equal(mine, theirs), optimizer_type
        assert not torch.equal(mine, start)


def test_adam_s_first_step_has_the_size_of_the_learning_rate_only_with_the_right_count():
    gradient = torch.tensor([0.5, -2.0])
    nothing = torch.zeros(2, 2)
    first = adam_move(statistics=nothing, gradient=gradient, learning_rate=0.1, step=1)
    step = moved(torch.zeros(2), first)
    assert torch.allclose(step, torch.tensor([-0.1, 0.1]), atol=1e-6)
    late = adam_move(statistics=nothing, gradient=gradient, learning_rate=0.1, step=10_000)
    ratio = moved(torch.zeros(2), late) / step
    assert torch.allclose(ratio, torch.tensor(0.1 / 0.001**0.5), rtol=1e-3)


@pytest.mark.parametrize(
    ("rule", "wrong", "words"),
    [
        (rmsprop_move, {"decay": 1.5}, "decay must be"),
        (rmsprop_move, {"epsilon": 0.0}, "epsilon must be"),
        (rmsprop_move, {"gradient": torch.zeros(3)}, "gradient"),
        (adam_move, {"step": 0}, "step must be"),
    ],
)
def test_bad_arguments_are_refused(rule, wrong, words):
    good = {"statistics": torch.zeros(2, 2), "gradient": torch.ones(2), "learning_rate": 0.1}
    good |= {"step": 1} if rule is adam_move else {}
    assert np.isfinite(rule(**good).root).all()
    with pytest.raises(ValueError, match=words):
        rule(**{**good, **wrong})
