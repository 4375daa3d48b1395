"""Faults in earnest: ends a process of a real Ray while a run goes on.

    with sigkill("Worker", after_s=2.0) as fault:
        result = train(config)
    fault.killed                                      [(pid, seconds)]

On the virtual clock, faults are fields of :class:`~rlbook.plumbing.cluster.Cluster`. Linux only.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from types import TracebackType
from typing import Self

import psutil

LOOK_EVERY_S = 0.05
"""How often it is looked for a process that is not there yet."""


class sigkill:  # noqa: N801  (a verb, as ``contextlib.suppress``)
    """Sends SIGKILL to one process of actor class ``name``, ``after_s`` seconds after one was first
    there: not after the ``with`` was entered, since starting processes may take seconds.

    Only processes that this one started, with Ray between, are touched, and only those whose
    constructor has ended; ``which`` counts them by process number, from 0. A cluster that the
    driver merely joined is out of reach.

    Leaving the ``with`` waits for nothing. It raises ``RuntimeError`` if no process was killed,
    unless an exception is under way. Raises ``ValueError`` for a bad name, time or index.
    """

    def __init__(self, name: str, after_s: float, *, which: int = 0) -> None:
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"name: must be the name of an actor's class, got {name!r}")
        if not 0 <= after_s < threading.TIMEOUT_MAX:
            raise ValueError(f"after_s: must be seconds, 0 or more, got {after_s}")
        if which < 0:
            raise ValueError(f"which: must be 0 or more, got {which}")
        self.name, self.after_s, self.which = name, after_s, which
        self.killed: list[tuple[int, float]] = []
        """(process number, seconds since one was first there); empty until then."""
        self._seen = 0
        self._there_at: float | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._strike, name=f"sigkill {name}", daemon=True)

    def __enter__(self) -> Self:
        if not sys.platform.startswith("linux"):
            raise RuntimeError("sigkill finds processes on Linux only")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left.set()
        self._thread.join()
        if kind is None and not self.killed:
            raise RuntimeError(f"sigkill: {self._excuse()}")

    def _strike(self) -> None:
        """Looks, waits, looks again, and kills one."""
        wait = 0.0
        while not self._left.wait(wait):
            wait = LOOK_EVERY_S
            found = processes(self.name)
            self._seen = max(self._seen, len(found))
            if len(found) <= self.which:
                continue
            if self._there_at is None:
                self._there_at, wait = time.perf_counter(), self.after_s
                continue
            victim = found[self.which]
            try:
                victim.kill()
            except psutil.NoSuchProcess:  # it went by itself: the next
                continue
            self.killed.append((victim.pid, time.perf_counter() - self._there_at))
            return

    def _excuse(self) -> str:
        if self._there_at is not None:
            spent = time.perf_counter() - self._there_at
            if spent < self.after_s:
                early = f"the block was left {spent:.1f} s after there was one to kill"
                return f"{early}, before the {self.after_s} s were over"
        return (
            f"nothing to kill: never more than {self._seen} processes of an actor class "
            f"{self.name} under this process, and which={self.which}"
        )


def processes(name: str) -> list[psutil.Process]:
    """Ray's processes under this one that hold an actor of class ``name``, by process number. One
    whose constructor still runs holds none yet.
    """
    # Ray titles a process by its actor and, at work, by the method: ray::Worker.gradients.
    title = re.compile(rf"ray::{name}(?!\.__init__)(\W|$)")
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            words = process.cmdline()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if words and title.match(words[0]):
            found.append(process)
    return sorted(found, key=lambda process: process.pid)
