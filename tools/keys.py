"""The key of a chapter: says whether its stored outputs still belong to its code.

A key is a SHA-256 over what can change a chapter's outputs and over nothing else: the code cells
(source and tags), the modules of `rlbook` that the cells import, directly or through other modules
(as syntax trees without docstrings, so that better words need no new run), the records under
`results/` that the cells read, and the pinned versions in `constraints.txt`. Nothing of the machine
enters, neither its name nor its Python nor the time, so that a fresh clone is fresh anywhere.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from tools import ROOT

PACKAGE = "rlbook"
_RECORD = re.compile(r"results/[\w./-]*")
_MAGIC = re.compile(r"^\s*[%!].*$", re.MULTILINE)


def chapter_key(notebook: dict[str, Any], root: Path = ROOT) -> str:
    """Compute the key of a notebook (a dict in nbformat 4) whose repository is at `root`.

    Raises FileNotFoundError if a cell reads a record that is not under `results/`.
    """
    cells = [_cell(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    trees = [tree for source, _ in cells if (tree := _parse(source)) is not None]
    modules = {name: module_hash(name, root) for name in sorted(imported_modules(trees, root))}
    records = {name: record_hash(root / name) for name in sorted(_records(trees))}
    parts = {"cells": cells, "modules": modules, "records": records, "pins": _pins(root)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def is_fresh(notebook: dict[str, Any], root: Path = ROOT) -> bool:
    """Say whether the stored outputs are there and belong to the code as it is now."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and _cell(cell)[0]]
    executed = all(cell.get("execution_count") is not None for cell in code)
    stored = notebook["metadata"].get(PACKAGE, {}).get("key")
    return executed and stored == chapter_key(notebook, root)


def imported_modules(trees: list[ast.Module], root: Path = ROOT) -> set[str]:
    """Find every module of the package that the trees need, following imports from file to file."""
    found: set[str] = set()
    waiting = [name for tree in trees for name in _named_modules(tree, root, "")]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += _module_imports(name, root)
    return found


def module_hash(name: str, root: Path = ROOT) -> str:
    """Hash a module's syntax tree without docstrings, comments, positions and Python's version."""
    path = _module_path(name, root)
    if path is None:
        raise ModuleNotFoundError(f"{name} is no module under {root}")
    return _source_hash(path.read_text(encoding="utf-8"))


def record_hash(path: Path) -> str:
    """Hash a record: a file, or all files of a folder by their relative names."""
    if not path.exists():
        raise FileNotFoundError(f"a chapter reads the record {path.name!r}, which is not there")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(path.parent).as_posix().encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@cache
def _source_hash(source: str) -> str:
    form = _form(_without_docstrings(ast.parse(source)))
    return hashlib.sha256(json.dumps(form).encode()).hexdigest()


def _cell(cell: dict[str, Any]) -> tuple[str, list[str]]:
    source = cell["source"]
    text = source if isinstance(source, str) else "".join(source)
    return text.strip(), sorted(cell.get("metadata", {}).get("tags", []))


def _pins(root: Path) -> list[str]:
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return sorted(line.strip() for line in lines if line.strip() and line[0] != "#")


def _parse(source: str) -> ast.Module | None:
    """Parse a cell, leaving out IPython's magics; a cell in another language has no tree."""
    if source.startswith("%%"):
        return None
    return ast.parse(_MAGIC.sub("", source))


def _records(trees: list[ast.Module]) -> Iterator[str]:
    """Yield `results/...` for each string literal that holds one and each `record("name")`."""
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from (match.rstrip("/.") for match in _RECORD.findall(node.value))
            elif isinstance(node, ast.Call) and _called(node) == "record":
                arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
                for value in arguments[:1]:
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        if not value.value.startswith("results/"):
                            yield f"results/{value.value}"
                    else:
                        yield "results"


def _called(node: ast.Call) -> str:
    return str(getattr(node.func, "id", None) or getattr(node.func, "attr", ""))


def _module_imports(name: str, root: Path) -> tuple[str, ...]:
    path = _module_path(name, root)
    assert path is not None
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return _source_imports(path.read_text(encoding="utf-8"), root, package)


@cache
def _source_imports(source: str, root: Path, package: str) -> tuple[str, ...]:
    return tuple(_named_modules(ast.parse(source), root, package))


def _named_modules(tree: ast.Module, root: Path, package: str) -> Iterator[str]:
    """Yield the package's modules that a tree imports, anywhere in it, or names in a string."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value.partition(":")[0]]  # "rlbook.ppo", "rlbook.parts.catch:Catch"
        for name in names:
            yield from _with_parents(name, root)


def _with_parents(name: str, root: Path) -> Iterator[str]:
    if name.split(".")[0] == PACKAGE and _module_path(name, root):
        steps = name.split(".")
        yield from (".".join(steps[: i + 1]) for i in range(len(steps)))


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    base = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _module_path(name: str, root: Path) -> Path | None:
    if not all(part.isidentifier() for part in name.split(".")):
        return None
    stem = root.joinpath(*name.split("."))
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return tree


def _form(node: Any) -> Any:
    """Write a tree as plain lists, the same under every Python: empty fields are left out."""
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name, None)) for name in sorted(node._fields))
        kept = [[name, _form(value)] for name, value in fields if value not in (None, [])]
        return [type(node).__name__, kept]
    if isinstance(node, list):
        return [_form(item) for item in node]
    return repr(node)
