"""A network's forward pass on another device, beside whatever else that device does.

    rows (numpy) ──copy──► device: network ──copy──► answers (numpy)   on a CUDA stream of its own
                             ▲
    host's parameters ──copy─┘ refresh()

On one GPU that learns and acts, the learner's kernels are on one stream and those of acting on
another of higher priority, so that a small forward pass need not wait until a large update is over.
Copies of rows come from pinned memory, so that they are on their stream too. What is bool stays
on the host: it says where episodes begin, and an LSTM's way through them is found there.
"""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from rlbook.parts.flat import Flat

Name = TypeVar("Name")


def there(array: Any, device: torch.device) -> torch.Tensor:
    """An array (or a tensor on the CPU) as a tensor on a device.

    On its way to a GPU it is copied to pinned memory, from where it travels beside what the GPU
    does; to the CPU nothing is copied. Arrays from another process are read-only, which PyTorch
    does not know: those are copied in any case.
    """
    is_tensor = isinstance(array, torch.Tensor)
    tensor = array if is_tensor else torch.from_numpy(np.require(array, None, "W"))
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def joined(arrays: Sequence[np.ndarray], axis: int, device: torch.device) -> Any:
    """Arrays one after the other along an axis: a new array, or a tensor on a GPU.

    They are put together where the GPU fetches them, so that the host copies each once, and goes on
    while they travel.
    """
    if device.type != "cuda":
        return np.concatenate(arrays, axis)
    shape, kind = list(arrays[0].shape), torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    shape[axis] = sum(array.shape[axis] for array in arrays)
    pinned = torch.empty(shape, dtype=kind, pin_memory=True)
    np.concatenate(arrays, axis, out=pinned.numpy())
    return pinned.to(device, non_blocking=True)


def on_host(state: Any) -> Any:
    """A tree of dicts, lists and tuples with copies of all its tensors on the CPU: a count of steps
    is there already, and goes on.
    """
    if isinstance(state, torch.Tensor):
        return state.to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: on_host(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(on_host, state))
    return state


def numbers(metrics: dict[Name, Any]) -> dict[Name, float]:
    """Metrics as plain numbers: those that are tensors of one number come to the host together."""
    found = {name: one for name, one in metrics.items() if isinstance(one, torch.Tensor)}
    values = torch.stack([one.detach() for one in found.values()]).tolist() if found else []
    return {**metrics, **dict(zip(found, values, strict=True))}


def means(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of several updates' metrics: those that are tensors come to the host together."""
    known = numbers({(k, name): one for k, row in enumerate(found) for name, one in row.items()})
    names = found[0] if found else ()
    return {name: float(np.mean([known[k, name] for k in range(len(found))])) for name in names}


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32: what autocast said in fewer bits must not be added up in them."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class OnDevice:
    """A copy of a network on a device.

    Args:
        network: whose parameters are copied at each `refresh`.
        device: where.
    """

    def __init__(self, network: nn.Module, device: str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self._theirs = list(network.parameters())
        self.network = copy.deepcopy(network).to(self.device)
        self._flat = Flat(self.network)
        self._stream = torch.cuda.Stream(self.device, priority=-1) if self.cuda else None
        if self._stream is not None:  # what was made so far, was made on another
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self.refresh()

    def refresh(self) -> None:
        """Takes over the parameters as they are now."""
        with torch.no_grad(), self._beside():
            vector = torch.cat([p.detach().reshape(-1) for p in self._theirs])
            self._flat.vector.copy_(self._pinned(vector), non_blocking=self.cuda)
            self._wait()

    @torch.inference_mode()
    def __call__(self, *rows: np.ndarray | tuple[np.ndarray, ...]) -> list[np.ndarray]:
        """What the network says to arrays (or tuples of arrays), as a flat list of arrays."""
        with self._beside():
            found = _leaves(self.network(*[self._there(row) for row in rows]))
            answers = [answer.to("cpu", non_blocking=self.cuda) for answer in found]
            self._wait()
        return [answer.numpy() for answer in answers]

    def _there(self, row: Any) -> Any:
        if isinstance(row, tuple):
            return tuple(map(self._there, row))
        tensor = torch.from_numpy(np.require(row, None, "W"))
        if tensor.dtype == torch.bool:  # where episodes begin is looked up on the host
            return tensor
        return self._pinned(tensor).to(self.device, non_blocking=self.cuda)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.pin_memory() if self.cuda else tensor

    def _beside(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _leaves(tree: Any) -> list[torch.Tensor]:
    """The tensors of nested tuples, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    return [leaf for branch in tree for leaf in _leaves(branch)]
