"""SEED RL: round trips a second by each road, rate, and seconds to solve CartPole-v1.

    python -m benchmarks.seed_rl [--seeds 5] [--seconds 10] [--quick]

A round trip: a worker in a process of its own shows one Atari observation (84 × 84 × 4 bytes), the
server answers with an action; one in flight. "ours" is the book's stream or its calls, with all
checks, slots and unrolls, and an agent and an environment that cost nothing; "plain" is an echo as
gRPC's own examples for Python are written (threads); "echo" is one on the same event loop as ours,
with the same messages, which are sent back whole; "half" sends bytes that nobody opens, and gets 8
back: what the road itself takes. All are measured in turns in one run.
Then the presets `default` and `throughput` for their rates, and the first until solved, a fresh
process for each run.
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
from benchmarks.trips import ROADS, ROUNDS, trips

__all__ = ["ROADS", "main"]

GOAL = 475.0
MOST_SECONDS, LEAST_RATE = 6.0, 110_000.0
LEAST_TRIPS, LEAST_SHARE = 4_000.0, 0.85
RATES = ("seed_rl", "seed_rl_throughput")
COLUMNS = ("road", "bytes", "ours/s", "plain/s", "of plain", "echo/s", "of echo", "half/s")


def figures(rows: Sequence[Row]) -> list[Row]:
    """What this book promises."""
    unix = next(row for row in rows if row.get("road") == "unix")
    rate = next(row for row in rows if (row.get("system"), row["what"]) == ("seed_rl", "rate"))
    median = seconds_to_solved([row for row in rows if "system" in row], "seed_rl")
    return [
        target("unix stream, 28 KB: round trips/s", unix["ours/s"], least=LEAST_TRIPS),
        target("of a plain gRPC echo's in the same run", unix["of plain"], least=LEAST_SHARE),
        target("of an echo's on the same stack", unix["of echo"], least=LEAST_SHARE),
        target("CartPole: env steps/s", rate["steps/s"], least=LEAST_RATE),
        target("CartPole: seconds to solved", median, most=MOST_SECONDS),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Round trips, rates, solving."""
    flags = parser("SEED RL: round trips by each road, rate, and seconds to solve CartPole-v1.")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=10.0)
    options = flags.parse_args(arguments)
    seconds = 0.5 if options.quick else options.seconds
    roads = trips(seconds / (2 * ROUNDS))
    table("Round trips with one Atari observation, one in flight", roads, COLUMNS)
    rows: list[Row] = []
    for seed in range(1, 0 if options.quick else options.seeds + 1):
        note(f"seed_rl on CartPole-v1, seed {seed}")
        trial = ["benchmarks.trial", "seed_rl", "--seed", str(seed), "--goal", str(GOAL)]
        rows.append(run_row("until solved", child(trial)))
    for system in RATES[:1] if options.quick else RATES:
        note(f"rate of {system}")
        run = child(["benchmarks.trial", system, "--seconds", str(seconds)])
        rows.append(run_row("rate", run))
    table("SEED RL, two workers on unix-socket streams, CartPole-v1", rows, RUN_COLUMNS)
    rows = [*roads, *rows]
    targets = [] if options.quick else figures(rows)
    print_targets(targets)
    keep("seed_rl", rows, targets, options, unusual(flags, options, "seeds", "seconds"))


if __name__ == "__main__":
    main()
