"""Look at the built site in a real browser, from disk and with the network off.

`python -m tools.browser` says how to get a browser if none is there.
`python -m tools.browser look HTML_DIR` opens every page and prints what it saw as JSON, for
tests/test_site.py to judge.
`python -m tools.browser shoot HTML_DIR OUT_DIR PAGE …` takes pictures, light and dark, wide and
narrow.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HELP = (
    "no browser found for the tests of the site. Get one with: apt-get install chromium\n"
    "(elsewhere: .venv/bin/python -m playwright install chromium), or name one in CHROMIUM=…"
)
FACTS = """() => {
  const seen = {};
  seen.title = document.title;
  seen.math = document.querySelectorAll('.math').length;
  seen.typeset = document.querySelectorAll('.math mjx-container > svg').length;
  seen.math_errors = [...document.querySelectorAll('[data-mml-node="merror"], mjx-merror')]
    .map(e => e.getAttribute('data-mjx-error') || e.textContent);
  seen.images = [...document.querySelectorAll('img')].map(
    i => ({src: i.getAttribute('src').slice(0, 80), width: i.naturalWidth, alt: i.alt.trim()}));
  seen.videos = [...document.querySelectorAll('video')].map(
    v => ({label: v.getAttribute('aria-label') || v.title, ready: v.readyState,
           width: v.videoWidth, error: v.error ? v.error.message : ''}));
  seen.numbered = document.querySelectorAll('.eqno').length;
  seen.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return seen;
}"""


def find_browser() -> str | None:
    """Find a Chromium: CHROMIUM, one on the path, or the one that Playwright has downloaded."""
    if named := os.environ.get("CHROMIUM"):
        return named
    for name in NAMES:
        if path := shutil.which(name):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


def look(html: Path) -> dict[str, Any]:
    """Open every page offline; return page -> what is there, what failed, what the console said."""
    pages = [p for p in sorted(html.rglob("*.html")) if "_static" not in p.parts]
    pages = [p for p in pages if 'http-equiv="Refresh"' not in p.read_text(encoding="utf-8")]
    with _browser() as browser:
        seen = {p.relative_to(html).as_posix(): _look_at(browser, p) for p in pages}
        seen["?search"] = _search(browser, html)
    return seen


def shoot(html: Path, out: Path, pages: list[str]) -> None:
    """Take pictures of whole pages: light and dark, 1280 and 390 points wide."""
    out.mkdir(parents=True, exist_ok=True)
    with _browser() as browser:
        for name in pages:
            for scheme in ("light", "dark"):
                for width in (1280, 390):
                    page = _page(browser, width=width, scheme=scheme)
                    _open(page, html / name)
                    stem = name.removesuffix(".html").replace("/", "-")
                    page.screenshot(path=out / f"{stem}-{scheme}-{width}.png", full_page=True)
                    page.close()


class _browser:
    """A browser that is closed on leaving a `with`."""

    def __enter__(self) -> Browser:
        from playwright.sync_api import sync_playwright

        path = find_browser()
        if path is None:
            raise SystemExit(HELP)
        self.playwright = sync_playwright().start()
        flags = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        self.browser = self.playwright.chromium.launch(executable_path=path, args=flags)
        return self.browser

    def __exit__(self, *error: object) -> None:
        self.browser.close()
        self.playwright.stop()


def _page(browser: Browser, width: int = 1280, scheme: str = "light") -> Page:
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
        offline=True,
    )
    return context.new_page()


def _open(page: Page, path: Path, query: str = "") -> None:
    page.goto(path.as_uri() + query, wait_until="load")
    page.evaluate(
        """async () => {
          if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
          for (const i of document.images) i.loading = 'eager';
          await Promise.all([...document.images].map(i => i.decode().catch(() => 0)));
          const ready = v => new Promise(done => {
            if (v.readyState >= 1 || v.error) return done();
            v.preload = 'metadata';
            v.addEventListener('loadedmetadata', done); v.addEventListener('error', done);
            setTimeout(done, 5000);
          });
          await Promise.all([...document.querySelectorAll('video')].map(ready));
        }"""
    )


def _look_at(browser: Browser, path: Path) -> dict[str, Any]:
    page = _page(browser)
    console: list[str] = []
    failed: list[str] = []
    remote: list[str] = []
    page.on("console", lambda m: console.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("requestfailed", lambda request: failed.append(request.url[:200]))
    page.on("request", lambda r: remote.append(r.url) if r.url.startswith("http") else None)
    _open(page, path)
    seen = page.evaluate(FACTS)
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(100)
    narrow = page.evaluate(
        "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
    page.context.close()
    return {**seen, "narrow": narrow, "console": console, "failed": failed, "remote": remote}


def _search(browser: Browser, html: Path) -> dict[str, Any]:
    """Type a word of the book into the search page; return the pages that it lists."""
    page = _page(browser)
    _open(page, html / "search.html", "?q=Bellman")
    page.wait_for_selector("#search-results li a", timeout=15000)
    page.wait_for_timeout(300)
    script = "[...document.querySelectorAll('#search-results li a')].map(a => a.textContent)"
    found = page.evaluate(script)
    page.context.close()
    return {"found": found}


def main() -> int:
    """Run one of the commands above."""
    match sys.argv[1:]:
        case []:
            if find_browser() is None:
                print(HELP)
                return 1
        case ["look", html]:
            print(json.dumps(look(Path(html).resolve())))
        case ["shoot", html, out, *pages]:
            shoot(Path(html).resolve(), Path(out), pages)
        case _:
            print(__doc__)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
