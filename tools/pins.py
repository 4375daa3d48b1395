"""Write constraints.txt: every installed package at its exact version (`make constraints`)."""

from __future__ import annotations

import re
import subprocess
import sys

from tools import ROOT

HEAD = """\
# Every package of the book's environment, pinned exactly. Written by `make constraints`.
# torch has no build suffix here, so that TORCH_INDEX may choose the CPU or the CUDA build.
"""
LEFT_OUT = re.compile(r"(?i)^(pip|rlbook|jupytext|nvidia-.*|triton)$")


def pins(freeze: str) -> str:
    """Turn the output of `pip freeze` into constraints: names sorted, no build suffix, no path."""
    lines = [line.split(";")[0].strip() for line in freeze.splitlines()]
    pairs = [line.split("==") for line in lines if "==" in line]
    kept = [(name, version.split("+")[0]) for name, version in pairs if not LEFT_OUT.match(name)]
    return HEAD + "".join(f"{n}=={v}\n" for n, v in sorted(kept, key=lambda p: p[0].lower()))


def main() -> None:
    """Freeze the running environment."""
    command = [sys.executable, "-m", "pip", "freeze", "--all", "--exclude-editable"]
    freeze = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (ROOT / "constraints.txt").write_text(pins(freeze), encoding="utf-8")


if __name__ == "__main__":
    main()
