"""What a run came to, and how it is found again: results, run folders, systems by name."""

import importlib
import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from rlbook import __version__
from rlbook.harness.checkpoint import load_checkpoint
from rlbook.harness.config import BaseConfig, config_from_json, config_to_json
from rlbook.harness.evaluate import Evaluation, Policy, evaluate, rollout_frames, write_video
from rlbook.harness.log import read_rows
from rlbook.parts.timeline import Timeline

REQUIRED = ("env_steps", "learner_steps", "wall_time_s", "stopped_because")
"""Fields of `result.json` that loading needs."""

TRACE = "trace.json"
"""Who worked on what, in the folder of a run with processes; for ui.perfetto.dev."""


@dataclass
class Result:
    """What a run came to."""

    system: str
    config: Any
    metrics: dict[str, Any]
    """Last values by name (`rlbook.harness.log.METRICS` says what they mean)."""
    curves: dict[str, np.ndarray]
    """Every logged metric as an array, one entry a row; the axes are among them."""
    env_steps: int
    learner_steps: int
    wall_time_s: float
    policy: Policy
    stopped_because: str
    """"solved", "total_env_steps", "finished" or "interrupted"."""
    checkpoint: Path | None = None
    run_dir: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """What a system adds of its own (tabular systems: values, action values, policy table)."""
    spans: Timeline | None = None
    """Who worked on what; None for systems without processes."""

    def plot(self, x: str = "env_steps", y: str = "episode_return_mean") -> Any:
        """One curve of the run as a matplotlib figure."""
        from rlbook.harness.plots import learning_curves

        return learning_curves({self.system: [self]}, x=x, y=y)

    def timeline(self, start: float | None = None, end: float | None = None) -> Any:
        """Who worked on what and who waited, as a matplotlib figure, one row a process.

        Args:
            start: from this second of the runtime's clock on.
            end: to this second; by default some eighty calls in the middle of the run.

        Raises:
            ValueError: the run kept no timeline, or nothing happened in that time.
        """
        from rlbook.harness.timelines import draw_timeline

        return draw_timeline(self.kept_spans(), start=start, end=end)

    def why(self) -> Any:
        """What bound the run and what to change: a `rlbook.harness.why.Diagnosis`.

        ValueError if the run kept nothing that says so.
        """
        from rlbook.harness.why import explain

        return explain(self.spans, self.metrics, self.config)

    def kept_spans(self) -> Timeline:
        """The run's spans; ValueError if it kept none."""
        if not self.spans:
            raise ValueError(
                f"timeline: this run of {self.system} kept no timeline"
                " (systems with processes do: those with a setting `runtime`)"
            )
        return self.spans

    def evaluate(self, episodes: int = 100, seed: int = 10_000) -> Evaluation:
        """Fresh episodes of the final policy."""
        return evaluate(self.policy, self.config.env_id, episodes=episodes, seed=seed)

    def video(self, path: str | Path, seed: int = 10_000, fps: int = 30) -> float:
        """Writes one fresh episode as mp4 and returns its return."""
        frames, episode_return = rollout_frames(self.policy, self.config.env_id, seed=seed)
        write_video(str(path), frames, fps)
        return episode_return

    @staticmethod
    def load(run_dir: str | Path) -> "Result":
        """A finished run from its folder; ValueError if there is none or it is damaged."""
        folder = Path(run_dir)
        config, system = load_config(folder)
        state = load_checkpoint(folder / "checkpoint.npz", system)
        summary = read_json(folder / "result.json")
        rows = read_rows(folder / "metrics.jsonl")
        missing = [name for name in REQUIRED if name not in summary]
        if missing:
            raise ValueError(f"{folder / 'result.json'}: damaged (it lacks {', '.join(missing)})")
        try:
            policy = system_module(system).load_policy(config, state["parts"])
        except (KeyError, RuntimeError, TypeError) as error:
            problem = " ".join(str(error).split())
            raise ValueError(
                f"{folder}: the checkpoint does not fit its config: {problem}"
            ) from error
        return Result(
            system=system,
            config=config,
            metrics=summary,
            curves=columns(rows),
            env_steps=summary["env_steps"],
            learner_steps=summary["learner_steps"],
            wall_time_s=summary["wall_time_s"],
            policy=policy,
            stopped_because=summary["stopped_because"],
            checkpoint=folder / "checkpoint.npz",
            run_dir=folder,
            extra=state.get("extra", {}),
            spans=Timeline.read(folder / TRACE) if (folder / TRACE).exists() else None,
        )


def system_module(system: str) -> Any:
    """The module of a system by its stem; ValueError if there is none."""
    from rlbook.harness.systems import SYSTEMS

    if system not in SYSTEMS:
        raise ValueError(f"system: there is no {system!r}; one of {', '.join(SYSTEMS)}")
    return importlib.import_module(f"rlbook.{system}")


def load_config(folder: Path) -> tuple[Any, str]:
    """(config, system) of a run folder; ValueError if it is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"run_dir: {folder} is no run folder (it holds no config.json)")
    values = read_json(folder / "config.json")
    system = str(values.pop("system", None))
    return config_from_json(system_module(system).Config, values, folder / "config.json"), system


def make_run_dir(folder: Path, system: str, config: BaseConfig) -> None:
    """Makes the folder of a new run; ValueError if it exists."""
    if folder.exists():
        raise ValueError(f"run_dir: {folder} exists; give a new folder, or resume it")
    folder.mkdir(parents=True)
    write_config(folder, system, config)


def write_config(folder: Path, system: str, config: BaseConfig) -> None:
    """Writes `config.json` and `versions.json`."""
    values = {"system": system, **config_to_json(config), "run_dir": None, "resume": None}
    write_json(folder / "config.json", values)
    write_json(folder / "versions.json", versions())


def versions() -> dict[str, str]:
    """Python, this book and what it stands on."""
    found = {"python": platform.python_version(), "rlbook": __version__}
    for package in ("torch", "numpy", "gymnasium", "ray", "ale-py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Rows of metrics as one array a metric; NaN where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: np.array([np.nan if row.get(name) is None else row[name] for row in rows])
        for name in names
    }


def read_json(path: Path) -> dict[str, Any]:
    """The document at `path`; ValueError if it is missing or no JSON object."""
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged ({type(error).__name__})") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: damaged (no JSON object)")
    return document


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a document aside and then renames it."""
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(values, indent=2) + "\n")
    aside.replace(path)
