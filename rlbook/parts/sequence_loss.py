"""R2D2's loss of a batch of sequences, and the priority that each of them gets from it.

    burn-in l │ m steps to learn from │ n to bootstrap from
               δ_t = h(R_n + γⁿ h⁻¹(Q(x_{t+n}, a*))) − Q(x_t, a_t)         for each of the m steps
               p   = η max |δ| + (1 − η) mean |δ|                          over those of the episode

What R2D2 and SEED RL's learner with replay share (Kapturowski et al., 2019). Padding counts neither
in the loss nor in the priority.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlbook.maths.losses import huber, masked_mean
from rlbook.maths.priorities import sequence_priority
from rlbook.maths.rescaling import rescaled_n_step_returns
from rlbook.parts.on_device import there
from rlbook.parts.replay import Sample
from rlbook.parts.sequences import Sequence, as_tensors, read_again, unpacked


def td_errors(q: Tensor, q_target: Tensor, batch: Sequence, config: Any) -> Tensor:
    """h(R_n + γⁿ h⁻¹(Q)) − Q(x, a) of the m steps, `[m, N]`; gradient through `q` only.

    Args:
        q: online, of the m + n rows behind the burn-in, `[m + n, N, A]`.
        q_target: of the target network, likewise.
        batch: as tensors, time first.
        config: of the system, with `burn_in_length`, `sequence_length`, `n_step`, `discount`,
            `double`, `rescaling_epsilon`.
    """
    behind, steps = slice(config.burn_in_length, None), config.sequence_length
    best = (q.detach() if config.double else q_target).argmax(-1, keepdim=True)
    targets = rescaled_n_step_returns(
        rewards=batch.reward[behind],
        discounts=config.discount * batch.discount[behind],
        values=q_target.gather(-1, best).squeeze(-1),
        n=config.n_step,
        epsilon=config.rescaling_epsilon,
        valid=batch.valid[behind],
    )
    chosen = q[:steps].gather(-1, batch.action[behind][:steps].unsqueeze(-1)).squeeze(-1)
    return torch.where(learnt(batch, config), targets[:steps] - chosen, 0.0)


def learnt(batch: Sequence, config: Any) -> Tensor:
    """Which of the m steps to learn from are steps of the episode, `[m, N]` bool."""
    return batch.valid[config.burn_in_length :][: config.sequence_length]


def priority(errors: Tensor, batch: Sequence, config: Any) -> Tensor:
    """p of each sequence, `[N]`; a little more, so that none is never drawn again."""
    mix, valid = config.priority_mix, learnt(batch, config)
    return sequence_priority(errors, mix=mix, valid=valid) + 1e-6


def sequence_loss(
    online: nn.Module, target: nn.Module, sample: Sample[Sequence], config: Any
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Weighted Huber losses, a mean over valid steps; the sequences' priorities `[N]`; metrics. All
    are where the network is: nothing is waited for.

    Args:
        online: network that is learnt.
        target: of an equal shape.
        sample: sequences `[N, ...]`, with the weight of each.
        config: as `td_errors` wants it, with `state_init` ("stored" or "zero"), `priority_mix`.
    """
    device, stored = next(online.parameters()).device, config.state_init == "stored"
    given = as_tensors(sample.items)
    batch = unpacked(Sequence(*(there(column, device) for column in given)), given.valid.numpy())
    read = batch._replace(valid=given.valid)  # where states begin is looked up on the host
    q = read_again(online, read, burn_in=config.burn_in_length, stored=stored)
    with torch.no_grad():
        q_target = read_again(target, read, burn_in=config.burn_in_length, stored=stored)
    errors, valid = td_errors(q, q_target, batch, config), learnt(batch, config)
    weights = there(sample.weights, device).to(errors)
    loss = masked_mean(weights * huber(errors), valid)
    error = masked_mean(errors.detach().abs(), valid)
    return loss, priority(errors, batch, config), {"loss": loss.detach(), "td_error_mean": error}
