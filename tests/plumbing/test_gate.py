"""The gate: what it refuses, and that it can neither wait for ever nor freeze."""

import math

import numpy as np
import pytest

from rlbook.plumbing.gate import Gate


def test_staleness_is_judged_by_a_threshold():
    gate = Gate(max_staleness=2)
    assert [gate.judge(age, 1.0) for age in (0, 2, 3, 100)] == ["", "", "stale", "stale"]


def test_without_rules_everything_finite_is_taken():
    gate = Gate()
    assert all(gate.judge(10**6, 10.0**k) == "" for k in range(30))
    assert gate.judge(0, math.nan) == gate.judge(0, math.inf) == "not finite"


def test_magnitudes_are_judged_after_the_warm_up_only():
    gate = Gate(max_sigmas=3.0, warm_up=5)
    assert [gate.judge(0, x) for x in (1.0, 100.0, 1.0, 1.0, 1.0)] == [""] * 5
    assert gate.judge(0, 10_000.0) == "outlier"


def test_a_single_outlier_is_refused_and_moves_the_limit_little():
    rng = np.random.default_rng(0)
    gate = Gate(max_sigmas=4.0)
    assert {gate.judge(0, x) for x in rng.normal(1.0, 0.1, 200)} == {""}
    before = gate.limit
    assert gate.judge(0, 1e9) == "outlier"
    assert gate.limit < 1.2 * before
    assert gate.judge(0, 1e9) == "outlier"


@pytest.mark.parametrize("level", [3.0, 100.0, 1e6])
def test_a_lasting_change_is_accepted_in_the_end(level):
    """Statistics without the refused would stay at 1 and refuse for ever."""
    gate = Gate(max_sigmas=3.0)
    for _ in range(100):
        gate.judge(0, 1.0)
    verdicts = [gate.judge(0, level) for _ in range(300)]
    assert verdicts[0] == "outlier" and verdicts[-1] == ""


def test_statistics_are_those_of_the_plain_formula_at_first():
    gate, values = Gate(max_sigmas=100.0, decay=0.999), [1.0, 2.0, 4.0, 8.0]
    for value in values:
        gate.judge(0, value)
    assert np.isclose(gate.mean, np.mean(values)) and np.isclose(gate.variance, np.var(values))


def test_stale_gradients_leave_the_statistics_alone():
    gate = Gate(max_staleness=0, max_sigmas=3.0)
    gate.judge(0, 1.0)
    gate.judge(5, 1000.0)
    assert (gate.seen, gate.mean) == (1, 1.0)


def test_its_state_goes_on():
    one, other = Gate(max_sigmas=3.0), Gate(max_sigmas=3.0)
    values = np.random.default_rng(1).lognormal(0, 1, 200)
    for value in values[:100]:
        one.judge(0, value)
    other.load_state_dict(one.state_dict())
    assert [one.judge(0, x) for x in values[100:]] == [other.judge(0, x) for x in values[100:]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_staleness": -1}, "max_staleness"),
        ({"max_sigmas": 0.0}, "max_sigmas"),
        ({"decay": 1.0}, "decay"),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Gate(**settings)
