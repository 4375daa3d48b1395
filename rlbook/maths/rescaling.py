"""Value rescaling of R2D2: learn big and small returns with one network, rewards not clipped.

h squeezes values about like a square root but keeps an inverse, so that targets can be built as
h(r + γ h⁻¹(Q)) (Pohlen et al., arXiv:1805.11593; Kapturowski et al., R2D2, ICLR 2019, section 2.3).
Both functions are written so that nothing cancels near 0: the textbook form of h⁻¹ loses all
digits there in float32.
"""

import torch
from torch import Tensor

from rlbook.maths.checks import check_floats, check_number
from rlbook.maths.returns import n_step_returns


def h(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """h(x) = sign(x) (√(|x| + 1) - 1) + ε x, any shape, differentiable.

    Raises:
        ValueError: `x` is not a float32 or float64 tensor, or ε < 0.
    """
    check_floats(x=x)
    check_number("epsilon", epsilon, least=0.0)
    # √(|x| + 1) - 1 = |x| / (√(|x| + 1) + 1)
    return x / ((x.abs() + 1).sqrt() + 1) + epsilon * x


def h_inverse(x: Tensor, epsilon: float = 1e-3) -> Tensor:
    """h⁻¹(x) = sign(x) (((√(1 + 4ε(|x| + 1 + ε)) - 1) / 2ε)² - 1), any shape, differentiable.

    With s the root and u = (s - 1) / 2ε = 2 (|x| + 1 + ε) / (s + 1), the result is sign(x) (u² -
    1). u - 1 is |x| times a factor that has no difference of near numbers, and u² - 1 = (u - 1)(u +
    1); ε = 0 needs no special case.

    Raises:
        ValueError: `x` is not a float32 or float64 tensor, or ε < 0.
    """
    check_floats(x=x)
    check_number("epsilon", epsilon, least=0.0)
    size = x.abs()
    root = (1 + 4 * epsilon * (size + 1 + epsilon)).sqrt()
    slope = (2 - 4 * epsilon / (root + (1 + 2 * epsilon))) / (root + 1)  # u - 1 = |x| slope
    return x * slope * (size * slope + 2)


@torch.no_grad()
def rescaled_n_step_returns(
    *,
    rewards: Tensor,
    discounts: Tensor,
    values: Tensor,
    n: int,
    epsilon: float | None = 1e-3,
    valid: Tensor | None = None,
) -> Tensor:
    """h(Σ_{k<n} γ^k r_{t+k} + γ^n h⁻¹(V(x_{t+n}))): targets for values learnt as h(V).

    R2D2 (Kapturowski et al., ICLR 2019, section 2.3, equation 1), where V is the target network's
    value of the online network's best action.

    Args:
        rewards: `[T, ...]`, r_t.
        discounts: `[T, ...]`, γ_t: gamma, or 0 at a termination.
        values: `[T + 1, ...]`, V(x_t), rescaled.
        n: steps of reward, at least 1; fewer where the rows or an episode end.
        epsilon: ε of h; None learns V as it is: h(x) = x.
        valid: bool `[T, ...]`, False where x_t is the last of an episode and on padding.

    Returns:
        `[T, ...]`; without gradient.

    Raises:
        ValueError: shapes or dtypes differ, n < 1, or ε < 0.
    """
    plain = values if epsilon is None else h_inverse(values, epsilon)
    returns = n_step_returns(
        rewards=rewards,
        discounts=discounts,
        values=plain[:-1],
        bootstrap_value=plain[-1],
        n=n,
        valid=valid,
    )
    return returns if epsilon is None else h(returns, epsilon)
