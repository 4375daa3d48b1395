"""Distributed PPO: rate and seconds to solve CartPole-v1, by all-reduce and by a parameter server.

    python -m benchmarks.dppo [--seeds 5] [--seconds 10] [--quick]

Two workers: processes that meet through `torch.distributed` (the default), or actors on Ray with a
server between them. A fresh process for each run, in turns.
"""

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
MOST_SECONDS, LEAST_RATE = 3.5, 90_000.0
SYSTEMS = ("dppo", "dppo_server")
"""By all-reduce, which the promises are about; by a parameter server, to compare."""


def figures(rows: Sequence[Row]) -> list[Row]:
    """What the book promises of all-reduce."""
    system = SYSTEMS[0]
    rated = {row["system"]: row["steps/s"] for row in rows if row["what"] == "rate"}
    return [
        target(f"{system}: seconds to solved", seconds_to_solved(rows, system), most=MOST_SECONDS),
        target(f"{system}: env steps/s", rated[system], least=LEAST_RATE),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Solving in turns, then rates."""
    flags = parser("Distributed PPO: rate and seconds to solve CartPole-v1.")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=10.0)
    options = flags.parse_args(arguments)
    seeds, seconds = (0, 0.05) if options.quick else (options.seeds, options.seconds)
    rows: list[Row] = []
    for seed in range(1, seeds + 1):
        for system in SYSTEMS:
            note(f"{system} on CartPole-v1, seed {seed}")
            trial = ["benchmarks.trial", system, "--seed", str(seed), "--goal", str(GOAL)]
            rows.append(run_row("until solved", child(trial)))
    for system in SYSTEMS:
        note(f"rate of {system}")
        run = child(["benchmarks.trial", system, "--seconds", str(seconds)])
        rows.append(run_row("rate", run))
    table("Distributed PPO, two workers, CartPole-v1", rows, RUN_COLUMNS)
    targets = figures(rows) if seeds else []
    print_targets(targets)
    keep("dppo", rows, targets, options, unusual(flags, options, "seeds", "seconds"))


if __name__ == "__main__":
    main()
