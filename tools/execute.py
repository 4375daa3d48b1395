"""Execute a notebook in a kernel of its own, quietly, and hold it to the rules of a chapter.

A chapter writes nothing to stderr and leaves no Ray process behind; both are checked here, each
time that a chapter is executed, so that no stored output can break them.
"""

from __future__ import annotations

import base64
import io
import os
import re
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import psutil
from nbclient.exceptions import CellExecutionError
from PIL import Image

# What keeps a kernel from writing lines that no cell of ours asked for.
QUIET = {
    "JUPYTER_PREFER_ENV_PATH": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "PYGAME_HIDE_SUPPORT_PROMPT": "1",
    "PYTHONUTF8": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm on the lookout for widgets
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "SDL_AUDIODRIVER": "dummy",
    "SDL_VIDEODRIVER": "dummy",
}
RAY_NAMES = ("raylet", "gcs_server", "ray::", "ray-dashboard")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class ChapterError(Exception):
    """A chapter that failed or broke a rule; the message shows the cell."""


def read(path: Path) -> nbformat.NotebookNode:
    """Read a notebook as nbformat 4."""
    return nbformat.read(path, as_version=4)


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook aside and rename it, so that an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".ipynb.part")
    nbformat.write(notebook, aside)
    aside.replace(path)


def execute(
    notebook: nbformat.NotebookNode, folder: Path, timeout_s: int = 900, patience_s: float = 10.0
) -> float:
    """Execute all cells in place with `folder` as working directory; return the seconds it took.

    Raises ChapterError with the failing cell and its traceback, or with what was written to stderr,
    or with the Ray processes that still run `patience_s` after the last cell.
    """
    client = nbclient.NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        allow_errors=False,
        # Without this the kernel warns about its own sockets, beside our progress lines.
        extra_arguments=["--IPKernelApp.log_level=ERROR"],
    )
    start = time.perf_counter()
    with client.setup_kernel(env={**os.environ, **QUIET}):
        for index, cell in enumerate(notebook.cells):
            try:
                client.execute_cell(cell, index)
            except CellExecutionError as error:
                raise ChapterError(_failure(cell, index, error.traceback)) from None
            except Exception as error:  # a dead kernel, a time-out
                raise ChapterError(_failure(cell, index, f"{error}")) from None
            _check_stderr(cell, index)
        provisioner: Any = client.km and client.km.provisioner
        _check_ray(provisioner.pid, patience_s)
    return time.perf_counter() - start


def ray_processes(pid: int) -> list[psutil.Process]:
    """Find the Ray processes among a process's descendants."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            words = " ".join([process.name(), *process.cmdline()[:2]])
            alive = process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if alive and any(name in words for name in RAY_NAMES):
            found.append(process)
    return found


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Strip in place what differs from machine to machine or from run to run without meaning."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    kept = {"kernelspec": kernel, "language_info": {"name": "python"}}
    if "rlbook" in notebook.metadata:
        kept["rlbook"] = notebook.metadata["rlbook"]
    notebook.metadata = nbformat.from_dict(kept)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: set[str] = set()
    for index, cell in enumerate(notebook.cells):
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in sorted(cell.metadata) if key in ("tags", "mystnb")}
        )
        if not cell.get("id") or cell.id in seen:
            cell.id = f"cell-{index:03d}"
        seen.add(cell.id)
        if cell.cell_type == "code":
            cell.outputs = merge_streams(cell.outputs)
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = smaller(output.data["image/png"])


def merge_streams(outputs: list[Any]) -> list[Any]:
    """Join neighbouring pieces of the same stream; where a kernel cuts them is a matter of time."""
    merged: list[Any] = []
    for output in outputs:
        same = merged and output.output_type == merged[-1].output_type == "stream"
        if same and output.name == merged[-1].name:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def smaller(png: str) -> str:
    """A figure (base64) with the 256 colours that tell it best: to the eye the same, in a third of
    the bytes. One that has a palette already stays as it is.
    """
    figure = Image.open(io.BytesIO(base64.b64decode(png)))
    if figure.mode == "P":
        return png
    drawn = figure.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    drawn.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def take_outputs(target: nbformat.NotebookNode, source: nbformat.NotebookNode) -> None:
    """Give the code cells of `target` the outputs of the same cells of `source`, in order."""
    pairs = zip(_code(target), _code(source), strict=True)
    for mine, theirs in pairs:
        mine.outputs, mine.execution_count = theirs.outputs, theirs.execution_count


def _code(notebook: nbformat.NotebookNode) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _check_stderr(cell: Any, index: int) -> None:
    for output in cell.get("outputs", []):
        if output.output_type == "stream" and output.name == "stderr":
            raise ChapterError(_failure(cell, index, f"written to stderr:\n{output.text}"))


def _check_ray(pid: int, patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while left := ray_processes(pid):
        if time.monotonic() > end:
            names = ", ".join(sorted({process.name() for process in left}))
            raise ChapterError(f"the notebook left {len(left)} Ray processes running: {names}")
        time.sleep(0.1)


def _failure(cell: Any, index: int, what: str) -> str:
    source = "\n".join(f"    {line}" for line in cell.source.splitlines())
    return f"cell {index}:\n{source}\n{_ANSI.sub('', what)}"
