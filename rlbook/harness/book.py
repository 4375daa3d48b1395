"""What the chapters need: `show` puts the package's source on the page, `check` says what holds."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np


def source_of(thing: Any, *, docstring: bool = False) -> str:
    """The source of a function, class, method or module as it stands in the package.

    Args:
        thing: what to show.
        docstring: False leaves the outermost docstring out (the page says it in prose).
    """
    text = textwrap.dedent(inspect.getsource(thing))
    if docstring or inspect.ismodule(thing):
        return text.rstrip()
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
    if ast.get_docstring(node) is None or len(node.body) == 1:
        return text.rstrip()
    first, lines = node.body[0], text.splitlines()
    assert first.end_lineno is not None
    return "\n".join(lines[: first.lineno - 1] + lines[first.end_lineno :]).rstrip()


def show(*things: Any, docstring: bool = False) -> Any:
    """Shows the source of one or several things on the page, coloured."""
    from IPython.display import Markdown

    blocks = [source_of(thing, docstring=docstring) for thing in things]
    return Markdown("\n".join(f"```python\n{block}\n```" for block in blocks))


def diagram(module: Any) -> Any:
    """Shows a system's docstring: its drawing, what it is, how it differs from the paper."""
    from IPython.display import Markdown

    return Markdown(f"```text\n{inspect.getdoc(module)}\n```")


def check(claim: str, holds: Any, expected: Any = None, *, tolerance: float = 1e-6) -> None:
    """Prints that a claim holds; AssertionError if it does not.

    Args:
        claim: what holds, in words.
        holds: a truth value; or, with `expected`, numbers that must equal it.
        expected: numbers or arrays to compare with.
        tolerance: largest absolute difference allowed.
    """
    if expected is None:
        assert holds, f"does not hold: {claim}"
    else:
        np.testing.assert_allclose(
            np.asarray(holds), np.asarray(expected), atol=tolerance, rtol=0, err_msg=claim
        )
    print(f"✓ {claim}")


def refused(action: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """The message with which `action` is refused; AssertionError if it is not."""
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError("was not refused")
