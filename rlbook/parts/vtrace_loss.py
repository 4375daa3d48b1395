"""V-trace's three losses of an unroll, before anybody adds them up.

What IMPALA and SEED RL share: the pass over all rows, the shift between what was said and what it
led to, and the targets. Their weighted sum stands in each system's own file.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlbook.data import Unroll
from rlbook.maths.losses import entropy_loss, log_prob, policy_gradient_loss, value_loss
from rlbook.maths.vtrace import vtrace
from rlbook.parts.on_device import there, widened
from rlbook.parts.recurrent import unrolled


class VTraceLosses(NamedTuple):
    """Means over the valid rows."""

    policy: Tensor
    value: Tensor
    entropy: Tensor
    """Negative entropy."""
    rows: Tensor
    """How many valid rows there are."""


def vtrace_losses(network: nn.Module, unroll: Unroll, config: Any) -> VTraceLosses:
    """Policy gradient, value and entropy loss with V-trace's targets.

    Args:
        network: an actor-critic, with or without memory.
        unroll: `[T+1, B]`, with the behaviour policy's logits.
        config: with `correction` ("vtrace" or "none"), `discount`, `rho_bar`, `c_bar`, `lambda_`.
    """
    # Time is folded into the batch, but for the LSTM. Whatever the network computed in, ratios,
    # targets and sums are of float32.
    logits, values = map(widened, unrolled(network, unroll))
    # The shift: what was seen and done at t (left) led to the reward and discount at t + 1 (right).
    logits, bootstrap, values = logits[:-1], values[-1].detach(), values[:-1]
    said, led_to = unroll.agent_outputs, unroll.env_outputs
    columns = said.action, unroll.valid, said.logits, led_to.discount[1:], led_to.reward[1:]
    actions, valid, behaviour_logits, discounts, rewards = (
        there(column, logits.device) for column in columns
    )
    log_rhos = log_prob(logits.detach(), actions) - log_prob(behaviour_logits, actions)
    targets = vtrace(
        log_rhos=log_rhos if config.correction == "vtrace" else torch.zeros_like(log_rhos),
        discounts=config.discount * discounts,
        rewards=rewards,
        values=values.detach(),
        bootstrap_value=bootstrap,
        valid=valid,
        rho_bar=config.rho_bar,
        c_bar=config.c_bar,
        pg_rho_bar=config.rho_bar,
        lambda_=config.lambda_,
    )
    advantage = targets.pg_advantages
    return VTraceLosses(
        policy_gradient_loss(logits=logits, actions=actions, advantages=advantage, valid=valid),
        value_loss(values=values, targets=targets.vs, valid=valid),
        entropy_loss(logits=logits, valid=valid),
        valid.sum(),
    )
