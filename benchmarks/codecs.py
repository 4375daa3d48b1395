"""What a codec costs and saves: MB of float32 gradient a second, and times fewer bytes.

    python -m benchmarks.codecs [--quick]

Of a network of 9,000 weights (CartPole's) and of one of 1.7 million (Atari's), gradients from a
normal distribution, on one core. "copy" is a copy of the array, for scale. "wire" is the speed of
a wire, in MB/s, below which the codec pays: there, encoding, sending and decoding take as long as
sending the whole; "–" if it never does.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.common import Row, in_turns, keep, parser, print_targets, table, target
from rlbook.plumbing.codecs import ErrorFeedback, decode, make_codec, ratio

NAMES = ("none", "fp16", "int8", "sign", "topk:0.01+fp16", "topk:0.01+int8")
SIZES = (9_000, 1_700_000)
LEAST_RATIO = 50.0
COLUMNS = ("codec", "values", "bytes", "ratio", "encode", "with feedback", "decode", "wire")


def actions_of(name: str, vector: np.ndarray) -> dict[str, Callable[[], Any]]:
    """What is timed of a codec: a call of each on `vector` `[P]`."""
    codec, sender = make_codec(name), ErrorFeedback(make_codec(name))
    blob = codec.encode(vector)
    return {
        "encode": lambda: codec.encode(vector),
        "with feedback": lambda: sender.encode(vector),
        "decode": lambda: decode(blob),
    }


def pays_below(raw: int, sent: int, seconds: float) -> float | None:
    """The wire's speed in MB/s where raw / speed = sent / speed + seconds."""
    return (raw - sent) / seconds / 1e6 if raw > sent else None


def race(size: int, rounds: int) -> list[Row]:
    """All codecs on one gradient, in turns. Speeds in MB/s of the gradient, whatever is sent."""
    vector = np.random.default_rng(size).normal(size=size).astype(np.float32)
    actions = {
        (name, step): action for name in NAMES for step, action in actions_of(name, vector).items()
    }
    calls = dict.fromkeys([*actions, "copy"], max(1, 300_000 // size))
    seconds: dict[Any, float] = in_turns(
        {**actions, "copy": vector.copy},
        calls=calls,
        rounds=rounds,  # type: ignore[dict-item, arg-type]
    )
    megabytes = vector.nbytes / 1e6
    rows: list[Row] = [{"codec": "copy", "values": size, "encode": megabytes / seconds["copy"]}]
    for name in NAMES:
        blob = make_codec(name).encode(vector)
        both = seconds[name, "with feedback"] + seconds[name, "decode"]
        speeds = {step: megabytes / seconds[name, step] for step in COLUMNS[4:7]}
        wire = pays_below(vector.nbytes, len(blob), both)
        shown = {"bytes": len(blob), "ratio": ratio(blob, vector)}
        rows.append({"codec": name, "values": size, **shown, **speeds, "wire": wire})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Medians of several rounds, in turns."""
    options = parser("What a codec costs and saves.").parse_args(arguments)
    rows = [row for size in SIZES for row in race(size, 1 if options.quick else 9)]
    table("Codecs: MB of float32 a second, and times fewer bytes", rows, COLUMNS)
    targets = [
        target(
            f"times fewer bytes, {row['codec']}, {row['values']:,} values",
            row["ratio"],
            least=LEAST_RATIO,
        )
        for row in rows
        if row["codec"] == "topk:0.01+fp16"
    ]
    print_targets(targets)
    keep("codecs", rows, targets, options)


if __name__ == "__main__":
    main()
