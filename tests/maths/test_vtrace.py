"""V-trace against the paper's sum, on the time axis, and on-policy against n-step returns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlbook.maths import returns
from rlbook.maths.vtrace import VTrace, vtrace
from tests import oracles
from tests.maths.test_returns import experience, one_cut


def off_policy(seed: int, length: int, batch: int, dtype=torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed + 1)
    log_rhos = torch.randn(length, batch, generator=g, dtype=dtype)
    return {**experience(seed, length, batch, dtype), "log_rhos": log_rhos}


def oracle(x: dict[str, Tensor], **numbers: float) -> tuple[Tensor, Tensor]:
    rows = {name: tensor for name, tensor in x.items() if name != "bootstrap_value"}
    tail = {"bootstrap_value": x["bootstrap_value"]}
    return oracles.columns(oracles.vtrace, rows, tail=tail, **numbers)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, 10),
    rho_bar=st.sampled_from([0.5, 1.0, 3.0, math.inf]),
    c_bar=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    pg_rho_bar=st.sampled_from([0.8, 1.0, math.inf]),
    lambda_=st.sampled_from([0.0, 0.9, 1.0]),
)
def test_vtrace_is_the_papers_sum(seed: int, length: int, **numbers: float) -> None:
    x = off_policy(seed, length, 3)
    vs, pg_advantages = oracle(x, **numbers)
    found = vtrace(**x, **numbers)
    torch.testing.assert_close(found.vs, vs)
    torch.testing.assert_close(found.pg_advantages, pg_advantages)


@pytest.mark.parametrize("lambda_", [0.5, 1.0])
def test_on_policy_it_is_the_lambda_return(lambda_: float) -> None:
    x = experience(3, 9, 4)
    found = vtrace(**x, log_rhos=torch.zeros_like(x["rewards"]), lambda_=lambda_)
    torch.testing.assert_close(found.vs, returns.lambda_returns(**x, lambda_=lambda_))
    if lambda_ == 1.0:  # the n-step return of IMPALA's section 4.1, with n as far as the data goes
        torch.testing.assert_close(found.vs, returns.n_step_returns(**x, n=9))
        torch.testing.assert_close(found.pg_advantages, found.vs - x["values"])


def test_truncation_and_termination_on_the_time_axis() -> None:
    for end, final in ((0.5, 30.0), (0.0, 0.0)):
        rhos = torch.tensor([0.5, 0.25, 100.0, 2.0])
        found = vtrace(**one_cut(end), log_rhos=rhos.log())
        v_3 = 40 + 1.0 * (4 + 0.5 * 50 - 40)
        v_1 = 20 + 0.25 * (2 + 0.5 * final - 20)
        v_0 = 10 + 0.5 * (1 + 0.5 * 20 - 10) + 0.5 * 0.5 * (v_1 - 20)
        torch.testing.assert_close(found.vs, torch.tensor([v_0, v_1, 30.0, v_3]))
        a_0 = 0.5 * (1 + 0.5 * v_1 - 10)
        a_1 = 0.25 * (2 + 0.5 * final - 20)
        torch.testing.assert_close(
            found.pg_advantages, torch.tensor([a_0, a_1, 0.0, 4 + 0.5 * 50 - 40])
        )


def test_nothing_of_the_next_episode_leaks_back() -> None:
    x = {**one_cut(0.5), "log_rhos": torch.tensor([0.1, -0.2, 0.0, 0.3])}
    changed = {name: tensor.clone() for name, tensor in x.items()}
    changed["rewards"][2:] = torch.tensor([math.nan, -7.0])
    changed["log_rhos"][2:] = torch.tensor([math.nan, -7.0])
    changed["values"][3:] = -9.0
    changed["bootstrap_value"] -= 3.0
    for before, after in zip(vtrace(**x), vtrace(**changed), strict=True):
        assert before[:3].tolist() == after[:3].tolist()
        assert before[3] != after[3]


def wrong_masks_the_loss_only(x: dict[str, Tensor]) -> VTrace:
    found = vtrace(**{name: tensor for name, tensor in x.items() if name != "valid"})
    return VTrace(
        torch.where(x["valid"], found.vs, x["values"]),
        torch.where(x["valid"], found.pg_advantages, 0.0),
    )


def wrong_cuts_as_termination(x: dict[str, Tensor]) -> VTrace:
    ends = torch.cat((~x["valid"][1:], torch.zeros_like(x["valid"][:1])))
    return vtrace(**{**x, "discounts": torch.where(ends, 0.0, x["discounts"])})


def wrong_advantage_from_the_value(x: dict[str, Tensor]) -> VTrace:
    next_values = torch.cat((x["values"][1:], x["bootstrap_value"][None]))
    rhos = x["log_rhos"].exp().clamp(max=1.0)
    advantages = rhos * (x["rewards"] + x["discounts"] * next_values - x["values"])
    return VTrace(vtrace(**x).vs, torch.where(x["valid"], advantages, 0.0))


def wrong_by_one_step(x: dict[str, Tensor]) -> VTrace:
    return vtrace(**{**x, "log_rhos": x["log_rhos"].roll(1, 0)})


@pytest.mark.parametrize(
    "wrong",
    [
        wrong_masks_the_loss_only,
        wrong_cuts_as_termination,
        wrong_advantage_from_the_value,
        wrong_by_one_step,
    ],
)
def test_known_mistakes_differ_from_the_oracle(wrong) -> None:
    x = off_policy(5, 12, 6)
    x["valid"][4, 0], x["discounts"][3, 0] = False, 0.9
    expected, found = oracle(x), wrong(x)
    assert not all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.allclose(a, b) for a, b in zip(vtrace(**x), expected, strict=True))


def test_rho_bar_moves_the_fixed_point_and_c_bar_does_not() -> None:
    """One state, two actions, exact expectations: iterate E_μ[v] until it stands still."""
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64)
    mu = torch.tensor([0.5, 0.5], dtype=torch.float64)
    pi = torch.tensor([0.9, 0.1], dtype=torch.float64)
    gamma = 0.5

    def fixed_point(rho_bar: float, c_bar: float) -> float:
        value = 0.0
        for _ in range(200):
            # All four sequences of two actions are columns, weighed by their probability under μ.
            first, second = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
            actions = torch.stack((first, second))
            found = vtrace(
                log_rhos=(pi / mu).log()[actions],
                discounts=torch.full((2, 4), gamma, dtype=torch.float64),
                rewards=rewards[actions],
                values=torch.full((2, 4), value, dtype=torch.float64),
                bootstrap_value=torch.full((4,), value, dtype=torch.float64),
                rho_bar=rho_bar,
                c_bar=c_bar,
            )
            value = float((mu[first] * mu[second] * found.vs[0]).sum())
        return value

    between = torch.minimum(1.0 * mu, pi)
    between = between / between.sum()  # π_ρ̄ of the paper, eq. 3
    on_clip = float((between * rewards).sum()) / (1 - gamma)
    on_target = float((pi * rewards).sum()) / (1 - gamma)
    assert fixed_point(1.0, 1.0) == pytest.approx(on_clip)
    assert fixed_point(1.0, 0.5) == pytest.approx(on_clip)
    assert fixed_point(100.0, 1.0) == pytest.approx(on_target)
    assert on_clip != pytest.approx(on_target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_gradient_and_inputs(dtype: torch.dtype) -> None:
    x = off_policy(0, 5, 2, dtype)
    x["values"].requires_grad_()
    x["log_rhos"].requires_grad_()
    before = {name: tensor.detach().clone() for name, tensor in x.items()}
    for found in vtrace(**x):
        assert found.dtype == dtype and found.shape == (5, 2) and not found.requires_grad
    assert all(torch.equal(before[name], x[name]) for name in x)


@pytest.mark.parametrize("name", ["rho_bar", "pg_rho_bar", "c_bar", "lambda_"])
def test_numbers_out_of_range_are_refused(name: str) -> None:
    for value in (-0.1, math.nan):
        with pytest.raises(ValueError, match=name):
            vtrace(**off_policy(0, 3, 2), **{name: value})


def test_huge_ratios_are_clipped_and_not_nan() -> None:
    x = off_policy(0, 3, 2, torch.float32)
    found = vtrace(**{**x, "log_rhos": torch.full((3, 2), 200.0)})
    clipped = vtrace(**{**x, "log_rhos": torch.zeros(3, 2)})
    torch.testing.assert_close(found, clipped)
