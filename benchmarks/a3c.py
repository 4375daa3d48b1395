"""A3C on CartPole-v1: seconds to solve and rate of both wirings, with A2C and with locks beside.

    python -m benchmarks.a3c [--seeds 5] [--seconds 10] [--quick]

Two worker processes, the defaults but for what the table says, a fresh process for each run.
`updates lost` is the part of all updates that another one overwrote.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.common import Row, child, keep, note, parser, print_targets, table, target

GOAL = 475.0
LEAST_RATE = {"a3c": 150_000.0, "a3c_server": 100_000.0}
MOST_SECONDS = {"a3c": 3.0, "a3c_server": 4.0}
SOLVING = ("a3c", "a3c_locked", "a3c_server", "a2c")
"""Shared memory without and with locks, with a parameter server on Ray, and chapter 04's A2C."""
COLUMNS = ("what", "seed", "solved", "seconds", "env steps", "steps/s", "updates lost")


def run(what: str, seed: int, **settings: Any) -> Row:
    """One run in this process."""
    from rlbook import a3c, policy_gradient

    module: Any = policy_gradient if what == "a2c" else a3c
    config = module.PRESETS["parameter_server" if what == "a3c_server" else "default"]
    if what == "a3c_locked":
        config = replace(config, update="locked")
    result = module.train(replace(config, seed=seed, progress=False, **settings))
    return {
        "what": what,
        "seed": seed,
        "solved": result.stopped_because == "solved",
        "seconds": result.wall_time_s,
        "env steps": result.env_steps,
        "steps/s": result.metrics["env_steps_per_s"],
        "updates lost": result.extra.get("updates_lost"),
    }


def in_child(what: str, seed: int, **settings: Any) -> Row:
    """One run in a fresh process."""
    note(f"{what}, seed {seed}, {settings}")
    return child(["benchmarks.a3c", "--one", json.dumps([what, seed, settings])])


def rate(what: str, seconds: float) -> Row:
    """A run of about so many seconds."""
    pilot = in_child(what, 1, total_env_steps=100_000)
    steps = int(max(100_000, seconds * pilot["steps/s"]))
    return {**in_child(what, 1, total_env_steps=steps), "what": f"{what}, rate", "solved": None}


def main(arguments: Sequence[str] | None = None) -> None:
    """Solving, then rates."""
    flags = parser("A3C: rate, seconds to solve, updates lost.")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=10.0)
    options = flags.parse_args(arguments)
    if options.quick:
        rows = [run(what, 1, total_env_steps=4_000) for what in ("a3c", "a3c_locked", "a2c")]
        table("A3C, a smoke test", rows, COLUMNS)
        keep("a3c", rows, [], options)
        return
    seeds = range(1, options.seeds + 1)
    rows = [in_child(what, seed, stop_at_return=GOAL) for what in SOLVING for seed in seeds]
    targets: list[Row] = []
    for what, most in MOST_SECONDS.items():
        mine = [row for row in rows if row["what"] == what]
        seconds = [row["seconds"] if row["solved"] else float("inf") for row in mine]
        name = f"{what}: seconds to solved"
        targets.append(target(name, statistics.median(seconds), most=most))
    rates = [rate(what, options.seconds) for what in SOLVING]
    for what, row in zip(SOLVING, rates, strict=True):
        if what in LEAST_RATE:
            targets.append(target(f"{what}: env steps/s", row["steps/s"], least=LEAST_RATE[what]))
    table("A3C, two workers, CartPole-v1", rows + rates, COLUMNS)
    print_targets(targets)
    keep("a3c", rows + rates, targets, options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        what, seed, settings = json.loads(sys.argv[2])
        print(json.dumps(run(what, seed, **settings)))
    else:
        main()
