"""REINFORCE, REINFORCE with a baseline, and A2C: climb the gradient of the expected return.

      ┌────────────────────── one process ──────────────────────┐
      │                                                         │
      │   Envs (B copies) ◄── actions ── Actor ◄── parameters   │
      │        │                                       ▲        │
      │        └── observations, rewards ──► Unroll ──► Learner │
      │                                                         │
      └── the learner waits for the unroll, the actor for the ──┘
                           new parameters

This is the policy gradient theorem, ∇J = E[Σ_t A_t ∇ log π(a_t | x_t)], with three estimates of the
advantage A_t:

- `reinforce`: the return of the whole episode, G_t (Williams, 1992, "Simple statistical
               gradient-following …");
- `baseline`:  G_t − V(x_t), with a learnt value as baseline (Williams, 1992; Sutton & Barto, 2018,
               section 13.4);
- `a2c`:       n steps of reward, then the value: r_t + … + γ^n V(x_{t+n}) − V(x_t), on unrolls of T
               steps by B copies: the synchronous form of A3C (Mnih et al., 2016, algorithm S3).

Differs from the papers: Adam by default in place of plain gradient ascent or RMSProp; losses are
means over valid rows. REINFORCE needs whole episodes: every copy plays one, and what a copy plays
while it waits for the longest is thrown away.

Book: chapter 04
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.data import AgentOutput, EnvOutput, Unroll
from rlbook.harness.config import RunConfig, above, at_least, one_of, within
from rlbook.harness.run import Result, Run
from rlbook.maths.losses import entropy_loss, policy_gradient_loss, value_loss
from rlbook.maths.returns import discounted_returns, lambda_returns
from rlbook.parts.envs import Envs, make_envs, require_discrete
from rlbook.parts.flat import Flat
from rlbook.parts.networks import ActorCritic, SamplingPolicy, sample_action
from rlbook.parts.optim import RMSProp
from rlbook.parts.unroll import collect_unroll


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings; the defaults solve CartPole-v1 with A2C in about a second of training."""

    algorithm: Literal["a2c", "baseline", "reinforce"] = "a2c"
    """Which estimate of the advantage."""
    unroll_length: int = 8
    """T, steps between updates of A2C (t_max = 5 in Mnih et al., 2016)."""
    discount: float = 0.98
    """γ."""
    lambda_: float = 0.9
    """λ of the λ-returns of A2C; 1 gives the paper's n-step returns."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Adam, or A3C's RMSProp: α = 0.99, ε inside the root."""
    rmsprop_epsilon: float = 1e-5
    """ε of RMSProp."""
    learning_rate: float = 2.5e-3
    """The optimiser's step size (A3C: searched from 1e-4 to 1e-2; its authors name 7e-4)."""
    value_cost: float = 0.5
    """Weight of the value loss ½ (V − target)² (0.5 in IMPALA, Espeholt et al., 2018)."""
    entropy_cost: float = 0.0
    """Weight of the entropy bonus, β (0.01 in Mnih et al., 2016)."""
    max_gradient_norm: float = 0.5
    """The gradient is scaled down to this Euclidean norm."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Fully connected layers of the torso."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        one_of(self, "algorithm", ("a2c", "baseline", "reinforce"))
        one_of(self, "optimizer", ("adam", "rmsprop"))
        above(self, 0.0, "rmsprop_epsilon")
        at_least(self, 1, "unroll_length")
        within(self, 0.0, 1.0, "discount", "lambda_")
        at_least(self, 0.0, "learning_rate", "value_cost", "entropy_cost", "max_gradient_norm")


PAPER = Config(
    num_envs=16,
    unroll_length=5,
    discount=0.99,
    lambda_=1.0,
    learning_rate=7e-4,
    entropy_cost=0.01,
    max_gradient_norm=40.0,
)

PRESETS = {
    "default": Config(),
    "paper": PAPER,
    "reinforce": Config(algorithm="reinforce", num_envs=8),
    # Whole returns are large: at the usual cost the value's gradient would drown the policy's.
    "baseline": Config(algorithm="baseline", num_envs=8, value_cost=0.002),
    "atari": replace(
        PAPER,
        env_id="ALE/Pong-v5",
        total_env_steps=10_000_000,
        unroll_length=20,
        max_gradient_norm=0.5,
        torch_threads=2,
    ),
}


def advantages(
    config: Config,
    rewards: Tensor,
    discounts: Tensor,
    values: Tensor,
    bootstrap: Tensor,
    valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """(A, targets of the value), both `[T, B]`: the one place where the three algorithms differ."""
    rows = {"rewards": rewards, "discounts": discounts, "valid": valid}
    if config.algorithm == "a2c":
        targets = lambda_returns(
            **rows, values=values, bootstrap_value=bootstrap, lambda_=config.lambda_
        )
        return targets - values, targets
    nothing = torch.zeros_like(values)
    targets = discounted_returns(
        **rows, values=nothing, bootstrap_value=torch.zeros_like(bootstrap)
    )
    return (targets - values if config.algorithm == "baseline" else targets), targets


def loss_function(
    network: nn.Module, unroll: Unroll, valid: Tensor, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient, value and entropy, each a mean over valid rows.

    Args:
        network: gives logits and values.
        unroll: T steps of B copies.
        valid: `[T, B]` bool, the rows that count.
        config: costs and γ.
    """
    observations = torch.from_numpy(unroll.env_outputs.observation)
    steps, copies = observations.shape[:2]
    logits, values = network(observations.flatten(0, 1))
    logits, values = logits.unflatten(0, (steps, copies)), values.unflatten(0, (steps, copies))
    # The shift: what was seen and done at t (left) led to the reward and discount at t + 1 (right).
    logits, bootstrap, values = logits[:-1], values[-1].detach(), values[:-1]
    actions = torch.from_numpy(unroll.agent_outputs.action)
    rewards = torch.from_numpy(unroll.env_outputs.reward[1:])
    discounts = config.discount * torch.from_numpy(unroll.env_outputs.discount[1:])
    advantage, targets = advantages(config, rewards, discounts, values.detach(), bootstrap, valid)
    policy = policy_gradient_loss(logits=logits, actions=actions, advantages=advantage, valid=valid)
    value = value_loss(values=values, targets=targets, valid=valid)
    entropy = entropy_loss(logits=logits, valid=valid)
    value_cost = 0.0 if config.algorithm == "reinforce" else config.value_cost
    loss = policy + value_cost * value + config.entropy_cost * entropy
    return loss, {"loss": loss, "policy_loss": policy, "value_loss": value, "entropy": -entropy}


class Actor:
    """Plays with the network's current parameters and hands on unrolls."""

    def __init__(self, envs: Envs, network: ActorCritic, config: Config) -> None:
        self.envs, self.network, self.config = envs, network, config
        self.rng = np.random.default_rng([config.seed, 1])

    def act(self, observation: np.ndarray) -> AgentOutput:
        """Samples an action for each copy."""
        return sample_action(self.network, observation, self.rng)

    def unroll(self) -> tuple[Unroll, np.ndarray, int]:
        """T steps for A2C, whole episodes for REINFORCE: (unroll, valid `[T, B]`, steps taken)."""
        if self.config.algorithm == "a2c":
            unroll = collect_unroll(self.envs, self.act, self.config.unroll_length)
            return unroll, unroll.valid, int(unroll.valid.sum())
        return collect_episodes(self.envs, self.act)

    def state_dict(self) -> dict[str, Any]:
        """The random generator."""
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the random generator."""
        self.rng.bit_generator.state = state["rng"]


def collect_episodes(
    envs: Envs, act: Callable[[np.ndarray], AgentOutput], max_steps: int = 20_000
) -> tuple[Unroll, np.ndarray, int]:
    """One whole episode of every copy, begun together: (unroll, valid `[T, B]`, steps taken)."""
    row = envs.reset()
    env_rows, valid_rows = [row], []
    agent_rows: list[AgentOutput] = []
    running, taken = np.ones(envs.num_envs, dtype=bool), 0
    while running.any() and len(agent_rows) < max_steps:
        agent_output = act(row.observation)
        valid_rows.append(running.copy())
        row = envs.step(agent_output.action)
        running &= ~envs.ended
        taken += int((~row.first).sum())
        agent_rows.append(agent_output)
        env_rows.append(row)
    unroll = Unroll(
        EnvOutput(*(np.stack(column) for column in zip(*env_rows, strict=True))),
        AgentOutput(*(np.stack(column) for column in zip(*agent_rows, strict=True))),
    )
    return unroll, np.stack(valid_rows), taken


class Learner:
    """Turns unrolls into updates of the network."""

    def __init__(self, network: ActorCritic, config: Config) -> None:
        self.config, self.network = config, network
        self.flat = Flat(network)  # one vector: one step of the optimiser instead of eight
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "adam":
            self.optimizer = torch.optim.Adam([self.flat.vector], lr=config.learning_rate)
        else:
            eps = config.rmsprop_epsilon
            self.optimizer = RMSProp([self.flat.vector], lr=config.learning_rate, eps=eps)

    def update(self, unroll: Unroll, valid: np.ndarray) -> dict[str, float]:
        """One step of gradient descent on the unroll's loss."""
        loss, metrics = loss_function(self.network, unroll, torch.from_numpy(valid), self.config)
        self.flat.gradients.zero_()
        loss.backward()
        norm = self.flat.clip(self.config.max_gradient_norm)
        self.optimizer.step()
        return {**{k: v.item() for k, v in metrics.items()}, "gradient_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimiser."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def make_network(config: Config, envs: Envs) -> ActorCritic:
    """A network for the environment's observations and actions."""
    num_actions = require_discrete(envs, "policy_gradient")
    torch.manual_seed(config.seed)
    return ActorCritic(envs.observation_space.shape or (), num_actions, config.hidden_sizes)


def load_policy(config: Config, parts: dict[str, Any]) -> SamplingPolicy:
    """The policy of a checkpoint."""
    network = make_network(config, make_envs(config.env_id, 1, config.seed))
    network.load_state_dict(parts["learner"]["network"])
    return SamplingPolicy(network)


def train(config: Config) -> Result:
    """Acts and learns in turns until the run is over."""
    torch.set_num_threads(config.torch_threads)
    envs = make_envs(config.env_id, config.num_envs, config.seed)
    network = make_network(config, envs)
    actor, learner = Actor(envs, network, config), Learner(network, config)
    parts = {"envs": envs, "actor": actor, "learner": learner}
    with Run("policy_gradient", config, SamplingPolicy(network), parts) as run:
        while run.running():
            unroll, valid, env_steps = actor.unroll()
            metrics = learner.update(unroll, valid)
            episodes = envs.episodes()
            if config.algorithm != "a2c":  # what was played while waiting is mostly short
                episodes = list({e.env: e for e in reversed(episodes)}.values())
            run.record(env_steps=env_steps, learner_steps=1, episodes=episodes, metrics=metrics)
    envs.close()
    return run.result()
