"""The package as others get it: a wheel that works alone, three lists of packages that agree."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def pinned() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines), lines
    return {name_of(name): version for name, version in (line.split("==") for line in lines)}


def test_every_dependency_is_pinned_exactly() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + [r for e in ("atari", "book", "test") for r in extras[e]]
    assert {name_of(r) for r in wanted} - set(pinned()) == set()
    assert pinned()["torch"] == "2.13.0"
    assert pinned()["jupyter-book"].startswith("1.")


def test_pins_are_what_is_installed() -> None:
    from importlib.metadata import distributions

    # Setuptools, once imported, appends its own copies to sys.path: what is found first counts.
    installed: dict[str, str] = {}
    for d in distributions():
        installed.setdefault(name_of(d.metadata["Name"]), d.version.split("+")[0])
    pins = pinned()
    drifted = {n: (v, pins[n]) for n, v in installed.items() if n in pins and v != pins[n]}
    assert drifted == {}


def test_conda_environment_names_the_same_set() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in environment["dependencies"] if isinstance(d, dict)]
    assert pip == ["-c constraints.txt", "-e .[atari,book,test]"]
    (python,) = [d.removeprefix("python=") for d in plain if d.startswith("python=")]
    assert PROJECT["requires-python"] == f">={python}"
    assert "EXTRAS := atari,book,test" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_versions_agree() -> None:
    import rlbook

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == rlbook.__version__ == citation["version"]
    assert f"## {rlbook.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_import_pulls_in_neither_torch_nor_ray_nor_numpy() -> None:
    code = (
        "import sys; before = set(sys.modules); import rlbook; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['rlbook']"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    """Build it, install it alone into a new environment outside the repository, and use it there.

    The dependencies come from this environment through a .pth file, without this checkout.
    """
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    source = tmp_path / "source"
    tracked = ["pyproject.toml", "README.md", "LICENSE", "LICENSE-text"]
    source.mkdir()
    for name in tracked:
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "rlbook").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("rlbook-*.whl")

    home = tmp_path / "empty"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    # pip acts on the new environment alone; a mere --prefix would uninstall this one's rlbook.
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q"]
    subprocess.run([*install, str(wheel)], check=True, cwd=tmp_path)
    installed = Path(packages.stdout.strip())
    assert (installed / "rlbook" / "cli.py").is_file()
    assert (installed / "rlbook" / "plumbing" / "redis_replay.lua").is_file()
    here = sysconfig.get_paths()["purelib"]
    (installed / "dependencies.pth").write_text(f"import sys; sys.path.append({here!r})\n")

    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    where = [python, "-c", "import rlbook; print(rlbook.__file__)"]
    done = subprocess.run(where, capture_output=True, text=True, cwd=tmp_path, env=bare)
    assert str(home) in done.stdout
    code = "import sys; sys.argv[0] = 'rlbook'; from rlbook.cli import main; sys.exit(main())"
    listed = subprocess.run(
        [python, "-c", code, "list"], capture_output=True, text=True, cwd=tmp_path, env=bare
    )
    assert listed.returncode == 0, listed.stderr
    assert "ppo" in listed.stdout and listed.stderr == ""
    assert (home / "bin" / "rlbook").is_file()
