"""Environment steps a second of whole training, over at least 10 s, on CartPole-v1.

    python -m benchmarks.rate [--seconds 10] [--quick]

Acting, storing, learning and bookkeeping count; evaluations and the start of Python do not.
"""

from collections.abc import Sequence

from benchmarks.common import (
    Row,
    child,
    keep,
    parser,
    peers_available,
    print_targets,
    table,
    target,
)

LEAST_RATE = {"ppo": 60_000.0, "a2c": 100_000.0, "dqn": 15_000.0}
COLUMNS = ("library", "system", "steps/s", "seconds", "env steps", "envs", "memory MB")


def line(library: str, run: Row) -> Row:
    """A run as a line of the table."""
    return {
        "library": library,
        "system": run["system"],
        "steps/s": run["env_steps_per_s"],
        "seconds": run["wall_time_s"],
        "env steps": run["env_steps"],
        "envs": run["num_envs"],
        "memory MB": run["memory_mb"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Each system once, ours and the peer's in turns."""
    flags = parser("Environment steps a second of whole training, over at least 10 s.")
    flags.add_argument("--seconds", type=float, default=10.0)
    options = flags.parse_args(arguments)
    seconds = str(0.2 if options.quick else options.seconds)
    rows = []
    for system in LEAST_RATE:
        run = child(["benchmarks.trial", system, "--seconds", seconds])
        rows.append(line("rlbook", run))
        if peers_available() and not options.quick:
            run = child(["benchmarks.peer", system, "--seconds", seconds], peer=True)
            rows.append(line("stable-baselines3", run))
    table("Training rate on CartPole-v1", rows, COLUMNS)
    targets = (
        []
        if options.quick
        else [
            target(f"{row['system']}: env steps/s", row["steps/s"], least=LEAST_RATE[row["system"]])
            for row in rows
            if row["library"] == "rlbook"
        ]
    )
    print_targets(targets)
    unusual = [] if options.seconds == 10.0 else [f"--seconds {seconds}"]
    keep("rate", rows, targets, options, unusual)


if __name__ == "__main__":
    main()
