"""The chapters' stored notebooks: complete, fresh, quiet, described, small, long as promised."""

import ast
import base64
import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.keys import is_fresh

ROOT = Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "chapters").glob("*.ipynb"))
NUMBERED = [path for path in PATHS if path.stem[:2].isdigit()]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def code(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def prose(path: Path) -> str:
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def outputs(path: Path) -> list[dict[str, Any]]:
    return [output for cell in code(path) for output in cell["outputs"]]


each = pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
each_numbered = pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)


def test_the_table_of_contents_holds_every_chapter() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [toc["root"], *(c["file"] for part in toc["parts"] for c in part["chapters"])]
    chapters = [Path(name).name for name in listed if name.startswith("chapters/")]
    assert sorted(chapters) == [path.stem for path in PATHS]
    assert chapters[0] == "intro" and chapters[1:] == sorted(chapters[1:])


@each
def test_stored_outputs_are_fresh(path: Path) -> None:
    assert is_fresh(read(path)), f"stale: make chapters NAMES={path.stem}"


@each
def test_nothing_on_stderr_and_no_error(path: Path) -> None:
    for output in outputs(path):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output


@each
def test_no_path_or_host_of_a_machine(path: Path) -> None:
    for output in outputs(path):
        data = output.get("data", {})
        text = "".join(output.get("text", "")) + "".join(data.get("text/plain", ""))
        text += re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", "".join(data.get("text/html", "")))
        assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|work)/", text), text[:300]
        assert not re.search(r"0x[0-9a-f]{8,}", text), text[:300]


@each
def test_every_figure_has_alt_text(path: Path) -> None:
    for cell in code(path):
        images = [o for o in cell["outputs"] if any("image/" in k for k in o.get("data", {}))]
        if images:
            alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
            stored = [v.get("alt", "") for o in images for v in o.get("metadata", {}).values() if v]
            assert len(alt) > 20 or any(len(a) > 20 for a in stored), "".join(cell["source"])
        for output in cell["outputs"]:
            html = "".join(output.get("data", {}).get("text/html", ""))
            for tag in re.findall(r"<img[^>]*>", html):
                assert re.search(r'alt="[^"]{3,}"', tag), tag[:100]
            for tag in re.findall(r"<video[^>]*>", html):
                assert re.search(r'aria-label="[^"]{3,}"', tag), tag[:100]
    for alt in re.findall(r"!\[([^\]]*)\]\(", prose(path)):
        assert alt.strip()
    for block in re.findall(r"\{(?:figure|image)\}.*?```", prose(path), re.DOTALL):
        assert re.search(r":alt: \S", block), block[:100]


@each
def test_a_notebook_stays_small_and_asks_nothing_from_the_network(path: Path) -> None:
    assert path.stat().st_size < 1_000_000
    text = "".join("".join(cell["source"]) for cell in code(path))
    assert not re.search(r"https?://|pip install|urllib|requests\.", text)


@each
def test_pictures_are_real_pictures(path: Path) -> None:
    for output in outputs(path):
        if "image/png" in output.get("data", {}):
            picture = base64.b64decode("".join(output["data"]["image/png"]))
            assert picture.startswith(b"\x89PNG") and len(picture) > 2000


@each
def test_cells_never_assert_a_speed(path: Path) -> None:
    for cell in code(path):
        source = re.sub(r"^\s*[%!].*$", "", "".join(cell["source"]), flags=re.MULTILINE)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Assert):
                assert not re.search(r"seconds|per_s|speed|wall_time", ast.unparse(node.test))


@each_numbered
def test_a_chapter_is_as_long_as_promised(path: Path) -> None:
    words = len(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", prose(path)))
    lengths = [len("".join(cell["source"]).strip().splitlines()) for cell in code(path)]
    assert 1500 <= words <= 4500, words
    assert 15 <= len(lengths) <= 40, len(lengths)
    assert statistics.median(lengths) <= 10 and max(lengths) <= 40, lengths


@each_numbered
def test_text_stands_between_any_two_code_cells(path: Path) -> None:
    kinds = [cell["cell_type"] for cell in read(path)["cells"]]
    assert kinds[0] == "markdown"
    assert ("code", "code") not in list(zip(kinds, kinds[1:], strict=False))


@each_numbered
def test_a_chapter_has_its_parts(path: Path) -> None:
    text = prose(path)
    for directive in ("{prf:algorithm}", "{exercise", "{solution", ":label: ", "{cite"):
        assert directive in text, f"{path.stem} has no {directive}"
    headings = " ".join(re.findall(r"^#+ (.*)$", text, re.MULTILINE)).lower()
    for word in ("goes wrong", "exercise", "quiz", "summary", "further reading"):
        assert word in headings, f"{path.stem} has no section '{word}' among: {headings}"


@each_numbered
def test_some_cells_are_compared(path: Path) -> None:
    tags = [tag for cell in code(path) for tag in cell["metadata"].get("tags", [])]
    assert tags.count("nbval-check-output") >= 3
