"""The papers' sums, written out: slow, plain Python floats on one sequence, nothing shared.

Each function takes lists of length T (time) and follows the sum of its paper term by term, O(T^2)
or worse. Nothing here is recursive or vectorised, so that it cannot share a mistake with the
package.

Episodes: `valid[t]` False marks the pseudo-step from a final observation to a reset. A sum that
starts at s runs to the end of its episode, `_end(s)`: the first invalid row at or after s, or T.
"""

import math
from collections.abc import Sequence

Floats = Sequence[float]


def _end(start: int, valid: Sequence[bool]) -> int:
    for t in range(start, len(valid)):
        if not valid[t]:
            return t
    return len(valid)


def n_step_return(
    rewards: Floats,
    discounts: Floats,
    values: Floats,
    bootstrap_value: float,
    n: float,
    valid: Sequence[bool],
) -> list[float]:
    """Sutton and Barto, eq. 7.1: the sum of up to n discounted rewards and one value."""
    state_values = [*values, bootstrap_value]
    results = []
    for s in range(len(rewards)):
        stop = int(min(s + n, _end(s, valid)))
        total = 0.0
        for t in range(s, stop):
            total += math.prod(discounts[s:t]) * rewards[t]
        results.append(total + math.prod(discounts[s:stop]) * state_values[stop])
    return results


def lambda_return(
    rewards: Floats,
    discounts: Floats,
    values: Floats,
    bootstrap_value: float,
    lambda_: float,
    valid: Sequence[bool],
) -> list[float]:
    """Sutton and Barto, eq. 12.3: (1-λ) Σ λ^(n-1) G^(n), and what is left of λ on the last one."""
    results = []
    for s in range(len(rewards)):
        steps = _end(s, valid) - s
        if steps == 0:
            results.append(values[s])
            continue

        def g(n: int, s: int = s) -> float:
            return n_step_return(rewards, discounts, values, bootstrap_value, n, valid)[s]

        total = sum((1 - lambda_) * lambda_ ** (n - 1) * g(n) for n in range(1, steps))
        results.append(total + lambda_ ** (steps - 1) * g(steps))
    return results


def gae(
    rewards: Floats,
    discounts: Floats,
    values: Floats,
    bootstrap_value: float,
    lambda_: float,
    valid: Sequence[bool],
) -> list[float]:
    """arXiv:1506.02438, eq. 16: Σ_l (γλ)^l δ_{t+l}."""
    state_values = [*values, bootstrap_value]
    results = []
    for s in range(len(rewards)):
        total = 0.0
        for t in range(s, _end(s, valid)):
            delta = rewards[t] + discounts[t] * state_values[t + 1] - state_values[t]
            total += math.prod(discounts[s:t]) * lambda_ ** (t - s) * delta
        results.append(total)
    return results


def vtrace(
    log_rhos: Floats,
    rewards: Floats,
    discounts: Floats,
    values: Floats,
    bootstrap_value: float,
    valid: Sequence[bool],
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    pg_rho_bar: float = 1.0,
    lambda_: float = 1.0,
) -> tuple[list[float], list[float]]:
    """arXiv:1802.01561, eq. 1 and section 4.2: v_s and ρ_s (r_s + γ v_{s+1} - V(x_s))."""
    length = len(rewards)
    state_values = [*values, bootstrap_value]
    ratios = [math.exp(x) for x in log_rhos]
    vs = []
    for s in range(length):
        total = state_values[s]
        for t in range(s, _end(s, valid)):
            traces = math.prod(lambda_ * min(c_bar, ratios[i]) for i in range(s, t))
            delta = rewards[t] + discounts[t] * state_values[t + 1] - state_values[t]
            total += math.prod(discounts[s:t]) * traces * min(rho_bar, ratios[t]) * delta
        vs.append(total)
    vs.append(bootstrap_value)
    advantages = [
        min(pg_rho_bar, ratios[s]) * (rewards[s] + discounts[s] * vs[s + 1] - state_values[s])
        if valid[s]
        else 0.0
        for s in range(length)
    ]
    return vs[:length], advantages


def columns(function, tensors, *, tail=(), **numbers):  # type: ignore[no-untyped-def]
    """Applies an oracle to each column b of `[T, B]` tensors (`tail`: `[B]`), results `[T, B]`."""
    import torch

    outputs = []
    for b in range(next(iter(tensors.values())).shape[1]):
        arguments = {name: tensor[:, b].tolist() for name, tensor in tensors.items()}
        arguments.update({name: tensor[b].item() for name, tensor in dict(tail).items()})
        outputs.append(function(**arguments, **numbers))
    if isinstance(outputs[0], tuple):
        return tuple(
            torch.tensor([list(o[k]) for o in outputs], dtype=torch.float64).T
            for k in range(len(outputs[0]))
        )
    return torch.tensor(outputs, dtype=torch.float64).T
