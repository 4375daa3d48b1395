"""What it costs to hand bytes to another process, by five roads.

    shared memory   copied once into pages that both processes see; the reader polls a flag
    pipe            copied into the kernel and out again
    gloo            `torch.distributed`: a socket on the loopback interface
    Ray call        the bytes are an argument of an actor's method
    Ray reference   put into the object store first; the call carries a reference

One trip is: the sender has an array; the receiver has read a byte of every page of it and says so
with a word as short as the road allows. Sender and receiver are processes of their own.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlbook.plumbing.ranks import Ranks
from rlbook.plumbing.runtime import RayRuntime

SIZES = (8, 1_000, 10_000, 100_000, 1_000_000, 10_000_000)
"""Bytes."""
PAGE = 4096
SHARED = Path("/dev/shm")
"""Where Linux keeps files in memory."""


class Trip(NamedTuple):
    """One measured trip."""

    road: str
    nbytes: int
    seconds: float
    """There and the word back: the shortest of many, since other programs only ever add to it."""


def measure_messages(
    runtime: RayRuntime, ranks: Ranks, sizes: Sequence[int] = SIZES, seconds: float = 0.1
) -> list[Trip]:
    """Every road and size, for about ``seconds`` each; ``ranks`` must be 2 or more."""
    return [
        *ranks.run(exchange, sizes, seconds, size=2)[0],
        *_measure_ray(runtime, sizes, seconds),
    ]


def exchange(sizes: Sequence[int], seconds: float) -> list[Trip]:
    """Rank 0 sends and measures, rank 1 receives; see :mod:`rlbook.plumbing.ranks`."""
    from torch import distributed

    trips, sends = [], distributed.get_rank() == 0
    for road, travel in (("shared memory", _shared), ("pipe", _pipe), ("gloo", _gloo)):
        with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as folder:
            place = [folder]
            distributed.broadcast_object_list(place)
            for nbytes in sizes:
                repeats = _repeats(nbytes, seconds)
                taken = travel(sends, Path(place[0]) / f"{nbytes}", nbytes, repeats)
                trips.append(Trip(road, nbytes, taken))
            distributed.barrier()
    return trips


class Receiver:
    """At the far end of Ray's roads."""

    def take(self, array: np.ndarray) -> int:
        """Reads it."""
        return touch(array)


def touch(array: np.ndarray) -> int:
    """Reads a byte of every page, so that the bytes really are there."""
    return int(array[::PAGE].sum())


def _repeats(nbytes: int, seconds: float) -> int:
    """So many trips that they take about ``seconds`` at a gigabyte a second and 50 µs each."""
    return int(np.clip(seconds / (50e-6 + nbytes / 1e9), 5, 500))


def _shortest_time(does: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        begun = time.perf_counter()
        does()
        times.append(time.perf_counter() - begun)
    return min(times[2:])


def _shared(sends: bool, place: Path, nbytes: int, repeats: int) -> float:
    """A file in memory: a flag that both poll, then the bytes."""
    from torch import distributed

    if sends:
        place.write_bytes(bytes(PAGE + nbytes))
    distributed.barrier()
    memory = np.memmap(place, np.uint8, "r+")
    flag, there = memory[:8].view(np.int64), memory[PAGE:]
    source = np.ones(nbytes, np.uint8)

    def until(value: int) -> None:
        while flag[0] != value:
            os.sched_yield()

    def send() -> None:
        there[:] = source
        flag[0] = 1
        until(0)

    if sends:
        return _shortest_time(send, repeats)
    for _ in range(repeats + 2):
        until(1)
        touch(there)
        flag[0] = 0
    return 0.0


def _pipe(sends: bool, place: Path, nbytes: int, repeats: int) -> float:
    """A connection of `multiprocessing`: a Unix socket."""
    from torch import distributed

    address = str(place)
    if sends:
        with Listener(address, "AF_UNIX") as listener:
            distributed.barrier()
            with listener.accept() as connection:
                source = bytes(nbytes)

                def send() -> None:
                    connection.send_bytes(source)
                    connection.recv_bytes()

                return _shortest_time(send, repeats)
    distributed.barrier()
    with Client(address, "AF_UNIX") as connection:
        for _ in range(repeats + 2):
            touch(np.frombuffer(connection.recv_bytes(), np.uint8))
            connection.send_bytes(b"1")
    return 0.0


def _gloo(sends: bool, place: Path, nbytes: int, repeats: int) -> float:
    """Point-to-point messages of `torch.distributed`."""
    import torch
    from torch import distributed

    array, word = torch.ones(nbytes, dtype=torch.uint8), torch.ones(1, dtype=torch.uint8)

    def send() -> None:
        distributed.send(array, 1)
        distributed.recv(word, 1)

    if sends:
        return _shortest_time(send, repeats)
    for _ in range(repeats + 2):
        distributed.recv(array, 0)
        touch(array.numpy())
        distributed.send(word, 0)
    return 0.0


def _measure_ray(runtime: RayRuntime, sizes: Sequence[int], seconds: float) -> list[Trip]:
    receiver: Any = runtime.remote(Receiver, num_cpus=0).remote()
    trips = []
    for nbytes in sizes:
        array, repeats = np.ones(nbytes, np.uint8), _repeats(nbytes, seconds) // 5 + 5

        def call(array: np.ndarray = array) -> None:
            runtime.get(receiver.take.remote(array))

        def refer(array: np.ndarray = array) -> None:
            runtime.get(receiver.take.remote(runtime.put(array)))

        trips.append(Trip("Ray call", nbytes, _shortest_time(call, repeats)))
        trips.append(Trip("Ray reference", nbytes, _shortest_time(refer, repeats)))
    return trips
