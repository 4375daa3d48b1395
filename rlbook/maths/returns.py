"""Returns and advantages over a piece of experience, computed backwards in time.

Row t of every argument is the step x_t -> x_{t+1}: `rewards[t]` is what that step paid and
`discounts[t]` is gamma, or 0 where the step ended in a *termination*. `values[t]` is V(x_t), and
`bootstrap_value` is V(x_T), the value of the state after the last row.

Time limits need no special case. An episode that is cut off leaves its final observation as a
row of its own (Gymnasium's NEXT_STEP autoreset); the step from there to the reset is no step of the
problem, and `valid` is False on it. On such a row the return is `values[t]` and the advantage 0, so
the row before it bootstraps from the value of the *final observation*, and nothing of the next
episode is seen. After a termination `discounts[t - 1]` is 0, and that value counts for nothing.

All functions are keyword-only, keep float32 or float64 as it comes in, and return targets: no
gradient flows through them. `[T, ...]` may have any number of axes after time. Sources: Sutton and
Barto, Reinforcement Learning (2018), ch. 7 and 12; Schulman et al., arXiv:1506.02438.
"""

import torch
from torch import Tensor

from rlbook.maths.checks import check_number, check_time_major


@torch.no_grad()
def discounted_returns(
    *,
    rewards: Tensor,
    discounts: Tensor,
    bootstrap_value: Tensor,
    values: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Discounted return G_t = r_t + γ_t G_{t+1}, with G_T = V(x_T) (Sutton and Barto, eq. 3.9).

    Args:
        rewards: `[T, ...]`, r_t.
        discounts: `[T, ...]`, γ_t: gamma, or 0 at a termination.
        bootstrap_value: `[...]`, V(x_T); zeros for a Monte Carlo return that ends here.
        values: `[T, ...]`, V(x_t); needed only when some row is invalid, and used only there.
        valid: bool `[T, ...]`, False on pseudo-steps; None means that every row counts.

    Returns:
        `[T, ...]`; on an invalid row `values[t]`.

    Raises:
        ValueError: shapes or dtypes differ, or rows are invalid and `values` is None.
    """
    check_time_major(
        rewards=rewards, discounts=discounts, bootstrap_value=bootstrap_value, valid=valid
    )
    if values is not None:
        check_time_major(rewards=rewards, values=values, bootstrap_value=bootstrap_value)
    if valid is not None and values is None:
        if not bool(valid.all()):
            raise ValueError(
                "values must be given where some rows are invalid: the return before an invalid "
                "row bootstraps from the value of the final observation"
            )
        valid = None
    if valid is not None:
        assert values is not None
        rewards, discounts = torch.where(valid, rewards, values), _stop_at_invalid(discounts, valid)
    return scan_backwards(inputs=rewards, decays=discounts, last=bootstrap_value)


@torch.no_grad()
def n_step_returns(
    *,
    rewards: Tensor,
    discounts: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    n: int,
    valid: Tensor | None = None,
) -> Tensor:
    """n-step return G_t = r_t + γ_t r_{t+1} + … + (γ_t ⋯ γ_{t+n-1}) V(x_{t+n}) (ibid., eq. 7.1).

    Where fewer than n rows are left, or an episode is cut off sooner, it bootstraps there, with the
    discount of the steps really taken. One pass of G^(k)_t = r_t + γ_t G^(k-1)_{t+1} with G^(0) = V
    makes every return one step longer, so n passes over whole tensors do.

    Args:
        rewards: `[T, ...]`, r_t.
        discounts: `[T, ...]`, γ_t: gamma, or 0 at a termination.
        values: `[T, ...]`, V(x_t).
        bootstrap_value: `[...]`, V(x_T).
        n: steps, at least 1; n >= T gives `discounted_returns`.
        valid: bool `[T, ...]`, False on pseudo-steps; None means that every row counts.

    Returns:
        `[T, ...]`; on an invalid row `values[t]`.

    Raises:
        ValueError: shapes or dtypes differ, or n < 1.
    """
    check_time_major(
        rewards=rewards,
        discounts=discounts,
        values=values,
        bootstrap_value=bootstrap_value,
        valid=valid,
    )
    check_number("n", n, least=1)
    if valid is not None:
        rewards, discounts = torch.where(valid, rewards, values), _stop_at_invalid(discounts, valid)
    if n >= rewards.shape[0]:
        return scan_backwards(inputs=rewards, decays=discounts, last=bootstrap_value)
    returns = values
    for _ in range(n):
        returns = torch.addcmul(rewards, discounts, next_row(returns, bootstrap_value))
    return returns


@torch.no_grad()
def lambda_returns(
    *,
    rewards: Tensor,
    discounts: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    lambda_: float,
    valid: Tensor | None = None,
) -> Tensor:
    """λ-return G_t = r_t + γ_t [(1-λ) V(x_{t+1}) + λ G_{t+1}], with G_T = V(x_T).

    Sutton and Barto, eq. 12.2 and 12.3, written as a recursion. λ = 0 is the TD(0) target, λ = 1
    the discounted return.

    Args:
        rewards: `[T, ...]`, r_t.
        discounts: `[T, ...]`, γ_t: gamma, or 0 at a termination.
        values: `[T, ...]`, V(x_t).
        bootstrap_value: `[...]`, V(x_T).
        lambda_: λ in [0, 1].
        valid: bool `[T, ...]`, False on pseudo-steps; None means that every row counts.

    Returns:
        `[T, ...]`; on an invalid row `values[t]`.

    Raises:
        ValueError: shapes or dtypes differ, or λ lies outside [0, 1].
    """
    advantages = gae(
        rewards=rewards,
        discounts=discounts,
        values=values,
        bootstrap_value=bootstrap_value,
        lambda_=lambda_,
        valid=valid,
    )
    return advantages.add_(values)


@torch.no_grad()
def gae(
    *,
    rewards: Tensor,
    discounts: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    lambda_: float,
    valid: Tensor | None = None,
) -> Tensor:
    """Generalised advantage estimate A_t = δ_t + γ_t λ A_{t+1} (arXiv:1506.02438, eq. 16).

    δ_t = r_t + γ_t V(x_{t+1}) - V(x_t) is the TD error. The λ-return is A_t + V(x_t),
    which is the value target that PPO uses.

    Args:
        rewards: `[T, ...]`, r_t.
        discounts: `[T, ...]`, γ_t: gamma, or 0 at a termination.
        values: `[T, ...]`, V(x_t).
        bootstrap_value: `[...]`, V(x_T).
        lambda_: λ in [0, 1]; 0 is least variance, 1 least bias.
        valid: bool `[T, ...]`, False on pseudo-steps; None means that every row counts.

    Returns:
        Advantages `[T, ...]`; 0 on an invalid row.

    Raises:
        ValueError: shapes or dtypes differ, or λ lies outside [0, 1].
    """
    check_time_major(
        rewards=rewards,
        discounts=discounts,
        values=values,
        bootstrap_value=bootstrap_value,
        valid=valid,
    )
    check_number("lambda_", lambda_, least=0.0, most=1.0)
    deltas = torch.addcmul(rewards, discounts, next_row(values, bootstrap_value)).sub_(values)
    decays = discounts * lambda_
    if valid is not None:
        # In the recursion, not only in the loss: otherwise the next episode leaks into this one.
        deltas, decays = _stop_at_invalid(deltas, valid), _stop_at_invalid(decays, valid)
    return scan_backwards(inputs=deltas, decays=decays, last=torch.zeros_like(bootstrap_value))


def next_row(rows: Tensor, last: Tensor) -> Tensor:
    """Row t + 1 in place of row t: `[T, ...]` from `rows` `[T, ...]` and `last` `[...]`."""
    return torch.cat((rows[1:], last.unsqueeze(0)))


@torch.no_grad()
def scan_backwards(*, inputs: Tensor, decays: Tensor, last: Tensor) -> Tensor:
    """y_t = inputs_t + decays_t y_{t+1} with y_T = `last`: the one recursion under every return.

    Args:
        inputs: `[T, ...]`.
        decays: `[T, ...]`; 0 on a row keeps everything later out of it.
        last: `[...]`, y_T.

    Returns:
        `[T, ...]`, a new tensor.
    """
    outputs = inputs.clone()
    following = last
    for row, decay in zip(reversed(outputs.unbind()), reversed(decays.unbind()), strict=True):
        following = row.addcmul_(decay, following)
    return outputs


def _stop_at_invalid(rows: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, rows, 0.0)
