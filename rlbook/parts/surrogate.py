"""What PPO's surrogate objective is computed from: the rows of an unroll with their advantages.

    Unroll [T+1, B] ──► GAE (once, with the values of acting time) ──► valid rows side by side [N]

Serial and distributed PPO share it, so that both learn from the same numbers.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from rlbook.data import Unroll
from rlbook.maths.losses import log_prob
from rlbook.maths.returns import gae


class AdvantageSettings(Protocol):
    """What `make_batch` reads of a system's configuration."""

    @property
    def discount(self) -> float:
        """γ."""

    @property
    def gae_lambda(self) -> float:
        """λ."""


class Batch(NamedTuple):
    """The valid rows of an unroll, flattened: N samples."""

    observation: Tensor
    """`[N, ...]`."""
    action: Tensor
    """`[N]` int64."""
    behaviour_log_prob: Tensor
    """`[N]`: log π_old(a | x)."""
    behaviour_value: Tensor
    """`[N]`: V_old(x)."""
    advantage: Tensor
    """`[N]`."""
    target: Tensor
    """`[N]`: A + V_old, what the value is fitted to."""


@torch.no_grad()
def make_batch(network: nn.Module, unroll: Unroll, config: AdvantageSettings) -> Batch:
    """Advantages of an unroll under the policy that made it, then its valid rows side by side."""
    last = torch.from_numpy(unroll.env_outputs.observation[-1])
    logits = torch.from_numpy(unroll.agent_outputs.logits)
    actions = torch.from_numpy(unroll.agent_outputs.action)
    values = torch.from_numpy(unroll.agent_outputs.value)
    valid = torch.from_numpy(unroll.valid)
    # The shift: what was seen and done at t led to the reward and discount at t + 1.
    advantages = gae(
        rewards=torch.from_numpy(unroll.env_outputs.reward[1:]),
        discounts=config.discount * torch.from_numpy(unroll.env_outputs.discount[1:]),
        values=values,
        bootstrap_value=network(last)[1],
        lambda_=config.gae_lambda,
        valid=valid,
    )
    rows = Batch(
        torch.from_numpy(unroll.env_outputs.observation[:-1]),
        actions,
        log_prob(logits, actions),
        values,
        advantages,
        advantages + values,
    )
    return Batch(*(row[valid] for row in rows))
