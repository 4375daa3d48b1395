"""Arrays in memory that several processes see at once, and that nothing leaves behind.

    memory = SharedArrays({"counts": ((4,), "int64")})      zeros
    memory["counts"][2] += 1                                a plain numpy array
    with memory.lock(): …                                   one process at a time, if all ask

The memory has no name in the file system: it is a file that was never linked, or is no longer, and
is known by its descriptor alone. A child that inherits the descriptor (`Crew(…, inherit=[…])`) can
be sent the object itself. The system frees the memory when the last process that has it ends, by
whatever death; there is nothing to unlink.

Nothing is synchronised: who reads while another writes may see some of the old values and some of
the new. An aligned 8-byte number is never seen half written on the machines that this book runs on.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

ALIGNMENT = 64
"""Bytes; a cache line: two arrays never share one."""

Fields = Mapping[str, tuple[tuple[int, ...], Any]]
"""Name → (shape, numpy dtype)."""


class SharedArrays:
    """Named arrays that start with zeros.

    Args:
        fields: name → (shape, numpy dtype).
        descriptor: of memory that already holds these fields (in a child); None makes new memory.
    """

    def __init__(self, fields: Fields, descriptor: int | None = None) -> None:
        self.fields = dict(fields)
        starts, size = {}, 0
        for name, (shape, dtype) in self.fields.items():
            starts[name] = size
            size += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self.descriptor = _anonymous(size) if descriptor is None else os.dup(descriptor)
        """The file descriptor that a child must inherit."""
        self._memory = mmap.mmap(self.descriptor, size)
        self.arrays: dict[str, np.ndarray] = {
            name: np.ndarray(shape, dtype, self._memory, starts[name])
            for name, (shape, dtype) in self.fields.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as its descriptor: only to a process that inherited it."""
        return SharedArrays, (self.fields, self.descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_memory"):
            os.close(self.descriptor)  # the arrays themselves live on as long as somebody has them

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process at a time is within; threads of one process are not kept apart.

        The system frees the lock of a process that dies.
        """
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)

    def state_dict(self) -> dict[str, Any]:
        """Copies of all arrays."""
        return {name: array.copy() for name, array in self.arrays.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; ValueError if shapes differ."""
        for name, array in self.arrays.items():
            if np.shape(state[name]) != array.shape:
                raise ValueError(f"{name}: has shape {array.shape}, not {np.shape(state[name])}")
            np.copyto(array, state[name])


def _anonymous(size: int) -> int:
    """The descriptor of `size` bytes of zeros that no folder lists."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("rlbook")
    else:
        descriptor, path = tempfile.mkstemp(prefix="rlbook-")
        os.unlink(path)
    os.ftruncate(descriptor, max(size, 1))
    return descriptor
