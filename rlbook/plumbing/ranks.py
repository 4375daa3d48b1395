"""Processes that compute together in lockstep: `torch.distributed` from a notebook.

    with Ranks(4) as ranks:
        answers = ranks.run(function, *arguments)              function(*arguments) on 4 ranks
        answers = ranks.run(function, *arguments, size=2)      the same on the first two
    Ranks(4, "cuda")                                           rank i on GPU i mod GPUs, with NCCL

Ray's actors answer a driver; ranks talk to each other. Every rank runs the same function, knows its
number (`torch.distributed.get_rank()`), and meets the others in collectives such as `all_reduce`.

A rank is a fresh Python with one thread, so it costs seconds to start and then stays. Each run is
a process group of its own (over the loopback interface, met through a file), so that a run leaves
nothing to the next. What a rank prints is not shown. If one fails, all are ended and its traceback
is raised here; if the driver vanishes, they end themselves.

Tensors on the CPU meet by gloo, those on GPUs by NCCL, which wants a GPU for each rank; ranks that
share one have gloo alone, which knows few collectives of a GPU's tensors (`all_reduce`,
`broadcast`). NCCL between several ranks has not been run by the authors: there was no computer with
two GPUs in reach.

For POSIX systems.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, Self

from rlbook.plumbing.children import Child, pipe_of

if TYPE_CHECKING:
    import torch

TIMEOUT_S = 120.0
"""A run that takes longer has gone wrong."""

DEVICE = "RLBOOK_RANK_DEVICE"
"""The variable of a rank's environment that names its device."""


class RankError(RuntimeError):
    """A rank raised an exception or died; the message holds its traceback."""


class _Job(NamedTuple):
    rank: int
    size: int
    backend: str
    meeting: str
    call: bytes
    timeout_s: float


class Ranks:
    """``size`` processes that wait for functions to run together.

    A function must be importable (of a package or module, not of a notebook's cell), its arguments
    and result picklable.

    Args:
        size: how many.
        device: "cpu"; "cuda" for rank i on GPU i mod GPUs; "cuda:1" for all on that one. A function
            learns its own by :func:`rank_device`; arguments come as the driver has them.
        backend: of tensors on GPUs; "auto" is NCCL where each rank has a GPU of its own, else gloo.

    Raises:
        ValueError: a size below 1, a device that is not here, NCCL where ranks share one.
    """

    def __init__(
        self, size: int, device: str = "cpu", backend: Literal["auto", "nccl", "gloo"] = "auto"
    ) -> None:
        from rlbook.plumbing.devices import backend_for, gpu_of, own_device, refuse_devices

        if size < 1:
            raise ValueError(f"size: must be at least 1, got {size}")
        self.size = size
        refuse_devices("device", [device])
        self.devices = [own_device(device, rank) for rank in range(size)]
        """Of each rank."""
        self.backend = backend_for(backend, [gpu_of(found) for found in self.devices])
        """Of tensors on these devices: "nccl" or "gloo"."""
        self._children: list[Child] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._runs = 0

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        try:
            for rank in range(self.size):
                self._start(rank)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        size: int | None = None,
        timeout_s: float = TIMEOUT_S,
        **options: Any,
    ) -> list[Any]:
        """``function(*arguments, **options)`` on ranks 0 … ``size`` − 1 (all by default).

        Returns their results in order of rank. Raises :class:`RankError` for the first that fails,
        ``TimeoutError`` after ``timeout_s`` seconds; either ends all ranks.
        """
        size = self.size if size is None else size
        if not 1 <= size <= self.size:
            raise ValueError(f"size: must be between 1 and {self.size}, got {size}")
        if self._folder is None:
            raise RuntimeError("the ranks are not running: enter their `with` first")
        if function.__module__ == "__main__":
            raise ValueError(
                f"{function.__qualname__}: must be importable by other processes; move it from the"
                " notebook or script into a module"
            )
        self._runs += 1
        meeting = str(Path(self._folder.name) / f"meeting-{self._runs}")
        call = pickle.dumps((function, arguments, options))
        try:
            for rank in range(size):
                self._send(rank, _Job(rank, size, self.backend, meeting, call, timeout_s))
            return self._collect(size, time.monotonic() + timeout_s, timeout_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the processes. Calling it again does nothing."""
        for child in self._children:
            child.close()
        self._children = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self, rank: int) -> None:
        assert self._folder is not None
        log = Path(self._folder.name) / f"rank-{rank}.log"
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        variables = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
        variables[DEVICE] = str(self.devices[rank])
        self._children.append(Child("rlbook.plumbing.ranks", log, environment=variables))

    def _send(self, rank: int, job: _Job) -> None:
        try:
            self._children[rank].pipe.send(tuple(job))
        except OSError:
            self._died(rank)

    def _collect(self, size: int, until: float, timeout_s: float) -> list[Any]:
        """The answers of all, or the failure of the first that failed."""
        waiting = {child.pipe: rank for rank, child in enumerate(self._children[:size])}
        answers: dict[int, Any] = {}
        while waiting:
            ready = wait(list(waiting), max(0.0, until - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                raise TimeoutError(f"ranks {late} of {size} did not answer in {timeout_s:g} s")
            failures: list[tuple[float, int, str]] = []
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    failed_at, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    self._died(rank)
                if failed_at is None:
                    answers[rank] = answer
                else:
                    failures.append((failed_at, rank, answer))
            if failures:  # one that fails takes others along: blame the earliest
                time.sleep(0.05)
                for rank in waiting.values():
                    if self._children[rank].process.poll() is not None:
                        self._died(rank)
                _, rank, text = min(failures)
                raise RankError(f"rank {rank} of {size} failed:\n{text}")
        return [answers[rank] for rank in range(size)]

    def _died(self, rank: int) -> NoReturn:
        raise RankError(f"rank {rank} {self._children[rank].last_words()}")


def rank_device() -> torch.device:
    """In a rank: its device. In any other process the CPU."""
    import torch

    return torch.device(os.environ.get(DEVICE, "cpu"))


def on_ranks(
    size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S
) -> list[Any]:
    """``function(*arguments)`` once on ``size`` fresh ranks; see :meth:`Ranks.run`."""
    with Ranks(size) as ranks:
        return ranks.run(function, *arguments, timeout_s=timeout_s)


def _serve(pipe: Connection) -> None:
    """A rank's life: take a job, meet the others, work, answer. Ends with the driver."""
    jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                jobs.put(_Job(*pipe.recv()))
        except (EOFError, OSError):
            os._exit(0)  # also out of a collective that nobody will ever complete

    threading.Thread(target=listen, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    if rank_device().type == "cuda":
        torch.cuda.set_device(rank_device())
    while True:
        job = jobs.get()
        try:
            answer = pickle.dumps((None, _work(job)))
        except Exception:
            answer = pickle.dumps((time.time(), traceback.format_exc()))
        pipe.send_bytes(answer)


def _work(job: _Job) -> Any:
    from torch import distributed

    function, arguments, options = pickle.loads(job.call)
    # The last run's group is left only now, when the driver has all answers of that run: who left
    # at once could hang up on others that are still getting connected.
    if distributed.is_initialized():
        distributed.destroy_process_group()
    distributed.init_process_group(
        job.backend if job.backend == "gloo" else "cpu:gloo,cuda:nccl",
        init_method=Path(job.meeting).as_uri(),
        rank=job.rank,
        world_size=job.size,
        timeout=timedelta(seconds=job.timeout_s),
    )
    return function(*arguments, **options)


if __name__ == "__main__":
    _serve(pipe_of(sys.argv))
