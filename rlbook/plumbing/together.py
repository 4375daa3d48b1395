"""Sums over processes that compute together, on GPUs or not; who is gone is noticed.

    rank 0: gradient on GPU 0 ─┐                         NCCL, from GPU to GPU, if each has its own
    rank 1: gradient on GPU 1 ─┼─ add ─► the same sum    gloo, through the hosts' memory, else
    rank 2: gradient on GPU 2 ─┘                         (one process group knows both)

    lifeline: a connection of each rank with rank 0 on which nothing is ever said. Kernels of NCCL
    wait for one another without end and know nothing of processes; a connection breaks when one of
    them dies. Who waits looks at it, gives up, and by leaving lets the others know.

The sum of CPU tensors is gloo's in any case. NCCL between more than one GPU, and between computers,
could not be tried where this was written.
"""

import ipaddress
import os
import secrets
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from rlbook.plumbing.devices import backend_for, gpu_of

TIMEOUT_S = 120.0
"""Who waits longer for the others gives up."""

AWAKE_S = 0.02
"""Who waits longer for a sum sleeps, and leaves its core to those it waits for."""

NAP_S = 0.002
"""How long it sleeps at a time where nothing would wake it."""


class GroupBroken(RuntimeError):
    """Somebody of the group died or did not come: its sums are worth nothing."""


@contextmanager
def broken_if_it_fails() -> Iterator[None]:
    """Within, an error of `torch.distributed` or of a connection is a `GroupBroken`."""
    try:
        yield
    except GroupBroken:
        raise
    except (RuntimeError, OSError) as error:
        raise GroupBroken(str(error)) from error


def _door(address: str, size: int) -> socket.socket:
    """Listens at an address of this computer, or, where it is none, at all that it has.

    A host's own name often leads to its loopback, and a public address to another host.
    """
    try:
        ipaddress.ip_address(address)
        return socket.create_server((address, 0), backlog=size)
    except (ValueError, OSError):
        return socket.create_server(("", 0), backlog=size)


def keep_alive(end: socket.socket) -> None:
    """Lets the system find out, within a minute or so, that the other computer has vanished."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Lifeline:
    """A connection of each rank with rank 0, for the sake of its end.

    Args:
        store: where rank 0 says where it listens.
        rank: 0 … size − 1.
        size: N.
        address: of rank 0's computer, where others reach it.
        timeout_s: who waits longer for the others gives up.

    Raises:
        OSError: the others did not come.
    """

    def __init__(self, store: Any, rank: int, size: int, address: str, timeout_s: float) -> None:
        self.ends: list[socket.socket] = []
        if rank > 0:
            port, word = store.get("lifeline").decode().split()
            self.ends.append(socket.create_connection((address, int(port)), timeout_s))
            self.ends[0].sendall(f"{word} {rank}".encode())
            keep_alive(self.ends[0])
            return
        word, missing = secrets.token_hex(16), {str(other) for other in range(1, size)}
        with _door(address, size) as door:
            store.set("lifeline", f"{door.getsockname()[1]} {word}")
            until = time.monotonic() + timeout_s
            while missing:
                door.settimeout(max(0.001, until - time.monotonic()))
                self._let_in(door.accept()[0], word, missing)

    def _let_in(self, end: socket.socket, word: str, missing: set[str]) -> None:
        """A rank that is missing, and nobody else."""
        end.settimeout(1.0)
        try:
            said = end.recv(len(word) + 16).decode(errors="replace").split()
        except OSError:
            said = []
        if len(said) == 2 and said[0] == word and said[1] in missing:
            missing.remove(said[1])
            self.ends.append(end)
            keep_alive(end)
        else:
            end.close()

    def check(self) -> None:
        """GroupBroken if somebody is gone."""
        if any(end.fileno() < 0 for end in self.ends) or select.select(self.ends, [], [], 0)[0]:
            raise GroupBroken("one of the group is gone")

    def cut(self) -> None:
        """This one is gone, for the others."""
        for end in self.ends:
            end.close()


class Together:
    """This process's place among `size` processes; made by all at once.

    Args:
        store: of `torch.distributed`, the same for all, with nothing of an earlier group in it.
        rank: 0 … size − 1.
        size: N.
        device: where the tensors are that are added up.
        backend: "nccl", "gloo", or "auto", which takes nccl if each has a GPU of its own.
        address: of rank 0's computer, where others reach it.
        timeout_s: who waits longer for the others gives up; of a death it learns at once.

    Raises:
        GroupBroken: the others did not come.
        ValueError: "nccl", but not everybody has a GPU of its own.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        device: torch.device | None = None,
        backend: str = "auto",
        address: str = "127.0.0.1",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        self.device = device or torch.device("cpu")
        store.set_timeout(limit := timedelta(seconds=timeout_s))
        with broken_if_it_fails():
            store.set(f"gpu {rank}", gpu_of(self.device))
            gpus = [store.get(f"gpu {other}").decode() for other in range(size)]
        self.backend = backend_for(backend, gpus)
        # NCCL's own watchdog ends the process where it notices a failure; here the error is raised.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # torchrun says 1
        kinds, on_gpu = "gloo", self.backend == "nccl"
        with broken_if_it_fails():
            self.lifeline = Lifeline(store, rank, size, address, timeout_s)
            distributed.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else kinds,
                store=store,
                rank=rank,
                world_size=size,
                timeout=limit,
                device_id=self.device if on_gpu else None,
            )
        self._host: Tensor | None = None

    def add(self, vector: Tensor) -> None:
        """Puts the sum of all ranks' vectors in the place of each, the same bits everywhere.

        Done when it returns: what a GPU does to the vector before is waited for.
        """
        if vector.device.type == "cpu" or self.backend == "nccl":
            self._wait(vector)
            return
        if self._host is None or self._host.shape != vector.shape:
            self._host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
        self._host.copy_(vector, non_blocking=True)
        torch.cuda.current_stream(vector.device).synchronize()  # it must be there to be added
        self._wait(self._host)
        vector.copy_(self._host, non_blocking=True)

    def lowest(self, vector: Tensor) -> None:
        """Puts the least of all ranks' numbers in the place of each; of a CPU tensor."""
        self._wait(vector, distributed.ReduceOp.MIN)

    def leave(self) -> None:
        """Who waits for this one learns at once that it does not come."""
        self.lifeline.cut()
        if not distributed.is_initialized():
            return
        with suppress(RuntimeError, ValueError):  # why it leaves is to be told, not this
            if self.backend == "nccl":  # what others will never answer must not be waited for
                distributed.distributed_c10d._abort_process_group()
            else:
                distributed.destroy_process_group()

    def _wait(self, vector: Tensor, operation: Any = distributed.ReduceOp.SUM) -> None:
        """The sum, when all are there."""
        if not distributed.is_initialized():
            raise GroupBroken("this one has left")
        with broken_if_it_fails():
            # By no name here: it holds the connections, which an error's traceback must not.
            on_host = vector.device.type == "cpu"
            self._see_through(distributed.all_reduce(vector, operation, async_op=True), on_host)

    def _see_through(self, work: Any, on_host: bool) -> None:
        """Awake at first. Sums of microseconds are too short to sleep: where all cores are busy,
        who sleeps wakes up milliseconds late (1.7 ms on average, 0.5 awake, on two cores).
        """
        try:
            begun = time.monotonic()
            while not work.is_completed():
                if (waited := time.monotonic() - begun) < AWAKE_S:
                    os.sched_yield()
                    continue
                if on_host:
                    break  # gloo wakes up who waits, for an answer and for a death
                self.lifeline.check()
                if waited > self.timeout_s:
                    raise GroupBroken(f"no answer of the others for {self.timeout_s:.0f} s")
                time.sleep(NAP_S)
            work.wait()
        finally:
            del work  # see `_wait`
