"""The tools that decide what is stale and that execute chapters."""

import base64
import io
import textwrap
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
from nbformat import NotebookNode
from PIL import Image

from tools import book
from tools.execute import (
    ChapterError,
    execute,
    merge_streams,
    normalise,
    smaller,
    take_outputs,
)
from tools.keys import chapter_key, imported_modules, is_fresh, module_hash, record_hash
from tools.pages import api_page, status_page
from tools.pins import pins

v4 = nbformat.v4


def notebook(*cells: str) -> NotebookNode:
    """A notebook of code cells."""
    made = v4.new_notebook()
    made.cells = [v4.new_code_cell(cell) for cell in cells]
    return made


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small repository: a -> b (lazily), c beside them, a record, pins."""
    package = tmp_path / "rlbook"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text(
        '"""Words."""\n\n\ndef f():\n    """More."""\n    from rlbook import b\n    return b.x\n'
    )
    (package / "b.py").write_text("x = 1\n")
    (package / "c.py").write_text("y = 1\n")
    (tmp_path / "results" / "run").mkdir(parents=True)
    (tmp_path / "results" / "run" / "record.json").write_text("{}")
    (tmp_path / "constraints.txt").write_text("# words\nnumpy==1\n")
    return tmp_path


NB = ("from rlbook.a import f\nprint(f())", 'record("run")')


def test_a_key_changes_with_what_can_change_an_output(root: Path) -> None:
    def changed(path: str, old: str, new: str) -> bool:
        before = chapter_key(notebook(*NB), root)
        file = root / path
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        after = chapter_key(notebook(*NB), root)
        file.write_text(text)
        return before != after

    assert changed("rlbook/a.py", "b.x", "b.x + 1")
    assert changed("rlbook/b.py", "1", "2"), "a lazy import counts"
    assert changed("results/run/record.json", "{}", "{ }")
    assert changed("constraints.txt", "==1", "==2")
    assert not changed("rlbook/c.py", "1", "2"), "a module that is not imported does not count"
    assert not changed("rlbook/a.py", "More.", "Better words."), "docstrings do not count"
    assert not changed("rlbook/b.py", "x = 1", "# why\nx = 1"), "comments do not count"
    assert not changed("constraints.txt", "# words", "# better words")


def test_a_key_changes_with_code_cells_and_tags_but_not_with_prose(root: Path) -> None:
    key = chapter_key(notebook(*NB), root)
    assert chapter_key(notebook(NB[0] + "\n1", NB[1]), root) != key
    tagged = notebook(*NB)
    tagged.cells[0].metadata["tags"] = ["nbval-check-output"]
    assert chapter_key(tagged, root) != key
    talked = notebook(*NB)
    talked.cells.insert(0, v4.new_markdown_cell("# Words"))
    assert chapter_key(talked, root) == key


@pytest.mark.parametrize(
    "cell",
    [
        "import rlbook.b",
        "from rlbook import b",
        "from rlbook.b import x",
        "%matplotlib inline\nfrom rlbook.b import x",
        "def f():\n    import rlbook.b as q",
        "import importlib\nimportlib.import_module('rlbook.b')",
        "register(entry_point='rlbook.b:make')",
    ],
)
def test_every_way_to_import_counts(root: Path, cell: str) -> None:
    before = chapter_key(notebook(cell), root)
    (root / "rlbook" / "b.py").write_text("x = 7\n")
    assert chapter_key(notebook(cell), root) != before


@pytest.mark.parametrize(
    "cell", ['record("run")', 'open("results/run/record.json")', 'harness.record(name="run")']
)
def test_every_way_to_read_a_record_counts(root: Path, cell: str) -> None:
    before = chapter_key(notebook(cell), root)
    (root / "results" / "run" / "record.json").write_text("[1]")
    assert chapter_key(notebook(cell), root) != before


def test_a_missing_record_is_an_error(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        chapter_key(notebook('record("nowhere")'), root)
    assert record_hash(root / "results") != record_hash(root / "results" / "run")


def test_relative_imports_are_followed(root: Path) -> None:
    package = root / "rlbook" / "deep"
    package.mkdir()
    (package / "__init__.py").write_text("from .one import z\n")
    (package / "one.py").write_text("from ..c import y as z\n")
    import ast

    found = imported_modules([ast.parse("import rlbook.deep")], root)
    assert found == {"rlbook", "rlbook.deep", "rlbook.deep.one", "rlbook.c"}
    assert module_hash("rlbook.c", root) != module_hash("rlbook.b", root)


def test_fresh_needs_outputs_and_the_right_key(root: Path) -> None:
    made = notebook(*NB)
    made.metadata["rlbook"] = {"key": chapter_key(made, root)}
    assert not is_fresh(made, root), "never executed"
    for count, cell in enumerate(made.cells, 1):
        cell.execution_count = count
    assert is_fresh(made, root)
    (root / "rlbook" / "b.py").write_text("x = 3\n")
    assert not is_fresh(made, root)


def test_normalise_strips_the_machine_and_keeps_what_matters() -> None:
    made = notebook("print(1)\nprint(2)")
    made.metadata = nbformat.from_dict(
        {"language_info": {"name": "python", "version": "3.99"}, "rlbook": {"key": "k"}, "x": 1}
    )
    cell = made.cells[0]
    cell.metadata = nbformat.from_dict({"execution": {"t": 1}, "tags": ["a"]})
    outputs = [v4.new_output("stream", name="stdout", text=text) for text in ("1\n", "2\n")]
    cell.outputs = outputs
    normalise(made)
    assert set(made.metadata) == {"kernelspec", "language_info", "rlbook"}
    assert made.metadata.language_info == {"name": "python"}
    assert cell.metadata == {"tags": ["a"]}
    assert [output.text for output in cell.outputs] == ["1\n2\n"]
    nbformat.validate(made)


def test_stored_figures_are_smaller_and_look_the_same() -> None:
    from matplotlib.figure import Figure

    figure, drawn = Figure(figsize=(4, 3)), io.BytesIO()
    ax = figure.add_subplot()
    ax.plot([1, 3, 2], linewidth=3)
    ax.fill_between([0, 1, 2], [0, 1, 1], [2, 3, 4], alpha=0.3)
    figure.savefig(drawn, format="png")
    png = base64.b64encode(drawn.getvalue()).decode()
    made = smaller(png)
    assert len(made) < 0.6 * len(png) and smaller(made) == made
    before, after = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB"), float)
        for one in (png, made)
    )
    assert before.shape == after.shape and np.abs(before - after).mean() < 0.5


def test_streams_of_different_names_are_not_joined() -> None:
    names = ("stdout", "stderr", "stdout")
    outputs = [v4.new_output("stream", name=name, text="x") for name in names]
    assert [output.name for output in merge_streams(outputs)] == list(names)


def test_take_outputs_keeps_the_newer_words() -> None:
    old, new = notebook("1"), notebook("1")
    old.cells[0].execution_count = 1
    old.cells[0].outputs = [v4.new_output("stream", name="stdout", text="one")]
    new.cells.insert(0, v4.new_markdown_cell("new words"))
    take_outputs(new, old)
    assert new.cells[0].source == "new words"
    assert new.cells[1].outputs[0].text == "one"


@pytest.mark.slow
def test_execute_stores_outputs_and_leaves_no_process(tmp_path: Path) -> None:
    made = notebook("x = 20 + 1", "print(2 * x)")
    children = {child.pid for child in psutil.Process().children(recursive=True)}
    assert execute(made, tmp_path) > 0
    assert made.cells[1].outputs[0].text == "42\n"
    end = time.monotonic() + 5
    while {c.pid for c in psutil.Process().children(recursive=True)} - children:
        assert time.monotonic() < end, "the kernel is still there"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ("print('before')\n1 / 0", ["cell 1:", "    1 / 0", "ZeroDivisionError"]),
        ("import sys\nprint('oh', file=sys.stderr)", ["written to stderr", "oh"]),
    ],
)
def test_a_failing_or_noisy_cell_is_shown(tmp_path: Path, cell: str, shown: list[str]) -> None:
    with pytest.raises(ChapterError) as error:
        execute(notebook("1", cell), tmp_path)
    for words in shown:
        assert words in str(error.value)
    assert "\x1b" not in str(error.value)


@pytest.mark.slow
def test_a_ray_process_left_behind_is_found(tmp_path: Path) -> None:
    leak = """
        import contextlib, io
        with contextlib.redirect_stderr(io.StringIO()):
            import ray
            ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    """
    with pytest.raises(ChapterError, match="left .* Ray processes"):
        execute(notebook(textwrap.dedent(leak)), tmp_path, patience_s=1)


@pytest.mark.slow
def test_build_never_writes_over_a_readers_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refreshing step of `make book`, on a folder of its own."""
    chapters, built = tmp_path / "chapters", tmp_path / "_build" / "source" / "chapters"
    chapters.mkdir()
    built.mkdir(parents=True)
    nbformat.write(notebook("print('edited by a reader')"), chapters / "01_x.ipynb")
    before = (chapters / "01_x.ipynb").read_bytes()
    (built / "01_x.ipynb").write_bytes(before)
    monkeypatch.setattr(book, "BUILD", tmp_path / "_build")
    assert book._refresh([built / "01_x.ipynb"])
    assert "[1/1] 01_x: executing … " in capsys.readouterr().out
    assert (chapters / "01_x.ipynb").read_bytes() == before
    assert "edited by a reader\\n" in (built / "01_x.ipynb").read_text()
    (built / "01_x.ipynb").write_bytes(before)
    assert book._refresh([built / "01_x.ipynb"])
    assert "executed by an earlier build" in capsys.readouterr().out


def test_chapters_are_found_by_name_and_intro_comes_first(tmp_path: Path) -> None:
    for name in ("02_td", "intro", "01_mdp"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    assert [p.stem for p in book.chapter_paths(folder=tmp_path)] == ["intro", "01_mdp", "02_td"]
    assert [p.stem for p in book.chapter_paths(["02_td"], tmp_path)] == ["02_td"]
    with pytest.raises(SystemExit, match="no chapter 09_x"):
        book.chapter_paths(["09_x"], tmp_path)


def test_generated_pages(root: Path, tmp_path: Path) -> None:
    page = api_page(root / "rlbook")
    assert "## `rlbook.a`" in page and "f()" in page and "More." in page
    chapters = tmp_path / "chapters"
    chapters.mkdir()
    nbformat.write(notebook("1"), chapters / "01_x.ipynb")
    assert "| {doc}`../chapters/01_x` | stale | 1 | 0 | 0 |" in status_page(chapters)


def test_pins_drop_builds_paths_and_the_book_itself() -> None:
    freeze = "torch==2.13.0+cpu\nrlbook==0.1.0\nnumpy==2.4.6\npip==23\nx @ file:///somewhere\n"
    lines = [line for line in pins(freeze).splitlines() if not line.startswith("#")]
    assert lines == ["numpy==2.4.6", "torch==2.13.0"]
