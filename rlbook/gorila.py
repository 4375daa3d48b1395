"""Gorila: DQN in parallel, by actors, replay, learners and a parameter server.

    bundled                                     apart

    ┌──────────── Worker i ───────────┐         Actor 0 … A−1 ── transitions ──► Replay 0 … R−1
    │ Actor ──► Replay ──► Learner    │            ▲                                │ batch
    │   ▲     (its own)    Q, target  │            │ weights                        ▼
    └───┼──────────────────────┼──────┘            │           weights ──► Learner 0 … L−1
        │ weights              │ gradient          │              │         Q, target │
        │                      ▼                   │              │                   ▼ gradient
        └── Shard 0 … Shard k−1                    └───────────── Shard 0 … Shard k−1
            (parameters, optimiser, version)                      (parameters, optimiser, version)

      who waits: with "async" nobody, but apart actors for learners that are behind;
                 with "sync" everybody for the slowest

This is DQN (Mnih et al., 2015) with: many actors that fill replay memories, many learners that draw
from them, and parameters that live in k shards which apply the learners' gradients (Nair et al.,
2015, "Massively parallel methods for deep reinforcement learning"). A learner copies its target
network when the *server* has made `target_period` updates. The server refuses gradients that are
too old or whose loss is an outlier. The simplest form, one bundle a worker and nothing refused, is
DQN through a parameter server.

Differs from the paper: one driver makes all calls; every `update_period` vector steps of an actor
owe one gradient, in both forms, so that acting never runs away from learning. Double Q-learning and
n-step returns are there as in chapter 03. The server judges the loss, where the paper's learner
does. By default two bundles wait for each other and Adam applies the mean of their gradients: with
few workers and large steps one version of staleness costs more than the wait (preset `async`: as in
the paper nobody waits). AdaGrad (Dean et al., 2012) and DQN's RMSProp are options.

Book: chapter 07
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from rlbook.data import Transition, tree_nbytes
from rlbook.harness.config import RunConfig, at_least, at_most, one_of, within
from rlbook.harness.doctor import require_memory
from rlbook.harness.measures import mean_metrics
from rlbook.harness.run import Result, Run
from rlbook.maths.exploration import linear_schedule
from rlbook.parts.envs import Envs, Episode, make_envs, require_discrete
from rlbook.parts.flat import Flat
from rlbook.parts.meter import Meter
from rlbook.parts.networks import GreedyPolicy, LivePolicy, QNetwork
from rlbook.parts.q_learning import Player, clipped_td_gradient, joined
from rlbook.parts.replay import Sample
from rlbook.plumbing import param_server
from rlbook.plumbing.cluster import own_runtime
from rlbook.plumbing.codecs import Identity
from rlbook.plumbing.param_server import Alive, Bundle, ParameterServer
from rlbook.plumbing.replay_server import ReplayServer, ReplayShard
from rlbook.plumbing.runtime import Reference, Runtime
from rlbook.plumbing.shard import Gradient, Receipt, ServerSettings, Weights, fates, put_weights
from rlbook.plumbing.team import Answer, Team, place_seed, remote_team
from rlbook.plumbing.virtual import StandIn


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings; the defaults solve CartPole-v1 with two bundles in some seconds of training."""

    bundled: bool = True
    """Actor, replay and learner in one process, or each in processes of its own."""
    num_workers: int = 2
    """N, bundles (100 actors and 100 learners in the paper)."""
    num_actors: int = 2
    """A, when apart."""
    num_learners: int = 1
    """L, when apart."""
    num_replays: int = 1
    """R, replay memories that learners share, when apart."""
    num_shards: int = 1
    """k, servers that hold a slice of the parameters each (31 in the paper)."""
    update_rule: Literal["async", "sync"] = "sync"
    """Apply each gradient as it comes (the paper), or wait for all and apply their mean."""
    calls_in_flight: int = 1
    """Turns asked of a process at once; with 2 it never waits for the driver, but is staler."""
    max_staleness: int | None = None
    """Refuse gradients that are more versions old; None takes all."""
    max_sigmas: float | None = None
    """Refuse gradients whose loss is so many standard deviations above its mean; None takes all."""
    optimizer: str = "adam"
    """At the server: adam, adagrad (Dean et al., 2012), dqn_rmsprop (Mnih et al., 2015), …"""
    learning_rate: float = 2e-3
    """Of the server's optimiser."""
    num_envs: int = 16
    """Copies of the environment that an actor steps together (1 in the paper)."""
    double: bool = True
    """Choose the next action by the online network, value it by the target network."""
    n_step: int = 3
    """Steps of reward before the bootstrap (1 in the paper)."""
    replay_capacity: int = 50_000
    """Transitions kept in each replay memory (1 M a learner in the paper)."""
    learning_starts: int = 1_000
    """Transitions in a replay memory before anything is drawn from it."""
    batch_size: int = 128
    """Transitions of one gradient (32 in Mnih et al., 2015)."""
    update_period: int = 1
    """Vector steps of an actor that owe one gradient."""
    target_period: int = 50
    """Updates of the server between copies to the target networks (60 000 in the paper)."""
    discount: float = 0.99
    """γ (0.99 in Mnih et al., 2015)."""
    epsilon_end: float = 0.01
    """Final probability of a random action (0.1 in Mnih et al., 2015)."""
    epsilon_steps: int = 10_000
    """Environment steps of all actors over which ε falls from 1."""
    max_gradient_norm: float = 10.0
    """A learner scales its gradient down to this Euclidean norm."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Fully connected layers of the torso."""
    runtime: Literal["ray", "virtual"] = "ray"
    """Real processes, or the seeded virtual cluster."""
    ray_address: str | None = None
    """An existing Ray cluster to join; None starts one here."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        one_of(self, "update_rule", ("async", "sync"))
        one_of(self, "runtime", ("ray", "virtual"))
        at_least(self, 1, "num_workers", "num_actors", "num_learners", "num_replays", "num_shards")
        at_least(self, 1, "calls_in_flight", "n_step", "replay_capacity", "learning_starts")
        at_least(self, 1, "batch_size", "update_period", "target_period", "epsilon_steps")
        at_least(self, 0.0, "learning_rate", "max_gradient_norm")
        within(self, 0.0, 1.0, "discount", "epsilon_end")
        ServerSettings.of(self)
        at_most(self, "learning_starts", "replay_capacity")

    @property
    def all_envs(self) -> int:
        """Copies of the environment over all actors."""
        return self.num_envs * (self.num_workers if self.bundled else self.num_actors)


PRESETS = {
    "default": Config(),
    "async": Config(update_rule="async", optimizer="adam_no_momentum"),
    "apart": Config(bundled=False, update_rule="async", learning_rate=1e-3),
    # With as many processes as a computer has cores; the paper: 100 bundles on 31 shards.
    "paper": Config(
        env_id="ALE/Pong-v5",
        total_env_steps=50_000_000,
        update_rule="async",
        optimizer="adagrad",
        num_envs=1,
        double=False,
        n_step=1,
        replay_capacity=1_000_000,
        learning_starts=50_000,
        batch_size=32,
        update_period=4,
        target_period=60_000,
        epsilon_end=0.1,
        epsilon_steps=1_000_000,
    ),
}

COSTS = {"env_step": 10e-6, "inference": 45e-6, "add": 15e-6, "sample": 40e-6, "learn": 0.6e-3}
COSTS |= param_server.SERVER_COSTS
"""Seconds of a unit of work on the virtual cluster, where none are given: one step of 16 copies of
CartPole, one forward pass of 16 rows, storing what a turn brings, drawing a batch of 128, its
gradient, one update, one copy of the parameters. `units_of_work` measures them here."""


class Report(NamedTuple):
    """What the driver learns of a turn; transitions and gradients go where they are needed."""

    env_steps: int
    transitions: int
    """That an actor made."""
    samples: int
    """Transitions that a gradient is a mean over; 0 if there was no gradient."""
    wire_bytes: int
    """That came to this process and went out of it."""
    episodes: list[Episode]
    metrics: dict[str, float]


class Actor(Player, Alive):
    """Plays ε-greedily with pulled parameters and hands on n-step transitions.

    Args:
        config: of the system.
        index: actor 0 draws as the single process of chapter 03 does.
        born: how many were in this place before (they died): a new one draws anew.
        metered: report where the time went (of the wall, so never on a virtual clock).
    """

    def __init__(self, config: Config, index: int, born: int = 0, metered: bool = False) -> None:
        torch.set_num_threads(1)
        self.config, seed = config, place_seed(config.seed, index, born)
        envs = make_envs(config.env_id, config.num_envs, seed)
        self.flat = Flat(network := make_network(config, envs))
        super().__init__(envs, network, config.n_step, config.discount, seed)
        self.meter = Meter(metered)
        self.meter.watch(envs, "transition", "env")
        self.meter.watch(self, "values", "inference")

    def play(self, env_steps: int, *weights: Weights) -> tuple[Report, Transition | None]:
        """`update_period` steps of B copies with these parameters; `env_steps` of all decide ε."""
        self.meter.begin()
        put_weights(self.flat.vector.numpy(), weights)
        turns, before, epsilon = [], env_steps, 1.0
        for _ in range(self.config.update_period):
            epsilon = linear_schedule(
                env_steps, start=1.0, end=self.config.epsilon_end, steps=self.config.epsilon_steps
            )
            transitions, taken = self.step(epsilon)
            turns.append(transitions)
            env_steps += taken
        made = joined(turns)
        metrics = {"epsilon": epsilon, "q_mean": self.q_mean, **self.meter.fractions()}
        count = 0 if made is None else len(made.r_t)
        wire = tree_nbytes(made) + sum(len(piece.blob) for piece in weights)
        return Report(env_steps - before, count, 0, wire, self.envs.episodes(), metrics), made


class Learner(Alive):
    """Computes gradients of DQN's loss with pulled parameters and a target network of its own."""

    def __init__(self, config: Config, *_place: int) -> None:
        torch.set_num_threads(1)
        self.config, envs = config, make_envs(config.env_id, 1, config.seed)
        self.online, self.target = make_network(config, envs), make_network(config, envs)
        self.flat, self.flat_target = Flat(self.online), Flat(self.target)
        self.bounds = param_server.shard_bounds(len(self.flat.vector), config.num_shards)
        self.synced = 0
        """The server's version that the target network is a copy of."""

    def gradient(self, sample: Sample, *weights: Weights) -> tuple[Any, ...]:
        """A `Report`, and the k pieces of the gradient of this batch at these parameters."""
        put_weights(self.flat.vector.numpy(), weights)
        version, period = weights[0].version, self.config.target_period
        if version // period > self.synced // period:  # the server's updates, not this learner's
            self.flat_target.vector.copy_(self.flat.vector)
            self.synced = version
        metrics = self.differentiate(sample)
        gradients, rows = self.flat.gradients.numpy(), len(sample.keys)
        pieces = [
            Gradient(Identity().encode(gradients[a:b]), w.version, rows, metrics["loss"])
            for w, (a, b) in zip(weights, self.bounds, strict=True)
        ]
        wire = tree_nbytes(sample.items) + sum(len(w.blob) for w in weights) + gradients.nbytes
        return Report(0, 0, rows, wire, [], metrics), *pieces

    def differentiate(self, sample: Sample) -> dict[str, float]:
        """Leaves the clipped gradient in `flat.gradients`; metrics, with the loss."""
        networks, limit = (self.online, self.target), self.config.max_gradient_norm
        return clipped_td_gradient(self.flat, networks, sample, self.config.double, limit)[1]

    def state_dict(self) -> dict[str, Any]:
        """The target network and the version that it is."""
        return {"target": self.flat_target.vector.numpy().copy(), "synced": self.synced}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        np.copyto(self.flat_target.vector.numpy(), state["target"])
        self.synced = state["synced"]


class Worker(Bundle):
    """An actor, a replay memory of its own and a learner, in one process."""

    parts = ("actor", "replay", "learner")

    def __init__(self, config: Config, index: int, born: int = 0, metered: bool = False) -> None:
        self.actor, self.learner = Actor(config, index, born, metered), Learner(config)
        self.replay = ReplayShard(config.replay_capacity, place_seed(config.seed, index, born))
        self.actor.meter.watch(self.learner, "differentiate", "gradient")

    def gradient(self, env_steps: int, *weights: Weights) -> tuple[Any, ...]:
        """Plays, remembers, learns: a `Report`, and the k pieces of a gradient.

        The pieces are None as long as the replay memory holds less than `learning_starts`.
        """
        played, transitions = self.actor.play(env_steps, *weights)
        self.replay.keep(transitions)
        if len(self.replay) < self.actor.config.learning_starts:
            return played, *[None] * len(weights)
        sample = self.replay.sample(self.actor.config.batch_size)
        learnt, *pieces = self.learner.gradient(sample, *weights)
        metrics = {**played.metrics, **learnt.metrics, **self.actor.meter.fractions()}
        metrics["replay_size"] = float(len(self.replay))
        wire = learnt.wire_bytes - tree_nbytes(sample.items)  # which stayed here
        return played._replace(samples=learnt.samples, wire_bytes=wire, metrics=metrics), *pieces


Turn = tuple[list[Report], list[Receipt]]
"""What a turn of the driver brings: reports, and what became of earlier gradients."""


class Driver:
    """Who is asked for what, and where the answers go. Bundled, there are no actors apart."""

    def __init__(self, runtime: Runtime, config: Config, server: ParameterServer) -> None:
        self.runtime, self.config, self.server = runtime, config, server
        self.learners = make_team(runtime, config, server, Worker if config.bundled else Learner)
        self.actors = make_team(runtime, config, server, Actor)
        self.failures = 0
        shards = 0 if config.bundled else config.num_replays
        self.replay = ReplayServer(runtime, config, shards, row_bytes(config))
        self.learners.settle()
        self.actors.settle()

    def turn(self, env_steps: int) -> Turn:
        """Asks whoever may be asked and waits for the first; with "sync" for all, actors first."""
        if self.config.update_rule == "sync":
            weights = self.server.pull()
            self.ask_actors(env_steps, weights)
            reports = self.finish()
            self.ask_learners(env_steps, weights)
            reports += self.finish()
        else:
            self.ask_learners(env_steps)
            self.ask_actors(env_steps)
            flights = [*self.actors.in_flight, *self.learners.in_flight]
            playing = self.runtime.wait(flights)[0][0] in self.actors.in_flight
            reports = self.keep(self.actors.next()) if playing else self.push(self.learners.next())
        # The newest receipts may still be on their way: nobody waits for them.
        return reports, self.server.receipts(newest=4 * (1 + len(self.learners.in_flight)))

    def ask_learners(self, env_steps: int, weights: Sequence[Reference] = ()) -> None:
        """A bundle is asked as soon as it may be; a learner alone only for what is owed."""
        for index in range(len(self.learners.workers)):
            while self.learners.may_start(index) and (self.config.bundled or self.replay.owed > 0):
                what = env_steps if self.config.bundled else self.replay.sample()
                self.learners.start(index, [what, *(weights or self.server.pull())])

    def ask_actors(self, env_steps: int, weights: Sequence[Reference] = ()) -> None:
        """Actors play while less is owed than there are learners."""
        for index in range(len(self.actors.workers)):
            if self.replay.owed < self.config.num_learners and self.actors.may_start(index):
                self.actors.start(index, [env_steps, *(weights or self.server.pull())])

    def finish(self) -> list[Report]:
        """Waits for all that is in flight, keeps and applies it."""
        return self.keep(self.actors.rest()) + self.push(self.learners.rest())

    def drain(self) -> Turn:
        """Finishes, and waits for all receipts."""
        return self.finish(), self.server.receipts()

    def keep(self, answers: list[Answer]) -> list[Report]:
        """Hands what actors made to the replay memories, unopened."""
        for answer in answers:
            self.replay.add(answer.pieces[0], answer.report.transitions)
        return [answer.report for answer in answers]

    def push(self, answers: list[Answer]) -> list[Report]:
        """Sends gradients to the shards; the mean of those that come together is one update."""
        if gradients := [answer.pieces for answer in answers if answer.report.samples]:
            self.server.push_together(gradients)
        if self.learners.failures > self.failures:  # a replay memory died, perhaps
            self.failures = self.learners.failures
            self.replay.mend()
        return [answer.report for answer in answers]


def book(run: Run, reports: list[Report], receipts: list[Receipt]) -> None:
    """Enters a turn's reports, and what became of earlier gradients, into the run's books."""
    metrics = mean_metrics([report.metrics for report in reports])
    env_steps = sum(report.env_steps for report in reports)
    for name, field in (("replay_ratio", "samples"), ("bytes_per_env_step", "wire_bytes")):
        run.extra[name] = run.extra.get(name, 0) + sum(getattr(r, field) for r in reports)
        metrics[name] = run.extra[name] / max(run.env_steps + env_steps, 1)
    run.record(
        env_steps=env_steps,
        learner_steps=sum(not all(receipt.refused) for receipt in receipts),
        episodes=[episode for report in reports for episode in report.episodes],
        metrics=metrics | fates(run.extra, receipts),
    )


def make_team(runtime: Runtime, config: Config, server: ParameterServer, kind: type[Alive]) -> Team:
    """Processes of one kind, with what their work costs on a virtual cluster."""
    plays, learns = kind is not Learner, kind is not Actor
    turns, k = config.update_period * plays, config.num_shards
    costs = {"env_step": turns, "inference": turns, "learn": learns}
    costs |= {"add": plays and learns, "sample": plays and learns}
    rows = turns * config.num_envs
    report = Report(rows, rows, config.batch_size * learns, 0, [], {})
    made = [StandIn(server.nbytes // k)] * k if learns else [StandIn(rows * row_bytes(config))]
    method = "gradient" if learns else "play"
    apart = {Learner: config.num_learners, Actor: config.num_actors}
    size = apart.get(kind, config.num_workers) * (kind is not Actor or not config.bundled)
    returns = (report, *made)
    return remote_team(
        runtime, kind, config, server, size, method=method, costs=costs, returns=returns
    )


def row_bytes(config: Config) -> int:
    """Bytes of a transition."""
    return 2 * make_envs(config.env_id, 1, 0).env_output.observation.nbytes + 16


def units_of_work(config: Config) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts."""
    worker = Worker(config, 0)
    actor, learner, replay = worker.actor, worker.learner, worker.replay
    actions = np.zeros(config.num_envs, np.int64)
    made = joined([actor.step(1.0)[0] for _ in range(config.n_step)])
    replay.keep(made)
    sample = replay.sample(config.batch_size)
    return param_server.server_units(actor.flat.vector.numpy(), ServerSettings.of(config)) | {
        "env_step": lambda: actor.envs.transition(actions),
        "inference": actor.values,
        "add": lambda: replay.keep(made),
        "sample": lambda: replay.sample(config.batch_size),
        "learn": lambda: learner.differentiate(sample),
    }


def make_network(config: Config, envs: Envs) -> QNetwork:
    """A Q-network for the environment's observations and actions."""
    num_actions = require_discrete(envs, "gorila")
    torch.manual_seed(config.seed)
    return QNetwork(envs.observation_space.shape or (), num_actions, config.hidden_sizes)


def load_policy(config: Config, parts: dict[str, Any]) -> GreedyPolicy:
    """The greedy policy of a checkpoint."""
    network = make_network(config, make_envs(config.env_id, 1, config.seed))
    np.copyto(Flat(network).vector.numpy(), param_server.stored_parameters(parts["server"]))
    return GreedyPolicy(network)


def train(config: Config, runtime: Runtime | None = None) -> Result:
    """Actors play, learners compute gradients, shards apply them, until the run is over.

    Args:
        config: settings.
        runtime: an open one to run on; by default one of its own, as `config` says.
    """
    torch.set_num_threads(config.torch_threads)
    rows = config.replay_capacity * (config.num_workers if config.bundled else config.num_replays)
    require_memory("replay_capacity", rows, row_bytes(config), f"of {config.env_id}")
    processes = config.num_workers + config.num_actors + config.num_learners + config.num_shards
    own = own_runtime(config, processes, COSTS)
    with own if runtime is None else nullcontext(runtime) as rt:
        flat = Flat(network := make_network(config, make_envs(config.env_id, 1, config.seed)))
        vector = flat.vector.numpy()
        server = param_server.priced_server(
            rt, vector, config.num_shards, ServerSettings.of(config)
        )
        driver = Driver(rt, config, server)
        policy = LivePolicy(GreedyPolicy(network), lambda: np.copyto(vector, server.weights()))
        parts = {"server": server, "learners": driver.learners, "actors": driver.actors}
        parts |= {"replay": driver.replay, "runtime": rt}
        with Run("gorila", config, policy, parts, lambda: rt.now, checkpoints="asked") as run:
            while run.running():
                book(run, *driver.turn(run.env_steps))
                if run.checkpoint_due():
                    book(run, *driver.drain())
                    run.checkpoint()
            book(run, *driver.drain())
            policy.initial_state(1)
        run.trace(rt.timeline())
    policy.refresh = None  # nobody is left to ask
    return run.result()
