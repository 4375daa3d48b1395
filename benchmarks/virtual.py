"""Calls that the virtual clock plays in a second of real time, with 1,000 actors in flight.

    python -m benchmarks.virtual [--quick]

Hollow work, through the public verbs: the driver waits for the first of 1,000 calls and calls that
actor again. In one process, on one core.
"""

import statistics
import time
from collections.abc import Sequence

from benchmarks.common import Row, keep, note, parser, print_targets, table, target
from rlbook.plumbing.cluster import Cluster, Node
from rlbook.plumbing.virtual import VirtualRuntime

LEAST = 150_000.0
KINDS = {
    "a core for every actor": {},
    "… without a timeline": {"trace": False},
    "… weights as an argument": {"weights": True},
    "64 cores for all": {"cores": 64},
    "… waiting on a list": {"as_list": True},
}
COLUMNS = ("what", "actors", "calls/s", "calls", "virtual s")


class Worker:
    """Its method never runs."""

    def unroll(self, weights: object = None) -> None:
        raise AssertionError("hollow work was done")


def play(
    actors: int,
    calls: int,
    *,
    cores: int | None = None,
    trace: bool = True,
    weights: bool = False,
    as_list: bool = False,
) -> tuple[float, float]:
    """(real seconds, virtual seconds) of `calls` calls on `actors` actors, all in flight."""
    cluster = Cluster(nodes=(Node(cores=cores or actors),), costs={"env_step": 50e-6})
    runtime = VirtualRuntime(1, cluster, hollow=True, trace=trace)
    remote = runtime.remote(Worker, costs={"unroll": {"env_step": 100}})
    arguments = (runtime.put(3),) if weights else ()
    workers = [remote.remote() for _ in range(actors)]
    inflight = {worker.unroll.remote(*arguments): worker for worker in workers}
    begun = time.perf_counter()
    for _ in range(calls):
        (reference,), _ = runtime.wait(list(inflight) if as_list else inflight)
        worker = inflight.pop(reference)
        inflight[worker.unroll.remote(*arguments)] = worker
    return time.perf_counter() - begun, runtime.now


def main(arguments: Sequence[str] | None = None) -> None:
    """Medians of several rounds, in turns."""
    options = parser("Calls that the virtual clock plays in a second.").parse_args(arguments)
    actors, calls, rounds = (10, 200, 1) if options.quick else (1000, 100_000, 5)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    virtual = {}
    for turn in range(rounds):
        note(f"round {turn + 1} of {rounds}")
        for kind, settings in KINDS.items():
            seconds, virtual[kind] = play(actors, calls, **settings)  # type: ignore[arg-type]
            times[kind].append(seconds)
    rows: list[Row] = [
        {
            "what": kind,
            "actors": actors,
            "calls/s": calls / statistics.median(times[kind]),
            "calls": calls,
            "virtual s": virtual[kind],
        }
        for kind in KINDS
    ]
    table("The virtual clock", rows, COLUMNS)
    targets = [target("hollow calls/s, 1,000 in flight", rows[0]["calls/s"], least=LEAST)]
    print_targets([] if options.quick else targets)
    keep("virtual", rows, [] if options.quick else targets, options)


if __name__ == "__main__":
    main()
