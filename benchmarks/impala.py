"""IMPALA: seconds to solve CartPole-v1, rate, and what it leaves to an env that costs 1 ms a step.

    python -m benchmarks.impala [--seeds 5] [--seconds 10] [--quick]

Two actors and a learner on Ray, a fresh process for each run: the default preset until solved, then
the presets `default` and `throughput` for their rates. The costly environment is CartPole whose
step uses a millisecond of a core (`rlbook/Costly-v0`); its ceiling is what as many processes as
there are actors, with as many copies each, step a second when they do nothing else. It is measured
before and after the training, and the mean of both counts.
"""

import statistics
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

from benchmarks.common import (
    RUN_COLUMNS,
    Row,
    child,
    keep,
    note,
    parser,
    print_targets,
    run_row,
    seconds_to_solved,
    table,
    target,
    unusual,
)
from benchmarks.trial import settings
from rlbook.harness.records import env_ceiling

GOAL = 475.0
COSTLY = "rlbook/Costly-v0"
MOST_SECONDS, LEAST_FRACTION = 5.0, 0.85
RATES = ("impala", "impala_throughput")
CEILING = ("system", "envs", "ceiling before", "ceiling after", "training steps/s", "fraction")


def ceiling(pool: Any, config: Any, seconds: float) -> float:
    """Steps a second of as many processes as there are actors, side by side, that only step."""
    actors = config.num_actors
    return sum(pool.starmap(env_ceiling, [(COSTLY, config.num_envs, seconds)] * actors, 1))


def costly(system: str, seconds: float) -> Row:
    """Training where the environment is what costs, against stepping alone."""
    _, config = settings(system, 1, COSTLY)
    trial = ["benchmarks.trial", system, "--env-id", COSTLY, "--seconds", str(seconds)]
    with get_context("spawn").Pool(config.num_actors) as pool:
        ceiling(pool, config, 0.2)  # all processes are there, all is imported
        before = ceiling(pool, config, seconds / 2)
        run = child(trial)
        after = ceiling(pool, config, seconds / 2)
    return {
        "system": system,
        "what": "1 ms a step",
        "envs": run["num_envs"],
        "ceiling before": before,
        "ceiling after": after,
        "training steps/s": run["env_steps_per_s"],
        "fraction": run["env_steps_per_s"] / statistics.mean([before, after]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Solving, rates, the costly environment."""
    flags = parser("IMPALA: seconds to solve, rate, and the rate with a costly environment.")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=10.0)
    options = flags.parse_args(arguments)
    seeds, seconds = (0, 0.1) if options.quick else (options.seeds, options.seconds)
    rows: list[Row] = []
    for seed in range(1, seeds + 1):
        note(f"impala on CartPole-v1, seed {seed}")
        trial = ["benchmarks.trial", "impala", "--seed", str(seed), "--goal", str(GOAL)]
        rows.append(run_row("until solved", child(trial)))
    for system in () if options.quick else RATES:
        note(f"rate of {system}")
        run = child(["benchmarks.trial", system, "--seconds", str(seconds)])
        rows.append(run_row("rate", run))
    note(f"impala on {COSTLY}")
    bound = costly("impala", seconds)
    if rows:
        table("IMPALA, two actors and a learner on Ray, CartPole-v1", rows, RUN_COLUMNS)
    table("A step that costs 1 ms of a core", [bound], CEILING)
    targets: list[Row] = []
    if not options.quick:
        median = seconds_to_solved(rows, "impala")
        targets.append(target("CartPole: seconds to solved", median, most=MOST_SECONDS))
        name = "1 ms a step: fraction of the ceiling"
        # More than the ceiling means that other work disturbed its measurement.
        targets.append(target(name, bound["fraction"], least=LEAST_FRACTION, most=1.05))
    print_targets(targets)
    keep("impala", [*rows, bound], targets, options, unusual(flags, options, "seeds", "seconds"))


if __name__ == "__main__":
    main()
