"""Pages that are written from the repository itself: the API and the status of every notebook."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from tools import ROOT
from tools.execute import read
from tools.keys import is_fresh

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def write_pages(source: Path) -> None:
    """Write docs/api.md and docs/status.md below `source`, which the site is built from."""
    pages = {"api": api_page(ROOT / "rlbook"), "status": status_page(source / "chapters")}
    for name, text in pages.items():
        path = source / "docs" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def status_page(chapters: Path) -> str:
    """Write a table of the notebooks: what they hold and whether their outputs are fresh."""
    rows = []
    for path in sorted(chapters.glob("*.ipynb"), key=lambda p: (p.stem != "intro", p.stem)):
        notebook = read(path)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
        compared = sum("nbval-check-output" in cell.metadata.get("tags", []) for cell in code)
        key = notebook.metadata.get("rlbook", {}).get("key", "")
        state = "fresh" if is_fresh(notebook) else "stale"
        words = sum(len(text.split()) for text in prose)
        size = path.stat().st_size // 1024
        cells = [f"{{doc}}`../chapters/{path.stem}`", state, len(code), compared, words, size]
        rows.append("| " + " | ".join(map(str, cells)) + f" | `{key[:12]}` |")
    head = "| notebook | outputs | code cells | compared by nbval | words | KiB | key |"
    rule = "|---|---|--:|--:|--:|--:|---|"
    return "\n".join([_STATUS, head, rule, *rows, ""])


def api_page(package: Path) -> str:
    """Write every public name of the package with its signature and docstring."""
    parts = [_API]
    for path in sorted(package.rglob("*.py"), key=lambda p: (len(p.parts), p.as_posix())):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        public = list(_public(tree))
        if not public and path.name != "__init__.py" or path.name == "__main__.py":
            continue
        if public:
            inside = path.relative_to(package.parent)
            name = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
            parts += [f"## `{name}`", _fence((ast.get_docstring(tree) or "").strip())]
            parts += [_entry(node) for node in public]
    return "\n\n".join(part for part in parts if part) + "\n"


def _public(tree: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node


def _entry(node: Definition) -> str:
    lines = [_signature(node), *_indented(ast.get_docstring(node))]
    if isinstance(node, ast.ClassDef):
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign):
                lines.append(f"    {ast.unparse(statement)}")
        for method in _public(node):
            lines += ["", f"    {_signature(method)}"]
            lines += [f"    {line}" for line in _indented(ast.get_docstring(method))]
    return f"### `{node.name}`\n\n" + _fence("\n".join(lines))


def _signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    whole = f"{node.name}({ast.unparse(node.args)}){returns}"
    if len(whole) <= 90:
        return whole
    inner = ast.unparse(node.args).replace(", ", ",\n    ")
    return f"{node.name}(\n    {inner},\n){returns}"


def _indented(docstring: str | None) -> list[str]:
    text = inspect.cleandoc(docstring) if docstring else ""
    return [f"    {line}" if line else "" for line in text.splitlines()]


def _fence(text: str) -> str:
    return f"````text\n{text}\n````" if text else ""


_STATUS = """# Status of every notebook

Each notebook is stored with its outputs and with a *key*: a hash of its code cells, of the package
modules that they use, of the records that they read and of the pinned versions. As long as the key
fits, the outputs are *fresh*: they are what the code of this very edition prints. More in
{doc}`architecture`.
"""

_API = """# API

What the chapters import, floor by floor: signatures and docstrings as they stand in the source.
Shapes are written time first: `[T, B]` is T steps of B environments.
"""
