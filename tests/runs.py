"""What tests of whole runs share: comparing, interrupting, starting the command."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from rlbook.harness.run import Result, Run

TIMES = {"wall_time_s", "env_steps_per_s", "evaluation_time_s"}


def network_of(result: Result) -> torch.nn.Module:
    return result.policy.network


def assert_same_run(a: Result, b: Result) -> None:
    """Parameters bit for bit, all rows and counts, but for the times."""
    mine, theirs = network_of(a).state_dict(), network_of(b).state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    assert a.curves.keys() == b.curves.keys()
    for name in a.curves.keys() - TIMES:
        assert np.array_equal(a.curves[name], b.curves[name], equal_nan=True), name
    assert without_times(a.metrics) == without_times(b.metrics)


def same_parameters(a: Result, b: Result) -> bool:
    mine, theirs = network_of(a).state_dict(), network_of(b).state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


def without_times(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name not in TIMES}


@contextmanager
def ctrl_c_at(env_steps: int) -> Iterator[None]:
    """A real SIGINT in the turn in which a run passes so many environment steps."""
    record = Run.record

    def recording(self: Run, **turn: Any) -> None:
        if self.env_steps < env_steps <= self.env_steps + turn["env_steps"]:
            signal.raise_signal(signal.SIGINT)
        record(self, **turn)

    with patch.object(Run, "record", recording):
        yield


def rlbook(*words: str, **options: Any) -> subprocess.Popen:
    """The command in a process of its own, where SIGINT means what it means on a terminal."""
    return subprocess.Popen(
        [sys.executable, "-m", "rlbook.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 60.0) -> None:
    """Waits until a running process has made a file."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"no {path.name} in {seconds} s"
        time.sleep(0.02)
