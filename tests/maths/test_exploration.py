"""Schedules and the ladder of Ape-X."""

import numpy as np
import pytest

from rlbook.maths.exploration import epsilon_ladder, exponential_schedule, linear_schedule


def test_linear_schedule() -> None:
    found = [linear_schedule(step, start=1.0, end=0.2, steps=4) for step in (0, 1, 2, 4, 99)]
    assert found == pytest.approx([1.0, 0.8, 0.6, 0.2, 0.2])


def test_exponential_schedule() -> None:
    found = [exponential_schedule(step, start=1.0, end=0.01, steps=4) for step in (0, 2, 4, 99)]
    assert found == pytest.approx([1.0, 0.1, 0.01, 0.01])


def test_epsilon_ladder_has_the_papers_ends() -> None:
    ladder = epsilon_ladder(8)
    assert ladder.dtype == np.float64 and ladder.shape == (8,)
    assert ladder[0] == pytest.approx(0.4) and ladder[-1] == pytest.approx(6.5536e-4)
    assert ladder[-1] == pytest.approx(0.4 ** (1 + 7))
    assert ladder[3] == pytest.approx(0.4 ** (1 + 7 * 3 / 7))
    assert (np.diff(ladder) < 0).all()
    assert epsilon_ladder(1).tolist() == [0.4]
    assert epsilon_ladder(2, base=0.5, alpha=1.0) == pytest.approx([0.5, 0.25])


def test_refusals() -> None:
    for match, call in (
        ("num_actors", lambda: epsilon_ladder(0)),
        ("base", lambda: epsilon_ladder(2, base=1.5)),
        ("alpha", lambda: epsilon_ladder(2, alpha=-1.0)),
        ("step", lambda: linear_schedule(-1, start=1.0, end=0.0, steps=5)),
        ("steps", lambda: linear_schedule(1, start=1.0, end=0.0, steps=0)),
        ("positive", lambda: exponential_schedule(1, start=1.0, end=0.0, steps=5)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
