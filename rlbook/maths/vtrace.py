"""V-trace: n-step targets for data of an older policy (IMPALA, Espeholt et al., arXiv:1802.01561).

The actors acted by the behaviour policy μ, the learner wants values and gradients of the target
policy π. V-trace weighs each step by the clipped ratio of the two. Two clips, two jobs (section
4.1): ρ̄ decides *what* is learnt (the fixed point is the value of a policy between μ and π), c̄
only *how fast*.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlbook.maths.checks import check_number, check_time_major
from rlbook.maths.returns import next_row, scan_backwards


class VTrace(NamedTuple):
    """What V-trace gives to the learner; no gradient flows through either."""

    vs: Tensor
    """`[T, ...]`, v_t: the target of the value function; `values[t]` on invalid rows."""

    pg_advantages: Tensor
    """`[T, ...]`, ρ_t (r_t + γ_t v_{t+1} - V(x_t)): weight of ∇ log π; 0 on invalid rows."""


@torch.no_grad()
def vtrace(
    *,
    log_rhos: Tensor,
    discounts: Tensor,
    rewards: Tensor,
    values: Tensor,
    bootstrap_value: Tensor,
    valid: Tensor | None = None,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    pg_rho_bar: float = 1.0,
    lambda_: float = 1.0,
) -> VTrace:
    """V-trace targets and policy-gradient advantages (arXiv:1802.01561, eq. 1 and section 4.2).

        v_s = V(x_s) + Σ_{t≥s} (Π_{i=s}^{t-1} γ_i c_i) δ_t,
        δ_t = ρ_t (r_t + γ_t V(x_{t+1}) - V(x_t)),  ρ_t = min(ρ̄, π/μ),  c_i = λ min(c̄, π/μ),

    computed backwards (Remark 1) as v_t - V(x_t) = δ_t + γ_t c_t (v_{t+1} - V(x_{t+1})).

    The advantage bootstraps from v_{t+1}, as the paper has it, and not from V(x_{t+1}); the last
    row from `bootstrap_value`. Row t is the step x_t -> x_{t+1}; `rlbook.maths.returns` says what
    `valid` is for: the row before an invalid one bootstraps from `values` of the final observation,
    and nothing of the next episode enters. On-policy (π = μ) with λ = 1 and ρ̄, c̄ >= 1, v_t is the
    n-step return.

    Args:
        log_rhos: `[T, ...]`, log π(a_t|x_t) - log μ(a_t|x_t).
        discounts: `[T, ...]`, γ_t: gamma, or 0 at a termination.
        rewards: `[T, ...]`, r_t.
        values: `[T, ...]`, V(x_t) of the learner.
        bootstrap_value: `[...]`, V(x_T).
        valid: bool `[T, ...]`, False on pseudo-steps; None means that every row counts.
        rho_bar: ρ̄ > 0, clip of the ratio in δ; `math.inf` for none. The theory wants ρ̄ >= c̄.
        c_bar: c̄ >= 0, clip of the ratio in the trace; `math.inf` for none.
        pg_rho_bar: clip > 0 of the ratio in the advantage; `math.inf` for none.
        lambda_: λ in [0, 1] (Remark 2).

    Returns:
        `VTrace(vs, pg_advantages)`, both `[T, ...]`.

    Raises:
        ValueError: shapes or dtypes differ, or a clip or λ is out of its range.
    """
    check_time_major(
        log_rhos=log_rhos,
        discounts=discounts,
        rewards=rewards,
        values=values,
        bootstrap_value=bootstrap_value,
        valid=valid,
    )
    check_number("rho_bar", rho_bar, least=0.0, open_left=True)
    check_number("c_bar", c_bar, least=0.0)
    check_number("pg_rho_bar", pg_rho_bar, least=0.0, open_left=True)
    check_number("lambda_", lambda_, least=0.0, most=1.0)

    ratios = log_rhos.exp()
    td_errors = torch.addcmul(rewards, discounts, next_row(values, bootstrap_value)).sub_(values)
    deltas = td_errors.mul_(ratios.clamp(max=rho_bar))
    decays = ratios.clamp(max=c_bar).mul_(discounts).mul_(lambda_)
    if valid is not None:
        # In the recursion, not only in the loss: otherwise the next episode leaks into this one.
        deltas, decays = torch.where(valid, deltas, 0.0), torch.where(valid, decays, 0.0)
    vs = scan_backwards(inputs=deltas, decays=decays, last=torch.zeros_like(bootstrap_value))
    vs.add_(values)

    q_estimates = torch.addcmul(rewards, discounts, next_row(vs, bootstrap_value))
    pg_advantages = q_estimates.sub_(values).mul_(ratios.clamp_(max=pg_rho_bar))
    if valid is not None:
        pg_advantages = torch.where(valid, pg_advantages, 0.0)
    return VTrace(vs, pg_advantages)
