"""Ends the processes of a Ray whose driver was killed outright (a killed kernel).

Ray's own helpers notice it too, but only after about a minute. This little program waits at a pipe
from the driver: a word means an orderly end and nothing to do; a pipe that closes without one
means that the driver is gone. It uses the standard library alone and is run as a script, so that
it starts in milliseconds.
"""

import os
import signal
import sys
from pathlib import Path

ORDERLY = b"over"


def started_at(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; None if there is none. Tells a process from a
    later one of its number.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def main(processes: list[str]) -> None:
    """Wait, then end ``processes`` ("pid:start") if they are still the same ones."""
    if sys.stdin.buffer.read() == ORDERLY:
        return
    for process in processes:
        pid, _, start = process.partition(":")
        if started_at(int(pid)) == start:
            os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
