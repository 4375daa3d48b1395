"""DPPO: distributed proximal policy optimisation, with a parameter server or by all-reduce.

    wiring "parameter_server"                     wiring "all_reduce"

    ┌────────── Shards: θ, Adam ──────────┐       Worker 0 ◄──────► Worker 1     each with θ, Adam,
    └──▲───────────┬──────────▲────────┬──┘           ▲  ╲            ╱  ▲       envs, rollout
       │ gradient  │ θ        │        │              │    ╲        ╱    │
       │           ▼          │        ▼              ▼      ╲    ╱      ▼
      Worker 0 (envs,       Worker 1 …            Worker 2 ◄──────► Worker 3     no server:
      rollout)                                                                   Σ over all

    a round:  each collects T steps of B copies · GAE · statistics of advantages, merged over all
              for each epoch and minibatch:  mean gradient of all samples · one Adam step

This is PPO (chapter 04) with: rollouts and gradients on N workers, averaged at a parameter server,
who waits for all (Heess et al., 2017, "Emergence of locomotion behaviours in rich environments";
"async" to compare), or by all-reduce without a server (Wijmans et al., 2020, "DD-PPO: learning
near-perfect PointGoal navigators from 2.5 billion frames"), with DD-PPO's preemption: a rollout is
cut short when most others have finished theirs. Gradients count by their samples and
advantages are normalised over all workers: N workers with B/N copies each do what one does with B.

Worker i learns on GPU i of its computer (`device` "cuda"), in bfloat16 and compiled on request. Its
convolutions act there too; a small network acts as a copy on the host. torchrun may start the
workers instead, on several hosts too (see `plumbing/torchrun.py`).

Differs from the papers: the clipped objective, where DPPO penalises KL(old ‖ new); feed-forward
networks, where both have LSTMs; advantages are normalised unless `normalize_advantages` is False;
rollouts in proportion to the workers' speeds on request (`balance`).

Book: chapter 09
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.data import AgentOutput
from rlbook.harness import one_gpu
from rlbook.harness.config import RunConfig, above, at_least, within
from rlbook.harness.measures import mean_metrics
from rlbook.harness.run import Result, Run
from rlbook.maths.losses import clipped_surrogate_loss, entropy_loss, log_prob, value_loss
from rlbook.maths.moments import moments
from rlbook.parts.acting import Sampler
from rlbook.parts.actor_copy import ActorCopy
from rlbook.parts.envs import Envs, Episode, make_envs, require_discrete
from rlbook.parts.flat import Flat
from rlbook.parts.meter import Meter
from rlbook.parts.minibatches import Minibatches
from rlbook.parts.networks import ActorCritic, LivePolicy, SamplingPolicy
from rlbook.parts.normalizer import Normalized
from rlbook.parts.on_device import numbers, there, widened
from rlbook.parts.surrogate import Batch, make_batch
from rlbook.parts.unroll import collect_unroll, joined
from rlbook.plumbing import param_server
from rlbook.plumbing.cluster import own_runtime
from rlbook.plumbing.devices import DeviceFields, autocast, compiled
from rlbook.plumbing.group import Adder, GroupBroken, Member, held
from rlbook.plumbing.lockstep import Conducted, Lockstep
from rlbook.plumbing.runtime import Runtime
from rlbook.plumbing.served_rounds import ServedRounds, in_pieces
from rlbook.plumbing.shard import Gradient, ServerSettings, Weights, fates, put_weights
from rlbook.plumbing.team import place_seed


@dataclass(frozen=True, kw_only=True)
class Config(DeviceFields, RunConfig):
    """Settings; the defaults solve CartPole-v1 in a second or two of training."""

    wiring: Literal["all_reduce", "parameter_server"] = "all_reduce"
    """Who adds up the gradients: the workers among themselves, or a server."""
    num_workers: int = 2
    """N, processes that act and learn (64 GPUs in DD-PPO's longest run); torchrun's ranks."""
    num_envs: int = 32
    """B, copies of each worker (4 in DD-PPO)."""
    update_rule: Literal["sync", "async"] = "sync"
    """With a server: each gradient waits for all, or is applied as it comes."""
    num_shards: int = 1
    """With a server: k, shards that hold a slice of the parameters each."""
    preempt: bool = False
    """With all-reduce: cut a rollout short when most others have finished theirs (DD-PPO)."""
    sync_fraction: float = 0.6
    """Part of the others that must have finished (60 % in DD-PPO)."""
    short_rollout: float = 0.25
    """Part of its steps that a worker takes in any case (25 % in DD-PPO)."""
    balance: bool = False
    """Lengths of rollouts in proportion to the workers' measured speeds."""
    unroll_length: int = 32
    """T, steps of each copy between updates (128 in DD-PPO); the mean of all with `balance`."""
    epochs: int = 4
    """Passes over each rollout (2 in DD-PPO)."""
    minibatch_size: int = 1024
    """Samples of one gradient, of all workers together, in a rollout of full length."""
    discount: float = 0.98
    """γ (0.99 in both papers)."""
    gae_lambda: float = 0.8
    """λ of GAE (0.95 in DD-PPO)."""
    clip: float = 0.2
    """ε: the ratio counts only within [1 − ε, 1 + ε] (0.2 in DD-PPO)."""
    normalize_advantages: bool = True
    """Bring the advantages of each minibatch, of all workers, to mean 0 and deviation 1."""
    normalize_observations: bool = False
    """Bring observations to mean 0 and deviation 1, by statistics of all workers."""
    learning_rate: float = 4e-3
    """Adam's step size (2.5e-4 in DD-PPO)."""
    value_cost: float = 0.25
    """Weight of the value loss ½ (V − target)²."""
    entropy_cost: float = 0.0
    """Weight of the entropy bonus (0.01 in DD-PPO)."""
    max_gradient_norm: float = 0.5
    """The mean gradient is scaled down to this Euclidean norm."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Fully connected layers of the torso."""
    torso: Literal["nature", "resnet"] = "nature"
    """Convolutions for frames: of Mnih et al. (2015), or a residual network, as DD-PPO has one."""
    runtime: Literal["ray", "virtual"] = "ray"
    """Real processes (Ray's with a server), or the seeded virtual cluster."""
    ray_address: str | None = None
    """With a server: an existing Ray cluster to join; None starts one here."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        self.check_devices()
        at_least(self, 1, "num_workers", "num_shards", "unroll_length", "epochs", "minibatch_size")
        within(self, 0.0, 1.0, "discount", "gae_lambda", "sync_fraction", "short_rollout")
        above(self, 0.0, "clip")
        at_least(self, 0.0, "learning_rate", "value_cost", "entropy_cost", "max_gradient_norm")
        if self.preempt and self.wiring != "all_reduce":
            raise ValueError('preempt: needs the wiring "all_reduce"')
        if self.update_rule == "async" and (self.wiring != "parameter_server" or self.balance):
            raise ValueError('update_rule: "async" needs a parameter server, and balance False')

    @property
    def all_envs(self) -> int:
        """Copies of the environment over all workers."""
        return self.num_workers * self.num_envs

    @property
    def parts(self) -> int:
        """Minibatches of an epoch: the same number on every worker, however long its rollout."""
        return max(1, round(self.all_envs * self.unroll_length / self.minibatch_size))

    @property
    def minibatches(self) -> int:
        """Updates of a round."""
        return self.epochs * self.parts


PRESETS = {
    "default": Config(),
    "one_gpu": Config(**one_gpu.DPPO),
    "parameter_server": Config(wiring="parameter_server"),
    "async": Config(wiring="parameter_server", update_rule="async"),
    "paper": Config(
        preempt=True,
        unroll_length=128,
        num_envs=4,
        epochs=2,
        minibatch_size=512,
        discount=0.99,
        gae_lambda=0.95,
        learning_rate=2.5e-4,
        entropy_cost=0.01,
        value_cost=0.5,
        normalize_advantages=False,
    ),
}

COSTS = {
    "env_step": 25e-6,
    "inference": 90e-6,
    "learn": 1.2e-3,
    "add": 20e-6,
} | param_server.SERVER_COSTS
"""Seconds of a unit of work on the virtual cluster; `units_of_work` measures them here."""


def loss_function(
    network: nn.Module, batch: Batch, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped surrogate, value and entropy; `batch.advantage` is normalised already."""
    with autocast(config, batch.action.device):
        logits, values = map(widened, network(batch.observation))
    policy, metrics = clipped_surrogate_loss(
        log_probs=log_prob(logits, batch.action),
        behaviour_log_probs=batch.behaviour_log_prob,
        advantages=batch.advantage,
        clip=config.clip,
    )
    value = value_loss(values=values, targets=batch.target)
    entropy = entropy_loss(logits=logits)
    loss = policy + config.value_cost * value + config.entropy_cost * entropy
    named = {"loss": loss, "policy_loss": policy, "value_loss": value, "entropy": -entropy}
    return loss, {**named, **metrics}


class Report(NamedTuple):
    """What the driver learns of a round, or of one call of it."""

    env_steps: int
    updates: int
    """Made by this worker since the run began; 0 with a server."""
    episodes: list[Episode]
    metrics: dict[str, float]


class Statistics(NamedTuple):
    """What workers tell each other of their rollouts: float64."""

    advantages: np.ndarray
    """`[3, epochs × parts]`: count, mean and squares of each minibatch's advantages."""
    observations: np.ndarray
    """`[3, ...]`, of the observations; empty where they are not normalised."""
    pace: np.ndarray
    """(steps, seconds)."""


class Worker(Member):
    """Acts, and learns with the others.

    Args:
        config: of the system.
        index: worker 0 draws as the single process of chapter 04 does.
        born: how many workers were in this place before (they died): a new one draws anew.
        meter: report where the time went (of the wall, so never on a virtual clock).
        board: a `Board`, where all note who has finished the rollout; or None.
    """

    def __init__(
        self, config: Config, index: int, born: int = 0, meter: bool = False, board: Any = None
    ) -> None:
        torch.set_num_threads(1)
        seed = place_seed(config.seed, index, born)
        super().__init__(config, index, board)
        self.config, self.envs = config, make_envs(config.env_id, config.num_envs, seed)
        self.network: Any = make_network(config, self.envs).to(self.device)
        self.flat, rate = Flat(self.network), config.learning_rate
        self.optimizer = torch.optim.Adam([self.flat.vector], lr=rate, fused=True)
        self.actor = ActorCopy(self.network, self.device)
        compiled(self.network, config)
        rng = np.random.default_rng([seed, 1])
        self.sampler = Sampler(self.actor.network, config.num_envs, rng)
        self.rng = np.random.default_rng([seed, 2])
        self.minibatches: Minibatches | None = None
        self.metrics: dict[str, Any] = {}
        self.meter = Meter(meter)
        self.meter.watch(self.envs, "step", "env")
        self.meter.watch(self.sampler, "act", "inference")
        self.meter.watch(self, "differentiate", "gradient")

    def collect(self, steps: int, cut: Callable[[int], bool] | None = None) -> None:
        """So many steps more of all copies."""
        if self.collected is None:
            self.meter.begin()
            if self.config.normalize_observations:
                self.network.normalizer.renew()
            self.actor.refresh()
        more, before = collect_unroll(self.envs, self.act, steps, cut), self.collected
        self.collected = more if before is None else joined(before, more)

    def act(self, observation: np.ndarray) -> AgentOutput:
        """Samples an action for each copy."""
        return self.sampler.act(observation, self.envs.env_output.first)

    def statistics(self) -> Statistics:
        """Ends the rollout: advantages, minibatches, and what the others must know of them."""
        config, unroll, self.collected = self.config, held(self.collected), None
        batch, seen = make_batch(self.actor.network, unroll, config), np.empty((3, 0))
        self.steps, self.samples = len(unroll.valid), len(batch.action)
        settings = config.epochs, config.parts, self.rng, config.normalize_advantages
        self.minibatches = Minibatches(batch, *settings, self.device)
        if config.normalize_observations:
            seen = np.stack([part.numpy() for part in moments(batch.observation.double())])
        return Statistics(self.minibatches.moments, seen, np.zeros(2))

    def agree(self, *statistics: Statistics) -> None:
        """Takes in everybody's, in the same order as all do."""
        held(self.minibatches).agree([one.advantages for one in statistics])
        self.observe(*statistics)

    def differentiate(self, k: int) -> float:
        """Leaves the mean gradient of this worker's rows of the k-th minibatch in
        `flat.gradients`; the share of these rows in all.
        """
        minibatches = held(self.minibatches)
        batch = minibatches[k]
        self.flat.gradients.zero_()
        if len(batch.action):
            loss, self.metrics = loss_function(self.network, batch, self.config)
            loss.backward()
        self.finish(k)
        return minibatches.shares[k]

    def weigh(self, k: int) -> None:
        """Leaves this worker's part of the mean gradient of all: the parts' sum is the mean."""
        self.flat.gradients.mul_(self.differentiate(k))

    def share(self, k: int) -> np.ndarray:
        """The same, `[P]`."""
        self.weigh(k)
        return self.flat.gradients.cpu().numpy()

    def apply(self, total: np.ndarray | None = None) -> None:
        """One step with the sum of all parts: `total`, or what is in `flat.gradients`."""
        if total is not None:
            self.flat.gradients.copy_(there(total, self.device))
        self.metrics["gradient_norm"] = self.flat.clipped(self.config.max_gradient_norm)
        self.optimizer.step()
        self.updates += 1

    def round(self) -> Report | None:
        """All-reduce: a whole round with the others; None if one of them died on the way."""
        try:
            self.play()
            for k in range(self.config.minibatches):
                self.weigh(k)
                self.group.add(self.flat.gradients)
                self.apply()
        except GroupBroken:
            self.group.close()
            return None
        return self.report()

    def receive(self, weights: Sequence[Weights]) -> None:
        """Takes over parameters of a server."""
        host = torch.zeros(len(self.flat.vector), dtype=self.flat.vector.dtype)
        put_weights(host.numpy(), weights)
        self.flat.vector.copy_(there(host, self.device))

    def rollout(self, steps: int, *weights: Weights) -> tuple[Report, Statistics]:
        """With a server: so many steps of all copies with these parameters."""
        self.receive(weights)
        self.collected = None
        self.collect(steps)
        mine, self.metrics = self.statistics(), {}
        return self.report(whole=False), mine

    def gradient(self, k: int, *weights: Weights) -> tuple[Report | Gradient, ...]:
        """With a server: the k-th minibatch's gradient, in pieces for the shards."""
        self.receive(weights)
        self.differentiate(k)
        self.metrics["gradient_norm"] = torch.linalg.vector_norm(self.flat.gradients)
        samples = len(held(self.minibatches).rows[k])
        pieces = in_pieces(self.flat.gradients.cpu().numpy(), weights, samples)
        return self.report(k == self.config.minibatches - 1)._replace(env_steps=0), *pieces

    def report(self, whole: bool = True) -> Report:
        """How the rollout and the newest gradient were; of a `whole` round, where its time went."""
        metrics = numbers(self.metrics) | {"unroll_length_mean": float(self.steps)}
        metrics |= self.traffic(self.samples)
        metrics |= self.meter.fractions() if whole else {}
        return Report(self.samples, self.updates, self.envs.episodes(), metrics)


def make_wiring(config: Config, stack: ExitStack, runtime: Runtime | None, flat: Flat) -> Any:
    """Workers and a server on a runtime; or workers alone: processes, or the same on a runtime."""
    served, vector = config.wiring == "parameter_server", flat.vector.numpy()
    if runtime is None and (served or config.runtime == "virtual"):
        processes = config.num_workers + (config.num_shards if served else 1)
        own: Any = own_runtime(config, processes, COSTS)
        runtime = stack.enter_context(own)
    if runtime is None:
        return stack.enter_context(Lockstep(Worker, config))
    report = partial(report_of, config)
    if not served:
        return Conducted(runtime, Worker, config, report, nbytes=vector.nbytes)
    server = param_server.priced_server(runtime, vector, config.num_shards, server_settings(config))
    return ServedRounds(runtime, Worker, config, report, server)


def report_of(config: Config, steps: int) -> Report:
    """What stands for a report in a hollow run."""
    return Report(steps * config.num_envs, 0, [], {})


def server_settings(config: Config) -> ServerSettings:
    """Adam; k slices with 1/√k of the norm each have the norm of the whole."""
    limit = config.max_gradient_norm / config.num_shards**0.5
    return ServerSettings("adam", config.learning_rate, max_mean_norm=limit)


def book(run: Run, reports: list[Report], receipts: Any) -> None:
    """Enters a turn's reports, and what became of gradients at a server, into the run's books."""
    made = max((report.updates for report in reports), default=0)
    applied = sum(not all(receipt.refused) for receipt in receipts)
    metrics = mean_metrics([report.metrics for report in reports])
    run.record(
        env_steps=sum(report.env_steps for report in reports),
        learner_steps=max(applied, made - run.learner_steps),
        episodes=[episode for report in reports for episode in report.episodes],
        metrics=metrics | (fates(run.extra, receipts) if receipts else {}),
    )


def units_of_work(config: Config) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts."""
    worker = Worker(config, 0)
    worker.collect(config.unroll_length)
    worker.agree(worker.statistics())
    vector, actions = worker.flat.vector.cpu().numpy(), np.zeros(config.num_envs, np.int64)
    return param_server.server_units(vector, server_settings(config)) | {
        "env_step": lambda: worker.envs.step(actions),
        "inference": lambda: worker.act(worker.envs.env_output.observation),
        "learn": lambda: worker.differentiate(0),
        "add": lambda: Adder().add(vector, vector),
    }


def make_network(config: Config, envs: Envs) -> Any:
    """A network for the environment's observations and actions, normalised or not."""
    num_actions, shape = require_discrete(envs, "dppo"), envs.observation_space.shape or ()
    torch.manual_seed(config.seed)
    network = ActorCritic(shape, num_actions, config.hidden_sizes, torso=config.torso)
    return Normalized(network, shape) if config.normalize_observations else network


def load_policy(config: Config, parts: dict[str, Any]) -> SamplingPolicy:
    """The policy of a checkpoint."""
    flat = Flat(network := make_network(config, make_envs(config.env_id, 1, config.seed)))
    if config.wiring == "all_reduce":
        network.load_state_dict(parts["workers"]["members"][0]["network"])
    else:
        network.load_state_dict(parts["team"]["actors"][0]["network"])
        np.copyto(flat.vector.numpy(), param_server.stored_parameters(parts["server"]))
    return SamplingPolicy(network)


def train(config: Config, runtime: Runtime | None = None) -> Result:
    """Workers collect and learn, round after round, until the run is over.

    Args:
        config: settings.
        runtime: an open one to run on; by default one of its own, or processes without one.
    """
    torch.set_num_threads(config.torch_threads)
    flat = Flat(network := make_network(config, make_envs(config.env_id, 1, config.seed)))
    with ExitStack() as stack:
        wiring = make_wiring(config, stack, runtime, flat)
        policy = LivePolicy(SamplingPolicy(network), lambda: wiring.pull(network, flat))
        run = Run("dppo", config, policy, wiring.parts, lambda: wiring.now, checkpoints="asked")
        with run:
            while run.running():
                book(run, *wiring.turn())
                if run.checkpoint_due():
                    book(run, *wiring.drain())
                    run.checkpoint()
            book(run, *wiring.drain())
            policy.initial_state(1)
        run.trace(wiring.timeline())
    policy.refresh = None  # nobody is left to ask
    return run.result()
