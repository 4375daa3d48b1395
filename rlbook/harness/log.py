"""Where the numbers of a run go: rows in memory, `metrics.jsonl`, TensorBoard, a progress line.

The names below mean the same in every system, so that any two runs can be laid side by side.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

METRICS = {
    "env_steps": "agent decisions taken in the environments (valid steps)",
    "learner_steps": "updates of the parameters",
    "wall_time_s": "seconds of training since the first environment step (evaluations not counted);"
    " on the virtual runtime virtual seconds",
    "env_steps_per_s": "env_steps / wall_time_s",
    "episodes": "finished training episodes",
    "episode_return_mean": "mean return of the last max(100, 2 × num_envs) training episodes",
    "episode_return_mean/TASK": "mean return of the last 100 training episodes of one of the tasks",
    "episode_length_mean": "mean length of the same episodes, in steps",
    "evaluation_return_mean": "mean return of 100 fresh episodes",
    "evaluation_time_s": "seconds spent on evaluations",
    "loss": "what the optimiser minimised",
    "policy_loss": "policy part of the loss",
    "value_loss": "value part of the loss, before its cost",
    "entropy": "mean entropy of the policy, in nats",
    "gradient_norm": "Euclidean norm of the gradient before clipping",
    "clip_fraction": "part of the samples whose ratio PPO clipped",
    "approx_kl": "estimate of KL(old ‖ new), in nats",
    "unroll_length_mean": "mean steps of a rollout, less than T where it was cut short",
    "epsilon": "probability of a random action",
    "td_error_mean": "mean |TD error|",
    "q_mean": "mean of max_a Q(x, a) over the observations x that the actor met",
    "policy_lag_mean": "mean number of updates between the parameters that acted and the update",
    "policy_lag_max": "largest number of the same updates",
    "priority_lag_mean": "mean number of updates between the draw of a batch and its own",
    "priority_lag_max": "largest number of the same updates",
    "staleness_mean": "mean number of versions of the server between pull and apply",
    "staleness_max": "largest number of the same versions",
    "gradients_rejected": "part of the gradients that the server refused, as stale or as outliers",
    "updates_lost": "part of the updates in shared memory that others overwrote, parameters' mean",
    "updates_lost_max": "largest such part over the parameters",
    "bytes_sent": "bytes of one gradient on the wire, as encoded",
    "bytes_per_env_step": "bytes on the wire, gradients and parameters, for each environment step",
    "compression_ratio": "bytes of a gradient before encoding / after it",
    "learner_idle_fraction": "part of the time in which the learner (or server) had no work",
    "env_time_fraction": "part of the acting processes' working time spent in environment steps",
    "inference_time_fraction": "part of the same time spent in forward passes to act",
    "gradient_time_fraction": "part of the same time spent in gradients",
    "waiting_time_fraction": "part of the same time spent in sums over a group: mostly waiting",
    "inference_batch_mean": "mean rows of a forward pass of central inference",
    "env_ceiling_fraction": "env_steps_per_s / what the same environments alone can step a second",
    "replay_size": "transitions in replay",
    "replay_ratio": "transitions sampled for learning / environment steps",
    "sweeps": "passes over all states",
    "bellman_residual": "max |T V − V|",
    "value_error": "root mean squared error against the exact values",
}
"""Names and meanings with units. A row holds the mean over its turns; of `…_max` the largest."""


def read_rows(path: Path, rows: int | None = None) -> list[dict[str, Any]]:
    """The first `rows` rows of a `metrics.jsonl` (default all).

    Raises:
        ValueError: the file is missing, damaged or shorter than `rows`.
    """
    try:
        found = [json.loads(line) for line in path.read_text().splitlines()[:rows]]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged ({type(error).__name__})") from error
    if len(found) < (rows or 0) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: damaged (rows are missing)")
    return found


class RunLog:
    """Rows of metrics of one run.

    Args:
        run_dir: where `metrics.jsonl` and TensorBoard's events go; None keeps rows in memory alone.
        kept_rows: on resume, the rows that the checkpoint knows; later ones will be made again.
    """

    def __init__(self, run_dir: Path | None, kept_rows: int | None = None) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = self._board = None
        if run_dir is None:
            return
        path = run_dir / "metrics.jsonl"
        if kept_rows is not None:
            self.rows = read_rows(path, kept_rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self._file = path.open("a", buffering=1)
        from torch.utils.tensorboard import SummaryWriter

        kept_until = self.rows[-1]["env_steps"] + 1 if self.rows else None
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=kept_until)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row and writes it out."""
        self.rows.append(row)
        if self._file is not None and self._board is not None:
            self._file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, row["env_steps"])

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


class Progress:
    """How a run goes: a bar on a terminal, a few printed lines in a notebook, else nothing.

    Args:
        title: in front of the line.
        total: env steps (or sweeps, episodes) until the run ends.
        shown: False keeps quiet everywhere.
        unit: of `total`.
    """

    def __init__(self, title: str, total: int, shown: bool, unit: str = "step") -> None:
        self._bar = None
        self._title, self._total = title, total
        self._in_notebook = shown and "ipykernel" in sys.modules and not sys.stderr.isatty()
        self._begun = self._last = time.perf_counter()
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit=unit, unit_scale=True, leave=True)

    def update(self, steps: int, **values: float) -> None:
        """Shows that `steps` are done, with a few values."""
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            self._bar.update(steps - self._bar.n)
        elif self._in_notebook and time.perf_counter() - self._last >= 10.0:
            self._last = time.perf_counter()
            left = (self._last - self._begun) * (self._total / max(steps, 1) - 1)
            shown = ", ".join(f"{k} {v:.4g}" for k, v in values.items())
            print(
                f"{self._title}: {steps:,} of {self._total:,}, {shown}, at most {left:.0f} s left"
            )

    def say(self, text: str) -> None:
        """A line of its own, once."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._in_notebook:
            print(text)

    def close(self) -> None:
        """Ends the line."""
        if self._bar is not None:
            self._bar.close()
