"""Replay of stacks of frames: whole, and with each frame kept once; of Ape-X and of R2D2.

    python -m benchmarks.frames [--quick]

Of the shapes of the presets `one_gpu`: "bytes" of an item on its way to the memory, in it, and on
its way to a learner; items a second that an actor makes of what it saw, that a memory in this
process takes and gives, that the learner's side has ready (on the CPU), and that a shard on Ray
takes and gives.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import Row, in_turns, keep, parser, print_targets, table, target
from rlbook import apex, r2d2
from rlbook.data import Transition, tree_nbytes
from rlbook.parts.envs import Step
from rlbook.parts.frame_ring import frames_each
from rlbook.parts.n_step import Trail
from rlbook.parts.sequences import Rows, SequenceCutter, as_tensors, unpacked
from rlbook.parts.sequences import Sequence as Cut
from rlbook.plumbing.memory_shard import Made, MemorySettings, MemoryShard
from rlbook.plumbing.runtime import RayRuntime

PLANES, SIZE = 4, 84
HOW = ("whole stacks", "each frame once")
MOVES = ("made", "added", "drawn", "read", "added on Ray", "drawn on Ray")
BYTES = ("bytes sent", "bytes kept", "bytes drawn")
COLUMNS = ("what", "how", *BYTES, *(f"{move}/s" for move in MOVES))
IN_FLIGHT = 4
"""Calls to a shard at once."""
LEAST_RATIO = {"transitions": 6.0, "sequences": 3.5}


class Case(NamedTuple):
    """One kind of items in one form."""

    what: str
    how: str
    make: Callable[[], Made]
    """What an actor sends at once."""
    settings: MemorySettings
    batch: int
    read: Callable[[Any], Any] | None
    """What a learner does with the items of a batch before it computes; None for nothing."""


def stacks(rows: int, copies: int) -> list[np.ndarray]:
    """Rows [B, 4, 84, 84] that follow each other in long episodes."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (copies, rows + PLANES - 1, SIZE, SIZE), np.uint8)
    return [np.ascontiguousarray(frames[:, t : t + PLANES]) for t in range(rows)]


def transitions(how: str, capacity: int) -> Case:
    """Ape-X's."""
    config, once = apex.PRESETS["one_gpu"], how == HOW[1]
    copies, length = config.num_envs, config.unroll_length + config.n_step - 1
    seen, q = stacks(length + 1, copies), np.zeros((copies, 6), np.float32)
    ones, none = np.ones(copies, np.float32), np.zeros(copies, bool)
    action = np.zeros(copies, np.int64)
    steps = [Step(seen[t], action, ones, ones, seen[t + 1], none, ~none) for t in range(length)]
    trail = Trail(config.n_step, config.discount, once)

    def make() -> Made:
        trail.steps, trail.q = list(steps), [q] * length
        folded = trail.fold(q)
        assert folded is not None and folded[1] is not None
        return Made(folded[0], folded[1] + 1.0)

    one = Transition(seen[0][0], np.int64(0), np.float32(0), np.float32(0), seen[0][0])
    frames = once * frames_each(PLANES, config.unroll_length, config.n_step)
    settings = MemorySettings(capacity, example=one, frames=frames)
    return Case("transitions", how, make, settings, config.batch_size, None)


def sequences(how: str, capacity: int) -> Case:
    """R2D2's."""
    config, planes = r2d2.PRESETS["one_gpu"], PLANES if how == HOW[1] else 1
    copies, length, cells = config.num_envs, config.unroll_length, config.lstm_size
    shape = {"burn_in": config.burn_in_length, "length": config.sequence_length}
    shape |= {"overlap": config.sequence_overlap, "tail": config.n_step}
    cutter = SequenceCutter(copies, **shape, planes=planes)
    seen, (t, b) = np.stack(stacks(length, copies)), (length, copies)
    ones, state = np.ones((t, b), np.float32), np.zeros((t, b, cells), np.float32)
    q, action = np.zeros((t, b, 6), np.float32), np.zeros((t, b), np.int64)
    rows = Rows(seen, action, ones, ones, np.ones((t, b), bool), q, state, state)
    while cutter.push(rows) is None:
        pass

    def make() -> Made:
        found = cutter.push(rows)
        assert found is not None
        return Made(found[0], np.ones(len(found[0].valid)))

    one = Cut.blank(seen[0, 0], sum(shape.values()) - shape["overlap"], cells, planes)
    settings = MemorySettings(capacity, example=one)

    def read(items: Cut) -> Cut:
        return unpacked(as_tensors(items), items.valid.T)

    return Case("sequences", how, make, settings, config.batch_size, read)


def on_ray(case: Case, runtime: Any) -> dict[str, Callable[[], Any]]:
    """Adds and draws of a shard in a process of its own; this process sends and receives."""
    shard, made = runtime.remote(MemoryShard).remote(case.settings, 0), case.make()
    for _ in range(-(-case.settings.capacity // len(made.priorities))):
        runtime.get(shard.keep.remote(made))

    def several(send: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: runtime.get([send() for _ in range(IN_FLIGHT)])

    return {
        "added on Ray": several(lambda: shard.keep.remote(made)),
        "drawn on Ray": several(lambda: shard.draw.remote(case.batch, 1.0)),
    }


def actions_of(case: Case) -> tuple[Row, dict[str, Callable[[], Any]]]:
    """Bytes, and what is timed in this process."""
    shard, made = MemoryShard(case.settings, 0), case.make()
    for _ in range(1 + case.settings.capacity // len(made.priorities)):
        shard.keep(made)
    drawn = shard.memory.sample(case.batch).items
    row: Row = {"what": case.what, "how": case.how}
    row["bytes sent"] = tree_nbytes(made.items) / len(made.priorities)
    row["bytes kept"] = shard.memory.nbytes / case.settings.capacity
    row["bytes drawn"] = tree_nbytes(drawn) / case.batch
    timed: dict[str, Callable[[], Any]] = {
        "made": case.make,
        "added": lambda: shard.keep(made),
        "drawn": lambda: shard.draw(case.batch, 1.0),
    }
    if (read := case.read) is not None:
        timed["read"] = lambda: read(drawn)
    return row, timed


def race(kind: Callable[[str, int], Case], capacity: int, rounds: int, runtime: Any) -> list[Row]:
    """Both forms of one kind of items, in turns."""
    cases = [kind(how, capacity) for how in HOW]
    rows, actions = [], {}
    for case in cases:
        row, timed = actions_of(case)
        if runtime is not None:
            timed |= on_ray(case, runtime)
        rows.append(row)
        actions |= {f"{case.how}: {move}": action for move, action in timed.items()}
    seconds = in_turns(actions, calls=dict.fromkeys(actions, 3), rounds=rounds)
    for case, row in zip(cases, rows, strict=True):
        at_once = {"made": len(case.make().priorities), "added": len(case.make().priorities)}
        for name, value in seconds.items():
            how, _, move = name.partition(": ")
            if how == case.how:
                calls = IN_FLIGHT if "Ray" in move else 1
                row[f"{move}/s"] = calls * at_once.get(move.split()[0], case.batch) / value
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Both kinds, in this process and, but for a quick run, on Ray."""
    options = parser("Replay of stacks of frames.").parse_args(arguments)
    kinds, rows = {transitions: 4_000, sequences: 200}, []
    if options.quick:
        rows = [row for kind, size in kinds.items() for row in race(kind, size // 5, 1, None)]
    else:
        with RayRuntime(num_cpus=2) as runtime:
            rows = [row for kind, size in kinds.items() for row in race(kind, size, 7, runtime)]
    table("Replay of stacks of frames: items a second", rows, COLUMNS)
    targets = []
    for whole, once in zip(rows[::2], rows[1::2], strict=True):
        for where in BYTES[:2]:
            name, least = f"{whole['what']}: times fewer {where}", LEAST_RATIO[whole["what"]]
            targets.append(target(name, whole[where] / once[where], least=least))
    print_targets(targets)
    keep("frames", rows, targets, options)


if __name__ == "__main__":
    main()
