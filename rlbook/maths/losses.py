"""Losses of policy-gradient and Q-learning agents, as means over the steps that count.

`valid` (bool, shape of the loss) leaves out pseudo-steps; every mean divides by the number of valid
rows. Targets, advantages and behaviour quantities carry no gradient, whatever is passed in.
Shapes: `[...]` may be `[T, B]` or a flat batch `[N]`; logits and Q-values carry the actions last.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlbook.maths.checks import check_actions, check_floats, check_number, check_valid

Metrics = dict[str, Tensor]


def masked_mean(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean of `x` `[...]` over the rows where `valid` is True, a scalar; 0 if there is none."""
    check_floats(x=x)
    check_valid(valid, like=x)
    if valid is None:
        return x.mean()
    return torch.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)


def log_prob(logits: Tensor, actions: Tensor) -> Tensor:
    """log π(a|x) `[...]` of `actions` `[...]` under the softmax of `logits` `[..., A]`."""
    check_floats(logits=logits)
    check_actions("actions", actions, values=logits, values_name="logits")
    return _pick(logits.log_softmax(-1), actions)


def entropy(logits: Tensor) -> Tensor:
    """-Σ_a π(a|x) log π(a|x), in nats, `[...]` from `logits` `[..., A]`, which must be finite."""
    check_floats(logits=logits)
    log_probs = logits.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


def policy_gradient_loss(
    *, logits: Tensor, actions: Tensor, advantages: Tensor, valid: Tensor | None = None
) -> Tensor:
    """-mean[A log π(a|x)]: its gradient is the policy gradient (Sutton and Barto, ch. 13).

    Args:
        logits: `[..., A]` of the policy that learns.
        actions: int `[...]`, the actions taken.
        advantages: `[...]`; no gradient flows through them.
        valid: bool `[...]` or None.
    """
    log_probs = log_prob(logits, actions)
    check_floats(log_probs=log_probs, advantages=advantages)
    return -masked_mean(log_probs * advantages.detach(), valid)


def entropy_loss(*, logits: Tensor, valid: Tensor | None = None) -> Tensor:
    """-mean[H(π)]: adding it with a small cost keeps a policy from becoming certain too soon."""
    return -masked_mean(entropy(logits), valid)


def value_loss(*, values: Tensor, targets: Tensor, valid: Tensor | None = None) -> Tensor:
    """½ mean[(V - target)²]; `values` and `targets` `[...]`, no gradient through the targets."""
    check_floats(values=values, targets=targets)
    return 0.5 * masked_mean((values - targets.detach()).square(), valid)


def clipped_surrogate_loss(
    *,
    log_probs: Tensor,
    behaviour_log_probs: Tensor,
    advantages: Tensor,
    clip: float,
    valid: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's -mean[min(ratio A, clip(ratio, 1-ε, 1+ε) A)] (arXiv:1707.06347, eq. 7).

    Args:
        log_probs: `[...]`, log π(a|x) of the policy that learns.
        behaviour_log_probs: `[...]`, log μ(a|x) of the policy that acted; no gradient.
        advantages: `[...]`; no gradient.
        clip: ε > 0.
        valid: bool `[...]` or None.

    Returns:
        The loss, and metrics without gradient: `clip_fraction`, the share of rows whose ratio lies
        outside [1-ε, 1+ε], and `approx_kl`, mean[(ratio - 1) - log ratio], which estimates
        KL(μ‖π) in nats and is never negative.

    Raises:
        ValueError: shapes or dtypes differ, or clip <= 0.
    """
    check_floats(
        log_probs=log_probs, behaviour_log_probs=behaviour_log_probs, advantages=advantages
    )
    check_number("clip", clip, least=0.0, open_left=True)
    advantages = advantages.detach()
    log_ratios = log_probs - behaviour_log_probs.detach()
    ratios = log_ratios.exp()
    surrogate = torch.minimum(ratios * advantages, ratios.clamp(1 - clip, 1 + clip) * advantages)
    with torch.no_grad():
        outside = ((ratios - 1).abs() > clip).to(ratios.dtype)
        metrics = {
            "clip_fraction": masked_mean(outside, valid),
            "approx_kl": masked_mean(ratios - 1 - log_ratios, valid),
        }
    return -masked_mean(surrogate, valid), metrics


def clipped_value_loss(
    *,
    values: Tensor,
    behaviour_values: Tensor,
    targets: Tensor,
    clip: float,
    valid: Tensor | None = None,
) -> Tensor:
    """½ mean[max((V - target)², (V_clip - target)²)], V_clip within ±ε of the value at acting time.

    Not in the paper's text but in OpenAI's baselines `ppo2`; whether it helps is doubtful
    (Andrychowicz et al., arXiv:2006.05990). All `[...]`; gradient through `values` only; clip > 0.
    """
    check_floats(values=values, behaviour_values=behaviour_values, targets=targets)
    check_number("clip", clip, least=0.0, open_left=True)
    targets, behaviour_values = targets.detach(), behaviour_values.detach()
    near = behaviour_values + (values - behaviour_values).clamp(-clip, clip)
    errors = torch.maximum((values - targets).square(), (near - targets).square())
    return 0.5 * masked_mean(errors, valid)


def q_td_errors(
    *, q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, q_t: Tensor
) -> Tensor:
    """δ = r_t + γ_t max_a q_t(a) - q_tm1(a_tm1) (Watkins 1989; DQN, Mnih et al. 2015).

    Args:
        q_tm1: `[B, A]`, online Q-values where the action was taken.
        a_tm1: int `[B]`, the action.
        r_t: `[B]`, the reward, or the discounted sum of n rewards.
        discount_t: `[B]`, γ (γ^k after k steps), 0 at a termination.
        q_t: `[B, A]`, target network's Q-values where it led; no gradient.

    Returns:
        `[B]`; gradient through `q_tm1` only.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    check_floats(q_tm1=q_tm1, q_t=q_t)
    return _td_errors(q_tm1, a_tm1, r_t, discount_t, q_t.detach().amax(-1))


def double_q_td_errors(
    *,
    q_tm1: Tensor,
    a_tm1: Tensor,
    r_t: Tensor,
    discount_t: Tensor,
    q_t_selector: Tensor,
    q_t_value: Tensor,
) -> Tensor:
    """δ = r_t + γ_t q_value(argmax_a q_selector(a)) - q_tm1(a_tm1).

    Double DQN (van Hasselt et al., arXiv:1509.06461): one network chooses, another judges, so that
    noise is not taken for value.

    Args:
        q_tm1: `[B, A]`, online Q-values where the action was taken.
        a_tm1: int `[B]`, the action.
        r_t: `[B]`, the reward, or the discounted sum of n rewards.
        discount_t: `[B]`, γ (γ^k after k steps), 0 at a termination.
        q_t_selector: `[B, A]`, online Q-values where it led: they choose the action; no gradient.
        q_t_value: `[B, A]`, target network's Q-values there: they judge it; no gradient.

    Returns:
        `[B]`; gradient through `q_tm1` only.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    check_floats(q_tm1=q_tm1, q_t_selector=q_t_selector, q_t_value=q_t_value)
    best = q_t_selector.detach().argmax(-1)
    return _td_errors(q_tm1, a_tm1, r_t, discount_t, _pick(q_t_value.detach(), best))


def huber(x: Tensor, delta: float = 1.0) -> Tensor:
    """½x² where |x| <= δ, δ(|x| - ½δ) beyond, elementwise: its slope is x clipped to ±δ."""
    check_floats(x=x)
    check_number("delta", delta, least=0.0, open_left=True)
    return F.huber_loss(x, torch.zeros_like(x), reduction="none", delta=delta)


@torch.no_grad()
def normalize_advantages(
    advantages: Tensor, valid: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """(A - mean) / (std + ε) over the valid rows; 0 on the others; without gradient.

    The standard deviation divides by the number of rows, not by one less: one row gives 0, not NaN.
    """
    centred = advantages - masked_mean(advantages, valid)
    if valid is not None:
        centred = torch.where(valid, centred, 0.0)
    return centred / (masked_mean(centred.square(), valid).sqrt() + epsilon)


def _td_errors(
    q_tm1: Tensor, a_tm1: Tensor, r_t: Tensor, discount_t: Tensor, v_t: Tensor
) -> Tensor:
    check_actions("a_tm1", a_tm1, values=q_tm1, values_name="q_tm1")
    chosen = _pick(q_tm1, a_tm1)
    check_floats(**{"q_tm1 of the action": chosen}, r_t=r_t, discount_t=discount_t)
    return torch.addcmul(r_t, discount_t, v_t).detach() - chosen


def _pick(values: Tensor, actions: Tensor) -> Tensor:
    """`values[..., actions]`: `[...]` from `[..., A]` and int `[...]`."""
    return values.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)
