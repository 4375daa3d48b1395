"""Which device a process computes on, and by what its tensors travel to the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


def own_device(device: str, index: int) -> torch.device:
    """The device of process number `index` on this computer.

    Args:
        device: "cuda": GPU `index` mod GPUs; "auto": the same if there is a GPU, else the CPU;
            "cpu" and "cuda:1": as they say.
        index: of the process.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise ValueError(f"device: no {device!r} here: PyTorch finds no GPU it can use")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if device in ("auto", "cuda"):
        return torch.device("cuda", index % gpus)
    found = torch.device(device)
    if found.type != "cuda" or not 0 <= (found.index or 0) < gpus:
        raise ValueError(f"device: no {device!r} here: there are GPUs 0 to {gpus - 1}")
    return found


def backend_for(choice: str, devices: Sequence[torch.device]) -> Literal["nccl", "gloo"]:
    """By what the tensors of processes with these devices, on one computer, are added up.

    Args:
        choice: "auto" is NCCL where each has a GPU of its own, else gloo.
        devices: of all.

    Raises:
        ValueError: NCCL is asked for, and processes share a GPU or compute on the CPU.
    """
    apart = all(d.type == "cuda" for d in devices) and len(set(devices)) == len(devices)
    if choice == "nccl" and not apart:
        named = ", ".join(map(str, devices))
        raise ValueError(f"nccl: needs a GPU for each process, but they have {named}; use gloo")
    return "nccl" if apart and choice != "gloo" else "gloo"
