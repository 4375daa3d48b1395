"""SEED RL: workers only step environments; one server acts for all of them, and learns.

    EnvWorker 0 ─ rows ──►┌───────────────── server ──────────────────┐
      envs, no network    │ Inference: batches of rows, slots with    │
             ◄─ actions ──│   recurrent state; one forward pass       │
    EnvWorker 1 ─ rows ──►│      │ unrolls [T+1, B], μ,     ▲         │
             ◄─ actions ──│      ▼ a version for each step  │ weights │
    EnvWorker … ─ rows ──►│ Learner: V-trace                ┘         │
             ◄─ actions ──└───────────────────────────────────────────┘

    wiring "unix", "tcp"   one gRPC stream a worker; the server's thread acts, the driver's learns
    wiring "calls"         rows and actions as references that a driver conducts: Ray, virtual clock

    learner "vtrace"       IMPALA's: each unroll once
    learner "r2d2"         R2D2's, on the same service: ε-greedy by Q, unrolls cut into sequences
                           and kept at the learner, which draws from them as often as new ones come

    who waits: a worker, for its actions: until there is a batch, or the time-out; and when
               `unrolls_in_flight` of its unrolls are not yet learnt from

This is IMPALA with: inference at the learner instead of in the actors (Espeholt et al., 2020, "SEED
RL: scalable and efficient deep-RL with accelerated central inference"). Observations travel, and
actions; parameters never do. They may change within an unroll, so that each step has its version.
Without lag (update_rule "sync") its updates are IMPALA's, and with replay R2D2's.

Differs from the paper: batches have a time-out besides their size; a worker's copies are vectors
that step at once (`groups` of them in turn); the time limit of an episode is no termination, so
that no "abandoned" steps are needed; inference and learner share processor cores.

Book: chapter 13
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.data import Unroll
from rlbook.harness import one_gpu
from rlbook.harness.config import RunConfig, above, at_least, at_most, within
from rlbook.harness.measures import mean_metrics
from rlbook.harness.run import Result, Run
from rlbook.parts.acting import make_actor_critic, sampling_policy
from rlbook.parts.central_acting import CentralQ, CentralSampler
from rlbook.parts.envs import Envs, make_envs
from rlbook.parts.flat import Flat
from rlbook.parts.networks import LivePolicy
from rlbook.parts.on_device import on_host
from rlbook.parts.optim import RMSProp
from rlbook.parts.recurrent_q import make_q_network, q_policy
from rlbook.parts.tasks import common_shape, row_bytes
from rlbook.parts.unroll_replay import side_by_side
from rlbook.parts.vtrace_loss import vtrace_losses
from rlbook.plumbing.central import Turn, Update, check_waits
from rlbook.plumbing.central_calls import CentralServer, called
from rlbook.plumbing.cluster import own_runtime
from rlbook.plumbing.devices import (
    DeviceFields,
    autocast,
    compiled,
    device_here,
    own_device,
    refuse_devices,
)
from rlbook.plumbing.inference import Inference, Who
from rlbook.plumbing.learner_group import Peer
from rlbook.plumbing.runtime import Runtime
from rlbook.plumbing.sequence_learner import SequenceFields, SequencePeer, scored
from rlbook.plumbing.streamed import StreamWorker, streamed
from rlbook.plumbing.streams import StreamFields
from rlbook.plumbing.team import place_seed
from rlbook.plumbing.transport import Schema


@dataclass(frozen=True, kw_only=True)
class Config(StreamFields, SequenceFields, DeviceFields, RunConfig):
    """Settings; the defaults solve CartPole-v1 in some seconds of training."""

    learner: Literal["vtrace", "r2d2"] = "vtrace"
    """IMPALA's; or R2D2's: a Q-network, and replay at the learner (see `SequenceFields`)."""

    num_envs: int = 64
    """Copies of the environment that a group steps together (B; 1 in most of the paper)."""
    wiring: Literal["unix", "tcp", "calls"] = "unix"
    """gRPC over a unix socket or over TCP, or calls of a runtime."""
    num_workers: int = 2
    """Processes that step environments (up to 610 in the paper)."""
    groups: int = 1
    """Groups of `num_envs` copies that a worker steps in turn: one while it waits for another's
    actions. On streams alone."""
    inference_batch: int = 64
    """Rows that make a batch (32 to 64 in the authors' settings)."""
    num_inference: int = 1
    """Servers that act: k, of which number i modulo k acts for worker i."""
    inference_devices: tuple[str, ...] = ()
    """Where the servers are, in turn; empty: beside the learner, on a stream of their own."""
    inference_timeout_s: float | None = 0.005
    """A smaller batch is acted upon when its oldest row has waited so long; None: never."""
    update_rule: Literal["async", "sync"] = "async"
    """"sync": a worker goes on when the update is made that its unroll went into."""
    unrolls_in_flight: int = 2
    """Unrolls of a group, begun or finished and not yet learnt from: what bounds the lag."""
    unrolls_per_batch: int = 1
    """Unrolls of one update."""
    updates_in_flight: int = 1
    """With calls: batches at the learners at once."""
    num_learners: int = 1
    """With calls: k, processes that learn together."""
    correction: Literal["vtrace", "none"] = "vtrace"
    """"none" learns from old data as if it were new."""
    rho_bar: float = 1.0
    """ρ̄, clip of π/μ in the temporal differences and in the policy gradient."""
    c_bar: float = 1.0
    """c̄, clip of π/μ in the traces."""
    lambda_: float = 0.9
    """λ of the traces."""
    unroll_length: int = 16
    """T."""
    discount: float = 0.98
    """γ (0.99 in the paper)."""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """Over time and batch."""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """RMSProp with ε inside the root, or Adam."""
    learning_rate: float = 8e-3
    """η."""
    anneal_learning_rate: bool = False
    """η falls linearly to 0 over `total_env_steps`."""
    rmsprop_decay: float = 0.99
    """How much of the mean square is kept."""
    rmsprop_epsilon: float = 1e-5
    """ε inside the root."""
    value_cost: float = 0.5
    """Weight of the value loss ½ (V − v)²."""
    entropy_cost: float = 0.0
    """Weight of the entropy bonus."""
    max_gradient_norm: float = 0.5
    """The gradient is scaled down to this Euclidean norm."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Fully connected layers of the torso (frames get convolutions)."""
    torso: Literal["nature", "resnet"] = "nature"
    """Convolutions for frames: of Mnih et al. (2015), or IMPALA's deep network."""
    lstm_size: int = 0
    """Cells of an LSTM between torso and heads; 0 for none."""
    runtime: Literal["ray", "virtual"] = "ray"
    """With calls: real processes, or the seeded virtual cluster."""
    ray_address: str | None = None
    """With calls: an existing Ray cluster to join; None starts one here."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        at_least(self, 1, "num_workers", "groups", "inference_batch", "unrolls_in_flight")
        at_least(self, 1, "num_inference")
        at_most(self, "num_inference", "num_workers")
        at_least(self, 1, "unrolls_per_batch", "updates_in_flight", "num_learners", "unroll_length")
        at_least(self, 0.0, "c_bar", "learning_rate", "value_cost", "entropy_cost", "lstm_size")
        above(self, 0.0, "rho_bar", "rmsprop_epsilon", "max_gradient_norm", "silence_s")
        within(self, 0.0, 1.0, "discount", "lambda_", "rmsprop_decay", "scored_fraction")
        self.check_devices()
        refuse_devices("inference_devices", self.inference_devices, here=self.ray_address is None)
        if self.inference_timeout_s is not None:
            at_least(self, 0.0, "inference_timeout_s")
        if self.wiring == "calls" and self.groups > 1:
            raise ValueError("groups: must be 1 with calls; more workers do the same")
        if self.num_learners > 1 and (self.wiring != "calls" or self.learner == "r2d2"):
            raise ValueError('num_learners: more than one needs wiring "calls", learner "vtrace"')
        self.check_streams()
        check_waits(self)
        if self.learner == "r2d2":
            self.check_sequences()

    @property
    def all_envs(self) -> int:
        """Copies of the environment over all workers."""
        return self.num_workers * self.groups * self.num_envs

    broadcast_period = 1
    """Updates between two sets of parameters for the server: they only change hands."""
    policy_delay = 0


PRESETS = {
    "default": Config(),
    "one_gpu": Config(**one_gpu.SEED_RL),
    "throughput": Config(num_envs=128, inference_batch=128, unroll_length=20),
    # V-trace with IMPALA's values for Atari; on Atari the paper itself ran R2D2 (learner "r2d2").
    "paper": Config(
        env_id="ALE/Pong-v5",
        total_env_steps=50_000_000,
        num_workers=4,
        num_envs=8,
        inference_batch=16,
        unrolls_per_batch=4,
        unroll_length=20,
        lambda_=1.0,
        discount=0.99,
        loss_reduction="sum",
        learning_rate=6e-4,
        anneal_learning_rate=True,
        rmsprop_epsilon=0.01,
        entropy_cost=0.01,
        max_gradient_norm=40.0,
    ),
    "memory": Config(
        env_id="rlbook/Memory-v0",
        lstm_size=32,
        num_envs=16,
        inference_batch=16,
        unroll_length=20,
        optimizer="adam",
    ),
    "r2d2": Config(
        env_id="rlbook/Memory-v0",
        learner="r2d2",
        num_envs=8,
        inference_batch=16,
        unroll_length=20,
        discount=0.99,
        learning_rate=1e-3,
        max_gradient_norm=40.0,
        hidden_sizes=(32,),
        lstm_size=32,
    ),
}

COSTS = {"env_step": 30e-6, "batch": 30e-6, "inference": 40e-6, "learn": 2.5e-3, "apply": 0.1e-3}
"""Seconds of a unit of work on the virtual cluster, where none are given: one step of 64 copies of
CartPole; a forward pass, and what comes to it for each 64 rows; the gradient of one unroll of 1024
rows; one step of the optimiser. `units_of_work` measures them here."""


def loss_function(
    network: nn.Module, unroll: Unroll, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient, value and entropy with V-trace's targets; mean or sum over rows."""
    policy, value, entropy, rows = vtrace_losses(network, unroll, config)
    loss = policy + config.value_cost * value + config.entropy_cost * entropy
    if config.loss_reduction == "sum":
        loss = loss * rows
    return loss, {"loss": loss, "policy_loss": policy, "value_loss": value, "entropy": -entropy}


class EnvWorker(StreamWorker):
    """Steps environments and knows nothing of networks.

    Args:
        config: of the system.
        index: of the worker.
        born: how many workers were in this place before (they died): a new one begins anew.
    """

    def __init__(self, config: Config, index: int, born: int = 0) -> None:
        places = range(index * config.groups, (index + 1) * config.groups)
        seeds = [place_seed(config.seed, place, born) for place in places]
        super().__init__(index, [make_game(config, config.num_envs, seed) for seed in seeds])


def make_inference(config: Config, index: int = 0) -> Inference:
    """What acts: a network of its own, whose draws are those of IMPALA's (R2D2's) actors."""
    flat = Flat(network := make_network(config))
    devices = config.inference_devices or config.device.split(",")
    device, replays = own_device(devices[index % len(devices)], index), config.learner == "r2d2"
    kind = partial(CentralQ, epsilon=config.epsilons) if replays else CentralSampler
    agent, seed = kind(network, device=str(device)), partial(place_seed, config.seed)
    planes = 1 if replays else make_game(config, 1, config.seed).planes
    return Inference(agent, flat.vector.numpy(), config.unroll_length, seed, planes)


class Server(CentralServer):
    """With calls: a process that acts."""

    def __init__(self, config: Config, index: int = 0) -> None:
        torch.set_num_threads(config.torch_threads)
        vars(self).update(vars(make_inference(config, index)))


class Learner(Peer):
    """Turns unrolls into updates: alone, or with its share of each batch among k."""

    def __init__(self, config: Config, rank: int = 0, metered: bool = False) -> None:
        torch.set_num_threads(config.torch_threads)
        network = make_network(config).to(device_here(config, rank))
        self.network = compiled(network, config)
        super().__init__(Flat(network), config, metered)
        self.optimizer = make_optimizer(config, self.flat)

    def backward(self, *unrolls: Unroll) -> tuple[float, dict[str, Any]]:
        """Of the loss on these unrolls."""
        batch = side_by_side(unrolls, self.device)
        with autocast(self.config, self.device):
            loss, metrics = loss_function(self.network, batch, self.config)
        self.flat.gradients.zero_()
        loss.backward()
        weight = float(batch.valid.sum()) if self.average else 1.0
        return weight, metrics

    def step(self, env_steps: int) -> dict[str, Any]:
        """One step of the optimiser; `env_steps` of all workers decide its size."""
        norm = self.flat.clipped(self.config.max_gradient_norm)
        if self.config.anneal_learning_rate:
            left = max(0.0, 1 - env_steps / self.config.total_env_steps)
            self.optimizer.param_groups[0]["lr"] = left * self.config.learning_rate
        self.optimizer.step()
        return {"gradient_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Parameters and optimiser."""
        return super().state_dict() | {"optimizer": on_host(self.optimizer.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])


class SequenceLearner(SequencePeer):
    """R2D2's: fits a Q-network to sequences from replay, as often as new ones come."""

    def __init__(self, config: Config, rank: int = 0, metered: bool = False) -> None:
        torch.set_num_threads(config.torch_threads)
        online, target = (make_network(config).to(device_here(config, rank)) for _ in range(2))
        super().__init__(compiled(online, config), compiled(target, config), config, metered)


LEARNERS: dict[str, Any] = {"vtrace": Learner, "r2d2": SequenceLearner}


def book(run: Run, turns: list[Turn], dropped: int) -> None:
    """Enters what turns brought into the run's books."""
    run.extra["unrolls_dropped"] = dropped
    for came, metrics in turns:
        if isinstance(came, Update):
            seen = Counter(run.extra.get("policy_lag", {})) + came.lags
            run.extra["policy_lag"] = dict(sorted(seen.items()))
            acted = mean_metrics([one.report.metrics for one in came.batch])
            found = acted | (metrics or {}) | came.lag_metrics
            steps = int(found.pop("learner_steps", 1))
            run.record(env_steps=0, learner_steps=steps, metrics=found)
        else:
            run.record(env_steps=came.report.env_steps, episodes=scored(run.config, came))


def units_of_work(config: Config) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts."""
    worker, server = EnvWorker(config, 0), make_inference(config)
    learner = LEARNERS[config.learner](config)
    action, unroll, row = np.zeros(config.num_envs, int), None, worker.here()[1]
    while unroll is None:
        unroll = server.observe(Who(0, 0), row)
        action = server.act([0])[0]
        row = worker.step(action)[1]
    act, rng = server.agent.act, np.random.default_rng(0)
    state, single = map(server.agent.initial_state, (config.num_envs, 1))
    share = learner.gradient(unroll)
    return {
        "env_step": lambda: worker.step(action),
        "learn": lambda: learner.gradient(unroll),
        "apply": lambda: learner.apply([0], share),
        "batch": lambda: act(row.observation[:1], row.first[:1], single, [(rng, 1, 0)]),
        "inference": lambda: act(row.observation, row.first, state, [(rng, config.num_envs, 0)]),
    }


def make_optimizer(config: Config, flat: Flat) -> torch.optim.Optimizer:
    """Of all parameters as one vector."""
    if config.optimizer == "adam":
        return torch.optim.Adam([flat.vector], lr=config.learning_rate)
    decay, epsilon = config.rmsprop_decay, config.rmsprop_epsilon
    return RMSProp([flat.vector], lr=config.learning_rate, alpha=decay, eps=epsilon)


def make_game(config: Config, num_envs: int, seed: int) -> Envs:
    """Copies of the environment; where values are rescaled, rewards are not clipped."""
    rescales = config.learner == "r2d2" and config.rescaling_epsilon is not None
    return make_envs(config.env_id, num_envs, seed, reward_clip=np.inf if rescales else None)


def make_network(config: Config) -> Any:
    """A network for the task's observations and actions, with or without memory."""
    seen, num_actions, _ = common_shape((config.env_id,), "seed_rl")
    torch.manual_seed(config.seed)
    sizes = config.hidden_sizes, config.lstm_size
    if config.learner == "r2d2":
        return make_q_network(seen, num_actions, *sizes, config.dueling, config.torso)
    return make_actor_critic(seen, num_actions, *sizes, config.torso)


def make_policy(config: Config, network: nn.Module) -> Any:
    """What is evaluated: draws from the policy, or the best action."""
    return q_policy(network) if config.learner == "r2d2" else sampling_policy(network)


def load_policy(config: Config, parts: dict[str, Any]) -> Any:
    """The policy of a checkpoint."""
    network = make_network(config)
    learners = (
        [parts["streams"]["learner"]] if "streams" in parts else parts["learners"]["learners"]
    )
    np.copyto(Flat(network).vector.numpy(), learners[0]["parameters"])
    return make_policy(config, network)


def on_streams(config: Config, stack: ExitStack) -> Any:
    """The first wiring: gRPC, with server and learner here."""
    game = make_game(config, config.num_envs, config.seed)
    schema = Schema.of(game.env_output, game.stacked)
    servers = [make_inference(config, index) for index in range(config.num_inference)]
    learner, settings = LEARNERS[config.learner](config, 0, True), config.stream_settings(schema)
    return streamed(stack, EnvWorker, servers, schema, learner, config, settings)


def by_calls(config: Config, parameters: np.ndarray, runtime: Runtime) -> Any:
    """The second wiring: workers, server and learners on a runtime."""
    parts = EnvWorker, Server, LEARNERS[config.learner]
    tasks = (config.env_id,)
    sizes = row_bytes(tasks), row_bytes(tasks, packed=config.learner == "vtrace")
    return called(runtime, *parts, config, parameters, sizes)


def train(config: Config, runtime: Runtime | None = None) -> Result:
    """Workers step, the server acts and learns, until the run is over.

    Args:
        config: settings.
        runtime: with calls an open one to run on; by default one of its own.
    """
    torch.set_num_threads(config.torch_threads)
    vector = Flat(network := make_network(config)).vector.numpy()
    with ExitStack() as stack:
        if config.wiring == "calls":
            cores = config.num_workers + config.num_learners + config.num_inference
            own: Any = own_runtime(config, cores, COSTS)
            wiring = by_calls(config, vector, runtime or stack.enter_context(own))
        else:
            wiring = on_streams(config, stack)
        live = make_policy(config, network)
        policy = LivePolicy(live, lambda: np.copyto(vector, wiring.pull()))
        parts, clock = wiring.parts, lambda: wiring.now
        with Run("seed_rl", config, policy, parts, clock, checkpoints="asked") as run:
            while run.running():
                book(run, wiring.turn(run.env_steps), wiring.dropped)
                if run.checkpoint_due():
                    book(run, wiring.drain(run.env_steps), wiring.dropped)
                    run.checkpoint()
            book(run, wiring.drain(run.env_steps), wiring.dropped)
            policy.initial_state(1)
        run.trace(wiring.timeline())
    policy.refresh = None  # nobody is left to ask
    return run.result()
