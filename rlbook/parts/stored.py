"""Whether a configuration is being read back from a file, or is to be run here.

What was run with a GPU must be readable without one: who checks what this computer has asks first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_READING = ContextVar("reading", default=False)


@contextmanager
def reading() -> Iterator[None]:
    """Within, configurations are made from what was stored."""
    token = _READING.set(True)
    try:
        yield
    finally:
        _READING.reset(token)


def is_reading() -> bool:
    """Whether a stored configuration is being made."""
    return _READING.get()
