"""DQN: Q-learning with a network, a replay that breaks up time, and a target that stands still.

      ┌──────────────────────────── one process ────────────────────────────┐
      │                                                                     │
      │   Envs (B copies) ◄── ε-greedy actions ── Actor ◄── online Q        │
      │        │                                                ▲           │
      │        └── n-step transitions ──► Replay ── batch ──► Learner       │
      │                                     ▲                  │  │         │
      │                                     └── priorities ────┘  └─► target│
      │                                        (if prioritised)       Q     │
      └─────────────────────────────────────────────────────────────────────┘

This is Q-learning with: a network for the table, a replay memory, and a target network copied from
the online one every `target_period` updates (Mnih et al., 2015, "Human-level control through deep
reinforcement learning", algorithm 1). On top, each with a switch of its own: double Q-learning (van
Hasselt et al., 2016), dueling heads (Wang et al., 2016), n-step returns (Sutton, 1988; in DQN by
Hessel et al., 2018), prioritised replay (Schaul et al., 2016).

Differs from the paper: Adam; B copies act together and one update follows every `update_period`
vector steps, so that the replay ratio is batch_size / (B · update_period). An episode that ends at
a time limit is bootstrapped from; importance weights are divided by the largest of their batch.

Book: chapter 03
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlbook.harness.config import RunConfig, at_least, at_most, within
from rlbook.harness.doctor import require_memory
from rlbook.harness.run import Result, Run
from rlbook.maths.exploration import linear_schedule
from rlbook.parts.envs import Envs, make_envs, require_discrete
from rlbook.parts.flat import Flat
from rlbook.parts.networks import GreedyPolicy, QNetwork
from rlbook.parts.q_learning import Player, clipped_td_gradient
from rlbook.parts.replay import PrioritizedReplay, Sample, UniformReplay


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings; the defaults solve CartPole-v1 in some seconds of training."""

    num_envs: int = 16
    """Copies of the environment that step together (1 in the paper)."""
    life_loss_ends: bool = False
    """Atari: the loss of a life is the end to the learner (it is in the paper)."""
    double: bool = True
    """Choose the next action by the online network, value it by the target network."""
    dueling: bool = False
    """Separate heads for the value and the advantages."""
    n_step: int = 3
    """Steps of reward before the bootstrap (1 in the paper)."""
    prioritized: bool = False
    """Sample by TD error instead of uniformly."""
    priority_exponent: float = 0.6
    """α: 0 samples uniformly (0.6 in Schaul et al., 2016, proportional)."""
    importance_exponent: float = 0.4
    """β at the start, annealed linearly to 1 (0.4 in Schaul et al., 2016)."""
    replay_capacity: int = 50_000
    """Transitions kept (1 M in the paper)."""
    learning_starts: int = 1_000
    """Transitions in replay before the first update (50 000 in the paper)."""
    batch_size: int = 128
    """Transitions of one update (32 in the paper)."""
    update_period: int = 1
    """Vector steps between updates (4 steps of one copy in the paper)."""
    target_period: int = 50
    """Updates between copies to the target network (10 000 in the paper)."""
    learning_rate: float = 1e-3
    """Adam's step size (2.5e-4 in the paper, for RMSProp)."""
    discount: float = 0.99
    """γ (0.99 in the paper)."""
    epsilon_end: float = 0.01
    """Final probability of a random action (0.1 in the paper)."""
    epsilon_steps: int = 10_000
    """Environment steps over which ε falls from 1 (1 M in the paper, which says frames)."""
    max_gradient_norm: float = 10.0
    """The gradient is scaled down to this Euclidean norm (without limit in the paper)."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Fully connected layers of the torso."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        at_least(self, 1, "n_step", "replay_capacity", "batch_size", "update_period")
        at_least(self, 1, "target_period", "learning_starts", "epsilon_steps")
        within(self, 0.0, 1.0, "discount", "epsilon_end", "priority_exponent")
        within(self, 0.0, 1.0, "importance_exponent")
        at_least(self, 0.0, "learning_rate", "max_gradient_norm")
        at_most(self, "learning_starts", "replay_capacity")


PRESETS = {
    "default": Config(),
    "paper": Config(
        env_id="ALE/Pong-v5",
        life_loss_ends=True,
        num_envs=1,
        total_env_steps=50_000_000,
        double=False,
        n_step=1,
        replay_capacity=1_000_000,
        learning_starts=50_000,
        batch_size=32,
        update_period=4,
        target_period=10_000,
        learning_rate=6.25e-5,
        epsilon_end=0.1,
        epsilon_steps=1_000_000,
        torch_threads=2,
    ),
    "vanilla": Config(double=False, n_step=1),
}


class Learner:
    """Fits the online network to targets that the target network makes."""

    def __init__(self, online: QNetwork, target: QNetwork, config: Config) -> None:
        self.online, self.target, self.config = online, target, config
        self.target.load_state_dict(online.state_dict())
        self.flat = Flat(online)  # one vector: one step of the optimiser instead of six
        self.optimizer = torch.optim.Adam([self.flat.vector], lr=config.learning_rate)
        self.updates = 0

    def update(self, sample: Sample) -> tuple[np.ndarray, dict[str, float]]:
        """One gradient step on a batch: (|TD errors| `[N]`, metrics)."""
        networks = self.online, self.target
        absolute, metrics = clipped_td_gradient(
            self.flat, networks, sample, self.config.double, self.config.max_gradient_norm
        )
        self.optimizer.step()
        self.updates += 1
        if self.updates % self.config.target_period == 0:
            self.target.load_state_dict(self.online.state_dict())
        return absolute, metrics

    def state_dict(self) -> dict[str, Any]:
        """Both networks, the optimiser and the count of updates."""
        return {
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]


def make_network(config: Config, envs: Envs) -> QNetwork:
    """A Q-network for the environment's observations and actions."""
    num_actions = require_discrete(envs, "dqn")
    shape = envs.observation_space.shape or ()
    return QNetwork(shape, num_actions, config.hidden_sizes, config.dueling)


def make_actor(envs: Envs, online: QNetwork, config: Config) -> Player:
    """Who plays: ε-greedily, as the online network says at the moment."""
    return Player(envs, online, config.n_step, config.discount, config.seed)


def make_replay(config: Config, envs: Envs) -> UniformReplay | PrioritizedReplay:
    """The replay memory that the config asks for; ValueError if it can never fit into memory."""
    row = 2 * envs.env_output.observation[0].nbytes + 16
    require_memory("replay_capacity", config.replay_capacity, row, f"of {config.env_id}")
    if not config.prioritized:
        return UniformReplay(config.replay_capacity, seed=config.seed)
    return PrioritizedReplay(
        config.replay_capacity,
        priority_exponent=config.priority_exponent,
        importance_exponent=config.importance_exponent,
        seed=config.seed,
    )


def load_policy(config: Config, parts: dict[str, Any]) -> GreedyPolicy:
    """The greedy policy of a checkpoint."""
    network = make_network(config, make_envs(config.env_id, 1, config.seed))
    network.load_state_dict(parts["learner"]["online"])
    return GreedyPolicy(network)


def learn(
    learner: Learner, replay: UniformReplay | PrioritizedReplay, config: Config, env_steps: int
) -> dict[str, float]:
    """Samples, updates, and writes the new priorities back."""
    if not isinstance(replay, PrioritizedReplay):
        return learner.update(replay.sample(config.batch_size))[1]
    beta = linear_schedule(
        env_steps, start=config.importance_exponent, end=1.0, steps=config.total_env_steps
    )
    sample = replay.sample(config.batch_size, importance_exponent=beta)
    priorities, metrics = learner.update(sample)
    replay.update_priorities(sample.keys, priorities + 1e-6)
    return metrics


def train(config: Config) -> Result:
    """Acts, remembers and learns in turns until the run is over."""
    torch.set_num_threads(config.torch_threads)
    torch.manual_seed(config.seed)
    lives = config.life_loss_ends
    envs = make_envs(config.env_id, config.num_envs, config.seed, life_loss_ends=lives)
    online, target = make_network(config, envs), make_network(config, envs)
    actor, learner, replay = (
        make_actor(envs, online, config),
        Learner(online, target, config),
        make_replay(config, envs),
    )
    parts = {"actor": actor, "learner": learner, "replay": replay}
    with Run("dqn", config, GreedyPolicy(online), parts) as run:
        while run.running():
            epsilon = linear_schedule(
                run.env_steps, start=1.0, end=config.epsilon_end, steps=config.epsilon_steps
            )
            transitions, env_steps = actor.step(epsilon)
            if transitions is not None and len(transitions.r_t):
                replay.add(transitions)
            due = actor.turns % config.update_period == 0
            learns = due and len(replay) >= config.learning_starts
            metrics = learn(learner, replay, config, run.env_steps) if learns else {}
            metrics |= {"epsilon": epsilon, "q_mean": actor.q_mean, "replay_size": len(replay)}
            sampled = learner.updates * config.batch_size
            metrics["replay_ratio"] = sampled / (run.env_steps + env_steps)
            run.record(
                env_steps=env_steps,
                learner_steps=int(learns),
                episodes=envs.episodes(),
                metrics=metrics,
            )
    envs.close()
    return run.result()
