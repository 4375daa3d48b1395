"""All parameters of a network as one vector, and all gradients as another.

    vector     [P]  │ weight 0 │ bias 0 │ weight 1 │ …     the network's parameters are views of it
    gradients  [P]  │ its grad │  …              │ w │    backward() adds into it

What travels, is split over servers, compressed or clipped is then a slice of one array. Views stay
views as long as nobody replaces them: `zero_grad()` of PyTorch drops gradients, so zero the vector.
"""

import torch
from torch import nn


class Flat:
    """The two vectors of a network, whose parameters and gradients become views of them.

    Args:
        network: its parameters must share one dtype and live on one device.
    """

    def __init__(self, network: nn.Module) -> None:
        parameters = list(network.parameters())
        self.vector = torch.cat([p.detach().reshape(-1) for p in parameters])
        """`[P]`, the parameters one after the other, in the order of `network.parameters()`."""
        self.weighted = self.vector.new_zeros(len(self.vector) + 1)
        """`[P + 1]`, the gradients and behind them how much they count, to be added up at once."""
        self.gradients = self.weighted[:-1]
        """`[P]`, likewise."""
        self.vector.grad = self.gradients
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            parameter.data = self.vector[start:end].view(parameter.shape)
            parameter.grad = self.gradients[start:end].view(parameter.shape)
            start = end

    def clip(self, max_norm: float) -> float:
        """Scales the gradient down to Euclidean norm `max_norm`; returns its norm before."""
        return clip_to_norm(self.gradients, max_norm)

    def clipped(self, max_norm: float) -> float | torch.Tensor:
        """The same; from a GPU the norm comes as a tensor, for which nobody has to wait."""
        if not self.gradients.is_cuda:
            return self.clip(max_norm)
        norm = torch.linalg.vector_norm(self.gradients)
        scale = max_norm / norm.double().clamp(min=1e-30)  # as finely as the host divides
        self.gradients.mul_(scale.clamp(max=1.0).to(norm.dtype))
        return norm


def clip_to_norm(gradient: torch.Tensor, max_norm: float) -> float:
    """Scales a vector `[P]` down to Euclidean norm `max_norm`, in place; returns its norm before.

    Unlike `clip_grad_norm_` of PyTorch, which divides by the norm + 1e-6, to that very norm.
    """
    norm = torch.linalg.vector_norm(gradient).item()
    if norm > max_norm:
        gradient.mul_(max_norm / norm)
    return norm
