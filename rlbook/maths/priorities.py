"""Prioritised replay: who is drawn how often, and how the loss makes up for it.

Schaul et al., arXiv:1511.05952, section 3; the priority of a sequence is R2D2's (ICLR 2019, section
2.3). The first two work alike on numpy arrays and torch tensors, because replay lives on numpy's
side and may live in a process of its own; this module therefore imports torch for its types only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

    Array = TypeVar("Array", np.ndarray[Any, np.dtype[Any]], torch.Tensor)


def sampling_probabilities(priorities: Array, *, exponent: float) -> Array:
    """P(i) = p_i^α / Σ_k p_k^α (arXiv:1511.05952, eq. 1).

    α = 0 draws uniformly, α = 1 in proportion. A priority of 0 is never drawn, whatever α is (0⁰
    counts as 0 here), unless all are 0: then all are drawn alike, for something must be.

    Args:
        priorities: `[N]`, p_i: finite, not negative.
        exponent: α >= 0.

    Returns:
        `[N]`, sums to 1, dtype as it came.

    Raises:
        ValueError: empty, not 1-D, NaN, infinite or negative priorities, or a negative α.
    """
    _check_vector("priorities", priorities)
    _check_exponent(exponent)
    scaled = powered_priorities(priorities / _at_least_tiny(priorities), exponent=exponent)
    if not bool((scaled > 0).any()):
        scaled = scaled + 1
    return scaled / scaled.sum()


def powered_priorities(priorities: Array, *, exponent: float) -> Array:
    """p^α, but 0 where p = 0 even for α = 0, so that what must never be drawn never is."""
    return (priorities > 0) * priorities**exponent


def importance_weights(
    probabilities: Array,
    *,
    size: int,
    exponent: float,
    normalize: bool = True,
    smallest: float | None = None,
) -> Array:
    """w_i = (N P(i))^-β / max_j w_j (arXiv:1511.05952, section 3.4).

    It undoes the bias of not drawing uniformly. The maximum is over the *batch* given here, as in
    dqn_zoo, Acme and SEED RL; baselines and TorchRL take it over the whole buffer, which gives
    smaller weights (give `smallest` for that). Dividing by it means that weights only ever shrink a
    step; N cancels. With shards, P(i) must be the probability over all shards together.

    Args:
        probabilities: `[B]`, P(i) > 0 of the items drawn.
        size: N, the items that could have been drawn (only matters without `normalize`).
        exponent: β >= 0; 0 does not correct, 1 corrects in full.
        normalize: divide by the batch's maximum.
        smallest: min_j P(j) > 0 over the whole buffer: divide by the buffer's maximum instead.

    Returns:
        `[B]`, dtype as it came.

    Raises:
        ValueError: empty, not 1-D, not positive or not finite probabilities, size < 1, β < 0, or a
            `smallest` that is not positive.
    """
    _check_vector("probabilities", probabilities)
    _check_exponent(exponent)
    if size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    least: Any = probabilities.min()
    if not bool(least > 0):
        raise ValueError("probabilities must be positive: what cannot be drawn has no weight")
    if smallest is not None:
        if not smallest > 0:
            raise ValueError(f"smallest must be positive, not {smallest}")
        least = smallest
    if normalize:
        return (least / probabilities) ** exponent  # = (N P_i)^-β / (N min_j P_j)^-β
    return (size * probabilities) ** -exponent


def sequence_priority(
    td_errors: torch.Tensor, *, mix: float = 0.9, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """p = η max_t |δ_t| + (1 - η) mean_t |δ_t| of each sequence (R2D2, ICLR 2019, section 2.3).

    A mean over a long sequence washes large errors out; a maximum knows only one of them.

    Args:
        td_errors: `[T, ...]`, δ_t, without the burn-in.
        mix: η in [0, 1].
        valid: bool `[T, ...]`, False on padding; None means that every row counts.

    Returns:
        `[...]`, without gradient; 0 for a sequence that has no valid row.

    Raises:
        ValueError: T = 0, η outside [0, 1], or `valid` of another shape or dtype.
    """
    if td_errors.ndim == 0 or td_errors.shape[0] == 0:
        raise ValueError(f"td_errors must be [T, ...] with T >= 1, not {tuple(td_errors.shape)}")
    if not 0.0 <= mix <= 1.0:
        raise ValueError(f"mix must be in [0, 1], not {mix}")
    errors = td_errors.detach().abs()
    if valid is None:
        return mix * errors.amax(0) + (1 - mix) * errors.mean(0)
    if valid.shape != errors.shape or valid.is_floating_point():
        raise ValueError(f"valid must be a bool tensor of shape {tuple(errors.shape)}")
    errors = errors.where(valid, 0.0)
    return mix * errors.amax(0) + (1 - mix) * errors.sum(0) / valid.sum(0).clamp(min=1)


def _check_vector(name: str, values: Array) -> None:
    if values.ndim != 1 or values.shape[0] == 0:
        raise ValueError(f"{name} must be [N] with N >= 1, not {tuple(values.shape)}")
    if not bool(((values >= 0) & (values < float("inf"))).all()):
        raise ValueError(f"{name} must be finite and not negative")


def _check_exponent(exponent: float) -> None:
    if not 0.0 <= exponent < float("inf"):
        raise ValueError(f"exponent must be finite and at least 0, not {exponent}")


def _at_least_tiny(priorities: Array) -> float:
    # Scaling by the largest changes no probability and keeps p^α from overflowing.
    return float(priorities.max()) or 1.0
