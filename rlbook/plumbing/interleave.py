"""Asynchrony that can be replayed: N workers in one process take turns in an order that is given.

A worker's `round()` is a generator that pauses wherever other processes could come in between: at
each access of what is shared. In a process of its own a worker runs it to the end
(`for _ in worker.round(): pass`). Here somebody says at each pause who goes on next: a list, or a
seeded draw. The same order gives the same result, bit for bit.

    trace = interleave(workers, seed=1, rounds=10)       [(0, "read"), (1, "read"), (0, "computed")…
    trace = play(workers, [0, 1, 0, 0, 1])               by hand: who goes on, pause by pause
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np


class Pausing(Protocol):
    """A worker whose round can be stopped between two accesses."""

    def round(self) -> Iterator[str]:
        """One round; yields the name of what it has just done."""


def play(workers: Sequence[Pausing], order: Iterable[int]) -> list[tuple[int, str]]:
    """Lets workers go on in the given order, each to its next pause; then ends rounds under way.

    Args:
        workers: N, which share something.
        order: indices of workers. One whose round is over begins another.

    Returns:
        Who did what, in order: (index, what the round said at its pause). Rounds that are under
        way when `order` is at its end are played to their ends, by index.
    """
    rounds: dict[int, Iterator[str]] = {}
    trace: list[tuple[int, str]] = []

    def go_on(index: int) -> bool:
        said = next(rounds[index], None)
        if said is None:
            del rounds[index]
            return False
        trace.append((index, said))
        return True

    for index in order:
        if index not in rounds or not go_on(index):
            rounds[index] = workers[index].round()
            go_on(index)
    for index in sorted(rounds):
        while go_on(index):
            pass
    return trace


def interleave(workers: Sequence[Any], seed: int, rounds: int) -> list[tuple[int, str]]:
    """Every worker plays `rounds` rounds; who goes on at each pause is drawn from `seed`.

    Returns:
        Who did what, in order: (index, what the round said at its pause).
    """
    rng = np.random.default_rng(seed)
    playing = {index: _chain(worker, rounds) for index, worker in enumerate(workers)}
    trace: list[tuple[int, str]] = []
    while playing:
        index = int(rng.choice(sorted(playing)))
        said = next(playing[index], None)
        if said is None:
            del playing[index]
        else:
            trace.append((index, said))
    return trace


def _chain(worker: Pausing, rounds: int) -> Iterator[str]:
    for _ in range(rounds):
        yield from worker.round()
