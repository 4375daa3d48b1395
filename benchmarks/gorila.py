"""Gorila: rate and seconds to solve CartPole-v1, beside DQN in one process.

    python -m benchmarks.gorila [--seeds 5] [--seconds 10] [--quick]

Two bundles and one shard on Ray, the defaults, a fresh process for each run; in turns with DQN, so
that both meet the same machine.
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
)

GOAL = 475.0
MOST_SECONDS = 25.0
SYSTEMS = ("gorila", "dqn")


def main(arguments: Sequence[str] | None = None) -> None:
    """Solving in turns, then rates."""
    flags = parser("Gorila: rate, and seconds to solve CartPole-v1, beside DQN.")
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
        trial = ["benchmarks.trial", system, "--seconds", str(seconds)]
        rows.append(run_row("rate", child(trial)))
    table("Gorila with two bundles on Ray, and DQN; CartPole-v1", rows, RUN_COLUMNS)
    targets: list[Row] = []
    if seeds:
        median = seconds_to_solved(rows, "gorila")
        targets.append(target("Gorila, CartPole: seconds to solved", median, most=MOST_SECONDS))
    print_targets(targets)
    keep("gorila", rows, targets, options)


if __name__ == "__main__":
    main()
