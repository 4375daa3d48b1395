"""The built site, as a browser sees it from disk with the network off.

The site is built once, by the same command that readers use; `tools.browser` opens every page in a
real Chromium and writes down what is there; the tests judge that.
"""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tools.tidy import tidy_page

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
LISTED = [TOC["root"], *(c["file"] for part in TOC["parts"] for c in part["chapters"])]

pytestmark = pytest.mark.site


class Tags(HTMLParser):
    """All tags of a page with their attributes, and all ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    @property
    def ids(self) -> set[str]:
        return {a[n] for _, a in self.tags for n in ("id", "name") if n in a}


@pytest.fixture(scope="module")
def site() -> dict[str, Tags]:
    """Build the site; page -> its tags."""
    command = [sys.executable, "-m", "tools.book", "build"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"open {(HTML / 'index.html').as_uri()}" in done.stdout
    pages = [p for p in HTML.rglob("*.html") if "_static" not in p.relative_to(HTML).parts]
    return {p.relative_to(HTML).as_posix(): Tags(p.read_text("utf-8")) for p in pages}


@pytest.fixture(scope="module")
def seen(site: dict[str, Tags]) -> dict[str, Any]:
    """What a browser sees on every page."""
    command = [sys.executable, "-m", "tools.browser", "look", str(HTML)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def pages(seen: dict[str, Any]) -> dict[str, Any]:
    return {name: page for name, page in seen.items() if not name.startswith("?")}


def test_every_listed_page_is_built(site: dict[str, Tags]) -> None:
    assert {f"{name}.html" for name in LISTED} <= set(site)


def test_nothing_is_loaded_from_elsewhere(site: dict[str, Tags]) -> None:
    for name, page in site.items():
        for tag, attributes in page.tags:
            if tag in ("script", "link", "img", "iframe", "video", "source", "object", "embed"):
                for key in ("src", "href", "data", "poster"):
                    assert not re.match(r"(https?:)?//", attributes.get(key, "")), (name, tag)
        assert "THEBE_JS_URL" not in (HTML / name).read_text(encoding="utf-8"), name


def test_no_style_sheet_asks_for_a_remote_file() -> None:
    for sheet in HTML.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8", errors="replace")
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", text), sheet.name


def broken_links(site: dict[str, Tags]) -> list[tuple[str, str]]:
    """Links inside the site whose file or anchor is not there."""
    broken = []
    for name, page in site.items():
        here = HTML / name
        for _, attributes in page.tags:
            for url in (attributes.get("href", ""), attributes.get("src", "")):
                parts = urlsplit(url)
                if not url or parts.scheme or url.startswith("//"):
                    continue
                target = (here.parent / unquote(parts.path)).resolve() if parts.path else here
                inside = target.relative_to(HTML.resolve()).as_posix() if target.exists() else ""
                anchor = unquote(parts.fragment)
                if not target.exists() or (
                    anchor and inside in site and anchor not in site[inside].ids
                ):
                    broken.append((name, url))
    return broken


def test_every_link_inside_the_site_leads_somewhere(site: dict[str, Tags]) -> None:
    assert broken_links(site) == []


def test_a_planted_broken_link_is_found(site: dict[str, Tags]) -> None:
    planted = Tags('<a href="no/such/page.html">x</a><a href="#no-such-place">y</a>')
    assert len(broken_links({"planted.html": planted})) == 2


def test_the_browser_is_content(seen: dict[str, Any]) -> None:
    for name, page in pages(seen).items():
        assert page["console"] == [], (name, page["console"])
        assert page["failed"] == [], (name, page["failed"])
        assert page["remote"] == [], (name, page["remote"])


def test_equations_are_typeset_and_numbered(seen: dict[str, Any]) -> None:
    for name, page in pages(seen).items():
        assert page["typeset"] == page["math"], name
        assert page["math_errors"] == [], (name, page["math_errors"])
    for name in [n for n in LISTED if re.search(r"/\d\d_", n)]:
        assert seen[f"{name}.html"]["numbered"] > 0, f"{name} has no numbered equation"


def test_figures_are_loaded_and_described(seen: dict[str, Any]) -> None:
    for name, page in pages(seen).items():
        for image in page["images"]:
            assert image["width"] > 0 and image["alt"], (name, image)
        for video in page["videos"]:
            assert video["width"] > 0 and video["label"] and not video["error"], (name, video)
    assert sum(len(page["images"]) for page in pages(seen).values()) > len(LISTED)


def test_the_search_works(seen: dict[str, Any]) -> None:
    assert len(seen["?search"]["found"]) >= 3


def test_no_page_is_wider_than_a_phone(seen: dict[str, Any]) -> None:
    wide = {n: page["narrow"] for n, page in pages(seen).items() if page["narrow"] > 2}
    assert wide == {}


def test_chapters_have_download_and_launch_buttons(site: dict[str, Tags]) -> None:
    for name in [n for n in LISTED if n.startswith("chapters/")]:
        links = [a.get("href", "") for tag, a in site[f"{name}.html"].tags if tag == "a"]
        assert any(link.endswith(".ipynb") and "://" not in link for link in links), name
        for service in ("mybinder.org", "colab.research.google.com"):
            assert any(urlsplit(link).netloc == service for link in links), (name, service)


def test_icons_and_dark_mode(site: dict[str, Tags]) -> None:
    tags = site[f"{LISTED[0]}.html"].tags
    icons = [a["href"] for tag, a in tags if tag == "link" and "icon" in a.get("rel", "")]
    assert any(icon.endswith("favicon.svg") for icon in icons)
    assert any("theme-switch" in a.get("class", "") for _, a in tags)


def test_tidy_keeps_one_load_of_mathjax_and_all_else() -> None:
    load = '\n<script src="_static/mathjax/tex-svg-full.js?v=1"></script>'
    thebe = '\n<script>const THEBE_JS_URL = "x"</script>'
    assert tidy_page(f"<p>a</p>{load}{thebe}<p>b</p>{load}{thebe}<p>c</p>") == (
        f"<p>a</p>{load}<p>b</p><p>c</p>"
    )
