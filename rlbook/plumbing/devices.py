"""Where a learner computes, how exactly, and what it asks of Ray for that.

    config.device   "cpu" · "cuda" · "cuda:1" · "cuda:0,cuda:2" · "auto" (a GPU if there is one)
                      │
    driver:   placed(config)  ──► Ray's options: a GPU, or a part of one, for each learner
    learner:  device_here(config, rank)  ──► torch.device
              autocast(config, device) · compiled(network, config) · HostCopy(flat)

With "cuda" and "auto" Ray gives each learner its GPU, and hides the others from it, so that it is
"cuda:0" there. A GPU by its number is placement by hand: then Ray is asked for none and hides none
(Ray 2.60 lets an actor that asks for no GPU see what its node sees; old ones hid all), and the
number is the node's; of several numbers each learner takes its own in turn.

Nothing here could be tried on more than the computer at hand has: what the tests skip without a GPU
is marked so.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rlbook.parts.flat import Flat
from rlbook.parts.on_device import there
from rlbook.parts.stored import is_reading

DEVICE = re.compile(r"cpu|cuda|auto|cpu:0|cuda:\d+")


@dataclass(frozen=True, kw_only=True)
class DeviceFields:
    """What a config tells about a learner's device."""

    device: str = "cpu"
    """Where learners are: "cpu", "cuda", "cuda:1" (of several, "cuda:0,cuda:1", each takes the
    next), or "auto", a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass; parameters, targets and sums stay float32 (float32 in the papers). On a
    GPU PyTorch lets convolutions and LSTMs of float32 round what they multiply to 11 bits (TF32),
    unless the environment says NVIDIA_TF32_OVERRIDE=0."""
    compile: bool = False
    """Let torch.compile make kernels for the network that learns; it takes a minute."""
    learner_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """What carries gradients: nccl between GPUs, gloo through the host; "auto" takes nccl where
    every learner has a GPU of its own."""
    gpus_per_learner: float = 1.0
    """Part of a GPU that Ray keeps for a learner: with 0.5 two share one (by gloo)."""

    def check_devices(self: Any) -> None:
        """ValueError, with the field's name, for the first value that is out of range, or a device
        that is not here, where here is where it will run.
        """
        names = self.device.split(",")
        if len(names) > 1 and {"cuda", "auto"} & set(names):
            raise ValueError(f"device: of several, each by its number; got {self.device!r}")
        refuse_devices("device", names, here=getattr(self, "ray_address", None) is None)
        for name, allowed in (
            ("precision", ("float32", "bfloat16")),
            ("learner_backend", ("auto", "nccl", "gloo")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}: must be one of {', '.join(allowed)}; got {value!r}")
        if not 0 < (share := self.gpus_per_learner) <= 1:
            raise ValueError(f"gpus_per_learner: must be above 0 and at most 1, got {share}")
        if self.learner_backend == "nccl" and ("cpu" in self.device or share <= 0.5):
            raise ValueError("learner_backend: nccl needs a whole GPU for each learner")


def refuse_devices(field: str, names: Sequence[str], *, here: bool = True) -> None:
    """ValueError for the first that is no device, or none of this computer if it must be `here`
    (never where a stored configuration is read). Makes nothing on the device.
    """
    for name in names:
        if not DEVICE.fullmatch(name):
            raise ValueError(f"{field}: must be cpu, cuda, cuda:0 (1, …) or auto; got {name!r}")
        kind, _, number = name.partition(":")
        asked = kind == "cuda" and here and not is_reading()
        count = torch.cuda.device_count() if asked else 0
        if asked and count <= int(number or 0):
            have = f"GPUs cuda:0 to cuda:{count - 1}" if count else "no GPU for PyTorch"
            raise ValueError(f"{field}: this computer has no {name!r}: it has {have}")


def own_device(device: str, index: int = 0) -> torch.device:
    """The device of process (or learner) number `index` on this computer: its own of several."""
    names = device.split(",")
    name, count = names[index % len(names)], torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    return torch.device("cuda", index % max(count, 1)) if name == "cuda" else torch.device(name)


def device_here(config: Any, rank: int = 0) -> torch.device:
    """Of learner `rank`, in its own process; what it makes on "cuda" is made there from now on."""
    device = own_device(config.device, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def placed(config: Any, learners: int | None = None) -> dict[str, Any]:
    """Ray's options for one learner of `config`; asked when the runtime is open.

    Args:
        config: of the system.
        learners: how many there are; `num_learners` by default.

    Raises:
        ValueError: the cluster has too few GPUs; Ray would wait for more without end.
    """
    ray: Any = sys.modules.get("ray")  # without it no runtime of its own is open
    virtual = getattr(config, "runtime", "ray") == "virtual"
    if config.device not in ("cuda", "auto") or virtual or not (ray and ray.is_initialized()):
        return {}
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if learners is None:
        learners = int(getattr(config, "num_learners", 1))
    share, on_one = config.gpus_per_learner, int(1 / config.gpus_per_learner + 1e-9)
    if config.device == "auto":
        if not gpus:
            return {}
        if learners > gpus * on_one:  # they share what there is
            share = math.floor(1e4 / math.ceil(learners / gpus)) / 1e4  # Ray's own precision
    elif learners > gpus * on_one:
        raise ValueError(
            f"device: {learners} learners with {share} of a GPU each do not fit on Ray's {gpus}"
            ' GPUs: take fewer, smaller gpus_per_learner, or device "auto"'
        )
    # A core, too, would be taken away from those who act: Ray counts one where GPUs are asked for.
    return {"num_gpus": share, "num_cpus": 0}


def gpu_of(device: torch.device) -> str:
    """What tells a GPU from all others, on all computers; "" for a CPU."""
    if device.type != "cuda":
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def backend_for(choice: str, gpus: Sequence[str]) -> Literal["nccl", "gloo"]:
    """What carries sums between processes that compute on these GPUs (see `gpu_of`).

    Raises:
        ValueError: "nccl", but it cannot: it takes no two processes on one GPU, and none without.
    """
    able = all(gpus) and len(set(gpus)) == len(gpus)
    able = able and torch.distributed.is_available() and torch.distributed.is_nccl_available()
    if choice == "nccl" and not able:
        found = [gpu or "no GPU" for gpu in gpus]
        raise ValueError(f"learner_backend: nccl needs a GPU for each process alone, got {found}")
    return "nccl" if able and choice != "gloo" else "gloo"


def autocast(config: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Within, matrix products and convolutions are done in `config.precision`."""
    if config.precision == "float32":
        return nullcontext()
    # Without its cache: before PyTorch 2.10 or so a weight that was cast without gradient first (a
    # burn-in) came from there with gradient too, and got none.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def compiled(network: nn.Module, config: Any) -> Any:
    """The same network, whose forward pass is compiled at its first call if `config` says so.

    Of one with an LSTM only the torso is: the LSTM runs from reset to reset, in stretches whose
    lengths are new with every unroll. Of an actor with a critic both torsos are: the critic is not
    asked by a forward pass.
    """
    if config.compile:
        parts: list[Any] = [network]
        if hasattr(network, "core"):
            parts = [network.torso]
        elif hasattr(network, "critic_torso"):
            parts = [network.torso, network.critic_torso]
        for part in parts:
            part.compile()
    return network


class HostCopy:
    """The way of a network's parameters to the host and back.

    Args:
        flat: whose `vector` travels, as it is when it does.
    """

    def __init__(self, flat: Flat) -> None:
        self.flat = flat

    def begin(self) -> Callable[[], np.ndarray]:
        """Lets them set out; what waits for them, once what the device does before is done.

        The array `[P]` has memory of its own: pinned if they come from a GPU.
        """
        vector = self.flat.vector
        if vector.device.type != "cuda":
            values = vector.cpu().numpy().copy()
            return lambda: values
        host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        host.copy_(vector, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(vector.device))

        def taken() -> np.ndarray:
            arrived.synchronize()  # before: whatever the memory held
            return host.numpy()

        return taken

    def take(self) -> np.ndarray:
        """The parameters now, `[P]`."""
        return self.begin()()

    def put(self, values: np.ndarray) -> None:
        """Parameters from the host, `[P]`."""
        self.flat.vector.copy_(there(values, self.flat.vector.device))
