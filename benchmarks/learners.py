"""A learner on frames: samples a second by network and precision; copies; two ranks; idling.

    python -m benchmarks.learners [--seconds 3] [--rows 20 32] [--quick]

"update"   one update of IMPALA's learner on a batch of T steps of B copies of made-up frames, from
           arrays on the host to parameters for the actors on the host: all that a learner does
"copy"     the batch's bytes on their way to a GPU, from pinned and from pageable memory, GB/s
"ranks"    the same batch by two learners that add up their gradients by gloo, on one GPU if there
           is one, and how far their parameters are from one learner's after some updates
"idle"     IMPALA on Pong, learner and actors: the part of its time in which the learner waits

What there is no GPU or no compiler for is left out, and the row says why.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.common import Row, keep, note, parser, table, unusual
from rlbook import impala
from rlbook.data import AgentOutput, EnvOutput, Unroll
from rlbook.plumbing.devices import own_device, placed
from rlbook.plumbing.learner_group import LearnerGroup
from rlbook.plumbing.runtime import RayRuntime

FRAMES, ACTIONS = (4, 84, 84), 6
CASES = tuple(
    (torso, precision, compiles)
    for torso in ("nature", "resnet")
    for precision, compiles in (("float32", False), ("bfloat16", False), ("bfloat16", True))
)
COLUMNS = (
    "what",
    "case",
    "device",
    "samples",
    "milliseconds",
    "samples/s",
    "GB/s",
    "fraction",
    "difference",
    "why not",
)
UPDATES = 5
"""By two ranks and by one, before their parameters are compared."""


def settings(**changes: Any) -> impala.Config:
    """IMPALA's for Atari on the device at hand."""
    return replace(
        impala.PRESETS["paper"], torso="nature", device="auto", progress=False, **changes
    )


def made_up(steps: int, copies: int, seed: int = 0) -> Unroll:
    """An unroll `[T+1, B]` of noise, with an episode that ends here and there."""
    rng, rows = np.random.default_rng(seed), (steps + 1, copies)
    first = rng.random(rows) < 0.01
    seen = EnvOutput(
        rng.integers(0, 256, (*rows, *FRAMES), np.uint8),
        rng.choice(np.array([-1, 0, 1], np.float32), rows),
        (rng.random(rows) > 0.01).astype(np.float32),
        first,
    )
    logits = rng.normal(size=(steps, copies, ACTIONS)).astype(np.float32)
    action = rng.integers(ACTIONS, size=(steps, copies))
    return Unroll(seen, AgentOutput(action, logits, np.zeros((steps, copies), np.float32)))


def seconds_of(action: Callable[[], object], seconds: float) -> float:
    """Of one call, the mean over at least `seconds`, after two that warm up."""
    action(), action()
    calls, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds or not calls:
        action()
        calls += 1
    return spent / calls


def update(case: tuple[str, str, bool], rows: tuple[int, int], seconds: float) -> Row:
    """One learner's update."""
    torso, precision, compiles = case
    name = " ".join([torso, precision, *(["compiled"] if compiles else [])])
    config = settings(precision=precision, compile=compiles)
    made: Row = {"what": "update", "case": name, "device": str(own_device("auto"))}
    made["samples"] = rows[0] * rows[1]
    unroll = made_up(*rows)
    try:
        learner = impala.Learner(replace(config, torso=torso))
        spent = seconds_of(lambda: learner.update((0,), unroll), seconds)
    except Exception as error:
        if not compiles:
            raise
        return made | {"why not": f"torch.compile: {type(error).__name__}"}
    finally:
        torch.compiler.reset()
    return made | {"milliseconds": 1e3 * spent, "samples/s": made["samples"] / spent}


def copies(rows: tuple[int, int], seconds: float) -> list[Row]:
    """A batch of frames on its way to the GPU."""
    device = own_device("auto")
    found = torch.from_numpy(made_up(*rows).env_outputs.observation)
    made: list[Row] = []
    for case in ("pageable", "pinned", "pinned for it"):
        row: Row = {"what": "copy", "case": case, "device": str(device)}
        row["samples"] = rows[0] * rows[1]
        if device.type != "cuda":
            made.append(row | {"why not": "no GPU"})
            continue
        host = found.pin_memory() if case == "pinned" else found

        def copy(host: torch.Tensor = host, case: str = case) -> None:
            here = host.pin_memory() if case == "pinned for it" else host
            here.to(device, non_blocking=case != "pageable")
            torch.cuda.synchronize(device)

        spent = seconds_of(copy, seconds)
        made.append(row | {"milliseconds": 1e3 * spent, "GB/s": found.nbytes / spent / 1e9})
    return made


def ranks(
    runtime: RayRuntime, count: int, rows: tuple[int, int], seconds: float
) -> tuple[Row, np.ndarray]:
    """A batch of two unrolls by so many learners; their parameters after `UPDATES` updates."""
    share = 1.0 if count == 1 else 0.5
    config = settings(
        num_learners=count, unrolls_per_batch=2, gpus_per_learner=share, learner_backend="gloo"
    )
    steps, half = rows[0], rows[1] // 2
    learner = runtime.remote(impala.Learner, **placed(config))
    group = LearnerGroup(runtime, lambda rank: learner.remote(config, rank), count)
    batch = [runtime.put(made_up(steps, half, seed)) for seed in range(2)]

    def turn() -> None:
        metrics, _ = group.update((0,), batch)
        group.answer(metrics)

    for _ in range(UPDATES):
        turn()
    parameters = group.parameters()
    spent = seconds_of(turn, seconds)
    samples = steps * half * 2
    made = {"what": "ranks", "case": f"{count} of nature", "device": str(own_device("auto"))}
    times = {"samples": samples, "milliseconds": 1e3 * spent, "samples/s": samples / spent}
    return made | times, parameters


def idle(quick: bool) -> Row:
    """IMPALA on Pong."""
    config = replace(impala.PRESETS["one_gpu"], progress=False, total_env_steps=400_000)
    if own_device("auto").type != "cuda":
        small: dict[str, Any] = {"num_actors": 1, "num_envs": 2, "unrolls_per_batch": 2}
        steps = 160 if quick else 2_000
        config = replace(config, total_env_steps=steps, torch_threads=1, **small)
    result = impala.train(config)
    made = {"what": "idle", "case": "impala, nature", "device": str(own_device("auto"))}
    rate, waits = (result.metrics[n] for n in ("env_steps_per_s", "learner_idle_fraction"))
    return made | {"samples/s": rate, "fraction": waits}


def main(arguments: Sequence[str] | None = None) -> None:
    """Updates, copies, ranks, idling."""
    flags = parser("A learner on frames: samples a second.")
    flags.add_argument("--seconds", type=float, default=3.0)
    flags.add_argument("--rows", type=int, nargs=2, default=[20, 32], metavar=("T", "B"))
    options = flags.parse_args(arguments)
    steps, batch = (2, 2) if options.quick else options.rows
    size, seconds = (steps, batch), 0.0 if options.quick else options.seconds
    cases = CASES[:2] if options.quick else CASES
    rows: list[Row] = []
    for case in cases:
        note(f"updates: {case}")
        rows.append(update(case, size, seconds))
    rows += copies(size, seconds)
    note("two ranks, and one")
    with RayRuntime(num_cpus=2) as runtime:
        (one, expected), (two, found) = (ranks(runtime, k, size, seconds) for k in (1, 2))
    two["difference"] = float(np.abs(found - expected).max() / np.abs(expected).max())
    rows += [one, two]
    note("impala on Pong")
    rows.append(idle(options.quick))
    table(f"A learner, batches of {steps} steps of {batch} copies", rows, COLUMNS)
    keep("learners", rows, [], options, unusual(flags, options, "seconds", "rows"))


if __name__ == "__main__":
    main()
