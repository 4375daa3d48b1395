"""Mend what the theme writes into built pages and no setting turns off.

Thebe (code run in the page by a remote server) is off, yet its address stays in every page, twice,
which the browser reports as an error; MathJax is loaded a second time by another extension.
"""

from __future__ import annotations

import re
from pathlib import Path

THEBE = re.compile(
    r"\s*<script>const THEBE_JS_URL[^<]*</script>"
    r'|\s*<script[^>]*src="[^"]*sphinx-thebe[^<]*</script>'
    r'|\s*<script type="text/x-thebe-config">.*?</script>|\s*<script>kernelName = [^<]*</script>'
    r'|\s*<link[^>]*href="[^"]*sphinx-thebe[^>]*>',
    re.DOTALL,
)
MATHJAX = re.compile(r'\s*<script[^>]*src="[^"]*tex-svg-full\.js[^"]*"></script>')


def tidy(html: Path) -> None:
    """Mend every page below `html` in place."""
    for page in html.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        better = tidy_page(text)
        if better != text:
            page.write_text(better, encoding="utf-8")


def tidy_page(text: str) -> str:
    """Take Thebe's scripts out of a page, and all loads of MathJax but the first."""
    text = THEBE.sub("", text)
    first = MATHJAX.search(text)
    if first is None:
        return text
    return text[: first.end()] + MATHJAX.sub("", text[first.end() :])
