"""Action values with or without memory behind one call, and how they act.

    make_q_network(…, lstm_size)    RecurrentQNetwork, or QNetwork where lstm_size is 0
    q_values(network, x, first, s)  q [T, B, A] of T rows, and the state after them
    QActor(network, B).values(x)    q [B, A] of one row, in numpy; carries the state, resets it
    q_policy(network)               for evaluation: the best action, state carried and reset

At a batch of 16 and an LSTM of 32 the arithmetic of one step takes some microseconds, and what
PyTorch does around it takes several times as long; so small networks act in numpy, on the very
memory of PyTorch's parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.parts.networks import GreedyPolicy, MLPTorso, QNetwork
from rlbook.parts.recurrent import RecurrentQNetwork, State

ArrayState = tuple[np.ndarray, np.ndarray]
"""(h, c), `[B, H]` each; H = 0 without memory."""
Step = Callable[[np.ndarray, ArrayState], tuple[np.ndarray, ArrayState]]
"""Observation `[B, ...]` and state → q `[B, A]` and the next state."""


def make_q_network(
    observation_shape: Sequence[int],
    num_actions: int,
    hidden_sizes: Sequence[int],
    lstm_size: int = 0,
    dueling: bool = True,
    torso: str = "nature",
) -> QNetwork | RecurrentQNetwork:
    """A network with memory if `lstm_size` is not 0."""
    shape = observation_shape, num_actions
    if lstm_size:
        return RecurrentQNetwork(*shape, lstm_size, hidden_sizes, dueling, torso)
    return QNetwork(*shape, hidden_sizes, dueling, torso)


def q_values(
    network: nn.Module, observation: Tensor, first: Tensor, state: State
) -> tuple[Tensor, State]:
    """q `[T, B, A]` of all rows `[T, B, ...]`, by either kind of network, and the state after."""
    if isinstance(network, RecurrentQNetwork):
        return network(observation, first, state)
    steps = observation.shape[:2]
    return network(observation.flatten(0, 1)).unflatten(0, steps), state


class QActor:
    """The action values of B copies of an environment, with a state for each.

    Args:
        network: its parameters must have their place already (after `Flat(network)`, say);
            whoever owns them may change them at any time.
        num_envs: B.
    """

    def __init__(self, network: nn.Module, num_envs: int) -> None:
        self.network = network
        size = network.core.hidden_size if isinstance(network, RecurrentQNetwork) else 0
        self.state: ArrayState = (np.zeros((num_envs, size), np.float32),) * 2
        """Of the LSTM before the next step."""
        self._step = numpy_step(network) or torch_step(network)

    def values(self, observation: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, ArrayState]:
        """q of what the copies show, `[B, A]`, and the state *before* it, `[B, H]` twice.

        Args:
            observation: `[B, ...]`.
            first: `[B]` bool, whose episode begins with it: their state is zeroed before.
        """
        before = self.state
        if first.any():
            keep = ~first[:, None]
            before = before[0] * keep, before[1] * keep
        q, self.state = self._step(observation, before)
        return q, before

    def state_dict(self) -> dict[str, Any]:
        """The recurrent state."""
        return {"state": [part.copy() for part in self.state]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        hidden, cell = state["state"]
        self.state = hidden.copy(), cell.copy()


class RecurrentGreedyPolicy:
    """Evaluates action values with memory by their best action: carries the state, resets it."""

    def __init__(self, network: RecurrentQNetwork) -> None:
        self.network = network

    def initial_state(self, num_envs: int) -> State:
        """Zeros."""
        return self.network.initial_state(num_envs)

    @torch.no_grad()
    def act(
        self, observation: np.ndarray, state: State, first: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, State]:
        """The best action of each row, and the next state."""
        rows = torch.from_numpy(observation).unsqueeze(0), torch.from_numpy(first).unsqueeze(0)
        q, state = self.network(*rows, state)
        return q[0].argmax(-1).numpy(), state


def q_policy(network: nn.Module) -> Any:
    """The policy that evaluates a network by its best action, with memory if it has one."""
    if isinstance(network, RecurrentQNetwork):
        return RecurrentGreedyPolicy(network)
    assert isinstance(network, QNetwork)
    return GreedyPolicy(network)


def torch_step(network: nn.Module) -> Step:
    """One step of any of the networks, in PyTorch."""

    @torch.no_grad()
    def step(observation: np.ndarray, state: ArrayState) -> tuple[np.ndarray, ArrayState]:
        first = torch.zeros(1, len(observation), dtype=torch.bool)
        before = torch.from_numpy(state[0]), torch.from_numpy(state[1])
        # Rows from another process are read-only, which PyTorch does not know.
        seen = torch.from_numpy(np.require(observation, None, "W"))
        q, after = q_values(network, seen.unsqueeze(0), first, before)
        return q[0].numpy(), (after[0].numpy(), after[1].numpy())

    return step


def numpy_step(network: nn.Module) -> Step | None:
    """One step in numpy; None unless the torso is an MLP of ReLUs, in float32."""
    if not isinstance(network, QNetwork | RecurrentQNetwork):
        return None
    if not isinstance(network.torso, MLPTorso) or network.advantage_head.weight.dtype.itemsize != 4:
        return None
    hidden = [_views(layer) for layer in list(network.torso.layers)[::2]]
    core = _lstm(network.core) if isinstance(network, RecurrentQNetwork) else None
    advantage_head = _views(network.advantage_head)
    value_head = None if network.value_head is None else _views(network.value_head)

    def step(observation: np.ndarray, state: ArrayState) -> tuple[np.ndarray, ArrayState]:
        features = observation.reshape(len(observation), -1)
        for weight, bias in hidden:
            features = features @ weight
            features += bias
            np.maximum(features, 0, out=features)
        if core is not None:
            state = core(features, state)
            features = state[0]
        q = features @ advantage_head[0] + advantage_head[1]
        if value_head is not None:
            q += features @ value_head[0] + value_head[1] - q.mean(-1, keepdims=True)
        return q, state

    return step


def _lstm(core: nn.LSTM) -> Callable[[np.ndarray, ArrayState], ArrayState]:
    """One step of an LSTM: x `[B, F]` and (h, c) → (h, c) after it."""
    views = {name: value.detach().numpy() for name, value in core.named_parameters()}
    in_weight, weight = views["weight_ih_l0"].T, views["weight_hh_l0"].T
    in_bias, bias, size = views["bias_ih_l0"], views["bias_hh_l0"], core.hidden_size

    def step(x: np.ndarray, state: ArrayState) -> ArrayState:
        gates = x @ in_weight
        gates += state[0] @ weight
        gates += in_bias + bias
        new = np.tanh(gates[:, 2 * size : 3 * size])
        gates *= 0.5  # 1 / (1 + e^-x) = (1 + tanh(x / 2)) / 2, which cannot overflow
        opened = 0.5 + 0.5 * np.tanh(gates)
        cell = opened[:, size : 2 * size] * state[1] + opened[:, :size] * new
        return opened[:, 3 * size :] * np.tanh(cell), cell

    return step


def _views(layer: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """(weight `[in, out]`, bias `[out]`) of a linear layer, as views."""
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().numpy().T, layer.bias.detach().numpy()
