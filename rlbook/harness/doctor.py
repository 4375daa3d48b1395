"""What a machine has for this book, what is wrong with it, and how to mend that."""

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from rlbook.harness.placement import Host

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    what: str
    value: str
    wrong: str = ""
    """What is wrong and how to mend it; empty if nothing is."""

    def __str__(self) -> str:
        """One line, two where something is wrong."""
        mark = "!" if self.wrong else "ok"
        line = f"{mark:>2}  {self.what:14} {self.value}"
        return line + (f"\n    {'':14} → {self.wrong}" if self.wrong else "")


def examine() -> list[Finding]:
    """Looks at cores, memory, shared memory, disk, GPUs, Ray, ffmpeg and versions."""
    return [
        _python(),
        _cores(),
        _memory(),
        _shared_memory(),
        _disk(),
        *_packages(),
        _gpu(),
        _atari(),
    ]


def here() -> Host:
    """This computer, for advice on what to start."""
    try:
        import torch

        gpus = torch.cuda.device_count()
    except ModuleNotFoundError:
        gpus = 0
    return Host(usable_cores(), memory_bytes() / GIB, gpus)


def usable_cores() -> int:
    """Cores that this process may use (a container or `taskset` may give fewer than there are)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory of this machine, or of the container's limit where that is smaller."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        return min(total, int(text))
    return total


def require_memory(name: str, rows: int, bytes_per_row: int, of_what: str) -> None:
    """ValueError, in the name of a setting, if so many rows can never fit into memory."""
    needed = rows * bytes_per_row
    if needed > memory_bytes():
        raise ValueError(
            f"{name}: {rows:,} transitions {of_what} need {needed / GIB:.0f} GiB, this machine has"
            f" {memory_bytes() / GIB:.0f}"
        )


def _python() -> Finding:
    wrong = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer, then: make setup"
    system = f"{platform.system()} {platform.machine()}"
    return Finding("python", f"{platform.python_version()} on {system}", wrong)


def _cores() -> Finding:
    cores = usable_cores()
    wrong = "" if cores >= 2 else "parallel chapters need two cores to show a gain; they still run"
    return Finding("cores", str(cores), wrong)


def _memory() -> Finding:
    size = memory_bytes()
    wrong = "" if size >= 6 * GIB else "close other programs: Ray and PyTorch want 6 GiB"
    return Finding("memory", f"{size / GIB:.1f} GiB", wrong)


def _shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "none (not needed on this system)")
    free = shutil.disk_usage(path).free
    wrong = (
        ""
        if free >= GIB
        else "Ray's object store lies here: start the container with --shm-size=4g"
    )
    return Finding("/dev/shm", f"{free / GIB:.1f} GiB free", wrong)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    wrong = "" if free >= 2 * GIB else "free 2 GiB: checkpoints and the site need room"
    return Finding("disk", f"{free / GIB:.1f} GiB free here", wrong)


def _packages() -> list[Finding]:
    from rlbook.harness.run import versions

    found = versions()
    findings = [Finding(name, text) for name, text in found.items() if name not in ("python",)]
    missing = [name for name in ("torch", "ray", "gymnasium", "numpy") if name not in found]
    findings += [Finding(name, "missing", "run: make setup") for name in missing]
    return findings


def _gpu() -> Finding:
    try:
        import torch
    except ModuleNotFoundError:
        return Finding("GPU", "unknown without PyTorch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("GPU", ", ".join(names))
    if shutil.which("nvidia-smi"):
        return Finding(
            "GPU",
            "there is one, but this PyTorch cannot use it",
            "set TORCH_INDEX to PyTorch's CUDA index (README), then: make setup",
        )
    return Finding("GPU", "none (no chapter needs one)")


def _atari() -> Finding:
    if importlib.util.find_spec("ale_py") is None:
        return Finding("Atari", "missing", "pip install 'rlbook[atari]' for ALE/Pong-v5 and others")
    return Finding("Atari", "ale-py with its games")
