"""A2C through a parameter server: rate and seconds to solve CartPole-v1; what compression costs.

    python -m benchmarks.parameter_server [--seeds 5] [--seconds 10] [--quick]

CartPole: two worker processes and one shard on Ray, the defaults, a fresh process for each run.
Catch: the preset `compressed` against `catch` on the virtual cluster, at equal environment steps;
there the numbers are the same on every machine.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.common import Row, child, keep, note, parser, print_targets, table, target
from rlbook import parameter_server
from rlbook.plumbing.cluster import Cluster, Node
from rlbook.plumbing.virtual import VirtualRuntime

GOAL = 475.0
LEAST_RATE, MOST_SECONDS = 120_000.0, 3.0
LEAST_RATIO, LEAST_KEPT = 50.0, 0.9
CODECS = ("none", "fp16", "int8", "sign", "topk:0.01+fp16")
RUNS = ("what", "seed", "solved", "seconds", "env steps", "steps/s")
COMPRESSION = ("codec", "return", "lowest", "bytes a gradient", "times fewer")


def run_row(what: str, run: Row) -> Row:
    """A run on Ray as a line of the table."""
    return {
        "what": what,
        "seed": run["seed"],
        "solved": run["solved"],
        "seconds": run["wall_time_s"],
        "env steps": run["env_steps"],
        "steps/s": run["env_steps_per_s"],
    }


def compressed(codec: str, seeds: int, env_steps: int) -> Row:
    """Catch with one codec: mean return of 200 fresh episodes, median over seeds."""
    returns, sent = [], []
    for seed in range(1, seeds + 1):
        config = replace(
            parameter_server.CATCH,
            compression=codec,
            seed=seed,
            total_env_steps=env_steps,
            progress=False,
        )
        nodes = (Node(cores=config.num_workers + 1),)
        with VirtualRuntime(seed, Cluster(nodes=nodes, costs=parameter_server.COSTS)) as runtime:
            result = parameter_server.train(config, runtime)
        returns.append(result.evaluate(200).mean)
        sent.append(result.metrics["bytes_sent"])
    return {
        "codec": codec,
        "return": statistics.median(returns),
        "lowest": min(returns),
        "bytes a gradient": statistics.median(sent),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Solving, rate, compression."""
    flags = parser("A2C through a parameter server: rate, seconds to solve, compression.")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--seconds", type=float, default=10.0)
    options = flags.parse_args(arguments)
    rows: list[Row] = []
    targets: list[Row] = []
    if not options.quick:
        solving = []
        for seed in range(1, options.seeds + 1):
            note(f"parameter_server on CartPole-v1, seed {seed}")
            trial = ["benchmarks.trial", "parameter_server", "--seed", str(seed)]
            solving.append(run_row("until solved", child([*trial, "--goal", str(GOAL)])))
        rate = child(["benchmarks.trial", "parameter_server", "--seconds", str(options.seconds)])
        rows += [*solving, run_row("rate", rate)]
        seconds = [row["seconds"] if row["solved"] else float("inf") for row in solving]
        median = statistics.median(seconds)
        targets += [
            target("CartPole: seconds to solved", median, most=MOST_SECONDS),
            target("CartPole: env steps/s", rate["env_steps_per_s"], least=LEAST_RATE),
        ]
        table("Parameter server on Ray, two workers, CartPole-v1", rows, RUNS)
    seeds, env_steps = (1, 4_000) if options.quick else (options.seeds, 100_000)
    codecs = [compressed(codec, seeds, env_steps) for codec in CODECS]
    for row in codecs:
        row["times fewer"] = codecs[0]["bytes a gradient"] / row["bytes a gradient"]
    table(f"Compression on Catch, {env_steps:,} environment steps", codecs, COMPRESSION)
    if not options.quick:
        kept = codecs[-1]["return"] / codecs[0]["return"]
        targets += [
            target(
                f"{CODECS[-1]}: times fewer bytes", codecs[-1]["times fewer"], least=LEAST_RATIO
            ),
            target(f"{CODECS[-1]}: part of the return kept", kept, least=LEAST_KEPT),
        ]
    print_targets(targets)
    keep("parameter_server", rows + codecs, targets, options)


if __name__ == "__main__":
    main()
