"""Sum trees against the fastest in pure Python on PyPI; a replay shard on Ray; replay on Redis.

    python -m benchmarks.replay [--quick]

The trees run in the peers' environment: single files of the peers are read, so that neither JAX nor
the rest of their libraries is needed. (Trees in C++, Rust, Cython or numba are no pure Python; what
walks one leaf at a time is far behind these two.) A search may have to add up what updates
left undone, so what counts is "update + sample" in turn, as in training. Then, in this environment:
the whole memory with its arrays in this process, as a shard on Ray, and on a real Redis server.
"""

import json
import shutil
import sys
import types
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import (
    Row,
    child,
    in_turns,
    keep,
    parser,
    peer_module,
    peers_available,
    print_targets,
    table,
    target,
)
from rlbook.parts.replay import PrioritizedReplay, SumTree

BATCH, BATCHES = 512, (32, 128, 512)
COLUMNS = ("what", "leaves", "batch", "operation", "batches/s", "items/s")
RATIOS = ("× best peer", "× in process")
BOTH = "update + sample"
LEAST_RATIO, LEAST_ADDED, LEAST_SAMPLED, LEAST_REDIS = 5.0, 200_000.0, 100_000.0, 30_000.0


class Items(NamedTuple):
    """What the replay holds in this measurement: a CartPole transition."""

    obs_tm1: np.ndarray
    a_tm1: np.ndarray
    r_t: np.ndarray
    discount_t: np.ndarray
    obs_t: np.ndarray


def items(count: int) -> Items:
    """`count` transitions."""
    rng = np.random.default_rng(1)
    observations = rng.random((2, count, 4), dtype=np.float32)
    action, ones = rng.integers(2, size=count), np.ones(count, dtype=np.float32)
    return Items(observations[0], action, ones, ones, observations[1])


def dopamine_tree() -> Any:
    """Dopamine's vectorised tree; an empty class stands in for its base, which needs JAX."""
    stand_in = types.ModuleType("dopamine.jax.checkpointers")
    stand_in.Checkpointable = object  # type: ignore[attr-defined]
    above = types.ModuleType("dopamine.jax")
    above.checkpointers = stand_in  # type: ignore[attr-defined]
    modules = {"dopamine": types.ModuleType("dopamine"), "dopamine.jax": above}
    sys.modules.update({**modules, "dopamine.jax.checkpointers": stand_in})
    return peer_module("dopamine_sum_tree", "dopamine", "jax/replay_memory/sum_tree.py").SumTree


def agile_tree() -> Any:
    """AgileRL's vectorised tree."""
    return peer_module("agile_tree", "agilerl", "components/segment_tree.py").SumSegmentTree


Operations = dict[str, Callable[[np.ndarray, np.ndarray], Any]]


def trees(size: int) -> dict[str, Operations]:
    """(tree → operation → function of leaves and draws in [0, 1)), each filled alike."""
    start, everyone = np.random.default_rng(0).random(size) + 0.01, np.arange(size)
    ours = SumTree(size)
    ours.set(everyone, start)
    found: dict[str, Operations] = {
        "rlbook": {"update": ours.set, "sample": lambda _, draws: ours.find(draws * ours.total)}
    }
    try:
        dopamine = dopamine_tree()(size)
        dopamine.set(everyone, start)
        found[f"dopamine-rl {version('dopamine-rl')}"] = {
            "update": dopamine.set,
            "sample": lambda _, draws: dopamine.query(draws * dopamine.root),
        }
        agile = agile_tree()(size)
        agile.update_batch(everyone, start)
        found[f"agilerl {version('agilerl')}"] = {
            "update": agile.update_batch,
            "sample": lambda _, draws: agile.retrieve_batch(draws * agile.tree[1]),
        }
    except ModuleNotFoundError:
        pass  # the peers' environment is not there: ours alone
    return found


def agree(found: dict[str, Operations], size: int) -> None:
    """All trees must find the same leaves, or the race is void."""
    draws = (np.arange(BATCH) + 0.5) / BATCH  # of the middles: no rounding decides
    answers = [np.asarray(tree["sample"](np.arange(BATCH), draws)) for tree in found.values()]
    for answer in answers[1:]:
        if not np.array_equal(answer, answers[0]):
            raise RuntimeError(f"the trees of {size} leaves find different leaves")


def race(size: int, batch: int, rounds: int, calls: int) -> list[Row]:
    """Every tree's update, sample, and both in turn."""
    found = trees(size)
    agree(found, size)
    rng = np.random.default_rng(2)
    leaves = [rng.integers(size, size=batch) for _ in range(64)]
    values = [rng.random(batch) + 0.01 for _ in range(64)]
    draws = [(np.arange(batch) + rng.random(batch)) / batch for _ in range(64)]
    rows = []
    for operation in ("update", "sample", BOTH):
        actions = {
            name: cycling(tree, operation.split(" + "), leaves, values, draws)
            for name, tree in found.items()
        }
        seconds = in_turns(actions, calls=dict.fromkeys(actions, calls), rounds=rounds)
        peers = [value for name, value in seconds.items() if name != "rlbook"]
        for name, value in seconds.items():
            made = line(f"tree: {name}", size, operation, value, batch)
            made["× best peer"] = min(peers) / value if peers else None
            rows.append(made)
    return rows


def cycling(
    tree: Operations,
    operations: list[str],
    leaves: list[np.ndarray],
    values: list[np.ndarray],
    draws: list[np.ndarray],
) -> Callable[[], Any]:
    """Does the operations with other arguments each time."""
    turn = 0

    def call() -> None:
        nonlocal turn
        turn = (turn + 1) % len(leaves)
        for operation in operations:
            given = values if operation == "update" else draws
            tree[operation](leaves[turn], given[turn])

    return call


def line(what: str, size: int, operation: str, seconds: float, batch: int = BATCH) -> Row:
    """A row of the table."""
    return {
        "what": what,
        "leaves": size,
        "batch": batch,
        "operation": operation,
        "batches/s": 1 / seconds,
        "items/s": batch / seconds,
    }


def memory(what: str, there: Any, size: int, rounds: int, calls: int) -> list[Row]:
    """Add, sample and update of a prioritised replay, its data included."""
    rng, step = np.random.default_rng(3), min(size, 1 << 14)
    for _ in range(0, size, step):
        there.add(items(step), rng.random(step))
    batch, priorities = items(BATCH), rng.random(BATCH) + 0.01
    keys = there.sample(BATCH).keys
    actions: dict[str, Callable[[], Any]] = {
        "add": lambda: there.add(batch, priorities),
        "sample": lambda: there.sample(BATCH),
        "update": lambda: there.update_priorities(keys, priorities),
    }
    seconds = in_turns(actions, calls=dict.fromkeys(actions, calls), rounds=rounds)
    return [line(what, size, name, value) for name, value in seconds.items()]


def shard(size: int, rounds: int, calls: int) -> list[Row]:
    """The same as a process of its own on Ray; this process sends and receives every batch."""
    from rlbook.plumbing.memory_shard import Made, MemorySettings, MemoryShard, Priorities
    from rlbook.plumbing.runtime import RayRuntime

    rng = np.random.default_rng(4)
    with RayRuntime(num_cpus=1) as runtime:
        there = runtime.remote(MemoryShard).remote(MemorySettings(size), 0)
        many = Made(items(size), rng.random(size))
        runtime.get(there.keep.remote(many))
        batch, priorities = items(BATCH), rng.random(BATCH) + 0.01
        keys = runtime.get(there.draw.remote(BATCH, 1.0))[1].sample.keys

        def several(send: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: runtime.get([send() for _ in range(calls)])

        actions = {
            "add": several(lambda: there.keep.remote(Made(batch, priorities))),
            "sample": several(lambda: there.draw.remote(BATCH, 1.0)),
            "update": several(lambda: there.correct.remote(Priorities(keys, priorities))),
        }
        seconds = in_turns(actions, calls=dict.fromkeys(actions, 1), rounds=rounds)
    return [line("replay: shard on Ray", size, n, s / calls) for n, s in seconds.items()]


def on_redis(size: int, rounds: int, calls: int) -> list[Row]:
    """The same on a Redis server of our own, with and without a log; none if there is no Redis."""
    from rlbook.plumbing.redis_replay import RedisMemory
    from rlbook.plumbing.redis_server import HOW_TO_INSTALL, Persistence, RedisServer

    example = Items(*(field[0] for field in items(1)))
    rows: list[Row] = []
    kinds: tuple[Persistence, ...] = ("none", "everysec", "always")
    if shutil.which("redis-server") is None:
        print(HOW_TO_INSTALL, file=sys.stderr)
        return rows
    for persistence in kinds:
        with RedisServer(persistence=persistence) as server:
            there = RedisMemory(server.settings, "measured", size, example)
            rows += memory(f"replay: Redis, {persistence}", there, size, rounds, calls)
    return rows


def figures(rows: list[Row]) -> list[Row]:
    """What this book promises."""

    def rate(what: str, operation: str) -> float | None:
        found = [r for r in rows if r["what"].startswith(what) and r["operation"] == operation]
        return min((row["items/s"] for row in found), default=None)

    trees = [row for row in rows if row["what"] == "tree: rlbook" and row["operation"] == BOTH]
    ratios = [row["× best peer"] for row in trees if row["batch"] == BATCH and row["× best peer"]]
    return [
        target(
            f"sum tree, {BOTH}, batch {BATCH}: × the fastest peer",
            min(ratios, default=None),
            least=LEAST_RATIO,
        ),
        target(
            "shard on Ray: items added a second", rate("replay: shard", "add"), least=LEAST_ADDED
        ),
        target(
            "shard on Ray: items sampled a second",
            rate("replay: shard", "sample"),
            least=LEAST_SAMPLED,
        ),
        target(
            "Redis, logged every second: items sampled a second",
            rate("replay: Redis, everysec", "sample"),
            least=LEAST_REDIS,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures in fresh processes, the trees in the peers' environment, where there is one."""
    flags = parser("Sum trees and replay memories.")
    flags.add_argument("--worker", choices=("trees", "memories"), help="measure here, print JSON")
    options = flags.parse_args(arguments)
    sizes, rounds, calls = ([1 << 10], 2, 3) if options.quick else ([1 << 16, 1 << 20], 7, 100)
    size = sizes[0]
    if options.worker == "trees":
        rows = [row for n in sizes for batch in BATCHES for row in race(n, batch, rounds, calls)]
        print(json.dumps({"rows": rows}))
        return
    if options.worker == "memories":
        rows = memory("replay: this process", PrioritizedReplay(size), size, rounds, calls)
        here = {row["operation"]: row["batches/s"] for row in rows}
        rows += on_redis(size, rounds, calls)
        rows += [] if options.quick else shard(size, rounds, calls)
        for row in rows:
            row["× in process"] = row["batches/s"] / here[row["operation"]]
        print(json.dumps({"rows": rows}))
        return
    quick = ["--quick"] if options.quick else []
    peer = peers_available() and not options.quick
    rows = child(["benchmarks.replay", "--worker", "trees", *quick], peer=peer)["rows"]
    rows += child(["benchmarks.replay", "--worker", "memories", *quick])["rows"]
    table("Sum trees and replay memories", rows, COLUMNS + RATIOS)
    targets = [] if options.quick else figures(rows)
    print_targets(targets)
    keep("replay", rows, targets, options)


if __name__ == "__main__":
    main()
