"""Where a process's time goes: seconds inside chosen methods, as parts of the whole."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any


class Meter:
    """Adds up the wall's time inside the methods that it watches.

    Args:
        on: False measures nothing; on a virtual clock the wall's time would mean nothing.
    """

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._begun = 0.0

    def watch(self, owner: Any, method: str, name: str) -> None:
        """From now on `owner.method(...)` counts as `name`."""
        if self.on:
            setattr(owner, method, self._timed(getattr(owner, method), name))

    def begin(self) -> None:
        """The whole begins here."""
        self._seconds.clear()
        self._begun = time.perf_counter()

    def fractions(self) -> dict[str, float]:
        """`{name}_time_fraction` of the time since `begin`; empty if off."""
        whole = time.perf_counter() - self._begun
        return {f"{name}_time_fraction": spent / whole for name, spent in self._seconds.items()}

    def _timed(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self._seconds[name] += time.perf_counter() - begun

        return timed
