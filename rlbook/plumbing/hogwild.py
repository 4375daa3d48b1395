"""Parameters in shared memory without locks, each with a count of the updates that reached it.

    parameters   [P]  (value, count), 8 bytes, read and written as one
    statistics   [1 or N, S, P]  of the optimiser: one for all, or one for each worker
    updates      [N]  made by each worker, counted before it writes
    env_steps    [N]  taken by each worker

A worker that updates reads the pairs, computes, and writes them. Where two do so at the same time
the later write undoes the earlier one, value and count alike. So Σ updates − count is what was
lost, parameter by parameter. `updates` has one writer for each entry: there nothing is lost.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlbook.plumbing.crew import Crew
from rlbook.plumbing.shared import SharedArrays
from rlbook.plumbing.timeline import Timeline

PAIR = np.dtype([("value", np.float32), ("count", np.int32)])
"""A parameter and the number of updates that reached it."""


def counted_parameters(
    parameters: np.ndarray, workers: int, statistics: int = 1, owners: int = 1
) -> SharedArrays:
    """The shared memory of N workers.

    Args:
        parameters: `[P]` float32, to start from.
        workers: N.
        statistics: S, how many numbers the optimiser keeps for each parameter.
        owners: how many sets of statistics there are: 1 that all share, or N.
    """
    size = len(parameters)
    memory = SharedArrays(
        {
            "parameters": ((size,), PAIR),
            "statistics": ((owners, statistics, size), np.float32),
            "updates": ((workers,), np.int64),
            "env_steps": ((workers,), np.int64),
        }
    )
    memory["parameters"]["value"] = parameters
    return memory


def updates_lost(memory: Mapping[str, np.ndarray] | SharedArrays) -> dict[str, float]:
    """The part of all updates that others overwrote: mean, and largest over the parameters.

    While workers are at work, an update that is under way counts as lost.
    """
    arrived = memory["parameters"]["count"].copy()  # before the sum: never more than were made
    made = int(memory["updates"].sum())
    part = (made - arrived) / max(made, 1)
    return {"updates_lost": float(part.mean()), "updates_lost_max": float(part.max())}


class InSharedMemory:
    """A crew that works on shared parameters by itself, as a run conducts it.

    Two requests are in flight with each worker, so that none waits for the driver. While the driver
    evaluates, its clock stands still and workers finish what they were asked: at most `2 × rounds`
    rounds each. With rounds of a millisecond or two that is little.

    Args:
        crew: entered; its objects have `rounds(count)`, which gives a report.
        memory: what they share, as `counted_parameters` made it.
        rounds: how many a worker is asked for at a time.
    """

    def __init__(self, crew: Crew, memory: SharedArrays, rounds: int) -> None:
        self.crew, self.memory, self.rounds = crew, memory, rounds

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds, when nothing is in flight."""
        return {"memory": self.memory, "crew": self.crew}

    @property
    def now(self) -> float:
        """The wall's clock."""
        return self.crew.now

    def pull(self, vector: np.ndarray) -> None:
        """Copies the parameters to `vector` `[P]`: some may be of one update, some of the next."""
        np.copyto(vector, self.memory["parameters"]["value"])

    def turn(self) -> tuple[list[Any], tuple[()]]:
        """Waits for the first report. None comes where a worker died: another is in its place."""
        for index in range(self.crew.size):
            while self.crew.in_flight(index) < 2:
                self.crew.ask(index, "rounds", self.rounds)
        answer = self.crew.first()
        return ([] if answer is None else [answer[1]]), ()

    def drain(self) -> tuple[list[Any], tuple[()]]:
        """Waits for all that is in flight."""
        return [report for _, report in self.crew.rest()], ()

    def timeline(self) -> Timeline:
        """Who worked on what."""
        return self.crew.timeline()
