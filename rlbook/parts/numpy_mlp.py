"""The forward pass of a small network in numpy, on the very memory of PyTorch's parameters.

At a batch of 32 and layers of 64 the arithmetic takes a few microseconds, and what PyTorch does
around each operation takes several times as long. Numpy does less around it. The arrays are views:
whoever changes the parameters (an optimiser, a copy from a server) changes what is computed here.
"""

from collections.abc import Callable

import numpy as np
from torch import nn

from rlbook.parts.networks import ActorCritic, MLPTorso, QNetwork

Forward = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Observations `[B, ...]` float32 → logits `[B, A]`, values `[B]`."""


def numpy_forward(network: nn.Module) -> Forward | None:
    """The forward pass of `network`; None unless it is an `ActorCritic` with one MLP of tanh.

    Must be made after the parameters were given their place (after `Flat(network)`, say), and anew
    when they get another.
    """
    if not isinstance(network, ActorCritic) or not isinstance(network.torso, MLPTorso):
        return None
    modules = list(network.torso.layers)
    if network.value_torso is not None or not all(isinstance(m, nn.Tanh) for m in modules[1::2]):
        return None
    hidden = [_views(layer) for layer in modules[::2]]
    policy, value = _views(network.policy_head), _views(network.value_head)

    def forward(observation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features = observation.reshape(len(observation), -1)
        for weight, bias in hidden:
            features = features @ weight
            features += bias
            np.tanh(features, out=features)
        logits = features @ policy[0]
        logits += policy[1]
        return logits, (features @ value[0] + value[1])[:, 0]

    return forward


def numpy_action_values(network: nn.Module) -> Callable[[np.ndarray], np.ndarray] | None:
    """Observations `[B, ...]` float32 → q `[B, A]`; None unless it is a `QNetwork` with an MLP.

    Must be made after the parameters were given their place, as `numpy_forward`.
    """
    if not isinstance(network, QNetwork) or not isinstance(network.torso, MLPTorso):
        return None
    modules = list(network.torso.layers)
    if not all(isinstance(m, nn.ReLU) for m in modules[1::2]):
        return None
    hidden, advantage = [_views(layer) for layer in modules[::2]], _views(network.advantage_head)
    value = None if network.value_head is None else _views(network.value_head)

    def forward(observation: np.ndarray) -> np.ndarray:
        features = observation.reshape(len(observation), -1)
        for weight, bias in hidden:
            features = features @ weight
            features += bias
            np.maximum(features, 0, out=features)
        q = features @ advantage[0]
        q += advantage[1]
        if value is not None:
            q = features @ value[0] + value[1] + q - q.mean(-1, keepdims=True)
        return q

    return forward


def _views(layer: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """(weight `[in, out]`, bias `[out]`) of a linear layer, as views."""
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().numpy().T, layer.bias.detach().numpy()
