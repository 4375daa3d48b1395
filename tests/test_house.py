"""The rules of the house, held by reading syntax trees: floors, lengths, words, references."""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlbook"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
SYSTEMS = {
    path.stem
    for path in PACKAGE.glob("*.py")
    if path.stem not in ("__init__", "__main__", "cli", "data")
}
# What each floor may import besides itself.
BELOW = {
    "maths": set(),
    "data": {"maths"},
    "parts": {"data", "maths"},
    "plumbing": {"parts", "data"},
    "harness": {"parts", "data", "maths"},
    "system": {"harness", "plumbing", "parts", "data", "maths"},
    "cli": {"harness", "plumbing", "parts", "data", "maths", "system"},
    "__init__": set(),
    "__main__": {"cli"},
}
FUNCTION_LINES, SYSTEM_LINES, MODULE_LINES = 60, 300, 250


def floor_of(module: str) -> str:
    """The floor of `rlbook.a.b`."""
    first = (module.split(".") + ["__init__"])[1]
    return "system" if first in SYSTEMS else first


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def own_imports(tree: ast.AST, module: str) -> Iterator[str]:
    """The modules of the package that a tree imports, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "rlbook")
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(module.split(".")[: -node.level])
            yield f"{base}.{node.module}" if node.module else base
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlbook":
            if node.module == "rlbook":
                yield from (f"rlbook.{a.name}" for a in node.names)
            else:
                yield str(node.module)


def wrong_imports(source: str, module: str) -> list[str]:
    mine = floor_of(module)
    found = []
    for name in own_imports(ast.parse(source), module):
        theirs = floor_of(name)
        same = theirs == mine and mine != "system"
        if name != "rlbook.__version__" and not same and theirs not in BELOW[mine]:
            found.append(name)
    return found


def code_lines(source: str) -> set[int]:
    """The lines that hold code: no blank line, no comment, no docstring."""
    lines: set[int] = set()
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # Docstrings, those under a constant or a field included.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def long_functions(source: str, limit: int = FUNCTION_LINES) -> list[str]:
    code = code_lines(source)
    spans = {f.name: set(range(f.lineno, (f.end_lineno or 0) + 1)) for f in functions(source)}
    return [name for name, span in spans.items() if len(span & code) > limit]


def undocumented(source: str) -> list[str]:
    """Public modules, classes, functions and methods without a docstring."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["module"]
    public = [n for n in tree.body if hasattr(n, "name") and not n.name.startswith("_")]
    for node in public:
        if not ast.get_docstring(node):
            found.append(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [m for m in node.body if isinstance(m, ast.FunctionDef)]
            public_methods = [m for m in methods if not m.name.startswith("_")]
            found += [f"{node.name}.{m.name}" for m in public_methods if not ast.get_docstring(m)]
    return found


def done_names(source: str) -> set[str]:
    """Variables, arguments and fields named `done` or `dones`: one word for two different ends."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", "")
        if name in ("done", "dones"):
            names.add(name)
    return names


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down(path: Path) -> None:
    assert wrong_imports(path.read_text(encoding="utf-8"), module_name(path)) == []


@pytest.mark.parametrize("path", MODULES + TOOLS, ids=lambda p: p.stem)
def test_functions_and_modules_are_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    limit = SYSTEM_LINES if path.parent == PACKAGE and path.stem in SYSTEMS else MODULE_LINES
    assert long_functions(source) == []
    assert len(code_lines(source)) <= limit


def test_most_functions_have_at_most_40_lines() -> None:
    sources = [path.read_text(encoding="utf-8") for path in MODULES + TOOLS]
    longer = [name for source in sources for name in long_functions(source, 40)]
    count = sum(len(list(functions(source))) for source in sources)
    assert len(longer) <= 0.02 * count, longer


@pytest.mark.parametrize("path", MODULES + TOOLS, ids=lambda p: p.stem)
def test_public_names_are_documented(path: Path) -> None:
    assert undocumented(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_variable_is_called_done(path: Path) -> None:
    assert done_names(path.read_text(encoding="utf-8")) == set()


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_a_system_says_what_it_is_and_where_the_book_explains_it(system: str) -> None:
    source = (PACKAGE / f"{system}.py").read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source)) or ""
    numbers = re.findall(r"Book: chapter (\d+)", text)
    assert numbers, f"{system} lacks a line 'Book: chapter N'"
    for number in numbers:
        assert list((ROOT / "chapters").glob(f"{int(number):02d}_*.ipynb")), f"no chapter {number}"
    assert re.search(r"This is .* with:|This is ", text), f"{system} lacks 'This is X with: …'"
    assert "Differs from" in text, f"{system} does not say where it departs from the paper"


def test_citations_exist() -> None:
    keys = set(re.findall(r"@\w+\{([^,]+),", (ROOT / "references.bib").read_text("utf-8")))
    texts = {p.name: p.read_text("utf-8") for p in (ROOT / "docs").glob("*.md")}
    for path in (ROOT / "chapters").glob("*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        texts[path.name] = "\n".join("".join(c["source"]) for c in cells)
    for name, text in texts.items():
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text):
            cited = {key.strip() for key in group.split(",")}
            assert cited <= keys, f"{name} cites {cited - keys}"


def test_nothing_names_a_machine() -> None:
    """No home folder, no temporary folder, no host of a registry in any text file of ours."""
    folders = ("rlbook", "tools", "tests", "docs", "chapters", "benchmarks", "results", ".ci")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in (".py", ".md")]
    files += [p for f in ("chapters", "results") for p in (ROOT / f).rglob("*.ipynb")]
    files += [ROOT / n for n in ("README.md", "Makefile", "pyproject.toml", "constraints.txt")]
    pattern = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w|download\.pytorch\.|pypi\.or" + "g")
    for path in files:
        if path != Path(__file__):
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: {found and found.group()}"


# -- planted mistakes: each rule can fail ----------------------------------------------------------


def test_planted_import_upwards_is_found() -> None:
    assert wrong_imports("from rlbook.harness.run import Run", "rlbook.maths.returns")
    assert wrong_imports("def f():\n    from rlbook import ppo", "rlbook.dqn")
    assert wrong_imports("from ..maths import vtrace", "rlbook.plumbing.runtime")
    assert not wrong_imports("from rlbook.maths import vtrace", "rlbook.ppo")


def test_planted_length_is_found_and_comments_are_free() -> None:
    body = "".join(f"    x = {i}\n" for i in range(FUNCTION_LINES))
    assert long_functions("def f():\n" + body) == ["f"]
    words = '    """Words.\n' + "\n" * 80 + '    """\n' + "    # why\n" * 80
    assert long_functions("def f():\n" + words + "    return 1\n") == []


def test_planted_silence_and_done_are_found() -> None:
    source = '"""M."""\nclass A:\n    """A."""\n    def f(self):\n        return 1\ndef g(): ...\n'
    assert undocumented(source) == ["A.f", "g"]
    assert done_names("def f(done): return done") == {"done"}
