"""What travels between processes: values as bytes, and promises of values.

    value ──pack──► Message(data, buffers, held, nbytes) ──open──► a copy of the value

A message is made as Ray makes it: by cloudpickle with protocol 5, which leaves large buffers
(arrays, tensors) out of the pickle. They are kept as ``bytes``: whoever opens the message reads
them where they lie, and cannot write, so that an array comes out read-only, as it does from Ray.
References inside a value travel as references.
"""

from __future__ import annotations

import io
import math
import pickle
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import cloudpickle
import numpy as np

if TYPE_CHECKING:
    import torch


class VirtualReference:
    """A promise of a value on the virtual clock: what Ray calls an ``ObjectRef``."""

    __slots__ = ("__weakref__", "at", "callers", "error", "message", "number", "places")

    def __init__(self, number: int) -> None:
        self.number = number
        """Counts the calls and puts of a runtime, in the order in which the driver made them."""
        self.at = math.inf
        """When the driver learnt that the value is there; infinite until then. Seconds."""
        self.message: Message | None = None
        self.error: Message | None = None
        """The exception that takes the place of the value."""
        self.callers: list[Any] | None = None
        """Calls that wait for the value as their argument."""
        self.places: dict[Any, float] | None = None
        """When a copy of the value is complete on a node."""

    @property
    def nbytes(self) -> int:
        """Size of the value on the wire; 0 before it is there."""
        return self.message.nbytes if self.message is not None else 0

    def __repr__(self) -> str:
        state = "pending" if self.at == math.inf else f"there at {self.at:.6f} s"
        return f"VirtualReference({self.number}, {state})"


class Bundle(VirtualReference):
    """What a call of several results answers with; the driver holds its ``parts`` alone."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[VirtualReference]) -> None:
        super().__init__(parts[0].number)
        self.parts = parts

    def fill(self, values: Any, as_message: Callable[[Any], Message]) -> None:
        """Gives each part its value. Raises ``ValueError`` if there are more values, or fewer, and
        ``TypeError`` if there is but one thing.
        """
        values = values if hasattr(values, "__len__") else list(values)
        if len(values) != len(self.parts):
            raise ValueError(
                f"the call returned {len(values)} values, but num_returns={len(self.parts)}"
            )
        messages = [as_message(value) for value in values]
        for part, message in zip(self.parts, messages, strict=True):
            part.message = message

    def split(self) -> list[VirtualReference]:
        """The parts, when the call is over: an error in its value's place goes to each."""
        if self.error is not None:
            for part in self.parts:
                part.error = self.error
        return self.parts


class Message(NamedTuple):
    """A value on its way."""

    data: bytes
    buffers: list[bytes]
    held: list[VirtualReference]
    """References inside the value."""
    nbytes: int

    def open(self) -> Any:
        """A new copy of the value; its arrays share the message's bytes and are read-only."""
        if self.held:
            return _Opener(self).load()
        return pickle.loads(self.data, buffers=self.buffers)


def pack(value: Any) -> Message:
    """``value`` as a message. Raises what pickle raises if it cannot travel."""
    packer = _Packer()
    packer.dump(value)
    data = packer.file.getvalue()
    # One copy, so that what the sender does to its arrays later stays with the sender.
    buffers = [bytes(buffer.raw()) for buffer in packer.buffers]
    return Message(data, buffers, packer.held, len(data) + sum(map(len, buffers)))


def pack_error(error: Exception, where: str) -> Message:
    """An exception as a message that opens, with where it happened as a note."""
    error.add_note(f"in {where}:\n{''.join(traceback.format_tb(error.__traceback__))}")
    try:
        message = pack(error)
        message.open()
        return message
    except Exception:  # some exceptions do not survive the journey; their text does
        return pack(RuntimeError(f"{type(error).__name__}: {error} in {where}"))


class _Packer(cloudpickle.Pickler):
    """Puts buffers and references aside."""

    def __init__(self) -> None:
        self.file = io.BytesIO()
        self.buffers: list[pickle.PickleBuffer] = []
        self.held: list[VirtualReference] = []
        super().__init__(self.file, 5, buffer_callback=self.buffers.append)

    def reducer_override(self, value: Any) -> Any:
        """How the two special things travel; all else as cloudpickle has it."""
        kind = type(value)
        if kind is VirtualReference:
            self.held.append(value)
            return _held, (len(self.held) - 1,)
        if kind.__name__ == "TypedStorage" and value._untyped_storage.device.type == "cpu":
            return _pack_storage(value)
        return super().reducer_override(value)


class _Opener(pickle.Unpickler):
    """Gives each held reference back its place in the value."""

    def __init__(self, message: Message) -> None:
        super().__init__(io.BytesIO(message.data), buffers=message.buffers)
        self.message = message

    def find_class(self, module: str, name: str) -> Any:
        """``_held`` looks into this message."""
        found = super().find_class(module, name)
        return self.message.held.__getitem__ if found is _held else found


def _held(index: int) -> VirtualReference:
    """Stands in a pickle for reference ``index`` of its message."""
    raise pickle.UnpicklingError(f"reference {index} is in no message")


def _pack_storage(storage: torch.TypedStorage) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The memory of a tensor as an array of bytes.

    PyTorch's own way writes the memory's address into the pickle, whose length then differs from
    run to run, and with it the time on the wire.
    """
    import torch

    untyped = storage._untyped_storage  # its public name warns
    view = torch.empty(0, dtype=torch.uint8).set_(untyped)
    return _open_storage, (view.numpy(), storage.dtype)


def _open_storage(array: np.ndarray, dtype: torch.dtype) -> torch.TypedStorage:
    """The memory of a tensor of its own: tensors come out writable, as from Ray."""
    import torch

    untyped = torch.from_numpy(array.copy()).untyped_storage()
    return torch.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)
