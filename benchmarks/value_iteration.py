"""One sweep of value iteration on a 200 × 200 grid: plain Python, arrays, worker processes.

    python -m benchmarks.value_iteration [--quick]

All backends do the same Jacobi sweeps from the same values; the results are compared.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.common import Row, keep, parser, print_targets, table, target
from rlbook.mdp import Backend, Block, Config, Parallel, Plain, solve
from rlbook.parts.gridworld import GridMap, gridworld_mdp, random_map
from rlbook.parts.tabular import TabularMDP
from rlbook.plumbing.runtime import RayRuntime

GAMMA, SLIP, WORKERS = 0.99, 0.2, 2
COLUMNS = ("backend", "ms a sweep", "states/s", "× plain", "largest difference")


def grid(side: int) -> TabularMDP:
    """An open map of side × side cells (no walls, so that every cell is a state)."""
    return gridworld_mdp(GridMap(random_map(side, side, walls=0.0, seed=0)), slip=SLIP)


def swept(backend: Backend, values: np.ndarray, sweeps: int) -> np.ndarray:
    """Values after `sweeps` sweeps."""
    for _ in range(sweeps):
        values = backend.improve(values).copy()
    return values


def seconds_a_sweep(backend: Backend, values: np.ndarray, calls: int, per_call: int = 1) -> float:
    """Seconds of one sweep, averaged over `calls` calls that make `per_call` sweeps each."""
    begun = time.perf_counter()
    for _ in range(calls):
        backend.improve(values)
    return (time.perf_counter() - begun) / (calls * per_call)


def measure(mdp: TabularMDP, rounds: int, batch: int) -> list[Row]:
    """All backends in turns; medians of `rounds`."""
    block = mdp.whole
    with RayRuntime(num_cpus=WORKERS) as runtime:
        backends: dict[str, tuple[Backend, int, int]] = {
            "plain Python": (Plain(block, GAMMA), 1, 1),
            "arrays": (Block(block, GAMMA), 100, 1),
            f"plain on {WORKERS} workers": (
                Parallel(mdp, GAMMA, runtime, WORKERS, worker=Plain),
                1,
                1,
            ),
            f"arrays on {WORKERS} workers": (Parallel(mdp, GAMMA, runtime, WORKERS), 20, 1),
            f"arrays on {WORKERS} workers, {batch} sweeps a message": (
                Parallel(mdp, GAMMA, runtime, WORKERS, batch),
                5,
                batch,
            ),
        }
        start = np.random.default_rng(0).random(mdp.num_states)
        exact = swept(backends["plain Python"][0], start, 2)
        times: dict[str, list[float]] = {name: [] for name in backends}
        differences = {
            name: float(np.abs(swept(backend, start, 2) - exact).max()) if per_call == 1 else None
            for name, (backend, _, per_call) in backends.items()
        }
        for _ in range(rounds):
            for name, (backend, calls, per_call) in backends.items():
                times[name].append(seconds_a_sweep(backend, start, calls, per_call))
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return [
        {
            "backend": name,
            "ms a sweep": 1e3 * seconds[name],
            "states/s": mdp.num_states / seconds[name],
            "× plain": seconds["plain Python"] / seconds[name],
            "largest difference": differences[name],
        }
        for name in backends
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweeps of all backends, then one whole solution by arrays."""
    options = parser("Value iteration: plain Python, arrays, worker processes.").parse_args(
        arguments
    )
    side = 12 if options.quick else 200
    mdp = grid(side)
    rows = measure(mdp, rounds=2 if options.quick else 5, batch=8)
    table(f"A sweep of value iteration on a {side} × {side} grid", rows, COLUMNS)
    begun = time.perf_counter()
    solution = solve(mdp, Config(discount=GAMMA, backend="vectorised"))
    solved = {"sweeps": len(solution.residuals), "seconds": time.perf_counter() - begun}
    print(f"  solved to 1e-8 by arrays: {solved['sweeps']} sweeps, {solved['seconds']:.2f} s")
    agree = max(row["largest difference"] or 0.0 for row in rows)
    targets = [
        target("arrays against plain Python, times", rows[1]["× plain"], least=100.0),
        target("largest difference between backends", agree, most=1e-12),
    ]
    print_targets([] if options.quick else targets)
    more: dict[str, Any] = {"side": side, "slip": SLIP, "gamma": GAMMA, "solved_by_arrays": solved}
    keep("value_iteration", rows, [] if options.quick else targets, options, **more)


if __name__ == "__main__":
    main()
