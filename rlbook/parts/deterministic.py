"""A deterministic policy and its critic, for actions that are numbers between bounds.

    observation ──► policy ──► action [N, D] ─┐
         └────────────────────────────────────┴─► critic ──► Q(x, a) [N]

The critic learns as a Q-network does; the policy climbs what the critic says: its gradient is the
mean of ∇_θ μ(x) ∇_a Q(x, a) at a = μ(x) (Silver et al., 2014, "Deterministic policy gradient
algorithms", equation 9; with deep networks Lillicrap et al., 2016, arXiv:1509.02971).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from rlbook.parts.envs import Envs
from rlbook.parts.flat import Flat
from rlbook.parts.n_step import Trail
from rlbook.parts.networks import MLPTorso, make_torso
from rlbook.parts.on_device import there, widened
from rlbook.parts.replay import Sample

TAKEN, BEST = 0, 1
"""Columns of the values that an actor notes: of the action taken, and of the policy's own."""


class DeterministicNetwork(nn.Module):
    """A policy μ and a critic Q in one module, so that one vector holds both.

    Args:
        observation_shape: of one observation.
        low, high: bounds of the action, `[D]`.
        hidden_sizes: of both torsos.
    """

    centre: Tensor
    reach: Tensor

    def __init__(
        self,
        observation_shape: Sequence[int],
        low: np.ndarray,
        high: np.ndarray,
        hidden_sizes: Sequence[int] = (128, 128),
    ) -> None:
        super().__init__()
        self.register_buffer("centre", torch.from_numpy((high + low) / 2))
        self.register_buffer("reach", torch.from_numpy((high - low) / 2))
        self.torso = make_torso(observation_shape, hidden_sizes)
        self.policy_head = nn.Linear(self.torso.features, len(low))
        inputs = int(np.prod(observation_shape)) + len(low)
        self.critic_torso = MLPTorso(inputs, hidden_sizes, nn.ReLU)
        self.critic_head = nn.Linear(self.critic_torso.features, 1)

    def forward(self, observation: Tensor) -> Tensor:
        """The policy's action for observations `[N, ...]`, `[N, D]`."""
        return self.centre + self.reach * torch.tanh(self.policy_head(self.torso(observation)))

    def value(self, observation: Tensor, action: Tensor) -> Tensor:
        """Q(x, a) of observations `[N, ...]` and actions `[N, D]`, `[N]`."""
        scaled = (action - self.centre) / self.reach
        rows = torch.cat([observation.flatten(1), scaled], -1)
        return self.critic_head(self.critic_torso(rows)).squeeze(-1)


class DeterministicPolicy:
    """Evaluates a deterministic policy without noise. No recurrent state."""

    def __init__(self, network: DeterministicNetwork) -> None:
        self.network = network

    def initial_state(self, num_envs: int) -> None:
        """No state."""

    @torch.inference_mode()
    def act(
        self, observation: np.ndarray, state: None, first: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, None]:
        """The policy's action for each row."""
        return self.network(torch.from_numpy(observation)).numpy(), None


class ActionTrail(Trail):
    """A `Trail` of actions that are numbers: q `[B, 2]` has the columns TAKEN and BEST."""

    def best(self, q: np.ndarray) -> np.ndarray:
        """`[...]` of q `[..., 2]`."""
        return q[..., BEST]

    def taken(self, q: np.ndarray, action: np.ndarray) -> np.ndarray:
        """`[N]` of q `[N, 2]`."""
        return q[:, TAKEN]


@torch.inference_mode()
def noisy_actions(
    network: DeterministicNetwork,
    observation: np.ndarray,
    scale: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Acts with Gaussian noise: actions `[B, D]` within their bounds, and q `[B, 2]`.

    Args:
        network: policy and critic.
        observation: `[B, ...]`.
        scale: `[B]`, standard deviation of the noise, in halves of the range of an action.
        rng: where the noise comes from.
    """
    seen = torch.from_numpy(observation)
    best = network(seen)
    noise = torch.from_numpy((scale[:, None] * rng.standard_normal(best.shape)).astype("f4"))
    low, high = network.centre - network.reach, network.centre + network.reach
    action = (best + network.reach * noise).clamp(low, high)
    q = network.value(torch.cat([seen, seen]), torch.cat([action, best]))
    return action.numpy(), q.reshape(2, -1).T.numpy()


def dpg_gradient(
    flat: Flat,
    networks: tuple[DeterministicNetwork, DeterministicNetwork],
    sample: Sample,
    cast: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Leaves two gradients in `flat.gradients`, each in its own part: of the critic's loss, half
    the mean of weighted squared TD errors, and of −Q(x, μ(x)), with ∇_a Q clipped to ±1.

    Args:
        flat: of the online network.
        networks: online and target.
        sample: a batch, `[N, ...]`, and the weight of each row.
        cast: in which the networks are asked and the loss is made, such as `torch.autocast`.

    Returns:
        |TD errors| `[N]`, and loss, policy_loss, td_error_mean, all where the network is: nothing
        is waited for.
    """
    (online, target), device = networks, flat.vector.device
    cast = cast or nullcontext()
    obs_tm1, a_tm1, r_t, discount_t, obs_t = (there(column, device) for column in sample.items)
    with cast:
        with torch.no_grad():
            goal = r_t + discount_t * widened(target.value(obs_t, target(obs_t)))
        errors = goal - widened(online.value(obs_tm1, a_tm1))
        loss = 0.5 * (there(sample.weights, device) * errors.square()).mean()
    flat.gradients.zero_()
    loss.backward()
    with cast:
        action = online(obs_tm1)
        held = action.detach().requires_grad_()
        q = widened(online.value(obs_tm1, held))
    (slope,) = torch.autograd.grad(q.sum(), held)  # of the action alone: the critic stays
    action.backward(-slope.clamp(-1, 1) / len(slope))
    absolute = errors.detach().abs()
    metrics = {"loss": loss.detach(), "policy_loss": -q.detach().mean()}
    return absolute, {**metrics, "td_error_mean": absolute.mean()}


def require_bounded(envs: Envs, system: str) -> gym.spaces.Box:
    """The action space; ValueError unless it is a vector of float32 between finite bounds."""
    space = envs.action_space
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype == np.float32:
        if np.isfinite(space.low).all() and np.isfinite(space.high).all():
            return space
    raise ValueError(
        f"env_id: {envs.env_id} has the action space {space}, but {system} needs a vector of"
        f" float32 between finite bounds"
    )
