"""One run: a clock, a log, checkpoints, and the rule that says when a task is solved.

    with Run("ppo", config, policy, parts) as run:    parts: what has state_dict, load_state_dict
        while run.running():                          starts the clock; False when it is over
            ...                                       a system's own loop
            run.record(env_steps=..., learner_steps=..., episodes=..., metrics=...)
    return run.result()

The clock counts training alone: it stands still during evaluations and checkpoints. It is the
wall's, or a runtime's (`clock=lambda: runtime.now`): then a run on a virtual cluster takes virtual
seconds and saves at the same virtual moments every time.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.harness.config import refuse_changes
from rlbook.harness.evaluate import Policy, evaluate
from rlbook.harness.interrupt import Interrupts
from rlbook.harness.log import Progress, RunLog
from rlbook.harness.measures import Stopwatch, Window, of_turns
from rlbook.harness.result import (
    TRACE,
    Result,
    columns,
    load_config,
    make_run_dir,
    system_module,
    versions,
    write_config,
    write_json,
)
from rlbook.parts.envs import Episode
from rlbook.parts.timeline import Timeline

CONFIRMING_EPISODES = 100

KEPT_SPANS = 100_000
"""A run keeps its newest so many spans (13 MB as a file)."""

COUNTERS = (
    "env_steps",
    "learner_steps",
    "episodes",
    "evaluations",
    "evaluation_time_s",
    "evaluation_return_mean",
)
"""What a checkpoint keeps of a run's own counts."""


class Run:
    """The run of one system; leaving its `with` writes the last checkpoint and closes all files.

    Args:
        system: the module's stem.
        config: its settings; `run_dir`, `resume` and `stop_at_return` are acted on here.
        policy: what is evaluated (acts with the parameters as they are at the moment).
        parts: name → object with `state_dict` and `load_state_dict`: all that a checkpoint holds.
        clock: returns seconds; the wall's clock by default.
        checkpoints: "regular": `record` saves when `checkpoint_every_s` have passed. "asked": it
            never does; for systems that first let what is in flight arrive:
            `if run.checkpoint_due(): ...; run.checkpoint()`.

    Raises:
        ValueError: the run folder exists, or the run to be resumed does not fit.
    """

    def __init__(
        self,
        system: str,
        config: Any,
        policy: Policy,
        parts: Mapping[str, Any] | None = None,
        clock: Callable[[], float] | None = None,
        checkpoints: Literal["regular", "asked"] = "regular",
    ) -> None:
        self.system, self.config, self.policy = system, config, policy
        self.parts = dict(parts or {})
        self.env_steps = self.learner_steps = self.episodes = self.evaluations = 0
        self.stopped_because: str | None = None
        self.evaluation_return_mean: float | None = None
        self.evaluation_time_s = 0.0
        envs = getattr(config, "all_envs", getattr(config, "num_envs", 1))
        self._window = Window(max(CONFIRMING_EPISODES, 2 * envs))
        self._sums: dict[str, list[float]] = {}
        self._next_row = getattr(config, "log_every_env_steps", 1)
        self._watch = Stopwatch(clock or time.perf_counter)
        self._made_at = clock() if clock else -np.inf
        self._checkpoints = checkpoints
        self._interrupts = Interrupts()
        self.extra: dict[str, Any] = {}
        self.spans: Timeline | None = None
        self._kept_rows: int | None = None
        self.run_dir = self._open_folder()
        self._log = RunLog(self.run_dir, self._kept_rows)
        self._progress = Progress(f"{system} {config.env_id}", self._total(), config.progress)
        self._saved_at_s = self.wall_time_s()

    def __enter__(self) -> Self:
        """From here on Ctrl-C ends the run at the end of a turn; the clock does not run yet."""
        self._interrupts.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> bool:
        """Saves and closes. An interrupt (Ctrl-C) ends the run in good order; errors go on."""
        self._watch.stop()
        self._interrupts.stop()
        interrupted = kind is KeyboardInterrupt
        if interrupted:
            self.stopped_because = "interrupted"
        try:
            if kind is None or interrupted:
                self.stopped_because = self.stopped_because or "finished"
                self.checkpoint()
                rows = self._log.rows
                if self._sums or not rows or rows[-1]["env_steps"] != self.env_steps:
                    self._add_row()
                if self.run_dir is not None:
                    write_json(self.run_dir / "result.json", self.summary())
        finally:
            self._progress.close()
            self._log.close()
        return interrupted

    def running(self) -> bool:
        """True while there is something left to do; starts the clock."""
        if self.stopped_because is None and self._interrupts.asked:
            self.stopped_because = "interrupted"
        if self.stopped_because is None and self.env_steps >= self._total():
            self.stopped_because = "total_env_steps"
        if self.stopped_because is not None:
            return False
        self._watch.start()
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
            metrics: values by name; a row holds their mean over its turns, or, where the name
                ends in `_max`, the largest.
        """
        self.env_steps += env_steps
        self.learner_steps += learner_steps
        self.episodes += len(episodes or ())
        self._window.add(episodes or ())
        for name, value in (metrics or {}).items():
            self._sums.setdefault(name, []).append(value)
        if self.env_steps >= self._next_row:
            every = self.config.log_every_env_steps
            self._next_row = (self.env_steps // every + 1) * every
            self._add_row()
        if episodes and self._window.reaches(getattr(self.config, "stop_at_return", None)):
            self._confirm()
        if self._checkpoints == "regular" and self.checkpoint_due():
            self.checkpoint()

    def say(self, text: str) -> None:
        """A line for people, where the run shows how it goes; nothing elsewhere."""
        self._progress.say(text)

    def wall_time_s(self) -> float:
        """Seconds of training so far, without evaluations and checkpoints."""
        return self._watch.seconds()

    def checkpoint_due(self) -> bool:
        """True when `checkpoint_every_s` seconds of training have passed since the last one.

        Without a run folder too: a run is to be the same whether it is kept or not.
        """
        due = getattr(self.config, "checkpoint_every_s", 60.0)
        return self.wall_time_s() - self._saved_at_s >= due

    def checkpoint(self) -> None:
        """Writes the checkpoint, with a run folder; the clock stands still meanwhile.

        OSError if it cannot be written (a full disk): the last one stays.
        """
        with self._watch.paused():
            self._saved_at_s = self.wall_time_s()
            if self.run_dir is not None:
                save_checkpoint(self.run_dir / "checkpoint.npz", self._state())

    def trace(self, spans: Iterable[tuple[str, str, float, float]]) -> None:
        """Keeps who worked on what (`runtime.timeline()`), and writes it to the run folder.

        Called once at the end of `train()`, best right after the run's own `with` and within the
        runtime's: then an interrupted run has it too.

        Args:
            spans: (who, what, start, end), seconds; the driver's are waits. The newest 100,000
                are kept, without those of earlier runs on the same runtime.
        """
        mine = (span for span in spans if span[3] >= self._made_at)
        self.spans = Timeline.of(mine).newest(KEPT_SPANS)
        if self.run_dir is not None:
            self.spans.save(self.run_dir / TRACE)

    def result(self) -> Result:
        """What the run came to."""
        return Result(
            system=self.system,
            config=self.config,
            metrics=self.summary(),
            curves=columns(self._log.rows),
            env_steps=self.env_steps,
            learner_steps=self.learner_steps,
            wall_time_s=self.wall_time_s(),
            policy=self.policy,
            stopped_because=str(self.stopped_because),
            checkpoint=self.run_dir / "checkpoint.npz" if self.run_dir else None,
            run_dir=self.run_dir,
            extra=self.extra,
            spans=self.spans,
        )

    def summary(self) -> dict[str, Any]:
        """The fields of `result.json`."""
        last = self._log.rows[-1] if self._log.rows else {}
        return {
            "system": self.system,
            "env_id": self.config.env_id,
            "seed": self.config.seed,
            **last,
            **self._counts(),
            "evaluation_return_mean": self.evaluation_return_mean,
            "evaluation_time_s": self.evaluation_time_s,
            "stopped_because": self.stopped_because,
        }

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {
            "system": self.system,
            "counters": counters,
            "returns": list(self._window.returns),
            "lengths": list(self._window.lengths),
            "sums": self._sums,
            "next_row": self._next_row,
            "spent_s": self.wall_time_s(),
            "rows": len(self._log.rows),
            "extra": self.extra,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def _counts(self) -> dict[str, Any]:
        seconds = self.wall_time_s()
        return {
            "env_steps": self.env_steps,
            "learner_steps": self.learner_steps,
            "wall_time_s": seconds,
            "env_steps_per_s": self.env_steps / seconds if seconds else 0.0,
            "episodes": self.episodes,
            **self._window.means(),
        }

    def _total(self) -> int:
        return int(getattr(self.config, "total_env_steps", 1))

    def _add_row(self) -> None:
        row = self._counts()
        row.update({name: of_turns(name, values) for name, values in self._sums.items()})
        self._sums = {}
        self._log.add(row)
        shown = {"return": row["episode_return_mean"] or 0.0, "steps/s": row["env_steps_per_s"]}
        self._progress.update(self.env_steps, **shown)

    def _confirm(self) -> None:
        """100 fresh episodes must average the goal too; if not, a new window begins."""
        self.evaluations += 1
        seed = 1_000_000 + 1_000 * self.config.seed + self.evaluations
        with self._watch.paused():
            begun = self._watch.now()
            evaluation = evaluate(
                self.policy, self.config.env_id, episodes=CONFIRMING_EPISODES, seed=seed
            )
            self.evaluation_time_s += self._watch.now() - begun
        if evaluation.mean >= self.config.stop_at_return:
            self.evaluation_return_mean = evaluation.mean
            self.stopped_because = "solved"
        else:
            self._window.clear()

    def _open_folder(self) -> Path | None:
        """Makes the run folder, or opens the one to resume and puts its state back."""
        if self.config.resume is not None:
            return self._resume(Path(self.config.resume))
        if self.config.run_dir is None:
            return None
        folder = Path(self.config.run_dir)
        make_run_dir(folder, self.system, self.config)
        return folder

    def _resume(self, folder: Path) -> Path:
        stored, system = load_config(folder)
        if system != self.system:
            raise ValueError(f"resume: {folder} is a run of {system}, not of {self.system}")
        refuse_changes(stored, self.config)
        state = load_checkpoint(folder / "checkpoint.npz", self.system)
        try:
            self._load(state)
        except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
            problem = " ".join(str(error).split())
            raise ValueError(
                f"resume: the checkpoint in {folder} does not fit: {problem}"
            ) from error
        goal = getattr(self.config, "stop_at_return", None)
        if goal is not None and (self.evaluation_return_mean or -np.inf) >= goal:
            self.stopped_because = "solved"
        else:
            self.evaluation_return_mean = None
        write_config(folder, self.system, self.config)
        return folder

    def _load(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        for name in COUNTERS:
            setattr(self, name, state["counters"][name])
        self._window.returns.extend(state["returns"])
        self._window.lengths.extend(state["lengths"])
        self._sums, self._next_row = state["sums"], state["next_row"]
        self._watch, self.extra = Stopwatch(self._watch.now, state["spent_s"]), state["extra"]
        self._kept_rows = state["rows"]


__all__ = ["Result", "Run", "load_config", "system_module", "versions"]
