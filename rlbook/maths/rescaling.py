"""Value rescaling of R2D2: learn big and small returns with one network, rewards not clipped.

h squeezes values about like a square root but keeps an inverse, so that targets can be built as
h(r + γ h⁻¹(Q)) (Pohlen et al., arXiv:1805.11593; Kapturowski et al., R2D2, ICLR 2019, section 2.3).
Both functions are written so that nothing cancels near 0: the textbook form of h⁻¹ loses all
digits there in float32.
"""

from torch import Tensor

from rlbook.maths.checks import check_floats, check_number


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
