"""What every system with Q-networks shares: n-step transitions, TD errors, ε-greedy actions.

Step, Step, …  ──► NStepWindow ──► Transition (n steps of reward, then where they led)
Transition     ──► td_errors(online, target) ──► [N]
q [B, A]       ──► epsilon_greedy ──► action [B]
"""

from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.data import Transition
from rlbook.maths.losses import double_q_td_errors, huber, q_td_errors
from rlbook.parts.envs import Envs, Step
from rlbook.parts.flat import Flat
from rlbook.parts.networks import QNetwork, action_values
from rlbook.parts.on_device import numbers, there, widened
from rlbook.parts.replay import Sample


class NStepWindow:
    """Folds n steps of B copies into transitions: R = Σ γ^k r_k, discount = Π γ d_k.

    A window that meets the end of an episode stops there, with the discount of the steps really
    taken: 0 after a termination, γ^k after a truncation, with the final observation to bootstrap
    from.
    """

    def __init__(self, n_step: int, discount: float) -> None:
        self.discount = discount
        self.steps: deque[Step] = deque(maxlen=n_step)

    def push(self, step: Step) -> Transition | None:
        """The transitions that began n steps ago `[≤ B]`; None until the window is full."""
        self.steps.append(step)
        if len(self.steps) < (self.steps.maxlen or 1):
            return None
        start = self.steps[0]
        r_t = start.r_t.copy()
        discount_t = np.float32(self.discount) * start.discount_t
        obs_t = start.obs_t.copy()
        alive = start.valid & ~start.ended
        for later in list(self.steps)[1:]:
            if not alive.any():
                break
            r_t += np.where(alive, discount_t * later.r_t, np.float32(0))
            folded = discount_t * np.float32(self.discount) * later.discount_t
            discount_t = np.where(alive, folded, discount_t)
            obs_t[alive] = later.obs_t[alive]
            alive = alive & ~later.ended
        columns = Transition(start.obs_tm1, start.a_tm1, r_t, discount_t, obs_t)
        return columns if start.valid.all() else Transition(*(c[start.valid] for c in columns))

    def state_dict(self) -> dict[str, Any]:
        """The steps in the window."""
        return {"steps": [step._asdict() for step in self.steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.steps.clear()
        self.steps.extend(Step(**step) for step in state["steps"])


def td_errors(online: nn.Module, target: nn.Module, batch: Transition, double: bool) -> Tensor:
    """r + γ Q_target(x', a*) − Q(x, a), `[N]`.

    a* is the best action of the target network or, if `double`, of the online one.
    """
    q_tm1 = widened(online(batch.obs_tm1))
    rows = {"a_tm1": batch.a_tm1, "r_t": batch.r_t, "discount_t": batch.discount_t}
    with torch.no_grad():
        q_t = widened(target(batch.obs_t))
        q_t_selector = widened(online(batch.obs_t)) if double else None
    if q_t_selector is None:
        return q_td_errors(q_tm1=q_tm1, q_t=q_t, **rows)
    return double_q_td_errors(q_tm1=q_tm1, q_t_selector=q_t_selector, q_t_value=q_t, **rows)


def td_gradient(
    flat: Flat,
    networks: tuple[nn.Module, nn.Module],
    sample: Sample,
    double: bool,
    cast: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Leaves the gradient of DQN's loss in `flat.gradients`: the mean of weighted Huber losses.

    Args:
        flat: of the online network.
        networks: online and target.
        sample: a batch, `[N, ...]`, and the weight of each row.
        double: see `td_errors`.
        cast: in which the networks are asked and the loss is made, such as `torch.autocast`.

    Returns:
        |TD errors| `[N]`, and loss and td_error_mean, all where the network is: nothing is waited
        for.
    """
    device = flat.vector.device
    with cast or nullcontext():
        rows = [there(column, device) for column in sample.items]
        errors = td_errors(*networks, Transition(*rows), double)
        loss = (there(sample.weights, device).to(errors.dtype) * huber(errors)).mean()
    flat.gradients.zero_()
    loss.backward()
    absolute = errors.detach().abs()
    return absolute, {"loss": loss.detach(), "td_error_mean": absolute.mean()}


def clipped_td_gradient(
    flat: Flat, networks: tuple[nn.Module, nn.Module], sample: Sample, double: bool, limit: float
) -> tuple[np.ndarray, dict[str, float]]:
    """The same, scaled down to the Euclidean norm `limit`: |TD errors| `[N]`, metrics with
    gradient_norm (before that), as plain numbers.
    """
    absolute, metrics = td_gradient(flat, networks, sample, double)
    return absolute.cpu().numpy(), {**numbers(metrics), "gradient_norm": flat.clip(limit)}


def epsilon_greedy(
    q: np.ndarray, epsilon: float | np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The best action of each row `[B]`, or with probability `epsilon` any action.

    Args:
        q: action values `[B, A]`.
        epsilon: 0 to 1, for all rows or for each `[B]`.
        rng: where the draws come from.
    """
    action = q.argmax(-1)
    random = rng.random(len(action)) < epsilon
    if random.any():
        action[random] = rng.integers(q.shape[-1], size=int(random.sum()))
    return action


class Player:
    """B copies of an environment, played ε-greedily by one network: actions in, transitions out.

    Args:
        envs: the copies.
        network: gives q `[B, A]`; whoever owns it may change its parameters at any time.
        n_step, discount: of the transitions.
        seed: of the random actions.
    """

    def __init__(
        self, envs: Envs, network: QNetwork, n_step: int, discount: float, seed: int
    ) -> None:
        self.envs, self.network = envs, network
        self.window = NStepWindow(n_step, discount)
        self.rng = np.random.default_rng([seed, 1])
        self.turns = 0
        self.q_mean = 0.0
        """Mean over the copies of the largest action value, at the last step."""

    def step(self, epsilon: float) -> tuple[Transition | None, int]:
        """One step of every copy: (transitions that are ready, valid steps taken)."""
        q = self.values()
        self.q_mean = float(q.max(-1).mean())
        step = self.envs.transition(epsilon_greedy(q, epsilon, self.rng))
        self.turns += 1
        return self.window.push(step), int(step.valid.sum())

    def values(self) -> np.ndarray:
        """Q of what the copies show now, `[B, A]`."""
        return action_values(self.network, self.envs.env_output.observation)

    def state_dict(self) -> dict[str, Any]:
        """Environments, window, random generator and the count of turns."""
        parts = {"envs": self.envs.state_dict(), "window": self.window.state_dict()}
        return {**parts, "rng": self.rng.bit_generator.state, "turns": self.turns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; the window is empty if the episodes were begun anew."""
        self.envs.load_state_dict(state["envs"])
        self.window.load_state_dict({"steps": []} if self.envs.restarted else state["window"])
        self.rng.bit_generator.state, self.turns = state["rng"], state["turns"]


def joined(transitions: Sequence[Transition | None]) -> Transition | None:
    """Several turns' transitions one after the other; None if there are none."""
    found = [rows for rows in transitions if rows is not None]
    return Transition(*map(np.concatenate, zip(*found, strict=True))) if found else None
