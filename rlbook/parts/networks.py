"""Networks: a torso for vectors or for Atari's frames, and the heads that the systems need.

    observation ──► torso ──► features ─┬─► policy head: logits [.., A]           ActorCritic
                                        ├─► value head:  value [..]
                                        └─► Q head, or dueling V + A: q [.., A]   QNetwork

How a network acts on numpy observations, and the policies for evaluation, are here too.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlbook.data import AgentOutput


class NatureTorso(nn.Module):
    """The convolutions of Mnih et al. (2015), Methods.

    Frames `[N, C, 84, 84]` uint8 → features `[N, 512]`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 8, 4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, 2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 512),
            nn.ReLU(),
        )
        self.features = 512

    def forward(self, observation: Tensor) -> Tensor:
        """Scales bytes to [0, 1] and convolves."""
        return self.layers(observation.to(torch.float32) / 255.0)


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x)))): 3 × 3, as many channels out as in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, H, W]` → the same shape."""
        return x + self.second(F.relu(self.first(F.relu(x))))


class ResNetTorso(nn.Module):
    """The deep network of IMPALA (Espeholt et al., 2018, figure 3, right): 15 convolutions.

        three times, 16, 32 and 32 channels:  conv 3 × 3 ► max-pool 3 × 3, stride 2 ► residual × 2
        then                                  ReLU ► fully connected, 256 ► ReLU

    Frames `[N, C, H, W]` uint8 → features `[N, 256]`.

    Args:
        channels: C.
        size: (H, W).
    """

    def __init__(self, channels: int, size: tuple[int, int] = (84, 84)) -> None:
        super().__init__()
        sections: list[nn.Module] = []
        height, width = size
        for wide in (16, 32, 32):
            sections += [nn.Conv2d(channels, wide, 3, padding=1), nn.MaxPool2d(3, 2, 1)]
            sections += [Residual(wide), Residual(wide)]
            channels, height, width = wide, -(-height // 2), -(-width // 2)
        inputs = channels * height * width
        self.layers = nn.Sequential(
            *sections, nn.ReLU(), nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU()
        )
        self.features = 256

    def forward(self, observation: Tensor) -> Tensor:
        """Scales bytes to [0, 1] and convolves."""
        return self.layers(observation.to(torch.float32) / 255.0)


class MLPTorso(nn.Module):
    """Fully connected layers.

    Observations `[N, ...]`, flattened, → features `[N, hidden_sizes[-1]]`.
    """

    def __init__(
        self, inputs: int, hidden_sizes: Sequence[int], activation: type[nn.Module]
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden_sizes]
        layers: list[nn.Module] = []
        for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(size_in, size_out), activation()]
        self.layers = nn.Sequential(*layers)
        self.features = sizes[-1]

    def forward(self, observation: Tensor) -> Tensor:
        """Flattens and applies the layers."""
        return self.layers(observation.flatten(1))


TORSOS: dict[str, Callable[[int], "NatureTorso | ResNetTorso"]] = {
    "nature": NatureTorso,
    "resnet": ResNetTorso,
}
"""Convolutions for frames, by the word in a config."""


def make_torso(
    observation_shape: Sequence[int],
    hidden_sizes: Sequence[int],
    activation: type[nn.Module] = nn.ReLU,
    frames: str = "nature",
) -> NatureTorso | ResNetTorso | MLPTorso:
    """Convolutions for Atari's `(C, 84, 84)` frames, full connection for all else.

    Args:
        observation_shape: of one observation.
        hidden_sizes: of the fully connected layers.
        activation: between those.
        frames: "nature" or "resnet", the convolutions.

    Raises:
        ValueError: an unknown kind of convolutions.
    """
    if frames not in TORSOS:
        raise ValueError(f"torso: must be one of {', '.join(TORSOS)}; got {frames!r}")
    if tuple(observation_shape[1:]) == (84, 84):
        return TORSOS[frames](observation_shape[0])
    return MLPTorso(int(np.prod(observation_shape)), hidden_sizes, activation)


def _orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class ActorCritic(nn.Module):
    """Policy and value: observations `[N, ...]` → logits `[N, A]`, values `[N]`.

    Args:
        observation_shape: of one observation.
        num_actions: A.
        hidden_sizes: of the fully connected torso (unused for Atari's frames).
        shared_torso: one torso for both heads, or one for each.
        torso: convolutions for frames, "nature" or "resnet".
    """

    def __init__(
        self,
        observation_shape: Sequence[int],
        num_actions: int,
        hidden_sizes: Sequence[int] = (64, 64),
        shared_torso: bool = True,
        torso: str = "nature",
    ) -> None:
        super().__init__()
        kind = observation_shape, hidden_sizes, nn.Tanh, torso
        self.torso = make_torso(*kind)
        self.value_torso = None if shared_torso else make_torso(*kind)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _orthogonal(module, 2**0.5)
        self.policy_head = _orthogonal(nn.Linear(self.torso.features, num_actions), 0.01)
        self.value_head = _orthogonal(nn.Linear(self.torso.features, 1), 1.0)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and values."""
        features = self.torso(observation)
        critic = features if self.value_torso is None else self.value_torso(observation)
        return self.policy_head(features), self.value_head(critic).squeeze(-1)


class QNetwork(nn.Module):
    """Action values: observations `[N, ...]` → q `[N, A]`.

    Args:
        observation_shape: of one observation.
        num_actions: A.
        hidden_sizes: of the fully connected torso.
        dueling: q = V + A − mean A (Wang et al., 2016, equation 9) instead of one head.
        torso: convolutions for frames, "nature" or "resnet".
    """

    def __init__(
        self,
        observation_shape: Sequence[int],
        num_actions: int,
        hidden_sizes: Sequence[int] = (128, 128),
        dueling: bool = False,
        torso: str = "nature",
    ) -> None:
        super().__init__()
        self.torso = make_torso(observation_shape, hidden_sizes, frames=torso)
        self.advantage_head = nn.Linear(self.torso.features, num_actions)
        self.value_head = nn.Linear(self.torso.features, 1) if dueling else None

    def forward(self, observation: Tensor) -> Tensor:
        """Action values."""
        features = self.torso(observation)
        advantage = self.advantage_head(features)
        if self.value_head is None:
            return advantage
        return self.value_head(features) + advantage - advantage.mean(-1, keepdim=True)


@torch.inference_mode()
def sample_action(
    network: ActorCritic, observation: np.ndarray, rng: np.random.Generator
) -> AgentOutput:
    """Acts once: one forward pass, then one draw from each row's policy (Gumbel-max).

    Args:
        network: gives logits `[B, A]` and values `[B]`.
        observation: `[B, ...]`.
        rng: where the draws come from.
    """
    logits, value = network(torch.from_numpy(observation))
    scores = logits.numpy() - np.log(rng.standard_exponential(logits.shape))
    return AgentOutput(scores.argmax(-1), logits.numpy(), value.numpy())


@torch.inference_mode()
def action_values(network: QNetwork, observation: np.ndarray) -> np.ndarray:
    """Q(x, ·) of observations `[B, ...]`: `[B, A]`."""
    return network(torch.from_numpy(observation)).numpy()


def greedy_action(network: QNetwork, observation: np.ndarray) -> np.ndarray:
    """The action of the largest value, `[B]` int64."""
    return action_values(network, observation).argmax(-1)


class SamplingPolicy:
    """Evaluates a stochastic policy as it was trained: by sampling. No recurrent state."""

    def __init__(self, network: ActorCritic) -> None:
        self.network = network

    def initial_state(self, num_envs: int) -> None:
        """No state."""

    def act(
        self, observation: np.ndarray, state: None, first: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, None]:
        """One sampled action for each row."""
        return sample_action(self.network, observation, rng).action, None


class GreedyPolicy:
    """Evaluates action values by their best action (ε = 0). No recurrent state."""

    def __init__(self, network: QNetwork) -> None:
        self.network = network

    def initial_state(self, num_envs: int) -> None:
        """No state."""

    def act(
        self, observation: np.ndarray, state: None, first: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, None]:
        """The best action of each row."""
        return greedy_action(self.network, observation), None


class LivePolicy:
    """A policy whose parameters live in another process: fetched before each evaluation.

    Args:
        policy: a `SamplingPolicy`, `GreedyPolicy`, …
        refresh: puts the newest parameters into the policy's network.
    """

    def __init__(self, policy: Any, refresh: Callable[[], None]) -> None:
        self.policy = policy
        self.refresh: Callable[[], None] | None = refresh

    @property
    def network(self) -> nn.Module:
        """The policy's network."""
        return self.policy.network

    def initial_state(self, num_envs: int) -> Any:
        """The policy's; the newest parameters are fetched, as long as `refresh` is set."""
        if self.refresh is not None:
            self.refresh()
        return self.policy.initial_state(num_envs)

    def act(
        self, observation: np.ndarray, state: Any, first: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, Any]:
        """The policy's action for each row."""
        return self.policy.act(observation, state, first, rng)
