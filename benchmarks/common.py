"""What every measurement needs: fresh processes, facts about the machine, tables, result files."""

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BENCH_PYTHON = ROOT / ".venv-bench" / "bin" / "python"

Row = dict[str, Any]


def parser(text: str) -> argparse.ArgumentParser:
    """The flags that all measurements share."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--quick", action="store_true", help="a smoke test: tiny, and ours alone")
    made.add_argument("--out", type=Path, default=None, help="folder for the result file")
    return made


def peers_available() -> bool:
    """Whether the peers' environment is there (`make bench` makes it)."""
    return BENCH_PYTHON.exists()


def child(arguments: Sequence[str], *, peer: bool = False, timeout_s: float = 600.0) -> Row:
    """Runs `python -m ARGUMENTS` in a fresh process; the last line it prints is its row.

    Args:
        arguments: module and flags.
        peer: in the peers' environment instead of this one.
        timeout_s: a process that takes longer is ended, with all that it started
            (subprocess.TimeoutExpired).

    Raises:
        RuntimeError: the process failed; the message holds the end of what it said.
    """
    python = str(BENCH_PYTHON) if peer else sys.executable
    process = subprocess.Popen(
        [python, "-m", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except BaseException:
        end_family(process)
        raise
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{errors[-2000:]}")
    return json.loads(output.strip().splitlines()[-1])


def end_family(process: subprocess.Popen[str]) -> None:
    """Ends a process and all that it started, each by its own id."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def peer_module(name: str, package: str, path: str) -> Any:
    """One file of an installed package, run without the package around it (and what that drags in).

    Raises:
        ModuleNotFoundError: the package is not installed here.
    """
    for folder in sys.path:
        file = Path(folder) / package / path
        if file.is_file():
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ModuleNotFoundError(f"{package} is not installed here")


def in_turns(
    actions: dict[str, Any], *, calls: dict[str, int], rounds: int = 5
) -> dict[str, float]:
    """Median seconds of one call of each action, measured in turns so that drift hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(rounds):
        for name, action in actions.items():
            begun = time.perf_counter()
            for _ in range(calls[name]):
                action()
            times[name].append((time.perf_counter() - begun) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def note(text: str) -> None:
    """A line of progress."""
    print(f"  {text}", file=sys.stderr, flush=True)


def table(title: str, rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Prints rows under a title, numbers to the right."""
    cells = [[shown(row.get(column)) for column in columns] for row in rows]
    widths = [
        max(len(column), *(len(line[index]) for line in cells)) if cells else len(column)
        for index, column in enumerate(columns)
    ]
    print(f"\n{title}")
    lines: Iterable[list[str]] = [list(columns), ["-" * width for width in widths], *cells]
    for line in lines:
        padded = [
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  " + "  ".join(padded).rstrip())
    sys.stdout.flush()


def shown(value: Any) -> str:
    """A value for a table."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def target(
    name: str, value: float | None, *, least: float | None = None, most: float | None = None
) -> Row:
    """A figure that this book promises, and whether it was reached."""
    reached = value is not None and (least is None or value >= least)
    reached = reached and (most is None or value <= most)  # type: ignore[operator]
    wanted = f">= {shown(least)}" if least is not None else f"<= {shown(most)}"
    return {"figure": name, "measured": value, "wanted": wanted, "reached": reached}


def run_row(what: str, run: Row) -> Row:
    """A run of `benchmarks.trial` as a line of a table; `what` is "until solved" or "rate"."""
    return {
        "system": run["system"],
        "what": what,
        "seed": run["seed"],
        "solved": run["solved"] if what == "until solved" else None,
        "seconds": run["wall_time_s"],
        "env steps": run["env_steps"],
        "steps/s": run["env_steps_per_s"],
        "memory MB": run["memory_mb"],
    }


RUN_COLUMNS = ("system", "what", "seed", "solved", "seconds", "env steps", "steps/s", "memory MB")


def seconds_to_solved(rows: Sequence[Row], system: str) -> float | None:
    """Median over the rows "until solved" of a system; None if that is a run that was not."""
    mine = [row for row in rows if (row["system"], row["what"]) == (system, "until solved")]
    median = statistics.median(row["seconds"] if row["solved"] else math.inf for row in mine)
    return median if median < math.inf else None


def unusual(flags: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> list[str]:
    """The flags among `names` whose values are not the usual ones, as one would type them."""
    values = {name: getattr(options, name) for name in names}
    changed = {name: v for name, v in values.items() if v != flags.get_default(name)}
    return [
        f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in changed.items()
    ]


def print_targets(targets: Sequence[Row]) -> None:
    """The promised figures as a table."""
    if targets:
        table("Figures to reach", targets, ("figure", "measured", "wanted", "reached"))


def keep(
    name: str,
    rows: Sequence[Row],
    targets: Sequence[Row],
    options: argparse.Namespace,
    flags: Sequence[str] = (),
    **more: Any,
) -> Path | None:
    """Writes `<out>/<name>.json`; a quick run without `--out` keeps nothing.

    Args:
        name: of the measurement.
        rows: what was measured.
        targets: from `target`.
        options: the flags, parsed.
        flags: those that differ from the defaults, as the command to repeat it has them.
        more: further entries of the file.

    Returns:
        The path of the file, or None.
    """
    from rlbook.harness.records import machine
    from rlbook.harness.run import versions

    if options.quick and options.out is None:
        return None
    folder = RESULTS if options.out is None else options.out
    changed = ["--quick"] if options.quick else list(flags)
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "benchmark": name,
        "command": " ".join(["python -m", f"benchmarks.{name}", *changed]),
        "machine": machine(),
        "load_before": round(LOAD_BEFORE, 2),
        "versions": versions(),
        **more,
        "targets": list(targets),
        "rows": list(rows),
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    return path


LOAD_BEFORE = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
"""Processes that wanted a core in the minute before: figures taken under load are low."""


def peer_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of packages in the peers' environment."""
    code = (
        "import json, sys; from importlib.metadata import version;"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [str(BENCH_PYTHON), "-c", code, *packages], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)
