"""A run saved after its actors were replaced goes on as if it had never stopped."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rlbook.harness.run import Result, Run
from rlbook.impala import COSTS, Config, train
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.virtual import VirtualRuntime

CONFIG = Config(
    num_actors=3,
    num_envs=8,
    total_env_steps=12_000,
    log_every_env_steps=500,
    checkpoint_every_s=0.1,
    runtime="virtual",
    progress=False,
)
CRASHES = (Crash("Actor 1", at_s=0.05), Crash("Actor 0", at_s=0.1), Crash("Actor 3", at_s=0.15))
"""The last is of the one that came after the first; the runs take 0.3 s."""


def play(**settings: str) -> Result:
    cluster = Cluster(nodes=(Node(cores=8),), costs=COSTS, crashes=CRASHES)
    with VirtualRuntime(1, cluster) as runtime:
        return train(replace(CONFIG, **settings), runtime)


def stopped(after_s: float) -> tuple[Callable, Callable]:
    """`Run`'s `checkpoint` and `record`: the power fails soon after the first checkpoint then."""
    save, record = Run.checkpoint, Run.record
    saved: list[float] = []

    def saving(run: Run) -> None:
        save(run)
        saved.append(run.wall_time_s())

    def until(run: Run, **turn: object) -> None:
        record(run, **turn)
        if saved and after_s < saved[-1] < run.wall_time_s() - 0.02:
            raise EOFError

    return saving, until


@pytest.mark.parametrize("after_s", [0.06, 0.16], ids=["one death", "three deaths"])
def test_resumed_after_deaths_is_uninterrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_s: float
) -> None:
    whole = play(run_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        for name, method in zip(("checkpoint", "record"), stopped(after_s), strict=True):
            patch.setattr(Run, name, method)
        with pytest.raises(EOFError):
            play(run_dir=str(tmp_path / "cut"))
    resumed = play(resume=str(tmp_path / "cut"))
    assert resumed.env_steps == whole.env_steps and resumed.extra == whole.extra
    for name in ("env_steps", "episode_return_mean", "loss", "gradient_norm"):
        assert np.array_equal(resumed.curves[name], whole.curves[name], equal_nan=True), name
    assert resumed.wall_time_s == pytest.approx(whole.wall_time_s, rel=1e-6)
