"""Seconds until CartPole-v1 is solved: the book's PPO, A2C and DQN against stable-baselines3's.

    python -m benchmarks.solve [--seeds 5] [--cap 60] [--systems ppo a2c dqn] [--quick]

Every run has a fresh process; the two libraries take turns, so that drift of the machine hits both.
Ours run with their defaults, the peer with RL Zoo's tuned settings (`benchmarks/peer.py`). A run
that is not solved counts as infinitely slow in the medians.
"""

import statistics
from collections.abc import Sequence

from benchmarks.common import (
    Row,
    child,
    keep,
    note,
    parser,
    peer_versions,
    peers_available,
    print_targets,
    table,
    target,
    unusual,
)
from benchmarks.peer import SETTINGS

GOAL = 475.0
MOST_SECONDS = {"ppo": 2.5, "a2c": 3.0, "dqn": 12.0}
OURS, PEER = "rlbook", "stable-baselines3"
COLUMNS = (
    "library",
    "system",
    "solved",
    "seconds",
    "slowest",
    "env steps",
    "steps/s",
    "envs",
    "memory MB",
)


def one(library: str, system: str, seed: int, goal: float, cap_s: float) -> Row:
    """One run of one library."""
    flags = [system, "--seed", str(seed), "--goal", str(goal)]
    if library == OURS:
        made = child(["benchmarks.trial", *flags])
    else:
        made = child(["benchmarks.peer", *flags, "--seconds", str(cap_s)], peer=True)
    return {"library": library, **made}


def summary(runs: Sequence[Row], cap_s: float) -> Row:
    """The runs of one library and system as a line of the table."""
    solved = [run for run in runs if run["solved"]]
    seconds = sorted(run["wall_time_s"] if run["solved"] else float("inf") for run in runs)
    median, slowest = statistics.median_low(seconds), seconds[-1]
    middle = [run for run in runs if run["solved"] and run["wall_time_s"] == median]
    late = f"not in {cap_s:.0f} s" if runs[0]["library"] == PEER else "not solved"
    return {
        "library": runs[0]["library"],
        "system": runs[0]["system"],
        "solved": f"{len(solved)} of {len(runs)}",
        "seconds": median if middle else late,
        "slowest": slowest if len(solved) == len(runs) else late,
        "env steps": middle[0]["env_steps"] if middle else None,
        "steps/s": statistics.median(run["env_steps_per_s"] for run in runs),
        "envs": runs[0]["num_envs"],
        "memory MB": statistics.median(run["memory_mb"] for run in runs),
    }


def figures(runs: Sequence[Row], systems: Sequence[str]) -> list[Row]:
    """What the book promises of its own systems."""
    made = []
    for system in systems:
        ours = [run for run in runs if run["library"] == OURS and run["system"] == system]
        seconds = [run["wall_time_s"] if run["solved"] else float("inf") for run in ours]
        median = statistics.median_low(sorted(seconds))
        slow = sum(value > 3 * median for value in seconds) if median < float("inf") else len(ours)
        shown = median if median < float("inf") else None
        name = f"{system}: seconds to solved, median of {len(ours)}"
        made.append(target(name, shown, most=MOST_SECONDS[system]))
        made.append(target(f"{system}: seeds slower than 3 × the median", slow, most=1))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """All runs, in turns."""
    flags = parser("Seconds until CartPole-v1 is solved, against stable-baselines3.")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--cap", type=float, default=60.0, help="seconds for a run of the peer")
    flags.add_argument("--systems", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    flags.add_argument("--ours", action="store_true", help="leave out the peer")
    options = flags.parse_args(arguments)
    seeds, goal = (1, 20.0) if options.quick else (options.seeds, GOAL)
    alone = options.quick or options.ours or not peers_available()
    libraries = (OURS,) if alone else (OURS, PEER)
    runs: list[Row] = []
    for system in options.systems:
        for seed in range(1, seeds + 1):
            for library in libraries:
                runs.append(one(library, system, seed, goal, options.cap))
                run = runs[-1]
                word = "solved" if run["solved"] else "not solved"
                note(f"{library} {system} seed {seed}: {word}, {run['wall_time_s']:.2f} s")
    lines = []
    for system in options.systems:
        for library in libraries:
            mine = [r for r in runs if (r["library"], r["system"]) == (library, system)]
            lines.append(summary(mine, options.cap))
    table(f"CartPole-v1 until solved at {goal:.0f}, medians of {seeds} seeds", lines, COLUMNS)
    if not alone:
        for system in options.systems:
            print(f"  {PEER} {system}: {SETTINGS[system].note}; 1 thread, as ours")
    elif not options.quick and not options.ours:
        print("  The peer is missing: `make bench` installs it.")
    targets = [] if options.quick else figures(runs, options.systems)
    print_targets(targets)
    changed = unusual(flags, options, "seeds", "cap", "systems")
    more = {
        "goal": goal,
        "cap_s": options.cap,
        "summary": lines,
        "peer_versions": {} if alone else peer_versions(["stable_baselines3", "torch"]),
        "peer_settings": {} if alone else {s: SETTINGS[s].note for s in options.systems},
    }
    keep("solve", runs, targets, options, changed, **more)


if __name__ == "__main__":
    main()
