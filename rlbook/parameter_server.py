"""A2C through a parameter server: synchronous, asynchronous, with bounded staleness.

      ┌─────────────────────────── driver ────────────────────────────┐
      │   start(worker):  pull ──► gradient        wait for the first │
      └──────┬──────────────────────┬──────────────────────▲──────────┘
             │ weights              │ pieces of            │ report
             ▼ (references)         ▼ the gradient         │ (small)
        Worker 0 ─┐            ┌─ Shard 0 (parameters, optimiser, version)
        Worker 1 ─┼─ gradient ─┼─ Shard 1
        Worker … ─┘            └─ Shard k−1

      who waits: with "sync" every worker for the slowest; with "async" nobody;
                 with "bounded" those who are more than `staleness_bound` rounds ahead

This is A2C (Mnih et al., 2016) with: N workers that act and compute gradients, and parameters that
live in k shards which apply them (Dean et al., 2012, "Large scale distributed deep networks"; Li et
al., 2014, "Scaling distributed machine learning with the parameter server"; bounded staleness: Ho
et al., 2013). Gradients may be compressed with error feedback (Seide et al., 2014; Lin et al.,
2018), parameters sent as differences, gradients summed by local servers first.

Differs from the papers: one driver makes all calls and the servers answer in the order of its
calls, so that what is pulled from k shards is one consistent state. A worker clips its gradient
before it is compressed. RMSProp or Adam at the server, where DistBelief has AdaGrad.

Book: chapter 06
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.data import AgentOutput, Unroll
from rlbook.harness.config import RunConfig, accepted, at_least, one_of, within
from rlbook.harness.measures import mean_metrics
from rlbook.harness.run import Result, Run
from rlbook.maths.losses import entropy_loss, policy_gradient_loss, value_loss
from rlbook.maths.returns import lambda_returns
from rlbook.parts.envs import Envs, Episode, make_envs, require_discrete
from rlbook.parts.flat import Flat
from rlbook.parts.meter import Meter
from rlbook.parts.networks import ActorCritic, LivePolicy, SamplingPolicy, sample_action
from rlbook.parts.unroll import collect_unroll
from rlbook.plumbing.cluster import own_runtime
from rlbook.plumbing.codecs import DeltaDecoder, ErrorFeedback, decode, make_codec
from rlbook.plumbing.param_server import (
    SERVER_COSTS,
    Alive,
    ParameterServer,
    priced_server,
    server_units,
    shard_bounds,
    stored_parameters,
)
from rlbook.plumbing.runtime import Runtime
from rlbook.plumbing.shard import Gradient, Receipt, ServerSettings, Weights, fates
from rlbook.plumbing.team import Team, place_seed, remote_team
from rlbook.plumbing.virtual import StandIn


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings; the defaults solve CartPole-v1 asynchronously in about a second of training."""

    num_workers: int = 2
    """N, processes that act and compute gradients, each with `num_envs` copies."""
    num_shards: int = 1
    """k, servers that hold a slice of the parameters each."""
    update_rule: Literal["async", "sync", "bounded"] = "async"
    """Apply each gradient as it comes; wait for all; or let nobody run too far ahead."""
    staleness_bound: int = 2
    """Rounds that a worker may be ahead of the slowest (s in Ho et al., 2013), with "bounded"."""
    calls_in_flight: int = 1
    """Gradients asked of a worker at once; with 2 it never waits for the driver, but is staler."""
    max_staleness: int | None = None
    """Refuse gradients that are more versions old; None takes all (the rule of Gorila)."""
    max_sigmas: float | None = None
    """Refuse gradients whose norm is so many standard deviations above its mean; None takes all."""
    compression: str = "none"
    """Codec of gradients, with error feedback: none, fp16, int8, sign, topk:0.01+fp16, …"""
    weights_compression: str = "none"
    """Codec of the parameters' differences; "none" sends them whole."""
    num_groups: int = 0
    """Local servers that add up gradients, with "sync"; 0 sends each gradient to the shards."""
    optimizer: Literal["adam", "rmsprop", "adagrad", "sgd"] = "rmsprop"
    """At the server, its state on the shards (Mnih et al., 2016, find shared RMSProp robust)."""
    unroll_length: int = 16
    """T, steps between gradients."""
    discount: float = 0.98
    """γ."""
    lambda_: float = 0.9
    """λ of the λ-returns; 1 gives A3C's n-step returns."""
    learning_rate: float = 4e-3
    """Of the server's optimiser."""
    value_cost: float = 0.5
    """Weight of the value loss ½ (V − target)²."""
    entropy_cost: float = 0.0
    """Weight of the entropy bonus, β (0.01 in Mnih et al., 2016)."""
    max_gradient_norm: float = 0.5
    """A worker scales its gradient down to this Euclidean norm."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Fully connected layers of the torso."""
    runtime: Literal["ray", "virtual"] = "ray"
    """Real processes, or the seeded virtual cluster."""
    ray_address: str | None = None
    """An existing Ray cluster to join; None starts one here."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        one_of(self, "update_rule", ("async", "sync", "bounded"))
        one_of(self, "runtime", ("ray", "virtual"))
        at_least(self, 1, "num_workers", "num_shards", "unroll_length", "calls_in_flight")
        at_least(self, 0, "staleness_bound", "num_groups")
        within(self, 0.0, 1.0, "discount", "lambda_")
        at_least(self, 0.0, "learning_rate", "value_cost", "entropy_cost", "max_gradient_norm")
        if self.num_groups and (self.update_rule != "sync" or self.num_groups > self.num_workers):
            raise ValueError(
                'num_groups: needs update_rule "sync" and at most num_workers groups, got'
                f" {self.num_groups} with {self.update_rule!r} and {self.num_workers} workers"
            )
        ServerSettings.of(self)
        accepted(self, make_codec, "compression", "weights_compression")

    @property
    def all_envs(self) -> int:
        """Copies of the environment over all workers."""
        return self.num_workers * self.num_envs


CATCH = Config(
    env_id="rlbook/Catch-v0",
    num_envs=8,
    unroll_length=9,
    optimizer="adam",
    learning_rate=2e-3,
    entropy_cost=0.01,
    total_env_steps=100_000,
)
PRESETS = {
    "default": Config(),
    "sync": Config(update_rule="sync"),
    "bounded": Config(update_rule="bounded"),
    "catch": CATCH,
    "compressed": replace(CATCH, compression="topk:0.01+fp16"),
}

COSTS = {"env_step": 12e-6, "inference": 60e-6, "learn": 1.6e-3} | SERVER_COSTS
"""Seconds of a unit of work on the virtual cluster, where none are given: one step of 32 copies of
CartPole, one forward pass of 32 rows, one gradient of 512 rows, one update, one copy of the
parameters. `units_of_work` measures them here."""


def loss_function(
    network: nn.Module, unroll: Unroll, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """A2C's policy gradient, value and entropy, each a mean over the unroll's valid rows."""
    observations = torch.from_numpy(unroll.env_outputs.observation)
    logits, values = network(observations.flatten(0, 1))
    rows = observations.shape[:2]
    logits, values = logits.unflatten(0, rows), values.unflatten(0, rows)
    # The shift: what was seen and done at t (left) led to the reward and discount at t + 1 (right).
    logits, bootstrap, values = logits[:-1], values[-1].detach(), values[:-1]
    actions, valid = torch.from_numpy(unroll.agent_outputs.action), torch.from_numpy(unroll.valid)
    targets = lambda_returns(
        rewards=torch.from_numpy(unroll.env_outputs.reward[1:]),
        discounts=config.discount * torch.from_numpy(unroll.env_outputs.discount[1:]),
        values=values.detach(),
        bootstrap_value=bootstrap,
        lambda_=config.lambda_,
        valid=valid,
    )
    advantage = targets - values.detach()
    policy = policy_gradient_loss(logits=logits, actions=actions, advantages=advantage, valid=valid)
    value = value_loss(values=values, targets=targets, valid=valid)
    entropy = entropy_loss(logits=logits, valid=valid)
    loss = policy + config.value_cost * value + config.entropy_cost * entropy
    return loss, {"loss": loss, "policy_loss": policy, "value_loss": value, "entropy": -entropy}


class Report(NamedTuple):
    """What the driver learns of a gradient; the gradient itself goes to the shards."""

    env_steps: int
    episodes: list[Episode]
    metrics: dict[str, float]


class Worker(Alive):
    """Acts with pulled parameters and computes a gradient from what it saw.

    Args:
        config: of the system.
        index: worker 0 draws as the single process of chapter 04 does.
        born: how many workers were in this place before (they died): a new one draws anew.
        metered: report where the time went (of the wall, so never on a virtual clock).
    """

    def __init__(self, config: Config, index: int, born: int = 0, metered: bool = False) -> None:
        torch.set_num_threads(1)
        seed = place_seed(config.seed, index, born)
        self.config = config
        self.envs = make_envs(config.env_id, config.num_envs, seed)
        self.rng = np.random.default_rng([seed, 1])
        self.network = make_network(config, self.envs)
        self.flat = Flat(self.network)
        self.bounds = shard_bounds(len(self.flat.vector), config.num_shards)
        self.encoders = [ErrorFeedback(make_codec(config.compression)) for _ in self.bounds]
        self.decoders = [DeltaDecoder() for _ in self.bounds]
        self.meter = Meter(metered)
        self.meter.watch(self.envs, "step", "env")
        self.meter.watch(self, "act", "inference")
        self.meter.watch(self, "differentiate", "gradient")

    def gradient(self, *weights: Weights) -> tuple[Report | Gradient, ...]:
        """T steps of B copies with these parameters: a report, then the gradient's k pieces."""
        self.meter.begin()
        self._load(weights)
        unroll = collect_unroll(self.envs, self.act, self.config.unroll_length)
        norm, metrics = self.differentiate(unroll)
        samples, received = int(unroll.valid.sum()), sum(len(w.blob) for w in weights)
        pieces = [
            Gradient(encoder.encode(self.flat.gradients[a:b].numpy()), w.version, samples, norm)
            for encoder, w, (a, b) in zip(self.encoders, weights, self.bounds, strict=True)
        ]
        metrics["bytes_sent"] = float(sum(len(piece.blob) for piece in pieces))
        metrics["bytes_per_env_step"] = (metrics["bytes_sent"] + received) / max(samples, 1)
        report = Report(samples, self.envs.episodes(), {**metrics, **self.meter.fractions()})
        return report, *pieces

    def state_dict(self) -> dict[str, Any]:
        """Environments, random generator, what compression still owes, and known parameters."""
        return {
            "envs": self.envs.state_dict(),
            "rng": self.rng.bit_generator.state,
            "encoders": [encoder.state_dict() for encoder in self.encoders],
            "decoders": [decoder.state_dict() for decoder in self.decoders],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.envs.load_state_dict(state["envs"])
        self.rng.bit_generator.state = state["rng"]
        parts: list[Any] = [*self.encoders, *self.decoders]
        for part, kept in zip(parts, state["encoders"] + state["decoders"], strict=True):
            part.load_state_dict(kept)

    def act(self, observation: np.ndarray) -> AgentOutput:
        """Samples an action for each copy."""
        return sample_action(self.network, observation, self.rng)

    def differentiate(self, unroll: Unroll) -> tuple[float, dict[str, float]]:
        """Leaves the clipped gradient in `flat.gradients`; its norm before, and metrics."""
        loss, metrics = loss_function(self.network, unroll, self.config)
        self.flat.gradients.zero_()
        loss.backward()
        norm = self.flat.clip(self.config.max_gradient_norm)
        return norm, {**{k: v.item() for k, v in metrics.items()}, "gradient_norm": norm}

    def _load(self, weights: Sequence[Weights]) -> None:
        vector, differences = self.flat.vector.numpy(), self.config.weights_compression != "none"
        for decoder, piece, (start, end) in zip(self.decoders, weights, self.bounds, strict=True):
            values = decoder.apply(piece.blob) if differences else decode(piece.blob)
            np.copyto(vector[start:end], values)


Turn = tuple[list[Report], list[Receipt]]
"""What a turn of the driver brings: reports of gradients, and what became of earlier pushes."""


def asynchronous(team: Team, server: ParameterServer) -> Turn:
    """Whoever comes first: its gradient is applied, and it goes on from what that gave."""
    for index in range(len(team.workers)):
        while team.may_start(index):
            team.start(index, server.pull(team.client(index)))
    if (answer := team.first()) is None:
        return [], []
    server.push(answer.pieces)
    # The newest receipts may still be on their way: nobody waits for them.
    return [answer.report], server.receipts(newest=4 * (1 + len(team.in_flight)))


def synchronous(team: Team, server: ParameterServer) -> Turn:
    """All from the same parameters; the mean of all gradients is one update."""
    whole = None if team.clients else server.pull()
    for index in range(len(team.workers)):
        team.start(index, whole or server.pull(team.client(index)))
    answers = team.rest()  # by worker: floats are added in the same order every time
    if answers:
        server.push_together(team.combine([answer.pieces for answer in answers]))
    return [answer.report for answer in answers], server.receipts()


def drain(team: Team, server: ParameterServer) -> Turn:
    """Waits for all that is in flight and applies it."""
    answers = team.rest()
    for answer in answers:
        server.push(answer.pieces)
    server.settle()
    return [answer.report for answer in answers], server.receipts()


def book(run: Run, reports: list[Report], receipts: list[Receipt]) -> None:
    """Enters a turn's reports, and what became of earlier pushes, into the run's books."""
    metrics = mean_metrics([report.metrics for report in reports])
    run.record(
        env_steps=sum(report.env_steps for report in reports),
        learner_steps=sum(not all(receipt.refused) for receipt in receipts),
        episodes=[episode for report in reports for episode in report.episodes],
        metrics=metrics | fates(run.extra, receipts),
    )


def make_team(
    runtime: Runtime, config: Config, server: ParameterServer, parameters: np.ndarray
) -> Team:
    """The workers, with what their work costs, and what stands in for it in a hollow run."""
    steps = config.unroll_length
    noise = np.random.default_rng(0).normal(size=len(parameters)).astype(parameters.dtype)
    size = len(make_codec(config.compression).encode(noise))
    report = Report(steps * config.num_envs, [], {})
    return remote_team(
        runtime,
        Worker,
        config,
        server,
        config.num_workers,
        costs={"env_step": steps, "inference": steps, "learn": 1},
        returns=(report, *[StandIn(size // config.num_shards)] * config.num_shards),
        bound=config.staleness_bound if config.update_rule == "bounded" else None,
        clients=config.weights_compression != "none",
        groups=config.num_groups,
        codec=config.compression,
    )


def units_of_work(config: Config) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts."""
    worker = Worker(config, 0)
    parameters = worker.flat.vector.numpy()
    actions = np.zeros(config.num_envs, np.int64)
    unroll = collect_unroll(worker.envs, worker.act, config.unroll_length)
    return server_units(parameters, ServerSettings.of(config)) | {
        "env_step": lambda: worker.envs.step(actions),
        "inference": lambda: worker.act(worker.envs.env_output.observation),
        "learn": lambda: worker.differentiate(unroll),
    }


def make_network(config: Config, envs: Envs) -> ActorCritic:
    """A network for the environment's observations and actions."""
    num_actions = require_discrete(envs, "parameter_server")
    torch.manual_seed(config.seed)
    return ActorCritic(envs.observation_space.shape or (), num_actions, config.hidden_sizes)


def load_policy(config: Config, parts: dict[str, Any]) -> SamplingPolicy:
    """The policy of a checkpoint."""
    network = make_network(config, make_envs(config.env_id, 1, config.seed))
    np.copyto(Flat(network).vector.numpy(), stored_parameters(parts["server"]))
    return SamplingPolicy(network)


def train(config: Config, runtime: Runtime | None = None) -> Result:
    """Workers compute gradients, shards apply them, until the run is over.

    Args:
        config: settings.
        runtime: an open one to run on; by default one of its own, as `config` says.
    """
    torch.set_num_threads(config.torch_threads)
    own = own_runtime(config, config.num_workers + config.num_shards, COSTS)
    with own if runtime is None else nullcontext(runtime) as rt:
        flat = Flat(network := make_network(config, make_envs(config.env_id, 1, config.seed)))
        vector = flat.vector.numpy()
        server = priced_server(rt, vector, config.num_shards, ServerSettings.of(config))
        team = make_team(rt, config, server, vector)
        team.settle()  # the clock of the run begins when everybody is there
        policy = LivePolicy(SamplingPolicy(network), lambda: np.copyto(vector, server.weights()))
        parts = {"server": server, "team": team, "runtime": rt}
        turn = synchronous if config.update_rule == "sync" else asynchronous
        run = Run("parameter_server", config, policy, parts, lambda: rt.now, checkpoints="asked")
        with run:
            while run.running():
                book(run, *turn(team, server))
                if run.checkpoint_due():
                    book(run, *drain(team, server))
                    run.checkpoint()
            book(run, *drain(team, server))
            policy.initial_state(1)
        run.trace(rt.timeline())
    policy.refresh = None  # nobody is left to ask
    return run.result()
