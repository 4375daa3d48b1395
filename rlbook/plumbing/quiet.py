"""Ray without the notices that would land in notebook cells.

A death is told to who asks for a result (:class:`~rlbook.plumbing.runtime.ActorDiedError`); the
driver then decides. Ray would also print it, twice, in the words of its own machinery. What it says
of anything else (an error whose result nobody fetched, memory that runs out) is still heard.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

OBITUARY = "A worker died or was killed"
"""So begins what Ray prints when a process of an actor ends before its time."""


def quiet_ray() -> Any:
    """Import Ray with its notices off."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # In a notebook Ray asks, while it is imported, for widgets that nobody needs here.
    logging.getLogger("ray.widgets").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    return ray


def is_death(error: BaseException | None) -> bool:
    """Whether one of Ray's errors says that a process died: the one that was asked, the one that
    was to make an argument, at any remove, or the one that kept the value.
    """
    from ray import exceptions

    while isinstance(error, exceptions.RayTaskError):
        error = error.cause
    deaths = exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.ObjectLostError
    return isinstance(error, deaths)


def hush_deaths() -> Callable[[], None]:
    """From now on Ray prints nothing of actors that died. Returns what undoes that."""
    from ray._private import worker

    printed, handled = worker.print_to_stdstream, worker._unhandled_error_handler

    def print_others(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        lines = [line for line in data["lines"] if not str(line).startswith(OBITUARY)]
        if lines:
            printed({**data, "lines": lines}, *args, **kwargs)

    def handle_others(error: Exception) -> None:
        if not is_death(error):
            handled(error)

    def undo() -> None:
        worker.print_to_stdstream, worker._unhandled_error_handler = printed, handled

    setattr(worker, "print_to_stdstream", print_others)  # noqa: B010  (types as Ray has them)
    setattr(worker, "_unhandled_error_handler", handle_others)  # noqa: B010
    return undo
