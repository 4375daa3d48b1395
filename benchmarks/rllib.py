"""The book's IMPALA and distributed PPO beside RLlib's IMPALA, APPO and PPO, on CartPole-v1.

    python -m benchmarks.rllib [--seeds 5] [--cap 60] [--seconds 10] [--ours] [--quick]

Every run has a fresh process, and all take turns seed by seed, so that drift of the machine hits
all alike. RLlib (new API stack) has two env runners of 16 copies and the settings that its examples
document for CartPole (`benchmarks/rllib_peer.py`). Both sides are judged by raw episodes: the last
max(100, 2 × copies) of training, then 100 fresh ones of the policy, the clock standing still. A run
that is not solved within the cap counts as infinitely slow in the medians.

`seconds` do not hold the start of the processes; `memory MB` is the peak of all of them together.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

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
from benchmarks.rllib_peer import SETTINGS

GOAL = 475.0
OURS, PEER = "rlbook", "RLlib"
Systems = Mapping[str, Sequence[str]]
SYSTEMS: Systems = {OURS: ("impala", "impala_throughput", "dppo"), PEER: tuple(SETTINGS)}
LEAST_TIMES_SOONER, LEAST_TIMES_RATE, MOST_SECONDS = 10.0, 20.0, 5.0
START_S = 120.0
"""A process that takes longer than its cap by this much is ended."""
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


def one(library: str, system: str, seed: int, *flags: str, seconds: float) -> Row:
    """One run of one library: until solved, or for its rate."""
    command = [system, "--seed", str(seed), *flags]
    if library == OURS:
        made = again(["benchmarks.trial", *command])
    else:
        command += ["--seconds", str(seconds)]
        limit = 2 * seconds + START_S  # it may confirm several times
        made = again(["benchmarks.rllib_peer", *command], peer=True, timeout_s=limit)
    return {"library": library, **made}


def again(command: Sequence[str], **options: Any) -> Row:
    """A fresh process, and another one if it fails: on a busy machine Ray does not always start."""
    try:
        return child(command, **options)
    except RuntimeError as error:
        note(f"once more, for it failed: {str(error).splitlines()[-1]}")
        return child(command, **options)


def solve(systems: Systems, seeds: int, goal: float, cap_s: float) -> list[Row]:
    """All systems until solved, in turns."""
    runs = []
    for seed in range(1, seeds + 1):
        for library, names in systems.items():
            for system in names:
                run = one(library, system, seed, "--goal", str(goal), seconds=cap_s)
                runs.append({"what": "until solved", **run})
                word = "solved" if run["solved"] else "not solved"
                note(f"{library} {system} seed {seed}: {word}, {run['wall_time_s']:.2f} s")
    return runs


def rates(systems: Systems, seconds: float) -> list[Row]:
    """All systems for some seconds each."""
    runs = []
    for library, names in systems.items():
        for system in names:
            flags = ["--seconds", str(seconds)] if library == OURS else []
            run = one(library, system, 1, *flags, seconds=seconds)
            runs.append({"what": "rate", **run})
            note(f"{library} {system}: {run['env_steps_per_s']:,.0f} steps/s")
    return runs


def seconds_of(runs: Sequence[Row]) -> list[float]:
    """Seconds to solved, in order; infinite where a run was not."""
    return sorted(run["wall_time_s"] if run["solved"] else float("inf") for run in runs)


def summary(solving: Sequence[Row], rate: Row, cap_s: float) -> Row:
    """The runs of one system as a line of the table."""
    seconds = seconds_of(solving)
    median = statistics.median_low(seconds)
    middle = [run for run in solving if run["solved"] and run["wall_time_s"] == median]
    late = f">{cap_s:.0f}" if rate["library"] == PEER else "not solved"
    return {
        "library": rate["library"],
        "system": rate["system"],
        "solved": f"{sum(run['solved'] for run in solving)} of {len(solving)}",
        "seconds": median if middle else late,
        "slowest": seconds[-1] if seconds[-1] < float("inf") else late,
        "env steps": middle[0]["env_steps"] if middle else None,
        "steps/s": rate["env_steps_per_s"],
        "envs": rate["num_envs"],
        "memory MB": max(run["memory_mb"] for run in [*solving, rate]),
    }


def figures(lines: Sequence[Row], cap_s: float) -> list[Row]:
    """What the book promises beside RLlib.

    A peer that is not solved within the cap is taken for as slow as the cap: a lower bound.
    """
    found = {(line["library"], line["system"]): line for line in lines}
    ours, theirs = found[OURS, "impala"], found[PEER, "impala"]
    fast = found[OURS, "impala_throughput"]
    peers = [line for line in lines if line["library"] == PEER]
    seconds = ours["seconds"] if isinstance(ours["seconds"], float) else None
    slow = theirs["seconds"] if isinstance(theirs["seconds"], float) else cap_s
    sooner = slow / seconds if seconds else None
    made = [
        target("impala: seconds to solved", seconds, most=MOST_SECONDS),
        target("impala: times sooner than RLlib's", sooner, least=LEAST_TIMES_SOONER),
        target(
            "impala_throughput: times RLlib's impala's steps/s",
            fast["steps/s"] / theirs["steps/s"],
            least=LEAST_TIMES_RATE,
        ),
    ]
    least = min(line["memory MB"] for line in peers)
    for system in SYSTEMS[OURS]:
        name = f"{system}: memory, MB, against RLlib's least"
        made.append(target(name, found[OURS, system]["memory MB"], most=least))
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Solving in turns, then rates."""
    flags = parser("IMPALA and distributed PPO beside RLlib, on CartPole-v1.")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--cap", type=float, default=60.0, help="seconds for a run of RLlib")
    flags.add_argument("--seconds", type=float, default=10.0, help="for a rate")
    flags.add_argument("--ours", action="store_true", help="leave out RLlib")
    options = flags.parse_args(arguments)
    alone = options.quick or options.ours or not peers_available()
    seeds, goal, seconds, systems = options.seeds, GOAL, options.seconds, dict(SYSTEMS)
    if alone:
        del systems[PEER]
    if options.quick:
        seeds, goal, seconds, systems = 1, 20.0, 0.2, {OURS: ("dppo",)}
    solving = solve(systems, seeds, goal, options.cap)
    rating = rates(systems, seconds)
    lines = []
    for rate in rating:
        which = rate["library"], rate["system"]
        mine = [run for run in solving if (run["library"], run["system"]) == which]
        lines.append(summary(mine, rate, options.cap))
    table(f"CartPole-v1 until solved at {goal:.0f}, medians of {seeds} seeds", lines, COLUMNS)
    targets = [] if alone else figures(lines, options.cap)
    if not alone:
        for system, settings in SETTINGS.items():
            print(f"  {PEER} {system}: {settings.note}")
    elif not options.quick and not options.ours:
        print("  RLlib is missing: `make bench` installs it.")
    print_targets(targets)
    more = {
        "goal": goal,
        "cap_s": options.cap,
        "summary": lines,
        "peer_versions": {} if alone else peer_versions(["ray", "torch", "gymnasium", "numpy"]),
        "peer_settings": {} if alone else {name: s.note for name, s in SETTINGS.items()},
    }
    changed = unusual(flags, options, "seeds", "cap", "seconds")
    keep("rllib", solving + rating, targets, options, changed, **more)


if __name__ == "__main__":
    main()
