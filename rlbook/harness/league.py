"""The league table: every system on the same task, from its record, with the machine named."""

import ast
import inspect
from collections.abc import Iterable, Mapping
from statistics import median
from typing import NamedTuple

from rlbook.harness.records import Record
from rlbook.harness.run import system_module


class Row(NamedTuple):
    """One system's line; medians over the seeds of its record."""

    system: str
    confirmed_return: float | None
    """Mean return of the confirming episodes; None if a seed was not solved."""
    solved: str
    """Seeds solved, of all."""
    env_steps: float
    """To the goal."""
    wall_time_s: float
    """Seconds of training to the goal."""
    env_steps_per_s: float
    ceiling_fraction: float | None
    """Of the rate that the bare environments reach on the same machine; None where unmeasured."""
    memory_mb: float | None
    """Largest memory of the training process; None where unmeasured."""
    code_lines: int
    """Lines of the system's file without blanks, comments and docstrings."""


def league_row(name: str, record: Record) -> Row:
    """The line of one record under the name that the table shows."""
    rate = record.median("env_steps_per_s")
    solved = record.solved == len(record.runs)
    return Row(
        system=name,
        confirmed_return=record.median("evaluation_return_mean") if solved else None,
        solved=f"{record.solved} of {len(record.runs)}",
        env_steps=record.median("env_steps"),
        wall_time_s=record.median("wall_time_s"),
        env_steps_per_s=rate,
        ceiling_fraction=rate / record.env_ceiling if record.env_ceiling else None,
        memory_mb=record.memory_mb,
        code_lines=code_lines(record.system),
    )


def league_table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table, fastest to the goal first."""
    head = (
        "system",
        "seeds solved",
        "confirmed return",
        "env steps to the goal",
        "seconds to the goal",
        "env steps/s",
        "of the env ceiling",
        "memory (MB)",
        "lines of code",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" + "---:|" * (len(head) - 1)]
    for row in sorted(rows, key=lambda row: row.wall_time_s):
        cells = (
            row.system,
            row.solved,
            _shown(row.confirmed_return, ".0f"),
            f"{row.env_steps:,.0f}",
            f"{row.wall_time_s:.1f}",
            f"{row.env_steps_per_s:,.0f}",
            _shown(row.ceiling_fraction, ".0%"),
            _shown(row.memory_mb, ",.0f"),
            str(row.code_lines),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TRAFFIC = {
    "updates late (mean)": (("policy_lag_mean", "staleness_mean"), ".1f"),
    "bytes per env step": (("bytes_per_env_step",), ",.0f"),
    "replay ratio": (("replay_ratio",), ".1f"),
    "learner idle": (("learner_idle_fraction",), ".0%"),
    "worker waits for others": (("waiting_time_fraction",), ".0%"),
}
"""Column → the metrics that may fill it, and how it is written."""


def traffic_table(records: Mapping[str, Record]) -> str:
    """How late, how much and how idle, as a Markdown table: medians over those seeds of each
    record that know; a dash where a system has no such thing or does not measure it.
    """
    lines = ["| system | " + " | ".join(TRAFFIC) + " |", "|---|" + "---:|" * len(TRAFFIC)]
    for name, record in records.items():
        found = {
            metric: [run.metrics[metric] for run in record.runs if metric in run.metrics]
            for metrics, _ in TRAFFIC.values()
            for metric in metrics
        }
        cells = [
            next((format(median(found[one]), form) for one in metrics if found[one]), "–")
            for metrics, form in TRAFFIC.values()
        ]
        if set(cells) != {"–"}:
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def code_lines(system: str) -> int:
    """Lines of a system's file that are neither blank, nor comment, nor docstring."""
    text = inspect.getsource(system_module(system))
    lines = text.splitlines()
    words: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str) and node.end_lineno is not None:
                words.update(range(node.lineno, node.end_lineno + 1))
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#") and number not in words
        for number, line in enumerate(lines, start=1)
    )


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
