"""Records: long runs kept in the repository with all that is needed to believe and to repeat them.

    results/NAME/record.json    system, config, summaries and curves of all seeds, machine,
                                versions, commit, command
    results/NAME/policy.npz     the policy of the first seed (a checkpoint of its network alone)
    results/NAME/episode.mp4    one fresh episode of it, where the environment can be drawn

`rlbook record` makes them, `record(NAME)` reads them.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

import numpy as np

from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.harness.config import config_to_json
from rlbook.harness.doctor import memory_bytes, usable_cores
from rlbook.harness.run import Result, system_module, versions
from rlbook.parts.envs import make_envs

POINTS = 200
"""Rows of a curve that a record keeps."""


@dataclass(frozen=True)
class RecordedRun:
    """One seed of a record: `.curves` and `.metrics` as a `Result` has them."""

    metrics: dict[str, Any]
    curves: dict[str, np.ndarray]


@dataclass(frozen=True)
class Record:
    """A record as the chapters read it."""

    name: str
    system: str
    config: dict[str, Any]
    command: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: str
    runs: list[RecordedRun]
    env_ceiling: float | None = None
    """Environment steps a second of the bare environments, without any agent."""
    memory_mb: float | None = None
    """Largest memory of the training process."""

    def median(self, metric: str) -> float:
        """Median of a final metric over the seeds; ValueError if a seed lacks it."""
        values = [run.metrics[metric] for run in self.runs]
        if any(value is None for value in values):
            raise ValueError(f"{self.name}: not every seed has {metric!r}")
        return float(np.median(values))

    @property
    def solved(self) -> int:
        """Seeds that were solved."""
        return sum(run.metrics["stopped_because"] == "solved" for run in self.runs)

    @property
    def where(self) -> str:
        """The machine in a few words."""
        gib = self.machine["memory_gib"]
        return f"{self.machine['cores']} cores, {gib:.0f} GiB, {self.machine['gpu'] or 'no GPU'}"


def machine() -> dict[str, Any]:
    """Cores, memory and GPU; nothing that names a host."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return {
        "cores": usable_cores(),
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "gpu": gpu,
        "system": platform.system(),
        "processor": platform.machine(),
    }


def env_ceiling(env_id: str, num_envs: int, seconds: float = 1.0) -> float:
    """Environment steps a second of `num_envs` copies that nothing but steps (one core)."""
    envs = make_envs(env_id, num_envs, seed=0)
    action = envs.vector_env.action_space.sample()
    taken, begun = 0, time.perf_counter()
    while (spent := time.perf_counter() - begun) < seconds:
        taken += int((~envs.step(action).first).sum())
    envs.close()
    return taken / spent


def env_ceiling_of(config: Any) -> float | None:
    """What the environments of a config alone can step a second: as many copies in as many
    processes, side by side. None for a system without environments.
    """
    copies = getattr(config, "num_envs", 0)
    processes = getattr(config, "num_workers", getattr(config, "num_actors", 1))
    if not copies:
        return None
    if processes == 1:
        return env_ceiling(config.env_id, copies)
    with get_context("spawn").Pool(processes, _one_thread) as pool:
        return sum(pool.starmap(env_ceiling, [(config.env_id, copies, 2.0)] * processes, 1))


def _one_thread() -> None:
    """For this process, as the processes of a run have it."""
    os.environ["OMP_NUM_THREADS"] = "1"


class TreeMemory:
    """The largest memory of this process and its children together, sampled within the `with`.

    Pages that several of them share count once (Linux's proportional size; elsewhere every process
    counts them).
    """

    def __init__(self, every_s: float = 1.0) -> None:
        self.peak_mb = 0.0
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, tree_memory_mb())
            if self._stop.wait(self._every_s):
                return


def tree_memory_mb() -> float:
    """Memory of this process and its children now, in MB."""
    import psutil

    total, me = 0, psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            memory = process.memory_full_info()
            total += getattr(memory, "pss", memory.rss)
        except psutil.Error:  # it ended meanwhile, or is not ours to look at
            continue
    return total / 1e6


def peak_memory_mb() -> float:
    """Largest memory that this process has held, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def make_record(
    folder: Path, system: str, config: Any, seeds: int, command: str, keep_policy: bool = True
) -> Path:
    """Trains `seeds` seeds from `config.seed` on, keeps the record, returns its `record.json`.

    Args:
        folder: of the record, to be made.
        system: name of the system.
        config: of its runs.
        seeds: how many runs.
        command: that repeats it.
        keep_policy: the first seed's, too. It comes from a checkpoint, in which a replay memory of
            frames takes gigabytes; without it no checkpoint is written.

    Raises:
        ValueError: the folder exists, or seeds < 1.
    """
    if folder.exists():
        raise ValueError(f"record: {folder} exists; remove it or choose another name")
    if seeds < 1:
        raise ValueError(f"seeds: must be at least 1, got {seeds}")
    results = []
    with tempfile.TemporaryDirectory() as scratch, TreeMemory() as memory:
        for index in range(seeds):
            run_dir = str(Path(scratch) / f"seed{index}") if keep_policy else None
            seeded = replace(config, seed=config.seed + index, run_dir=run_dir)
            results.append(system_module(system).train(seeded))
            if results[-1].stopped_because == "interrupted":
                raise KeyboardInterrupt
        folder.mkdir(parents=True)
        if keep_policy:
            state = load_checkpoint(Path(scratch) / "seed0" / "checkpoint.npz")
            _keep_policy(folder, state, results[0])
    ceiling = env_ceiling_of(config)
    document = {
        "name": folder.name,
        "system": system,
        "config": {**config_to_json(config), "run_dir": None, "resume": None},
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "commit": _commit(),
        "memory_mb": round(memory.peak_mb),
        "env_ceiling": round(ceiling) if ceiling else None,
        "runs": [{"metrics": result.metrics, "curves": _thin(result.curves)} for result in results],
    }
    path = folder / "record.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


def record(name: str) -> Record:
    """A record by its name, from the nearest folder `results/` at or above the current one.

    Raises:
        ValueError: there is no such record.
    """
    for folder in (Path.cwd(), *Path.cwd().parents):
        path = folder / "results" / name / "record.json"
        if path.is_file():
            document = json.loads(path.read_text())
            runs = [
                RecordedRun(run["metrics"], {k: _array(v) for k, v in run["curves"].items()})
                for run in document.pop("runs")
            ]
            return Record(runs=runs, **document)
    raise ValueError(f"record: there is no results/{name}/record.json here or above")


def _keep_policy(folder: Path, state: dict[str, Any], result: Result) -> None:
    kept = {name: part for name, part in state["parts"].items() if name in ("learner", "server")}
    parts = _without_optimizer(kept)
    save_checkpoint(folder / "policy.npz", {"system": state["system"], "parts": parts})
    try:
        result.video(folder / "episode.mp4")
    except (ValueError, AttributeError, NotImplementedError):
        (folder / "episode.mp4").unlink(missing_ok=True)


def _without_optimizer(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_optimizer(v) for k, v in value.items() if k != "optimizer"}
    return [_without_optimizer(item) for item in value] if isinstance(value, list) else value


def _thin(curves: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
    """At most `POINTS` rows of each curve, the last one included, rounded to six digits."""
    rows = max((len(curve) for curve in curves.values()), default=0)
    kept = np.unique(np.linspace(0, rows - 1, min(rows, POINTS)).round().astype(int))
    return {
        name: [None if np.isnan(v) else float(f"{v:.6g}") for v in curve[kept]]
        for name, curve in curves.items()
    }


def _array(values: list[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values])


COMMIT = "RLBOOK_COMMIT"
"""Variable that says the commit where the code lies without its history."""


def _commit() -> str:
    if COMMIT in os.environ:
        return os.environ[COMMIT]
    run = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "--", "rlbook"],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
