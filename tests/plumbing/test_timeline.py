"""Notes of what actors do: they are in order, bounded, and change nothing."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import pytest

from rlbook.plumbing import timeline as module
from rlbook.plumbing.timeline import timed

T = TypeVar("T")


class Base(Generic[T]):
    """Documented."""

    limit = 3

    def __init__(self, start: int) -> None:
        self.count = start

    def add(self, amount: int = 1) -> int:
        """Adds."""
        self.count += amount
        return self.count

    def twice(self) -> int:
        self.add()
        return self.add()

    def fail(self) -> None:
        raise KeyError("on purpose")

    def _hidden(self) -> int:
        return self.count

    @property
    def double(self) -> int:
        return 2 * self.count

    @staticmethod
    def still() -> str:
        return "static"

    def each(self) -> Iterator[int]:
        yield self.count


def test_noting_changes_nothing() -> None:
    noted = timed(Base)
    assert issubclass(noted, Base) and noted.__name__ == "Base" and noted.__doc__ == "Documented."
    one = noted(5)
    assert [one.add(), one.add(amount=2), one.twice()] == [6, 8, 10]
    assert (one.double, one.still(), one._hidden(), list(one.each())) == (20, "static", 10, [10])
    with pytest.raises(KeyError, match="on purpose"):
        one.fail()
    spans = one.rlbook_spans()
    # twice calls add, which is part of it.
    assert [what for what, *_ in spans] == ["__init__", "add", "add", "twice", "fail"]
    times = np.array([span[1:] for span in spans]).ravel()
    assert (np.diff(times) >= 0).all()
    assert one.rlbook_spans() == []
    assert noted.add.__doc__ == "Adds."


def test_an_actor_remembers_its_newest_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 10)
    one = timed(Base)(0)
    for _ in range(1000):
        one.add()
    assert 10 <= len(one.rlbook_spans()) <= 20


def test_frozen_classes_can_be_noted() -> None:
    @dataclass(frozen=True)
    class Frozen:
        number: int

        def get(self) -> int:
            return self.number

    one = timed(Frozen)(3)
    assert one.get() == 3
    assert [what for what, *_ in one.rlbook_spans()] == ["__init__", "get"]
