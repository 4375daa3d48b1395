"""Prioritised sampling: probabilities, weights, and the priority of a sequence."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from rlbook.maths.priorities import importance_weights, sampling_probabilities, sequence_priority


@pytest.mark.parametrize("make", [np.array, lambda x: torch.tensor(x, dtype=torch.float64)])
def test_probabilities_and_weights_on_both_kinds_of_arrays(make) -> None:
    found = sampling_probabilities(make([1.0, 4.0, 0.0]), exponent=0.5)
    assert found.tolist() == pytest.approx([1 / (1 + 2), 2 / (1 + 2), 0.0])
    weights = importance_weights(make([0.1, 0.4]), size=5, exponent=0.5)
    assert weights.tolist() == pytest.approx([1.0, (5 * 0.4) ** -0.5 / (5 * 0.1) ** -0.5])
    plain = importance_weights(make([0.1, 0.4]), size=5, exponent=0.5, normalize=False)
    assert plain.tolist() == pytest.approx([(5 * 0.1) ** -0.5, (5 * 0.4) ** -0.5])
    assert type(found) is type(weights) is type(make([1.0]))


def test_corner_cases_of_the_exponent() -> None:
    p = np.array([3.0, 0.0, 1.0])
    assert sampling_probabilities(p, exponent=0.0).tolist() == [0.5, 0.0, 0.5]
    assert sampling_probabilities(np.zeros(4), exponent=0.7).tolist() == [0.25] * 4
    assert sampling_probabilities(np.zeros(4), exponent=0.0).tolist() == [0.25] * 4
    huge = sampling_probabilities(np.array([1e300, 1e300]), exponent=2.0)
    assert huge.tolist() == [0.5, 0.5]
    assert importance_weights(np.array([0.2, 0.8]), size=2, exponent=0.0).tolist() == [1.0, 1.0]


def test_weights_with_full_correction_make_the_mean_unbiased() -> None:
    x = np.array([1.0, 5.0, -2.0])
    p = sampling_probabilities(np.array([0.5, 3.0, 1.0]), exponent=1.0)
    weights = importance_weights(p, size=3, exponent=1.0, normalize=False)
    assert (p * weights * x).sum() == pytest.approx(x.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_in_is_dtype_out(dtype: torch.dtype) -> None:
    p = torch.tensor([1.0, 2.0], dtype=dtype)
    assert sampling_probabilities(p, exponent=0.6).dtype == dtype
    assert importance_weights(p, size=2, exponent=0.4).dtype == dtype
    assert sequence_priority(p[:, None]).dtype == dtype


def test_sequence_priority_is_r2d2s_mix() -> None:
    errors = torch.tensor([[1.0, -2.0], [-3.0, 0.0], [2.0, 5.0]], requires_grad=True)
    found = sequence_priority(errors, mix=0.9)
    expected = [0.9 * 3 + 0.1 * (1 + 3 + 2) / 3, 0.9 * 5 + 0.1 * (2 + 0 + 5) / 3]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert not found.requires_grad
    valid = torch.tensor([[True, False], [True, False], [False, False]])
    found = sequence_priority(errors, mix=0.9, valid=valid)
    torch.testing.assert_close(found, torch.tensor([0.9 * 3 + 0.1 * (1 + 3) / 2, 0.0]))


def test_refusals() -> None:
    ones = np.ones(2)
    for bad in (np.array([1.0, math.nan]), np.array([-1.0]), np.array([math.inf]), np.ones((1, 1))):
        with pytest.raises(ValueError, match="priorities must be"):
            sampling_probabilities(bad, exponent=0.5)
    for match, call in (
        ("N >= 1", lambda: sampling_probabilities(np.zeros(0), exponent=0.5)),
        ("exponent", lambda: sampling_probabilities(ones, exponent=-0.5)),
        ("exponent", lambda: importance_weights(ones, size=2, exponent=math.nan)),
        ("positive", lambda: importance_weights(np.zeros(2), size=2, exponent=0.5)),
        ("size", lambda: importance_weights(ones, size=0, exponent=0.5)),
        ("mix", lambda: sequence_priority(torch.ones(2, 2), mix=2.0)),
        ("T >= 1", lambda: sequence_priority(torch.ones(0, 2))),
        ("valid", lambda: sequence_priority(torch.ones(2, 2), valid=torch.ones(2, 2))),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_replay_needs_no_torch() -> None:
    code = "import sys, rlbook.parts.replay; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
