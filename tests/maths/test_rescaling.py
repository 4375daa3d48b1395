"""Value rescaling: the paper's formulas, a round trip, and float32 near 0."""

import pytest
import torch

from rlbook.maths.rescaling import h, h_inverse

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
