"""A child process with a pipe to it: a fresh Python that runs one of the book's modules.

    child = Child("rlbook.plumbing.crew", folder / "worker-0.log")
    child.pipe.send(…)            there: serve(pipe), with `python -m MODULE FILENO`

A fresh Python imports no `__main__` again, so that a notebook or a script without a main guard can
start children. It has one thread, a session of its own (Ctrl-C is for the driver) and writes what
it prints to a log. When the driver vanishes the pipe is at its end, and a child that reads there
should end itself. For POSIX systems.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path


class Child:
    """One process, as its driver holds it.

    Args:
        module: run as ``python -m module FILENO``, with the number of its end of the pipe.
        log: file for what it prints.
        inherit: further file descriptors that it shall have, under the same numbers.
        environment: variables besides the driver's own; all that compute with threads get one.
    """

    def __init__(
        self,
        module: str,
        log: Path,
        inherit: Sequence[int] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        self.pipe, theirs = Pipe()
        with theirs, log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(), *inherit),
                start_new_session=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path),
                    **(environment or {}),
                },
            )

    def last_words(self) -> str:
        """How it ended and the end of its log; waits for its end."""
        code = self.process.wait()
        said = self.log.read_text(errors="replace")[-2000:]
        return f"died (exit code {code})\n{said}".rstrip()

    def close(self) -> None:
        """Ends it at once. Calling it again does nothing."""
        self.pipe.close()
        self.process.kill()
        self.process.wait()


def pipe_of(arguments: Sequence[str]) -> Connection:
    """The child's end of the pipe, from its command line."""
    return Connection(int(arguments[1]))
