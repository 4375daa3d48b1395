"""One run: a clock, a log, checkpoints, and the rule that says when a task is solved.

with Run("ppo", config, policy, parts) as run:      parts: whatever has state_dict / load_state_dict
while run.running():                            starts the clock; False when the run is over
...                                         a system's own loop
run.record(env_steps=..., learner_steps=..., episodes=..., metrics=...)
return run.result()
"""

import importlib
import json
import platform
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from rlbook import __version__
from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.harness.config import (
    BaseConfig,
    RunConfig,
    config_from_json,
    config_to_json,
    refuse_changes,
)
from rlbook.harness.evaluate import Evaluation, Policy, evaluate, rollout_frames, write_video
from rlbook.harness.log import Progress, RunLog
from rlbook.parts.envs import Episode

CONFIRMING_EPISODES = 100


@dataclass
class Result:
    """What a run came to."""

    system: str
    config: Any
    metrics: dict[str, Any]
    """Last values by name (`rlbook.harness.log.METRICS` says what they mean)."""
    curves: dict[str, np.ndarray]
    """Every logged metric as an array, one entry a row; `env_steps` and `wall_time_s` are the axes."""
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

    def plot(self, x: str = "env_steps", y: str = "episode_return_mean") -> Any:
        """One curve of the run as a matplotlib figure."""
        from rlbook.harness.plots import learning_curves

        return learning_curves({self.system: [self]}, x=x, y=y)

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
        state = load_checkpoint(folder / "checkpoint.npz")
        if state["system"] != system:
            raise ValueError(f"{folder}: the checkpoint is of {state['system']}, not of {system}")
        summary = _read_json(folder / "result.json")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        try:
            policy = system_module(system).load_policy(config, state["parts"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{folder}: the checkpoint does not fit its config: {error}"
            ) from error
        return Result(
            system=system,
            config=config,
            metrics=summary,
            curves=_columns(rows),
            env_steps=summary["env_steps"],
            learner_steps=summary["learner_steps"],
            wall_time_s=summary["wall_time_s"],
            policy=policy,
            stopped_because=summary["stopped_because"],
            checkpoint=folder / "checkpoint.npz",
            run_dir=folder,
            extra=state.get("extra", {}),
        )


def system_module(system: str) -> Any:
    """The module of a system by its stem; ValueError if there is none (systems are looked up by name here alone)."""
    from rlbook.harness.systems import SYSTEMS

    if system not in SYSTEMS:
        raise ValueError(f"system: there is no {system!r}; one of {', '.join(SYSTEMS)}")
    return importlib.import_module(f"rlbook.{system}")


def load_config(folder: Path) -> tuple[Any, str]:
    """(config, system) of a run folder; ValueError if it is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"run_dir: {folder} is no run folder (it holds no config.json)")
    values = _read_json(folder / "config.json")
    system = values.pop("system", None)
    return config_from_json(system_module(str(system)).Config, values, folder / "config.json"), str(
        system
    )


class Run:
    """The run of one system; leaving its `with` writes the last checkpoint and closes all files.

    Args:
        system: the module's stem.
        config: its settings; `run_dir`, `resume` and `stop_at_return` are acted on here.
        policy: what is evaluated (acts with the parameters as they are at the moment).
        parts: name → object with `state_dict` and `load_state_dict`: all that a checkpoint holds.

    Raises:
        ValueError: the run folder exists, or the run to be resumed does not fit.
    """

    def __init__(
        self, system: str, config: Any, policy: Policy, parts: Mapping[str, Any] | None = None
    ) -> None:
        self.system, self.config, self.policy = system, config, policy
        self.parts = dict(parts or {})
        self.env_steps = self.learner_steps = self.episodes = self.evaluations = 0
        self.stopped_because: str | None = None
        self.evaluation_return_mean: float | None = None
        self.evaluation_time_s = self._spent_s = 0.0
        window = max(CONFIRMING_EPISODES, 2 * getattr(config, "num_envs", 1))
        self._returns: deque[float] = deque(maxlen=window)
        self._lengths: deque[int] = deque(maxlen=window)
        self._metrics: dict[str, float] = {}
        self._sums: dict[str, list[float]] = {}
        self._next_row = getattr(config, "log_every_env_steps", 1)
        self._clock: float | None = None
        self.extra: dict[str, Any] = {}
        self._kept_rows: int | None = None
        self.run_dir = self._open_folder()
        self._log = RunLog(self.run_dir, self._kept_rows)
        self._progress = Progress(f"{system} {config.env_id}", self._total(), config.progress)
        self._saved_at = time.perf_counter()

    def __enter__(self) -> Self:
        """Starts nothing: the clock starts with the first `running()`."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """Saves and closes. An interrupt (Ctrl-C) ends the run in good order; other errors go on."""
        self._stop_clock()
        interrupted = kind is KeyboardInterrupt
        if interrupted:
            self.stopped_because = "interrupted"
        try:
            if kind is None or interrupted:
                self.stopped_because = self.stopped_because or "finished"
                self.checkpoint()
                self._add_row()
                self._write_result()
        finally:
            self._progress.close()
            self._log.close()
        return interrupted

    def running(self) -> bool:
        """True while there is something left to do; starts the clock."""
        if self.stopped_because is None and self.env_steps >= self._total():
            self.stopped_because = "total_env_steps"
        if self.stopped_because is not None:
            return False
        if self._clock is None:
            self._clock = time.perf_counter()
        return True

    def record(
        self,
        *,
        env_steps: int,
        learner_steps: int = 0,
        episodes: list[Episode] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Books one turn of a system's loop.

        Args:
            env_steps: valid steps taken in this turn.
            learner_steps: updates made in this turn.
            episodes: training episodes that ended in it.
            metrics: values by name, averaged over the turns of a row.
        """
        self.env_steps += env_steps
        self.learner_steps += learner_steps
        for episode in episodes or ():
            self.episodes += 1
            self._returns.append(episode.episode_return)
            self._lengths.append(episode.length)
        for name, value in (metrics or {}).items():
            self._sums.setdefault(name, []).append(value)
        if self.env_steps >= self._next_row:
            every = self.config.log_every_env_steps
            self._next_row = (self.env_steps // every + 1) * every
            self._add_row()
        if episodes and self._may_be_solved():
            self._confirm()
        due = getattr(self.config, "checkpoint_every_s", 60.0)
        if self.run_dir is not None and time.perf_counter() - self._saved_at >= due:
            self.checkpoint()

    def wall_time_s(self) -> float:
        """Seconds of training so far, without evaluations and checkpoints."""
        running = 0.0 if self._clock is None else time.perf_counter() - self._clock
        return self._spent_s + running

    def checkpoint(self) -> None:
        """Writes the checkpoint (with a run folder); OSError if the disk is full: the last one stays."""
        if self.run_dir is None:
            return
        was_running = self._clock is not None
        self._stop_clock()
        counters = {name: getattr(self, name) for name in COUNTERS}
        state = {
            "system": self.system,
            "counters": counters,
            "returns": list(self._returns),
            "lengths": list(self._lengths),
            "sums": self._sums,
            "next_row": self._next_row,
            "spent_s": self._spent_s,
            "rows": len(self._log.rows),
            "extra": self.extra,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        save_checkpoint(self.run_dir / "checkpoint.npz", state)
        self._saved_at = time.perf_counter()
        if was_running:
            self._clock = self._saved_at

    def result(self) -> Result:
        """What the run came to."""
        return Result(
            system=self.system,
            config=self.config,
            metrics=self.summary(),
            curves=_columns(self._log.rows),
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            wall_time_s=self.wall_time_s(),
            policy=self.policy,
            stopped_because=str(self.stopped_because),
            checkpoint=self.run_dir / "checkpoint.npz" if self.run_dir else None,
            run_dir=self.run_dir,
            extra=self.extra,
        )

    def summary(self) -> dict[str, Any]:
        """The fields of `result.json`."""
        seconds = self.wall_time_s()
        last = self._log.rows[-1] if self._log.rows else {}
        return {
            **last,
            "system": self.system,
            "env_id": self.config.env_id,
            "seed": self.config.seed,
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "wall_time_s": seconds,
            "env_steps_per_s": self.env_steps / seconds if seconds else 0.0,
            "episodes": self.episodes,
            "episode_return_mean": _mean(self._returns),
            "evaluation_return_mean": self.evaluation_return_mean,
            "evaluation_time_s": self.evaluation_time_s,
            "stopped_because": self.stopped_because,
        }

    def _total(self) -> int:
        return int(getattr(self.config, "total_env_steps", 1))

    def _stop_clock(self) -> None:
        self._spent_s, self._clock = self.wall_time_s(), None

    def _add_row(self) -> None:
        seconds = self.wall_time_s()
        row = {
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "wall_time_s": seconds,
            "env_steps_per_s": self.env_steps / seconds if seconds else 0.0,
            "episodes": self.episodes,
            "episode_return_mean": _mean(self._returns),
            "episode_length_mean": _mean(self._lengths),
            **{name: float(np.mean(values)) for name, values in self._sums.items()},
        }
        self._sums = {}
        self._log.add(row)
        shown = {"return": row["episode_return_mean"] or 0.0, "steps/s": row["env_steps_per_s"]}
        self._progress.update(self.env_steps, **shown)

    def _may_be_solved(self) -> bool:
        goal = getattr(self.config, "stop_at_return", None)
        full = len(self._returns) == self._returns.maxlen
        return goal is not None and full and _mean(self._returns) >= goal

    def _confirm(self) -> None:
        """100 fresh episodes of the policy must average the goal too; if not, a new window begins."""
        self._stop_clock()
        begun = time.perf_counter()
        self.evaluations += 1
        seed = 1_000_000 + 1_000 * self.config.seed + self.evaluations
        evaluation = evaluate(
            self.policy, self.config.env_id, episodes=CONFIRMING_EPISODES, seed=seed
        )
        self.evaluation_time_s += time.perf_counter() - begun
        if evaluation.mean >= self.config.stop_at_return:
            self.evaluation_return_mean = evaluation.mean
            self.stopped_because = "solved"
        else:
            self._returns.clear()
            self._lengths.clear()
        self._clock = time.perf_counter()

    def _open_folder(self) -> Path | None:
        """Makes the run folder, or opens the one to resume and puts its state back into the parts."""
        if self.config.resume is not None:
            return self._resume(Path(self.config.resume))
        if self.config.run_dir is None:
            return None
        folder = Path(self.config.run_dir)
        if folder.exists():
            raise ValueError(f"run_dir: {folder} exists; give a new folder, or resume it")
        folder.mkdir(parents=True)
        self._write_config(folder)
        return folder

    def _write_config(self, folder: Path) -> None:
        values = {"system": self.system, **config_to_json(replace(self.config, resume=None))}
        values["run_dir"] = None
        _write_json(folder / "config.json", values)
        _write_json(folder / "versions.json", versions())

    def _resume(self, folder: Path) -> Path:
        stored, system = load_config(folder)
        if system != self.system:
            raise ValueError(f"resume: {folder} is a run of {system}, not of {self.system}")
        refuse_changes(stored, self.config)
        state = load_checkpoint(folder / "checkpoint.npz")
        if state["system"] != self.system or set(state["parts"]) != set(self.parts):
            raise ValueError(f"resume: the checkpoint in {folder} is of another system")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"resume: the checkpoint in {folder} does not fit: {error}") from error
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self._returns.extend(state["returns"])
        self._lengths.extend(state["lengths"])
        self._sums, self._next_row = state["sums"], state["next_row"]
        self._spent_s, self.extra = state["spent_s"], state["extra"]
        self._kept_rows = state["rows"]
        self._write_config(folder)
        return folder

    def _write_result(self) -> None:
        if self.run_dir is not None:
            _write_json(self.run_dir / "result.json", self.summary())


COUNTERS = (
    "env_steps",
    "learner_steps",
    "episodes",
    "evaluations",
    "evaluation_time_s",
)


def versions() -> dict[str, str]:
    """Python, this book and what it stands on."""
    found = {"python": platform.python_version(), "rlbook": __version__}
    for package in ("torch", "numpy", "gymnasium", "ray", "ale-py"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _columns(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {
        name: np.array([np.nan if row.get(name) is None else row[name] for row in rows])
        for name in names
    }


def _mean(values: deque[Any]) -> float | None:
    return float(np.mean(values)) if values else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged ({type(error).__name__})") from error


def _write_json(path: Path, values: dict[str, Any]) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(values, indent=2) + "\n")
    aside.replace(path)


__all__ = ["BaseConfig", "Result", "Run", "RunConfig", "load_config", "system_module", "versions"]
