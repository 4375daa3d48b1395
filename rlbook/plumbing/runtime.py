"""Ray's four verbs, and a Ray that cleans up after itself.

    with RayRuntime(num_cpus=2) as runtime:
        worker = runtime.remote(Worker).remote(7)     a process of its own, at once
        reference = worker.work.remote(data)          returns before the work is done
        ready, pending = runtime.wait([reference])    which are done?
        result = runtime.get(reference)               fetch the value

A system's ``train()`` speaks to whatever has these verbs, so it does not know what carries its
calls. Ray starts when the ``with`` is entered and is shut down when it is left: after the last
line, an exception or Ctrl-C. It prints nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from rlbook.plumbing import watchdog

Reference = Any
"""A promise of a value that some process holds or will hold (Ray's ``ObjectRef``)."""


class Runtime(Protocol):
    """What a conducting ``train()`` needs: Ray's verbs with Ray's meaning."""

    def remote(self, target: Any, **options: Any) -> Any:
        """A class or function whose calls run elsewhere: call ``.remote(...)`` on what comes
        back.
        """

    def put(self, value: Any) -> Reference:
        """Store ``value`` once, where every process can read it."""

    def get(self, references: Any, *, timeout: float | None = None) -> Any:
        """The value behind a reference, or the values behind a list of them. Blocks."""

    def wait(
        self, references: Sequence[Reference], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Reference], list[Reference]]:
        """Block until ``num_returns`` of ``references`` are done. Returns (done, not done)."""


class RayRuntime:
    """The four verbs on real processes, on this computer or a cluster.

    ``num_cpus``: cores that Ray may hand out, 1 or more; all by default. ``object_store_mb``:
    shared memory for values in flight, in MB, at least 80 (Ray's own floor is a little below).
    ``address``: an existing cluster to join, whose cores and memory are its own affair; leaving
    the ``with`` disconnects from it and lets it run.

    Raises ``ValueError`` for a bad size and ``RuntimeError`` when Ray already runs in this process.
    """

    def __init__(
        self, *, num_cpus: int | None = None, object_store_mb: int = 256, address: str | None = None
    ) -> None:
        if num_cpus is not None and num_cpus < 1:
            raise ValueError(f"num_cpus must be at least 1, got {num_cpus}")
        if object_store_mb < 80:
            raise ValueError(f"object_store_mb must be at least 80, got {object_store_mb}")
        self.num_cpus = num_cpus
        self.object_store_mb = object_store_mb
        self.address = address
        self._running = False
        self._watchdog: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        ray = _quiet_ray()
        if ray.is_initialized():
            raise RuntimeError(
                "Ray already runs in this process: leave its `with` (or call ray.shutdown()) first"
            )
        quiet: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "configure_logging": True,
        }
        if self.address is None:
            quiet |= {
                "num_cpus": self.num_cpus,
                "object_store_memory": self.object_store_mb * 1024 * 1024,
                "include_dashboard": False,
            }
        atexit.register(self.shutdown)
        self._running = True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address=self.address or "local", **quiet)
            if self.address is None:
                self._watchdog = _start_watchdog()
        except BaseException:
            self.shutdown()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Stop Ray and its processes. Calling it again does nothing."""
        if not self._running:
            return
        import ray

        self._running = False
        atexit.unregister(self.shutdown)
        ray.shutdown()
        if self._watchdog is not None:
            self._watchdog.communicate(watchdog.ORDERLY)
            self._watchdog = None

    def remote(self, target: Any, **options: Any) -> Any:
        """``target`` (a class or function) with its calls run in other processes.

        ``options`` are Ray's: ``num_cpus``, ``num_gpus`` (fractions too), ``max_restarts``, …
        Without any, an actor asks for no core of its own beyond Ray's default.
        """
        import ray

        return ray.remote(**options)(target) if options else ray.remote(target)

    def put(self, value: Any) -> Reference:
        """Copy ``value`` into shared memory once; every process on the node then reads it without
        a copy of its own.
        """
        import ray

        return ray.put(value)

    def get(self, references: Any, *, timeout: float | None = None) -> Any:
        """The value behind a reference, or a list of values; an exception of the remote call is
        raised here.

        ``timeout`` in seconds; ``ray.exceptions.GetTimeoutError`` when it passes. Arrays come back
        read-only.
        """
        import ray

        return ray.get(references, timeout=timeout)

    def wait(
        self, references: Sequence[Reference], *, num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Reference], list[Reference]]:
        """Block until ``num_returns`` references are done, or ``timeout`` seconds. Returns (done,
        not done).
        """
        import ray

        return ray.wait(list(references), num_returns=num_returns, timeout=timeout)


def _quiet_ray() -> Any:
    """Import Ray with its notices off; they would otherwise land in notebook cells."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # In a notebook Ray asks, while it is imported, for widgets that nobody needs here.
    logging.getLogger("ray.widgets").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
    return ray


def _start_watchdog() -> subprocess.Popen[bytes] | None:
    """See :mod:`rlbook.plumbing.watchdog`; on Linux alone (elsewhere Ray brings its own)."""
    if not sys.platform.startswith("linux"):
        return None
    import psutil

    words = ("raylet", "gcs_server", "ray::")
    family = [child for child in psutil.Process().children(recursive=True) if child.is_running()]
    ours = [child.pid for child in family if any(w in " ".join(child.cmdline()) for w in words)]
    return subprocess.Popen(
        [sys.executable, "-S", "-E", watchdog.__file__]
        + [f"{pid}:{watchdog.started_at(pid)}" for pid in ours],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
