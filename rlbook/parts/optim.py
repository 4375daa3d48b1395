"""RMSProp as the papers of asynchronous and deep Q-learning have it: ε inside the root.

    s ← α s + (1 − α) g²                     running mean of the squared gradient
    m ← α m + (1 − α) g                      running mean of the gradient (if centred, else 0)
    x ← x − η g / √(s − m² + ε)

PyTorch's `RMSprop` adds ε outside the root: with the same ε the first steps differ by up to an
order of magnitude. Not centred: Tieleman & Hinton (2012, lecture 6.5), and A3C (Mnih et al., 2016,
section 4 and supplement 1). Centred: Graves (2013, "Generating sequences with recurrent neural
networks", equations 38–41, without their momentum), and DQN (Mnih et al., 2015, Methods).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RMSProp(torch.optim.Optimizer):
    """Steps of RMSProp, element by element: a vector in pieces moves as the whole one does.

    Args:
        params: tensors with gradients.
        lr: η, at least 0.
        alpha: α, how much of the running means is kept; 0 to 1.
        eps: ε, added inside the root; above 0.
        centered: subtract the square of the mean gradient.
        foreach: accepted for the sake of PyTorch's signature; only False or None.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 7e-4,
        alpha: float = 0.99,
        eps: float = 0.1,
        centered: bool = False,
        foreach: bool | None = None,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"lr: must be at least 0, got {lr}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: must be between 0 and 1, got {alpha}")
        if not eps > 0:
            raise ValueError(f"eps: must be above 0, got {eps}")
        if foreach:
            raise ValueError("foreach: must be False, one tensor is updated after the other")
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "centered": centered})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step with the gradients as they are; `closure` is evaluated first, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, alpha = self.state[parameter], group["alpha"]
        if not state:
            state["square"] = torch.zeros_like(parameter)
            if group["centered"]:
                state["mean"] = torch.zeros_like(parameter)
        square = state["square"].mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
        if group["centered"]:
            mean = state["mean"].mul_(alpha).add_(gradient, alpha=1 - alpha)
            square = square.addcmul(mean, mean, value=-1)
        root = square.add(group["eps"]).sqrt_()
        parameter.addcdiv_(gradient, root, value=-group["lr"])
