"""Returns and advantages against the papers' sums, identities and planted mistakes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlbook.maths import returns
from tests import oracles

GAMMA = 0.9


def experience(seed: int, length: int, batch: int, dtype=torch.float64) -> dict[str, Tensor]:
    """Random rows; terminations and time limits are each followed by a pseudo-step."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(length, batch, generator=g, dtype=dtype)
    values = torch.randn(length, batch, generator=g, dtype=dtype)
    bootstrap_value = torch.randn(batch, generator=g, dtype=dtype)
    discounts = torch.full((length, batch), GAMMA, dtype=dtype)
    valid = torch.ones(length, batch, dtype=torch.bool)
    for b in range(batch):
        for t in range(length):
            fate = torch.rand((), generator=g).item()
            if t and not valid[t - 1, b]:
                continue
            if (
                fate < 0.15 and t + 1 < length
            ):  # row t reaches a final observation, row t + 1 resets
                discounts[t, b] = 0.0 if fate < 0.08 else GAMMA
                valid[t + 1, b] = False
                rewards[t + 1, b] = 100.0  # must be seen nowhere
    return {
        "rewards": rewards,
        "discounts": discounts,
        "values": values,
        "bootstrap_value": bootstrap_value,
        "valid": valid,
    }


def oracle(function, x: dict[str, Tensor], **numbers: float) -> Tensor:
    rows = {name: tensor for name, tensor in x.items() if name != "bootstrap_value"}
    return oracles.columns(
        function, rows, tail={"bootstrap_value": x["bootstrap_value"]}, **numbers
    )


seeds = st.integers(0, 10_000)
lengths = st.integers(1, 12)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, length=lengths, lambda_=st.sampled_from([0.0, 0.3, 0.95, 1.0]))
def test_gae_and_lambda_returns_are_the_papers_sums(seed: int, length: int, lambda_: float) -> None:
    x = experience(seed, length, 3)
    expected = oracle(oracles.gae, x, lambda_=lambda_)
    torch.testing.assert_close(returns.gae(**x, lambda_=lambda_), expected)
    expected = oracle(oracles.lambda_return, x, lambda_=lambda_)
    torch.testing.assert_close(returns.lambda_returns(**x, lambda_=lambda_), expected)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, length=lengths, n=st.integers(1, 14))
def test_n_step_returns_are_the_papers_sum(seed: int, length: int, n: int) -> None:
    x = experience(seed, length, 3)
    expected = oracle(oracles.n_step_return, x, n=n)
    torch.testing.assert_close(returns.n_step_returns(**x, n=n), expected)


@settings(deadline=None, max_examples=30)
@given(seed=seeds, length=lengths)
def test_discounted_returns_are_the_full_sum(seed: int, length: int) -> None:
    x = experience(seed, length, 3)
    expected = oracle(oracles.n_step_return, x, n=float("inf"))
    torch.testing.assert_close(returns.discounted_returns(**x), expected)


def one_cut(discount_at_end: float) -> dict[str, Tensor]:
    """Rows: step, last step of an episode, pseudo-step, first step of the next episode."""
    return {
        "rewards": torch.tensor([1.0, 2.0, 100.0, 4.0]),
        "discounts": torch.tensor([0.5, discount_at_end, 0.5, 0.5]),
        "values": torch.tensor([10.0, 20.0, 30.0, 40.0]),  # 30 is the final observation's
        "bootstrap_value": torch.tensor(50.0),
        "valid": torch.tensor([True, True, False, True]),
    }


def test_truncation_and_termination_on_the_time_axis() -> None:
    for end, final in ((0.5, 30.0), (0.0, 0.0)):  # time limit: γ V(final); termination: nothing
        x = one_cut(end)
        last = 2 + 0.5 * final
        full = [1 + 0.5 * last, last, 30.0, 4 + 0.5 * 50]
        one = [1 + 0.5 * 20, last, 30.0, 4 + 0.5 * 50]
        assert returns.discounted_returns(**x).tolist() == full
        assert returns.n_step_returns(**x, n=3).tolist() == full
        assert returns.n_step_returns(**x, n=1).tolist() == one
        delta_0, delta_1 = one[0] - 10, last - 20
        advantages = [delta_0 + 0.5 * 0.8 * delta_1, delta_1, 0.0, 4 + 0.5 * 50 - 40]
        torch.testing.assert_close(returns.gae(**x, lambda_=0.8), torch.tensor(advantages))
        expected = torch.tensor(advantages) + x["values"]
        torch.testing.assert_close(returns.lambda_returns(**x, lambda_=0.8), expected)


def test_nothing_of_the_next_episode_or_of_the_pseudo_step_leaks_back() -> None:
    x = one_cut(0.5)
    changed = {name: tensor.clone() for name, tensor in x.items()}
    changed["rewards"][2:] = torch.tensor([float("nan"), -7.0])
    changed["discounts"][2] = float("nan")
    changed["values"][3:] = -9.0
    changed["bootstrap_value"] -= 3.0
    for function, more in (
        (returns.discounted_returns, {}),
        (returns.n_step_returns, {"n": 3}),
        (returns.lambda_returns, {"lambda_": 0.9}),
        (returns.gae, {"lambda_": 0.9}),
    ):
        before, after = function(**x, **more), function(**changed, **more)  # type: ignore[operator]
        assert before[:3].tolist() == after[:3].tolist()
        assert before[3] != after[3]


def test_masking_only_the_result_is_a_mistake_that_the_oracle_sees() -> None:
    x = one_cut(0.5)
    unmasked = {name: tensor for name, tensor in x.items() if name != "valid"}
    leaky = torch.where(x["valid"], returns.gae(**unmasked, lambda_=0.9), 0.0)
    x64 = {
        n: t.unsqueeze(-1) if t.dtype == torch.bool else t.double().unsqueeze(-1)
        for n, t in x.items()
    }
    expected = oracle(oracles.gae, x64, lambda_=0.9)[:, 0]
    assert not torch.allclose(leaky[:2].double(), expected[:2])
    as_termination = {**unmasked, "discounts": torch.where(x["valid"], x["discounts"], 0.0)}
    as_termination["discounts"][1] = 0.0  # the common `done = terminated or truncated`
    assert not torch.allclose(returns.gae(**as_termination, lambda_=0.9)[:2].double(), expected[:2])


@pytest.mark.parametrize("seed", range(3))
def test_identities(seed: int) -> None:
    x = experience(seed, 9, 4)
    full = returns.discounted_returns(**x)
    torch.testing.assert_close(returns.lambda_returns(**x, lambda_=1.0), full)
    torch.testing.assert_close(returns.n_step_returns(**x, n=9), full)
    torch.testing.assert_close(returns.n_step_returns(**x, n=10**6), full)
    td_0 = returns.n_step_returns(**x, n=1)
    torch.testing.assert_close(returns.lambda_returns(**x, lambda_=0.0), td_0)
    torch.testing.assert_close(returns.gae(**x, lambda_=1.0), full - x["values"])
    torch.testing.assert_close(returns.gae(**x, lambda_=0.0), td_0 - x["values"])
    assert not torch.allclose(full, td_0)


def test_a_monte_carlo_return_needs_no_values() -> None:
    found = returns.discounted_returns(
        rewards=torch.tensor([1.0, 2.0, 3.0]),
        discounts=torch.tensor([0.5, 0.5, 0.0]),
        bootstrap_value=torch.tensor(99.0),
        valid=torch.tensor([True, True, True]),
    )
    assert found.tolist() == [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_in_is_dtype_out_and_no_gradient_and_inputs_stay(dtype: torch.dtype) -> None:
    x = experience(0, 6, 2, dtype)
    x["values"].requires_grad_()
    before = {name: tensor.detach().clone() for name, tensor in x.items()}
    for found in (
        returns.discounted_returns(**x),
        returns.n_step_returns(**x, n=2),
        returns.n_step_returns(**x, n=9),
        returns.lambda_returns(**x, lambda_=0.9),
        returns.gae(**x, lambda_=0.9),
    ):
        assert found.dtype == dtype and found.shape == (6, 2) and not found.requires_grad
    assert all(torch.equal(before[name], x[name]) for name in x)


def test_any_number_of_axes_after_time() -> None:
    x = experience(1, 7, 6)
    deep = {name: tensor.reshape(*tensor.shape[:-1], 2, 3) for name, tensor in x.items()}
    torch.testing.assert_close(
        returns.gae(**deep, lambda_=0.9), returns.gae(**x, lambda_=0.9).reshape(7, 2, 3)
    )


def refused(match: str, **changes: object) -> None:
    x: dict[str, object] = {**experience(0, 4, 3), "lambda_": 0.9, **changes}
    with pytest.raises(ValueError, match=match):
        returns.gae(**x)  # type: ignore[arg-type]


def test_wrong_arguments_are_refused_by_name() -> None:
    refused("values has shape", values=torch.zeros(4, dtype=torch.float64))
    refused("values is torch.float32", values=torch.zeros(4, 3))
    refused("bootstrap_value has shape", bootstrap_value=torch.zeros((), dtype=torch.float64))
    refused("rewards must be float32 or float64", rewards=torch.zeros(4, 3, dtype=torch.int64))
    refused("rewards must be a torch.Tensor", rewards=[[1.0] * 3] * 4)
    refused("valid must be None or a bool", valid=torch.ones(4, 3))
    refused("valid is", valid=torch.ones(4, 1, dtype=torch.bool))
    refused("lambda_ must be", lambda_=1.1)
    refused("lambda_ must be", lambda_=float("nan"))
    x = experience(0, 4, 3)
    with pytest.raises(ValueError, match="n must be at least 1"):
        returns.n_step_returns(**x, n=0)
    empty = {name: tensor[:0] for name, tensor in x.items()}
    with pytest.raises(ValueError, match="T >= 1"):
        returns.gae(**{**empty, "bootstrap_value": x["bootstrap_value"]}, lambda_=0.9)
    x["valid"][1, 1] = False
    with pytest.raises(ValueError, match="values must be given"):
        returns.discounted_returns(**{k: v for k, v in x.items() if k != "values"})
