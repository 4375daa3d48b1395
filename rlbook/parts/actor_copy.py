"""Who acts with a network that learns on a GPU: the network itself, or a copy on the host.

    learns on the CPU     the network itself acts
    frames, on a GPU      the network itself: observations go there, logits and values come back
    all else, on a GPU    a copy on the host, brought up to date before each rollout: a forward pass
                          of a small network takes less time than the way to the GPU and back

Actors act in float32, whatever precision the learner has.
"""

import copy

import torch
from torch import Tensor, nn

from rlbook.parts.flat import Flat
from rlbook.parts.on_device import on_host, there


class Away(nn.Module):
    """A network on a device, for who has tensors on the host.

    Args:
        network: observations `[N, ...]` → logits `[N, A]`, values `[N]`.
        device: where it is.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.device = network, device

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and values, on the host."""
        logits, values = self.network(there(observation, self.device))
        both = torch.cat([logits, values.unsqueeze(-1)], -1).cpu()  # they come together
        return both[..., :-1], both[..., -1]


class ActorCopy:
    """The network that acts.

    Args:
        network: that learns, with its parameters in their place.
        device: where it is.
        copied: act with a copy on the host; by default where that is quicker.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, copied: bool | None = None
    ) -> None:
        self._learns = network
        if copied is None:
            frames = any(isinstance(module, nn.Conv2d) for module in network.modules())
            copied = device.type != "cpu" and not frames
        self.copied = copied
        self.network: nn.Module = network if device.type == "cpu" else Away(network, device)
        """Takes and gives tensors on the host."""
        if copied:
            self.network = copy.deepcopy(network).cpu()
            self._flat = Flat(self.network)

    def refresh(self) -> None:
        """Takes over parameters and statistics as they are now."""
        if self.copied:
            self.network.load_state_dict(on_host(self._learns.state_dict()))
