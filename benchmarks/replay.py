"""The sum tree against the fastest in pure Python (numpy) on PyPI: batches of 512 of a million.

    python -m benchmarks.replay [--quick]

Runs in the peers' environment. The peers' trees are read as single files, so that neither JAX nor
the rest of their libraries is needed. "replay" is the whole replay with its arrays, for scale.
"""

import json
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
    table,
)
from rlbook.parts.replay import PrioritizedReplay, SumTree

BATCH = 512
COLUMNS = ("what", "leaves", "operation", "batches/s", "items/s", "× best peer")


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
    draws = (np.arange(BATCH) + 0.5) / BATCH
    answers = [np.asarray(tree["sample"](np.arange(BATCH), draws)) for tree in found.values()]
    for answer in answers[1:]:
        if not np.array_equal(answer, answers[0]):
            raise RuntimeError(f"the trees of {size} leaves find different leaves")


def race(size: int, rounds: int, calls: int) -> list[Row]:
    """Every tree's update and sample, in turns."""
    found = trees(size)
    agree(found, size)
    rng = np.random.default_rng(2)
    leaves = [rng.integers(size, size=BATCH) for _ in range(64)]
    values = [rng.random(BATCH) + 0.01 for _ in range(64)]
    draws = [(np.arange(BATCH) + rng.random(BATCH)) / BATCH for _ in range(64)]
    rows = []
    for operation, arguments in (("update", values), ("sample", draws)):
        actions = {
            name: cycling(tree[operation], leaves, arguments) for name, tree in found.items()
        }
        seconds = in_turns(actions, calls=dict.fromkeys(actions, calls), rounds=rounds)
        peers = [value for name, value in seconds.items() if name != "rlbook"]
        for name, value in seconds.items():
            made = line(f"tree: {name}", size, operation, value)
            made["× best peer"] = min(peers) / value if peers else None
            rows.append(made)
    return rows


def cycling(
    action: Callable[[np.ndarray, np.ndarray], Any],
    first: list[np.ndarray],
    second: list[np.ndarray],
) -> Callable[[], Any]:
    """Calls an action with other arguments each time."""
    turn = 0

    def call() -> None:
        nonlocal turn
        turn = (turn + 1) % len(first)
        action(first[turn], second[turn])

    return call


def line(what: str, size: int, operation: str, seconds: float) -> Row:
    """A row of the table."""
    return {
        "what": what,
        "leaves": size,
        "operation": operation,
        "batches/s": 1 / seconds,
        "items/s": BATCH / seconds,
    }


def whole_replay(size: int, rounds: int, calls: int) -> list[Row]:
    """Add, sample and update of the prioritised replay, its data included."""
    replay: PrioritizedReplay[Items] = PrioritizedReplay(size)
    replay.add(items(size))
    batch = items(BATCH)
    keys = replay.sample(BATCH).keys
    priorities = np.random.default_rng(3).random(BATCH) + 0.01
    actions: dict[str, Callable[[], Any]] = {
        "sample": lambda: replay.sample(BATCH),
        "update": lambda: replay.update_priorities(keys, priorities),
        "add": lambda: replay.add(batch),
    }
    seconds = in_turns(actions, calls=dict.fromkeys(actions, calls), rounds=rounds)
    return [line("replay: rlbook", size, name, value) for name, value in seconds.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures in a fresh process of the peers' environment, where there is one."""
    flags = parser("The sum tree against the fastest pure-Python ones from PyPI.")
    flags.add_argument("--worker", action="store_true", help="measure here and print JSON")
    options = flags.parse_args(arguments)
    sizes, rounds, calls = ([1 << 10], 2, 3) if options.quick else ([1 << 17, 1 << 20], 7, 200)
    if options.worker:
        rows = [row for size in sizes for row in race(size, rounds, calls)]
        print(json.dumps({"rows": rows + whole_replay(sizes[-1], rounds, calls)}))
        return
    quick = ["--quick"] if options.quick else []
    peer = peers_available() and not options.quick
    rows = child(["benchmarks.replay", "--worker", *quick], peer=peer)["rows"]
    table(f"Sum trees and replay, batches of {BATCH}", rows, COLUMNS)
    keep("replay", rows, [], options)


if __name__ == "__main__":
    main()
