"""Value rescaling: the paper's formulas, a round trip, and float32 near 0."""

import pytest
import torch

from rlbook.maths.rescaling import h, h_inverse, rescaled_n_step_returns

X = torch.cat([-torch.logspace(-8, 5, 60), torch.zeros(1), torch.logspace(-8, 5, 60)]).double()


def paper_h(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x.sign() * ((x.abs() + 1).sqrt() - 1) + epsilon * x


def paper_h_inverse(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    root = (1 + 4 * epsilon * (x.abs() + 1 + epsilon)).sqrt()
    return x.sign() * (((root - 1) / (2 * epsilon)) ** 2 - 1)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-2, 0.5])
def test_the_papers_formulas(epsilon: float) -> None:
    torch.testing.assert_close(h(X, epsilon), paper_h(X, epsilon), rtol=1e-9, atol=1e-12)
    expected = paper_h_inverse(X, epsilon)
    torch.testing.assert_close(h_inverse(X, epsilon), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 1e-2])
def test_round_trip_to_the_last_digits(epsilon: float) -> None:
    torch.testing.assert_close(h_inverse(h(X, epsilon), epsilon), X, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(h(h_inverse(X, epsilon), epsilon), X, rtol=1e-12, atol=0.0)


def test_float32_keeps_its_digits_near_zero_where_the_papers_form_loses_them() -> None:
    x = X.float()
    torch.testing.assert_close(h_inverse(h(x)), x, rtol=2e-6, atol=0.0)
    small = torch.tensor([1e-4, -1e-5])
    assert not torch.allclose(paper_h_inverse(paper_h(small, 1e-3), 1e-3), small, rtol=1e-2)


def test_odd_growing_and_known_values() -> None:
    torch.testing.assert_close(h(-X), -h(X))
    assert (h(X.sort().values).diff() > 0).all()
    expected = [(3 + 1) ** 0.5 - 1 + 1e-3 * 3, -((8 + 1) ** 0.5 - 1 + 1e-3 * 8)]
    torch.testing.assert_close(h(torch.tensor([3.0, -8.0])), torch.tensor(expected))


def test_gradients_are_the_derivatives() -> None:
    x = torch.tensor([-5.0, -0.1, 0.0, 0.1, 5.0], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(h(x).sum(), x)
    torch.testing.assert_close(found, 1 / (2 * (x.detach().abs() + 1).sqrt()) + 1e-3)
    assert torch.autograd.gradcheck(h_inverse, (x[[0, 1, 3, 4]].detach().requires_grad_(),))


def test_dtype_and_refusals() -> None:
    assert h(X.float()).dtype == h_inverse(X.float()).dtype == torch.float32
    assert h(X).dtype == h_inverse(X).dtype == torch.float64
    with pytest.raises(ValueError, match="epsilon"):
        h(X, -1.0)
    with pytest.raises(ValueError, match="x must be float32"):
        h_inverse(torch.tensor([1]))


@pytest.mark.parametrize("epsilon", [None, 1e-3, 0.1])
@pytest.mark.parametrize("n", [1, 3, 20])
def test_rescaled_returns_by_loops(n: int, epsilon: float | None) -> None:
    """Two columns: one goes on to its end, the other's episode is truncated at row 4."""
    generator = torch.Generator().manual_seed(n)
    rewards = 10 * torch.randn(7, 2, generator=generator).double()
    discounts = torch.full((7, 2), 0.9).double()
    discounts[5, 0] = 0.0  # a termination
    values = torch.randn(8, 2, generator=generator).double()
    valid = torch.ones(7, 2, dtype=torch.bool)
    valid[4:, 1] = False  # x_4 is the last that is seen; behind it there is padding
    found = rescaled_n_step_returns(
        rewards=rewards, discounts=discounts, values=values, n=n, epsilon=epsilon, valid=valid
    )
    for b, end in ((0, 7), (1, 4)):
        for t in range(end):
            total, factor, at = 0.0, 1.0, t
            while at < min(t + n, end):
                total += factor * rewards[at, b].item()
                factor *= discounts[at, b].item()
                at += 1
            value = values[at, b]
            plain = value if epsilon is None else paper_h_inverse(value, epsilon)
            wanted = torch.as_tensor(total + factor * plain)
            wanted = wanted if epsilon is None else paper_h(wanted, epsilon)
            torch.testing.assert_close(found[t, b], wanted, rtol=1e-9, atol=1e-9)
    assert not found.requires_grad


def test_large_rewards_make_small_targets_and_the_scale_comes_back() -> None:
    reward = torch.tensor([[1e4]]).double()
    rows = {"rewards": reward, "discounts": torch.zeros(1, 1).double()}
    target = rescaled_n_step_returns(**rows, values=torch.zeros(2, 1).double(), n=1)
    assert 100 < target.item() < 120
    torch.testing.assert_close(h_inverse(target), reward)
