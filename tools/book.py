"""Build the book: `python -m tools.book build | chapters [NAME …] | stale`.

    chapters/*.ipynb ──copy──> _build/source ──execute what is stale──> jupyter-book ──> _build/html
           ^                                                                               |
           └── only `chapters` writes here                       a browser opens index.html┘

`build` never writes over chapters/: a reader's edited notebook is executed in the build folder, and
its outputs are kept there by key, so that a second build executes nothing. `chapters` executes and
stores outputs and key in chapters/ itself. `stale` lists what would be executed and fails if that
is anything.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from nbformat import NotebookNode

from tools import BUILD, CHAPTERS, ROOT
from tools.execute import ChapterError, execute, normalise, read, take_outputs, write
from tools.keys import chapter_key, is_fresh
from tools.pages import write_pages
from tools.tidy import tidy

SOURCE = BUILD / "source"
HTML = BUILD / "html"
COPIED = ("_config.yml", "_toc.yml", "references.bib", "_static", "chapters", "docs", "results")
IGNORED = ("runs", ".ipynb_checkpoints", "__pycache__")
MEDIA = (".mp4", ".webm", ".gif")


def chapter_paths(names: list[str] | None = None, folder: Path = CHAPTERS) -> list[Path]:
    """List the chapters, `intro` first; with `names`, those alone (stems, or paths to them)."""
    paths = sorted(folder.glob("*.ipynb"), key=lambda path: (path.stem != "intro", path.stem))
    if not names:
        return paths
    by_stem = {path.stem: path for path in paths}
    unknown = [name for name in names if Path(name).stem not in by_stem]
    if unknown:
        raise SystemExit(f"no chapter {', '.join(unknown)}; there are: {', '.join(by_stem)}")
    return [by_stem[Path(name).stem] for name in names]


def stale_paths(folder: Path = CHAPTERS, root: Path = ROOT) -> list[Path]:
    """List the chapters whose stored outputs do not belong to the code as it is now."""
    return [path for path in chapter_paths(folder=folder) if not is_fresh(read(path), root)]


def stale() -> int:
    """Print the stale chapters; 1 if there is any."""
    paths = stale_paths()
    for path in paths:
        print(f"stale: {path.relative_to(ROOT)} (mend it with: make chapters NAMES={path.stem})")
    if not paths:
        print(f"the stored outputs of all {len(chapter_paths())} chapters are fresh")
    return int(bool(paths))


def store_chapters(names: list[str]) -> int:
    """Execute chapters in chapters/ and store their outputs and key; 1 if one fails."""
    paths = chapter_paths(names)
    for number, path in enumerate(paths, 1):
        notebook = read(path)
        if not _execute(notebook, path.stem, path.parent, f"[{number}/{len(paths)}]"):
            return 1
        write(notebook, path)
    return 0


def build() -> int:
    """Execute what is stale into the build folder, build the site, say where to open it."""
    copy_sources()
    if not _refresh(chapter_paths(folder=SOURCE / "chapters")):
        return 1
    write_pages(SOURCE)
    if not _jupyter_book():
        # A page that warned is not built again by itself, so the next build must start afresh.
        shutil.rmtree(BUILD / ".doctrees", ignore_errors=True)
        shutil.rmtree(HTML, ignore_errors=True)
        return 1
    copy_media()
    tidy(HTML)
    print(f"\nthe book is built: open {(HTML / 'index.html').as_uri()}")
    return 0


def copy_sources(source: Path = SOURCE) -> None:
    """Copy what the site is made from; unchanged files keep their times, vanished ones go."""
    wanted: set[Path] = set()
    for name in COPIED:
        start = ROOT / name
        files = [start] if start.is_file() else sorted(start.rglob("*"))
        for file in files:
            inside = file.relative_to(ROOT)
            if file.is_file() and not set(inside.parts) & set(IGNORED):
                wanted.add(inside)
                _copy(file, source / inside)
    for file in [path for path in source.rglob("*") if path.is_file()]:
        if file.relative_to(source) not in wanted and ".part" not in file.suffixes:
            file.unlink()


def copy_media() -> None:
    """Put videos that pages name by a relative path beside those pages; Sphinx leaves them out."""
    for file in (SOURCE / "chapters").rglob("*"):
        if file.suffix in MEDIA:
            _copy(file, HTML / file.relative_to(SOURCE))


def _copy(file: Path, target: Path) -> None:
    if not target.exists() or target.read_bytes() != file.read_bytes():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _refresh(paths: list[Path]) -> bool:
    """Bring every copied chapter's outputs up to date; from an earlier build where one has them."""
    for number, path in enumerate(paths, 1):
        notebook, label = read(path), f"[{number}/{len(paths)}]"
        if is_fresh(notebook):
            print(f"{label} {path.stem}: fresh, not executed", flush=True)
            continue
        kept = BUILD / "executed" / f"{path.stem}-{chapter_key(notebook)[:16]}.ipynb"
        if kept.exists():
            take_outputs(notebook, read(kept))
            notebook.metadata["rlbook"] = {"key": chapter_key(notebook)}
            normalise(notebook)
            print(f"{label} {path.stem}: executed by an earlier build", flush=True)
        elif _execute(notebook, path.stem, path.parent, label):
            write(notebook, kept)
        else:
            return False
        write(notebook, path)
    return True


def _execute(notebook: NotebookNode, name: str, folder: Path, label: str) -> bool:
    """Execute one chapter with one progress line; False, with the cell shown, if it fails."""
    print(f"{label} {name}: executing … ", end="", flush=True)
    key = chapter_key(notebook)  # before the run: a module edited meanwhile must make it stale
    try:
        seconds = execute(notebook, folder)
    except ChapterError as error:
        print(f"failed\n\n{name}, {error}", flush=True)
        return False
    notebook.metadata["rlbook"] = {"key": key}
    normalise(notebook)
    print(f"{seconds:.1f} s", flush=True)
    return True


def _jupyter_book() -> bool:
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    command += [str(SOURCE), "--path-output", str(ROOT), "-W", "-n", "--keep-going", "-q"]
    print("building the site …", flush=True)
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout, flush=True)
    return done.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """Run one of the three commands and return its exit code."""
    parser = argparse.ArgumentParser(prog="tools.book", description="Build the book.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("build", help="execute what is stale into _build/ and build the site")
    store = commands.add_parser("chapters", help="execute chapters and store their outputs")
    store.add_argument("names", nargs="*", help="chapters such as 03_dqn; all if none is named")
    commands.add_parser("stale", help="list stale chapters, fail if there is one")
    chosen = parser.parse_args(arguments)
    if chosen.command == "build":
        return build()
    return stale() if chosen.command == "stale" else store_chapters(chosen.names)


if __name__ == "__main__":
    sys.exit(main())
