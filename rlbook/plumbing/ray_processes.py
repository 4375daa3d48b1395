"""The processes of a Ray that this one started: found, watched over, ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection

import psutil

from rlbook.plumbing import watchdog


def start_watchdog() -> subprocess.Popen[bytes] | None:
    """What ends them when this process is killed outright (see :mod:`rlbook.plumbing.watchdog`); on
    Linux alone, for elsewhere Ray brings its own.
    """
    if not sys.platform.startswith("linux"):
        return None
    return subprocess.Popen(
        [sys.executable, "-S", "-E", watchdog.__file__]
        + [f"{child.pid}:{watchdog.started_at(child.pid)}" for child in ray_children()],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


def ray_children() -> list[psutil.Process]:
    """Processes of Ray that descend from this one."""
    words = ("raylet", "gcs_server", "ray::", "ray/_private/", "ray/dashboard/", "ray/autoscaler/")
    family = [child for child in psutil.Process().children(recursive=True) if child.is_running()]
    return [child for child in family if any(word in _words(child) for word in words)]


def _words(process: psutil.Process) -> str:
    """Its command line; none if it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def end(processes: Collection[psutil.Process]) -> None:
    """Kills processes and waits until they are gone."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(processes, timeout=5.0)
