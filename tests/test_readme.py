"""Every command that the README and the set-up page show is run, or, for make, is a real target."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = README + (ROOT / "docs" / "setup.md").read_text(encoding="utf-8")
SHOWN += (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_every_make_command_is_a_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", SHOWN, re.MULTILINE))
    assert {"book", "test", "setup", "lab"} <= named <= targets
    assert {"chapters", "check", "bench", "help"} <= targets
    for variable in re.findall(r"make [a-z]+ ([A-Z_]+)=", SHOWN):
        assert re.search(rf"\b{variable}\b", makefile)


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    for target in ("book", "test", "setup", "lab", "chapters", "check", "bench"):
        assert re.search(rf"make {target}\b", done.stdout)


def test_an_old_python_gets_one_clear_line(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo 'Python 3.9.2' && exit 0\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "rlbook needs Python 3.11 or newer" in done.stdout and "Python 3.9.2" in done.stdout


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    """All `rlbook` lines in order, in a folder of their own, as a reader would type them."""
    run = [line for line in commands() if line.startswith(".venv/bin/")]
    assert len(run) >= 5
    others = [line for line in commands() if line not in run and not line.startswith("make ")]
    assert others == [], "a command that this test does not run"
    for line in run:
        words = shlex.split(line)
        words[0] = str(Path(sys.executable).parent / Path(words[0]).name)
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs" / "ppo" / "result.json").is_file()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (block,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ \d+\.\d+", done.stdout)


def test_files_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
