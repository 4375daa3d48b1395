"""IMPALA: actors that play with parameters a little old, learners that correct for it by V-trace.

      ┌────────────────────────── driver ─────────────────────────┐
      │ in_flight: reference ──► who      queue: finished unrolls │
      └────▲───────────│──────────────────────│──────────▲────────┘
    report │           │ weights              │ unrolls, │ metrics,
   (small) │           ▼ (a reference)        │ unopened ▼ weights
        Actor 0 ── unroll [T+1, B], μ ──┐     ▼      Learner 0 ─┐
        Actor 1 ── unroll [T+1, B], μ ──┼────────►   Learner 1 ─┼─ gradients all-reduced
        Actor … ── unroll [T+1, B], μ ──┘            Learner … ─┘
                                     first in, first out

      who waits: an actor, when `unrolls_in_flight` of its unrolls have not gone to a learner;
                 the learners, when the queue holds less than a batch

This is A2C (Mnih et al., 2016) with: actors apart from learners, and V-trace for the difference
between the policy μ that acted and the policy π that learns (Espeholt et al., 2018, "IMPALA:
scalable distributed deep-RL with importance weighted actor-learner architectures"). Without lag
(update_rule "sync") V-trace gives n-step returns, and this is batched A2C.

Differs from the paper: an actor steps B copies of its environment at once (B = 1 there); what
bounds the lag is how much is in flight, where the paper has a queue; no reward or action is fed
back to the network; RMSProp's mean square begins at 0. Where tasks differ in shape they are padded.
An actor that dies is replaced; when a learner dies the run ends, and its checkpoint goes on.

Book: chapter 11
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.data import AgentOutput, Unroll, tree_map, tree_nbytes
from rlbook.harness import one_gpu
from rlbook.harness.config import RunConfig, above, at_least, within
from rlbook.harness.measures import mean_metrics
from rlbook.harness.run import Result, Run
from rlbook.parts.acting import Sampler, make_actor_critic, sampling_policy
from rlbook.parts.envs import Episode
from rlbook.parts.flat import Flat
from rlbook.parts.meter import Meter
from rlbook.parts.networks import LivePolicy
from rlbook.parts.on_device import on_host
from rlbook.parts.optim import RMSProp
from rlbook.parts.tasks import (
    common_shape,
    keep_returns,
    make_task_envs,
    row_bytes,
    task_policy,
    task_scores,
)
from rlbook.parts.unroll import collect_unroll
from rlbook.parts.unroll_replay import UnrollReplay, side_by_side
from rlbook.parts.vtrace_loss import vtrace_losses
from rlbook.plumbing.cluster import own_runtime
from rlbook.plumbing.devices import DeviceFields, autocast, compiled, device_here
from rlbook.plumbing.flow import Flow, Turn, Update, lag_metrics, remote_flow
from rlbook.plumbing.learner_group import Peer, Vector
from rlbook.plumbing.param_server import Bundle
from rlbook.plumbing.runtime import Runtime
from rlbook.plumbing.team import place_seed


@dataclass(frozen=True, kw_only=True)
class Config(DeviceFields, RunConfig):
    """Settings; the defaults solve CartPole-v1 in some seconds of training."""

    life_loss_ends: bool = False
    """Atari: the loss of a life is the end to the learner (it is in the paper)."""
    env_ids: tuple[str, ...] = ()
    """Tasks of a multi-task run, given to the actors in turn, `env_id` (which is evaluated) among
    them; empty for `env_id` alone."""
    num_actors: int = 2
    """Processes that act, each with `num_envs` copies (up to 500 in the paper, with one each)."""
    num_learners: int = 1
    """k, processes that learn together (1 or 8 in the paper)."""
    update_rule: Literal["async", "sync"] = "async"
    """"sync": actors wait for the update that their unrolls went into, as in batched A2C."""
    unrolls_in_flight: int = 2
    """Unrolls asked of an actor that have not gone to a learner: what bounds the lag."""
    updates_in_flight: int = 1
    """Batches at the learners at once; with 2 they never wait for the driver."""
    unrolls_per_batch: int = 1
    """Unrolls of one update, those from replay included (32 in the paper)."""
    broadcast_period: int = 1
    """Updates between two sets of parameters for the actors."""
    policy_delay: int = 0
    """Actors get parameters that are so many updates old: lag made on purpose, to study it."""
    max_policy_lag: int | None = None
    """Drop unrolls that are more updates old; None takes all."""
    correction: Literal["vtrace", "none"] = "vtrace"
    """"none" learns from old data as if it were new."""
    rho_bar: float = 1.0
    """ρ̄, clip of π/μ in the temporal differences and in the policy gradient."""
    c_bar: float = 1.0
    """c̄, clip of π/μ in the traces."""
    lambda_: float = 0.9
    """λ of the traces (1 in the paper; remark 2)."""
    unroll_length: int = 16
    """T (20 for Atari in the paper, 100 for DMLab)."""
    discount: float = 0.98
    """γ (0.99 in the paper)."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Over time and batch. The paper sums: its step size, clip and ε mean nothing with a mean."""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """RMSProp with ε inside the root, as in the paper; or Adam."""
    learning_rate: float = 4e-3
    """η (6e-4 for Atari in the paper)."""
    anneal_learning_rate: bool = False
    """η falls linearly to 0 over `total_env_steps`, as in the paper."""
    rmsprop_decay: float = 0.99
    """How much of the mean square is kept (0.99 in the paper)."""
    rmsprop_epsilon: float = 1e-5
    """ε inside the root (0.01 for Atari in the paper, 0.1 for DMLab; both with sums)."""
    value_cost: float = 0.5
    """Weight of the value loss ½ (V − v)² (0.5 in the paper)."""
    entropy_cost: float = 0.0
    """Weight of the entropy bonus (0.01 for Atari in the paper)."""
    max_gradient_norm: float = 0.5
    """The gradient is scaled down to this Euclidean norm (40 in the paper, of a sum)."""
    replay_unrolls: int = 0
    """Unrolls that the learners keep to learn from again (10,000 in the paper's replay variant)."""
    replay_fraction: float = 0.5
    """Part of a batch that is drawn from them, uniformly, if any are kept (0.5 in the paper)."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Fully connected layers of the torso (frames get convolutions)."""
    torso: Literal["nature", "resnet"] = "nature"
    """Convolutions for frames: of Mnih et al. (2015), or the paper's deep network (figure 3)."""
    lstm_size: int = 0
    """Cells of an LSTM between torso and heads (256 in the paper); 0 for none."""
    runtime: Literal["ray", "virtual"] = "ray"
    """Real processes, or the seeded virtual cluster."""
    ray_address: str | None = None
    """An existing Ray cluster to join; None starts one here."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        at_least(self, 1, "num_actors", "num_learners", "unrolls_in_flight", "updates_in_flight")
        at_least(self, 1, "unrolls_per_batch", "broadcast_period", "unroll_length")
        at_least(self, 0, "policy_delay", "replay_unrolls", "lstm_size", "max_gradient_norm")
        at_least(self, 0.0, "c_bar", "learning_rate", "value_cost", "entropy_cost")
        above(self, 0.0, "rho_bar", "rmsprop_epsilon")
        within(self, 0.0, 1.0, "discount", "lambda_", "rmsprop_decay", "replay_fraction")
        self.check_devices()
        if self.max_policy_lag is not None:  # what even unrolls with the newest parameters may have
            at_least(self, self.policy_delay + self.broadcast_period - 1, "max_policy_lag")
        most, fresh = self.num_actors * self.unrolls_in_flight, self.fresh_unrolls
        if not self.num_learners <= fresh <= most:
            raise ValueError(
                f"unrolls_per_batch: {fresh} new unrolls a batch must be one or more for each of"
                f" {self.num_learners} learners, and no more than the {most} ever in flight"
            )
        if self.update_rule == "sync" and (fresh, self.unrolls_in_flight) != (self.num_actors, 1):
            raise ValueError(
                'update_rule: "sync" learns from one unroll of every actor at once: it needs'
                " unrolls_in_flight 1 and num_actors unrolls_per_batch (besides replayed ones)"
            )
        if self.replay_unrolls and fresh == self.unrolls_per_batch:
            raise ValueError(f"replay_unrolls: of {fresh} unrolls_per_batch none is drawn there")
        wrong = self.env_id not in self.tasks or len(self.tasks) > self.num_actors
        if wrong or self.env_ids and self.stop_at_return is not None:
            raise ValueError(
                "env_ids: must hold env_id, have an actor for each task, and no stop_at_return"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks; actor i plays number i modulo their count."""
        return self.env_ids or (self.env_id,)

    @property
    def fresh_unrolls(self) -> int:
        """Unrolls of a batch that were not learnt from before."""
        drawn = self.replay_fraction if self.replay_unrolls else 0.0
        return max(1, round(self.unrolls_per_batch * (1 - drawn)))

    @property
    def all_envs(self) -> int:
        """Copies of the environment over all actors."""
        return self.num_actors * self.num_envs


PAPER = Config(  # table G.1, with the deep network of figure 3; a batch is 32 unrolls of one copy
    env_id="ALE/Pong-v5",
    life_loss_ends=True,
    torso="resnet",
    total_env_steps=50_000_000,
    num_envs=16,
    unrolls_per_batch=2,
    unroll_length=20,
    lambda_=1.0,
    discount=0.99,
    loss_reduction="sum",
    learning_rate=6e-4,
    anneal_learning_rate=True,
    rmsprop_epsilon=0.01,
    entropy_cost=0.01,
    max_gradient_norm=40.0,
)
MEMORY = Config(
    env_id="rlbook/Memory-v0",
    lstm_size=32,
    num_envs=16,
    unroll_length=20,
    unrolls_per_batch=2,
    optimizer="adam",
    learning_rate=5e-3,
)
PRESETS = {
    "default": Config(),
    "one_gpu": Config(**one_gpu.IMPALA),
    "throughput": Config(num_envs=128, unroll_length=20, updates_in_flight=2, learning_rate=2.5e-3),
    "paper": PAPER,
    "memory": MEMORY,
    "multitask": replace(
        MEMORY, env_id="rlbook/Catch-v0", env_ids=("rlbook/Catch-v0", "rlbook/Memory-v0")
    ),
}

COSTS = {"env_step": 25e-6, "inference": 25e-6, "learn": 2e-3, "apply": 0.1e-3}
"""Seconds of a unit of work on the virtual cluster, where none are given: one step of 32 copies of
CartPole, one forward pass of 32 rows, the gradient of one unroll of 512 rows, one step of the
optimiser. `units_of_work` measures them here."""


def loss_function(
    network: nn.Module, unroll: Unroll, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient, value and entropy with V-trace's targets; mean or sum over rows."""
    policy, value, entropy, rows = vtrace_losses(network, unroll, config)
    loss = policy + config.value_cost * value + config.entropy_cost * entropy
    if config.loss_reduction == "sum":
        loss = loss * rows
    return loss, {"loss": loss, "policy_loss": policy, "value_loss": value, "entropy": -entropy}


class Report(NamedTuple):
    """What the driver learns of an unroll; the unroll itself goes to a learner."""

    env_steps: int
    episodes: list[Episode]
    metrics: dict[str, float]


class Actor(Bundle):
    """Plays its task with the parameters that it is given.

    Args:
        config: of the system.
        index: actor 0 draws as the single process of chapter 04 does.
        born: how many actors were in this place before (they died): a new one draws anew.
        metered: report where the time went (of the wall, so never on a virtual clock).
    """

    parts = ("envs", "sampler")

    def __init__(self, config: Config, index: int, born: int = 0, metered: bool = False) -> None:
        torch.set_num_threads(1)
        seed = place_seed(config.seed, index, born)
        self.config, self.index = config, index
        lives = config.life_loss_ends
        self.envs = make_task_envs(config.tasks, index, config.num_envs, seed, lives)
        self.flat = Flat(network := make_network(config))
        self.sampler = Sampler(network, config.num_envs, np.random.default_rng([seed, 1]))
        self.meter = Meter(metered)
        self.meter.watch(self.envs, "step", "env")
        self.meter.watch(self.sampler, "act", "inference")

    def unroll(self, weights: Vector) -> tuple[Report, Unroll]:
        """T steps of B copies, with the recurrent state before them."""
        self.meter.begin()
        np.copyto(self.flat.vector.numpy(), weights.values)
        state = tree_map(Tensor.numpy, self.sampler.state)
        rows = collect_unroll(self.envs, self.act, self.config.unroll_length, pack=True)
        unroll = rows._replace(agent_state=state, actor=self.index, version=weights.version)
        env_steps = int(unroll.valid.sum())
        wire = tree_nbytes(unroll) + weights.values.nbytes
        metrics = {"bytes_per_env_step": wire / max(env_steps, 1), **self.meter.fractions()}
        return Report(env_steps, self.envs.episodes(), metrics), unroll

    def act(self, observation: np.ndarray) -> AgentOutput:
        """Samples an action for each copy."""
        return self.sampler.act(observation, self.envs.env_output.first)


class Learner(Peer):
    """Turns unrolls into updates: alone, or with its share of each batch among k."""

    def __init__(self, config: Config, rank: int = 0, metered: bool = False) -> None:
        torch.set_num_threads(config.torch_threads)
        network = make_network(config).to(device_here(config, rank))
        self.network = compiled(network, config)
        super().__init__(Flat(network), config, metered)
        self.optimizer = make_optimizer(config, self.flat)
        self.replay = UnrollReplay(config.replay_unrolls, place_seed(config.seed, rank, 0))
        drawn = config.unrolls_per_batch - config.fresh_unrolls
        self.drawn = len(range(rank, drawn, config.num_learners))

    def backward(self, *unrolls: Unroll) -> tuple[float, dict[str, Any]]:
        """Of the loss on these unrolls and on replayed ones."""
        chosen = [*unrolls, *self.replay.draw(self.drawn)]
        self.replay.add(unrolls)
        batch = side_by_side(chosen, self.device)
        with autocast(self.config, self.device):
            loss, metrics = loss_function(self.network, batch, self.config)
        self.flat.gradients.zero_()
        loss.backward()
        weight = float(batch.valid.sum()) if self.average else 1.0
        return weight, metrics

    def step(self, env_steps: int) -> dict[str, Any]:
        """One step of the optimiser; `env_steps` of all actors decide its size."""
        norm = self.flat.clipped(self.config.max_gradient_norm)
        if self.config.anneal_learning_rate:
            left = max(0.0, 1 - env_steps / self.config.total_env_steps)
            self.optimizer.param_groups[0]["lr"] = left * self.config.learning_rate
        self.optimizer.step()
        return {"gradient_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimiser and replay."""
        optimizer, replay = on_host(self.optimizer.state_dict()), self.replay.state_dict()
        return super().state_dict() | {"optimizer": optimizer, "replay": replay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay.load_state_dict(state["replay"])


def turn(flow: Flow, env_steps: int) -> Turn:
    """The driver's part: whatever can go on goes on, then it waits for whoever is first."""
    while flow.has_batch():
        flow.learn(env_steps)  # references to the oldest unrolls, and who made them is free
    while flow.free:
        flow.act()  # with the newest weights there are
    return flow.first()


def book(run: Run, turns: list[Turn], flow: Flow) -> None:
    """Enters what turns brought into the run's books."""
    run.extra["unrolls_dropped"] = flow.dropped
    for asked, metrics in turns:
        if isinstance(asked, Update):
            acted = mean_metrics([unroll.report.metrics for unroll in asked.batch])
            metrics = acted | (metrics or {}) | lag_metrics(run.extra, asked)
            run.record(env_steps=0, learner_steps=1, metrics=metrics | task_scores(run.extra))
        elif asked.report is not None:
            env_steps, episodes, _ = asked.report
            keep_returns(run.extra, run.config.tasks, asked.actor, episodes)
            run.record(env_steps=env_steps, episodes=episodes)


def units_of_work(config: Config) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts."""
    actor, learner, actions = Actor(config, 0), Learner(config), np.zeros(config.num_envs, int)
    learner.drawn = 0  # "learn" is of one unroll, new or not
    _, unroll = actor.unroll(learner.weights())
    share = learner.gradient(unroll)
    return {
        "env_step": lambda: actor.envs.step(actions),
        "inference": lambda: actor.act(actor.envs.env_output.observation),
        "learn": lambda: learner.gradient(unroll),
        "apply": lambda: learner.apply([0], share),
    }


def make_optimizer(config: Config, flat: Flat) -> torch.optim.Optimizer:
    """Of all parameters as one vector: one step instead of eight."""
    if config.optimizer == "adam":
        return torch.optim.Adam([flat.vector], lr=config.learning_rate)
    decay, epsilon = config.rmsprop_decay, config.rmsprop_epsilon
    return RMSProp([flat.vector], lr=config.learning_rate, alpha=decay, eps=epsilon)


def make_network(config: Config) -> Any:
    """A network for the tasks' observations and actions, with or without memory."""
    observation, num_actions, _ = common_shape(config.tasks, "impala")
    torch.manual_seed(config.seed)
    sizes = config.hidden_sizes, config.lstm_size, config.torso
    return make_actor_critic(observation, num_actions, *sizes)


def make_policy(config: Config, network: nn.Module) -> Any:
    """The policy that plays `env_id`."""
    return task_policy(sampling_policy(network), config.env_id, config.tasks)


def load_policy(config: Config, parts: dict[str, Any]) -> Any:
    """The policy of a checkpoint."""
    network = make_network(config)
    np.copyto(Flat(network).vector.numpy(), parts["learners"]["learners"][0]["parameters"])
    return make_policy(config, network)


def train(config: Config, runtime: Runtime | None = None) -> Result:
    """Actors play, learners learn, until the run is over.

    Args:
        config: settings.
        runtime: an open one to run on; by default one of its own, as `config` says.
    """
    torch.set_num_threads(config.torch_threads)
    vector = Flat(network := make_network(config)).vector.numpy()
    own = own_runtime(config, config.num_actors + config.num_learners, COSTS)
    with own if runtime is None else nullcontext(runtime) as rt:
        report = Report(config.unroll_length * config.num_envs, [], {})
        flow = remote_flow(
            rt, Actor, Learner, config, vector, report, row_bytes(config.tasks, True)
        )
        learners = flow.learners
        policy = LivePolicy(
            make_policy(config, network), lambda: np.copyto(vector, learners.parameters())
        )
        parts = {"flow": flow, "actors": flow.actors, "learners": learners, "runtime": rt}
        with Run("impala", config, policy, parts, lambda: rt.now, checkpoints="asked") as run:
            while run.running():
                book(run, [turn(flow, run.env_steps)], flow)
                if run.checkpoint_due():
                    book(run, flow.drain(run.env_steps), flow)
                    run.checkpoint()
            book(run, flow.drain(run.env_steps), flow)
            policy.initial_state(1)
        run.trace(rt.timeline())
    policy.refresh = None  # nobody is left to ask
    return run.result()
