"""PPO: proximal policy optimisation. Several epochs on one batch, and a clip on how far to go.

      ┌─────────────────────────── one process ───────────────────────────┐
      │                                                                   │
      │   Envs (B copies) ◄── actions ── Actor ◄────── parameters ◄──┐    │
      │        │                                                     │    │
      │        └── observations, rewards ──► Unroll [T+1, B] ──► Learner  │
      │                                                              │    │
      │                       GAE once, then `epochs` passes over shuffled│
      │                       minibatches: clipped ratio · advantage ┘    │
      └───────────────────────────────────────────────────────────────────┘

This is A2C with: the advantages of GAE (Schulman et al., 2016, "High-dimensional continuous control
using generalized advantage estimation", equation 16), several epochs of minibatches on the same
unroll, and the clipped surrogate objective (Schulman et al., 2017, "Proximal policy optimization
algorithms", equation 7) in place of TRPO's constraint.

Differs from the paper: discrete actions; episodes that end at a time limit are bootstrapped from
their final value; advantages are normalised in each minibatch unless `normalize_advantages` is
False; the value loss is not clipped unless `value_clip` is set; the step size is constant unless
`anneal` is set, and the clip always is (for Atari the paper lowers both to 0).

Book: chapter 04
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.data import AgentOutput, Unroll
from rlbook.harness.config import RunConfig, above, at_least, within
from rlbook.harness.run import Result, Run
from rlbook.maths.losses import (
    clipped_surrogate_loss,
    clipped_value_loss,
    entropy_loss,
    log_prob,
    normalize_advantages,
    value_loss,
)
from rlbook.parts.envs import Envs, make_envs, require_discrete
from rlbook.parts.flat import Flat
from rlbook.parts.networks import ActorCritic, SamplingPolicy, sample_action
from rlbook.parts.surrogate import Batch, make_batch
from rlbook.parts.unroll import collect_unroll


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings; the defaults solve CartPole-v1 in about a second of training."""

    unroll_length: int = 32
    """T, steps of each copy between updates (horizon; 128 for Atari in the paper's table 5)."""
    epochs: int = 2
    """Passes over each unroll (K; 3 for Atari, 10 for MuJoCo in the paper)."""
    minibatch_size: int = 256
    """Samples of one gradient (32 × 8 for Atari, 64 for MuJoCo in the paper)."""
    discount: float = 0.98
    """γ (0.99 in the paper)."""
    gae_lambda: float = 0.8
    """λ of GAE (0.95 in the paper)."""
    clip: float = 0.2
    """ε: the ratio counts only within [1 − ε, 1 + ε] (0.2 for MuJoCo; 0.1 for Atari)."""
    normalize_advantages: bool = True
    """Bring the advantages of each minibatch to mean 0 and deviation 1 (not in the paper)."""
    value_clip: float | None = None
    """Keeps new values within ± this of the old ones; None does not clip."""
    learning_rate: float = 2.5e-3
    """Adam's step size (3e-4 for MuJoCo, 2.5e-4 for Atari in the paper)."""
    anneal: bool = False
    """Lowers the step size linearly to 0 over `total_env_steps`, as for Atari in the paper."""
    value_cost: float = 0.25
    """Weight of the value loss, c1 (1 in the paper, whose squared error has no ½)."""
    entropy_cost: float = 0.0
    """Weight of the entropy bonus, c2 (0.01 for Atari in the paper)."""
    max_gradient_norm: float = 0.5
    """The gradient is scaled down to this Euclidean norm."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Fully connected layers of the torso (64, 64 in the paper)."""
    shared_torso: bool = True
    """One torso for policy and value, or one for each (as in the paper without frames)."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        at_least(self, 1, "unroll_length", "epochs", "minibatch_size")
        within(self, 0.0, 1.0, "discount", "gae_lambda")
        above(self, 0.0, "clip")
        at_least(self, 0.0, "learning_rate", "value_cost", "entropy_cost")
        at_least(self, 0.0, "max_gradient_norm")
        if self.value_clip is not None:
            above(self, 0.0, "value_clip")


PRESETS = {
    "default": Config(),
    "paper": Config(
        env_id="ALE/Pong-v5",
        num_envs=8,
        total_env_steps=10_000_000,
        unroll_length=128,
        epochs=3,
        minibatch_size=256,
        discount=0.99,
        gae_lambda=0.95,
        clip=0.1,
        learning_rate=2.5e-4,
        anneal=True,
        value_cost=2.0,  # c1 = 1 on the squared error; the loss here has a half in it
        entropy_cost=0.01,
        torch_threads=2,
    ),
}


def loss_function(
    network: nn.Module, batch: Batch, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate, value and entropy of a minibatch (equation 9 of the paper, as a loss)."""
    logits, values = network(batch.observation)
    advantages = batch.advantage
    if config.normalize_advantages:
        advantages = normalize_advantages(advantages)
    policy, metrics = clipped_surrogate_loss(
        log_probs=log_prob(logits, batch.action),
        behaviour_log_probs=batch.behaviour_log_prob,
        advantages=advantages,
        clip=config.clip,
    )
    if config.value_clip is None:
        value = value_loss(values=values, targets=batch.target)
    else:
        value = clipped_value_loss(
            values=values,
            behaviour_values=batch.behaviour_value,
            targets=batch.target,
            clip=config.value_clip,
        )
    entropy = entropy_loss(logits=logits)
    loss = policy + config.value_cost * value + config.entropy_cost * entropy
    named = {"loss": loss, "policy_loss": policy, "value_loss": value, "entropy": -entropy}
    return loss, {**named, **metrics}


class Actor:
    """Plays with the network's current parameters and hands on unrolls."""

    def __init__(self, envs: Envs, network: ActorCritic, config: Config) -> None:
        self.envs, self.network, self.config = envs, network, config
        self.rng = np.random.default_rng([config.seed, 1])

    def act(self, observation: np.ndarray) -> AgentOutput:
        """Samples an action for each copy."""
        return sample_action(self.network, observation, self.rng)

    def unroll(self) -> Unroll:
        """T steps of every copy."""
        return collect_unroll(self.envs, self.act, self.config.unroll_length)

    def state_dict(self) -> dict[str, Any]:
        """The random generator."""
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the random generator."""
        self.rng.bit_generator.state = state["rng"]


class Learner:
    """Several epochs of minibatches on each unroll."""

    def __init__(self, network: ActorCritic, config: Config) -> None:
        self.network, self.config, self.flat = network, config, Flat(network)
        rate = config.learning_rate
        self.optimizer = torch.optim.Adam([self.flat.vector], lr=rate, fused=True)
        self.rng = np.random.default_rng([config.seed, 2])
        self.env_steps = self.learner_steps = 0

    def minibatches(self, samples: int) -> Iterator[Tensor]:
        """Indices: `epochs` shuffles of all samples, cut into parts of about `minibatch_size`."""
        parts = max(1, round(samples / self.config.minibatch_size))
        for _ in range(self.config.epochs):
            for indices in np.array_split(self.rng.permutation(samples), parts):
                yield torch.from_numpy(indices)

    def update(self, unroll: Unroll) -> dict[str, float]:
        """All gradient steps on one unroll; the metrics are those of the last minibatch."""
        batch = make_batch(self.network, unroll, self.config)
        samples = len(batch.action)
        if samples == 0:  # every row leads to a reset: there is nothing to learn from
            return {}
        self.env_steps += samples
        if self.config.anneal:
            left = max(0.0, 1.0 - self.env_steps / self.config.total_env_steps)
            self.optimizer.param_groups[0]["lr"] = left * self.config.learning_rate
        for indices in self.minibatches(samples):
            minibatch = Batch(*(column[indices] for column in batch))
            loss, metrics = loss_function(self.network, minibatch, self.config)
            self.flat.gradients.zero_()
            loss.backward()
            norm = self.flat.clip(self.config.max_gradient_norm)
            self.optimizer.step()
            self.learner_steps += 1
        return {**{k: v.item() for k, v in metrics.items()}, "gradient_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimiser, shuffling, counters."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.bit_generator.state,
            "counters": [self.env_steps, self.learner_steps],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        self.env_steps, self.learner_steps = state["counters"]


def make_network(config: Config, envs: Envs) -> ActorCritic:
    """A network for the environment's observations and actions."""
    num_actions = require_discrete(envs, "ppo")
    torch.manual_seed(config.seed)
    shape = envs.observation_space.shape or ()
    return ActorCritic(shape, num_actions, config.hidden_sizes, config.shared_torso)


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
    with Run("ppo", config, SamplingPolicy(network), parts) as run:
        while run.running():
            unroll, before = actor.unroll(), learner.learner_steps
            metrics = learner.update(unroll)
            run.record(
                env_steps=int(unroll.valid.sum()),
                learner_steps=learner.learner_steps - before,
                episodes=envs.episodes(),
                metrics=metrics,
            )
    envs.close()
    return run.result()
