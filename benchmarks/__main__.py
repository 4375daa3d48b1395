"""All measurements, one after the other: `python -m benchmarks [--quick] [--out FOLDER]`."""

import time
from collections.abc import Sequence

from benchmarks import (
    a3c,
    apex,
    codecs,
    dppo,
    envs,
    frames,
    gorila,
    impala,
    imports,
    learners,
    parameter_server,
    rate,
    replay,
    rllib,
    seed_rl,
    solve,
    value_iteration,
    virtual,
)
from benchmarks.common import LOAD_BEFORE, parser
from rlbook.harness.records import machine

ALL = (
    imports,
    value_iteration,
    replay,
    frames,
    codecs,
    virtual,
    envs,
    rate,
    parameter_server,
    gorila,
    a3c,
    dppo,
    apex,
    impala,
    seed_rl,
    learners,
    solve,
    rllib,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs each measurement with the same flags."""
    options = parser("All measurements.").parse_args(arguments)
    flags = ["--quick"] if options.quick else []
    if options.out is not None:
        flags += ["--out", str(options.out)]
    facts = machine()
    print(f"{facts['cores']} cores, {facts['memory_gib']} GiB, load before: {LOAD_BEFORE:.2f}")
    if LOAD_BEFORE > 0.5:
        print("Other work is running on this machine: the figures will be low.")
    begun = time.perf_counter()
    for measurement in ALL:
        measurement.main(flags)
    print(f"\nall measured in {(time.perf_counter() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
