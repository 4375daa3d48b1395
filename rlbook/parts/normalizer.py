"""Observations brought to mean 0 and deviation 1, by statistics that N workers share.

    ŷ = clip((x − mean) / √(variance + ε), ±10)

    worker 0: moments of its rollout ─┐
    worker 1: moments of its rollout ─┼─► merged in the same order by all: the same statistics
    worker …                          ┘

The statistics stand still during a rollout and the learning from it, so that the learner sees what
the actor saw: what is noted is taken in by `renew`, between two rollouts. (Heess et al., 2017,
section 3: sharing them "needs care"; DD-PPO's authors average them over all workers too.)
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.maths.moments import Moments, merge_moments
from rlbook.parts.networks import NatureTorso, ResNetTorso

LIMIT = 10.0
"""No normalised observation is further from 0."""


class Normalizer(nn.Module):
    """Running statistics of observations, as buffers: they travel in `state_dict`.

    Args:
        shape: of one observation.
        epsilon: ε; added to the variance.
    """

    rows: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, shape: tuple[int, ...], epsilon: float = 1e-8) -> None:
        super().__init__()
        self.epsilon = epsilon
        for name in Moments._fields:
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self._noted: list[Moments] = []

    @property
    def moments(self) -> Moments:
        """Of all observations so far."""
        return Moments(self.rows, self.mean, self.squares)

    def note(self, everybody: Sequence[np.ndarray]) -> None:
        """Keeps moments of new observations, `[3, ...]` of each worker, until `renew`."""
        place = self.mean.device
        found = [Moments(*torch.from_numpy(np.array(one)).to(place)) for one in everybody]
        self._noted.append(reduce(merge_moments, found))

    def renew(self) -> None:
        """Takes in what has been noted."""
        for seen in self._noted:
            for name, value in merge_moments(self.moments, seen)._asdict().items():
                getattr(self, name).copy_(value)
        self._noted = []

    def get_extra_state(self) -> Tensor:
        """What has been noted, `[K, 3, ...]`, for `state_dict`."""
        noted = [torch.stack(seen) for seen in self._noted]
        return torch.stack(noted) if noted else torch.zeros(0, 3, *self.mean.shape)

    def set_extra_state(self, state: Tensor) -> None:
        """Continues from `get_extra_state`."""
        self._noted = [Moments(*seen) for seen in state.clone().to(self.mean.device)]

    def forward(self, observation: Tensor) -> Tensor:
        """`[N, ...]` → the same, normalised; as it came until something has been merged."""
        scale = (self.moments.variance + self.epsilon).rsqrt()
        centred = observation - self.mean.to(observation.dtype)
        normalised = (centred * scale.to(observation.dtype)).clamp(-LIMIT, LIMIT)
        return torch.where(self.rows > 0, normalised, observation)  # no `if`: a GPU would be asked


class Normalized(nn.Module):
    """An actor-critic behind a normaliser.

    Args:
        network: observations `[N, ...]` → logits `[N, A]`, values `[N]`.
        shape: of one observation.

    Raises:
        ValueError: the network takes Atari's frames, which it scales itself.
    """

    def __init__(self, network: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        if isinstance(getattr(network, "torso", None), NatureTorso | ResNetTorso):
            raise ValueError("normalize_observations: must be False for frames, which are bytes")
        self.normalizer, self.network = Normalizer(shape), network

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and values of what the normaliser makes of the observations."""
        return self.network(self.normalizer(observation))
