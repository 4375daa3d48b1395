"""Ape-X: rate with learning, and seconds to solve CartPole-v1, beside DQN in one process.

    python -m benchmarks.apex [--seeds 5] [--seconds 10] [--quick]

Two actors, a shard and a learner on Ray, the defaults, a fresh process for each run; in turns with
DQN, so that both meet the same machine. The same is then done with the replay memory on a Redis
server, once, for its rate.
"""

import shutil
from collections.abc import Sequence

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

GOAL = 475.0
MOST_SECONDS, LEAST_RATE = 15.0, 30_000.0
SOLVING, RATES = ("apex", "dqn"), ("apex", "apex_redis", "dqn")


def main(arguments: Sequence[str] | None = None) -> None:
    """Solving in turns, then rates."""
    flags = parser("Ape-X: rate, and seconds to solve CartPole-v1, beside DQN.")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=10.0)
    options = flags.parse_args(arguments)
    seeds, seconds = (0, 0.05) if options.quick else (options.seeds, options.seconds)
    rows: list[Row] = []
    for seed in range(1, seeds + 1):
        for system in SOLVING:
            note(f"{system} on CartPole-v1, seed {seed}")
            trial = ["benchmarks.trial", system, "--seed", str(seed), "--goal", str(GOAL)]
            rows.append(run_row("until solved", child(trial)))
    for system in RATES:
        if system == "apex_redis" and shutil.which("redis-server") is None:
            continue
        note(f"rate of {system}")
        trial = ["benchmarks.trial", system, "--seconds", str(seconds)]
        rows.append(run_row("rate", child(trial)))
    table("Ape-X with two actors and a learner on Ray, and DQN; CartPole-v1", rows, RUN_COLUMNS)
    targets: list[Row] = []
    if not options.quick:
        median = seconds_to_solved(rows, "apex")
        targets.append(target("CartPole: seconds to solved", median, most=MOST_SECONDS))
        found = {row["system"]: row["steps/s"] for row in rows if row["what"] == "rate"}
        name = "env steps a second, with learning"
        targets.append(target(name, found["apex"], least=LEAST_RATE))
    print_targets(targets)
    keep("apex", rows, targets, options, unusual(flags, options, "seeds", "seconds"))


if __name__ == "__main__":
    main()
