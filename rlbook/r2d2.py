"""R2D2: Ape-X with memory, which learns from sequences and from the state before them.

    Actor 0 … N−1                     Replay 0 … R−1                     Learner
      Q + LSTM, ε_i   ─ sequences, ──►  by p^α / Σ  ── batch of ──────►   burn-in: state only
      state carried     priorities                     sequences          then loss, |δ|
         ▲                                 ▲                               │    │
         │                                 └───────── priorities ──────────┘    │
         └───────────────────── weights, every so many updates ─────────────────┘

      a sequence    burn-in l │ m steps to learn from │ n to bootstrap from       of one episode
                    h, c before it                    p = η max |δ| + (1 − η) mean |δ|

      who waits: actors, while the learner is behind the replay ratio;
                 the learner, while there is nothing more to draw

This is Ape-X (Horgan et al., 2018) with: an LSTM after the torso; sequences with overlap instead of
transitions; the recurrent state stored with them and warmed up over a burn-in; rescaled values
instead of clipped rewards; and a priority of sequences (Kapturowski et al., 2019, "Recurrent
experience replay in distributed reinforcement learning"). Without memory, with sequences of one
step and no rescaling, it is Ape-X.

Differs from the paper: the burn-in lies before the m steps, and the n steps to bootstrap from after
them, so that every step has its n-step target; an episode's first steps, whose state is known, need
no burn-in and are learnt from too. Huber's loss, a mean over valid steps. An actor steps B copies,
each with an ε of its own. k learners (`num_learners`, one there) each take 1/k of every batch. No
reward or action is fed back to the network. A sequence of stacked frames has each frame once.

Book: chapter 12
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from rlbook.data import tree_nbytes
from rlbook.harness import one_gpu
from rlbook.harness.config import RunConfig, above, at_least, at_most, within
from rlbook.harness.doctor import require_memory
from rlbook.harness.run import Result, Run
from rlbook.maths.exploration import epsilon_ladder
from rlbook.parts.envs import Envs, make_envs, require_discrete
from rlbook.parts.flat import Flat
from rlbook.parts.meter import Meter
from rlbook.parts.networks import LivePolicy
from rlbook.parts.recurrent_q import make_q_network, q_policy
from rlbook.parts.replay import weighed
from rlbook.parts.sequence_loss import learnt as learnt
from rlbook.parts.sequence_loss import priority, td_errors
from rlbook.parts.sequence_loss import sequence_loss as loss_function
from rlbook.parts.sequences import Rows, Sequence, SequencePlayer, as_tensors
from rlbook.plumbing.cluster import own_runtime
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.memory_shard import Made, MemorySettings, MemoryShard, Part
from rlbook.plumbing.param_server import Bundle
from rlbook.plumbing.replay_books import Report, book
from rlbook.plumbing.replay_flow import ReplayFlow, Turn, remote_flow
from rlbook.plumbing.replay_learner import (
    Found,
    LearnerFields,
    ReplayLearner,
    on_its_device,
)
from rlbook.plumbing.replay_server import Replay, ShardedReplay
from rlbook.plumbing.runtime import Runtime
from rlbook.plumbing.team import place_seed


@dataclass(frozen=True, kw_only=True)
class Config(LearnerFields, RunConfig):
    """Settings; the defaults solve the memory task, which no agent without memory can."""

    env_id: str = "rlbook/Memory-v0"
    num_actors: int = 2
    """Processes that act, each with `num_envs` copies (256 in the paper, with one each)."""
    num_envs: int = 8
    sequence_length: int = 10
    """m, steps of a sequence to learn from (80 in the paper)."""
    sequence_overlap: int = 5
    """Steps that neighbours share (40 in the paper)."""
    burn_in_length: int = 5
    """l, steps before them that only warm up the state (40 in the paper; 0 for none)."""
    unroll_length: int = 20
    """Vector steps of one turn of an actor."""
    state_init: Literal["stored", "zero"] = "stored"
    """Recurrent state before the burn-in: the actor's, or zeros."""
    n_step: int = 5
    """n, steps of reward before the bootstrap (5 in the paper)."""
    double: bool = True
    """Choose the next action by the online network, value it by the target network."""
    rescaling_epsilon: float | None = 1e-3
    """ε of h, with h(Q) learnt instead of Q (1e-3 in the paper); None learns Q."""
    discount: float = 0.99
    """γ (0.997 in the paper)."""
    priority_mix: float = 0.9
    """η: how much of a sequence's priority is its largest |δ| (0.9 in the paper)."""
    priority_exponent: float = 0.9
    """α (0.9 in the paper)."""
    importance_exponent: float = 0.6
    """β (0.6 in the paper)."""
    epsilon_base: float = 0.4
    """ε of the most exploring copy (0.4 in the paper)."""
    epsilon_alpha: float = 7.0
    """The least exploring one has base^(1 + this) (7 in the paper)."""
    scored_fraction: float = 0.5
    """Part of the copies, those that explore least, whose episodes are the score."""
    batch_size: int = 32
    """Sequences of one update (64 in the paper)."""
    updates_per_call: int = 4
    """Updates of one call of the learner, on one draw: fewer and larger messages."""
    calls_in_flight: int = 2
    """Draws at the learner at once; with 2 the next batch comes while it learns."""
    update_rule: Literal["async", "sync"] = "async"
    """"sync": all actors play a turn, then all is learnt that is owed, and so on."""
    broadcast_period: int = 4
    """Updates between two sets of parameters for the actors (400 of an actor's steps in the
    paper)."""
    samples_per_insert: float | None = 8.0
    """Steps drawn to learn from, for each that an actor takes (about 1.5 in the paper, by its
    figures); padding counts too. None: nobody waits for anybody, as in the paper."""
    num_replays: int = 1
    """R, shards of the replay memory."""
    replay_capacity: int = 10_000
    """Sequences in all shards together (100 000 in the paper)."""
    learning_starts: int = 100
    """Sequences in the replay memory before the first update."""
    learning_rate: float = 1e-3
    """Adam's step size (1e-4 in the paper)."""
    optimizer_epsilon: float = 1e-5
    """ε of Adam (1e-3 in the paper)."""
    target_period: int = 100
    """Updates between copies to the target network (2500 in the paper)."""
    max_gradient_norm: float = 40.0
    """The gradient is scaled down to this Euclidean norm."""
    hidden_sizes: tuple[int, ...] = (32,)
    """Fully connected layers of the torso (frames get convolutions)."""
    lstm_size: int = 32
    """Cells of the LSTM (512 in the paper); 0 for none: no memory."""
    dueling: bool = True
    """Separate heads for the value and the advantages."""

    runtime: Literal["ray", "virtual"] = "ray"
    """Real processes, or the seeded virtual cluster."""
    ray_address: str | None = None
    """An existing Ray cluster to join; None starts one here."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        self.check_learners()
        at_least(self, 1, "num_actors", "sequence_length", "unroll_length")
        at_least(self, 1, "n_step", "batch_size", "updates_per_call", "calls_in_flight")
        at_least(self, 1, "broadcast_period", "num_replays", "learning_starts", "target_period")
        at_least(self, 0, "sequence_overlap", "burn_in_length", "lstm_size", "learning_rate")
        at_least(self, 0, "epsilon_alpha", "max_gradient_norm")
        at_least(self, 0, "priority_exponent", "importance_exponent")
        optional = "rescaling_epsilon", "samples_per_insert"
        above(self, 0.0, "optimizer_epsilon", *(f for f in optional if vars(self)[f] is not None))
        within(self, 0.0, 1.0, "discount", "priority_mix", "epsilon_base", "scored_fraction")
        if self.sequence_overlap >= (m := self.sequence_length):
            got = f"which is {m}, got {self.sequence_overlap}"
            raise ValueError(f"sequence_overlap: must be less than sequence_length, {got}")
        at_most(self, "learning_starts", "replay_capacity")
        at_most(self, "num_replays", "replay_capacity")

    @property
    def rate_tolerance(self) -> float:
        """Sequences by which drawing may be ahead or behind: what both sides do at once."""
        steps = (self.samples_per_insert or 0.0) * self.unroll_length * self.all_envs
        return self.batch_size * self.updates_per_call + steps / self.sequence_length

    @property
    def all_envs(self) -> int:
        """Copies of the environment over all actors."""
        return self.num_actors * self.num_envs


MASKED = Config(
    env_id="rlbook/MaskedCartPole-v0",
    total_env_steps=300_000,
    sequence_length=20,
    sequence_overlap=10,
    burn_in_length=10,
    samples_per_insert=16.0,
    learning_rate=3e-3,
)
PRESETS = {
    "default": Config(),
    "one_gpu": Config(**one_gpu.R2D2),
    "masked": MASKED,
    "feedforward": replace(MASKED, lstm_size=0, burn_in_length=0),
    "cartpole": replace(MASKED, env_id="CartPole-v1", total_env_steps=500_000),
    # With as many processes as a computer has cores; the paper: 256 actors of one copy each.
    "paper": Config(
        env_id="ALE/Pong-v5",
        total_env_steps=50_000_000,
        sequence_length=80,
        sequence_overlap=40,
        burn_in_length=40,
        discount=0.997,
        batch_size=64,
        broadcast_period=2,
        samples_per_insert=1.5,
        replay_capacity=100_000,
        learning_starts=5_000,
        learning_rate=1e-4,
        optimizer_epsilon=1e-3,
        target_period=2_500,
        lstm_size=512,
    ),
}

COSTS = {"env_step": 10e-6, "inference": 60e-6, "fold": 0.5e-3, "add": 0.1e-3}
COSTS |= {"sample": 0.1e-3, "learn": 5e-3, "update": 0.1e-3}
"""Seconds of a unit of work on the virtual cluster, where none are given: one step of 8 copies of
Memory, one forward pass of 8 rows, cutting what a turn of 20 steps brings, storing it, drawing a
batch of 32, one update with it, storing its priorities. `units_of_work` measures them here."""


class Actor(Bundle):
    """Plays ε-greedily with the parameters that it is given, and cuts what it saw into sequences.

    Args:
        config: of the system.
        index: which actor; its copies take every `num_actors`-th place on the ladder of ε.
        born: how many were in this place before (they died): a new one draws anew.
        metered: report where the time went (of the wall, so never on a virtual clock).
    """

    parts = ("player",)

    def __init__(self, config: Config, index: int, born: int = 0, metered: bool = False) -> None:
        torch.set_num_threads(1)
        self.config, seed = config, place_seed(config.seed, index, born)
        self.envs, network = make_game(config, config.num_envs, seed), make_network(config)
        self.flat = Flat(network)
        base, alpha = config.epsilon_base, config.epsilon_alpha
        ladder = epsilon_ladder(config.all_envs, base=base, alpha=alpha)
        mine, scored = ladder[index :: config.num_actors], config.scored_fraction
        self.scored = mine <= ladder[-max(1, round(scored * config.all_envs))]
        self.player = SequencePlayer(
            self.envs,
            network,
            mine,
            seed,
            burn_in=config.burn_in_length,
            length=config.sequence_length,
            overlap=config.sequence_overlap,
            tail=config.n_step,
        )
        self.meter = Meter(metered)
        self.meter.watch(self.envs, "step", "env")
        self.meter.watch(self.player, "values", "inference")

    def play(self, weights: Vector) -> tuple[Report, Made | None]:
        """T steps of B copies: the sequences that they complete, with their priorities."""
        self.meter.begin()
        np.copyto(self.flat.vector.numpy(), weights.values)
        rows = self.player.rows(self.config.unroll_length)
        made = self.cut(rows)
        episodes = [one for one in self.envs.episodes() if self.scored[one.env]]
        metrics = {"q_mean": float(rows.q.max(-1).mean()), **self.meter.fractions()}
        items = 0 if made is None else len(made.priorities)
        wire = tree_nbytes(made) + weights.values.nbytes
        return Report(int(rows.valid.sum()), items, wire, episodes, metrics), made

    def cut(self, rows: Rows) -> Made | None:
        """The sequences that these rows complete; priorities by the action values of acting."""
        if (found := self.player.cutter.push(rows)) is None:
            return None
        sequences, q = found
        batch, values = as_tensors(sequences), torch.from_numpy(q)
        errors = td_errors(values, values, batch, self.config)
        return Made(sequences, priority(errors, batch, self.config).numpy())


class Learner(ReplayLearner):
    """Fits the online network to sequences; the target network follows now and then."""

    def __init__(self, config: Config, rank: int = 0, metered: bool = False) -> None:
        torch.set_num_threads(config.torch_threads)
        self.online = on_its_device(make_network(config), config, rank)
        self.target = on_its_device(make_network(config), config, rank)
        flat, rate = Flat(self.online), config.learning_rate
        optimizer = torch.optim.Adam([flat.vector], lr=rate, eps=config.optimizer_epsilon)
        super().__init__(flat, Flat(self.target), optimizer, config, rank, metered)

    def gradient(self, batch: Part) -> Found:
        """Of the loss of a batch: a mean over valid steps; and its sequences' priorities."""
        config, sample = self.config, batch.sample
        assert sample is not None
        size, beta, least = batch.size, config.importance_exponent, batch.smallest
        sample = weighed(sample, size=size, exponent=beta, smallest=least)
        with self.cast():
            loss, priorities, metrics = loss_function(self.online, self.target, sample, config)
        self.flat.gradients.zero_()
        loss.backward()
        steps = sample.items.valid[:, config.burn_in_length :][:, : config.sequence_length]
        return Found(priorities, float(steps.sum()), metrics)


def turn(flow: ReplayFlow) -> Turn:
    """The driver's part: whatever may go on goes on, then it waits for whoever is first."""
    while flow.may_learn():
        flow.learn()  # the draw is on its way before the learner has asked for it
    while flow.may_act():
        flow.act()  # with the newest weights there are
    return flow.first()


def make_flow(runtime: Runtime, config: Config, parameters: np.ndarray) -> ReplayFlow:
    """Actors, learner and replay memory on a runtime, and the flow between them."""
    steps = config.unroll_length * config.num_envs
    made = max(1, steps // (config.sequence_length - config.sequence_overlap))
    parts = runtime, Actor, Learner, make_replay(runtime, config), config, parameters
    work = {"forwards": config.unroll_length, "made_bytes": made * row_bytes(config)}
    chunk: dict[str, Any] = {"chunk_rows": steps / config.sequence_length, **work}
    return remote_flow(*parts, report=Report(steps, made, 0, [], {}), **chunk)


def make_replay(runtime: Runtime, config: Config) -> Replay:
    """The shards; ValueError if what they may hold can never fit into memory."""
    shards, capacity = config.num_replays, config.replay_capacity
    sizes = {"batch": config.batch_size, "row_bytes": row_bytes(config)}
    require_memory("replay_capacity", capacity, sizes["row_bytes"], f"of {config.env_id}")
    each, exponent = -(-capacity // shards), config.priority_exponent  # rounded up
    settings = MemorySettings(each, True, exponent, example=example(config))
    return ShardedReplay(runtime, settings, shards, seed=config.seed, **sizes)


def example(config: Config) -> Sequence:
    """An item of the replay memory."""
    rows = config.burn_in_length + config.sequence_length + config.n_step
    envs = make_game(config, 1, 0)
    return Sequence.blank(envs.env_output.observation[0], rows, config.lstm_size, envs.planes)


def row_bytes(config: Config) -> int:
    """Of a sequence, with priority."""
    return tree_nbytes(example(config)) + 8


def units_of_work(config: Config) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts."""
    actor, learner = Actor(config, 0), Learner(config)
    seen, actions = actor.envs.env_output, np.zeros(config.num_envs, int)
    shard = MemoryShard(MemorySettings(config.replay_capacity), config.seed)
    while len(shard.memory) < config.batch_size:
        shard.keep(made := actor.play(learner.newest())[1])
    part = shard.draw(config.batch_size, 1.0)[1]
    back = learner.learn(shard.draw(config.batch_size * config.updates_per_call, 1.0)[1])[2]
    rows = actor.player.rows(config.unroll_length)
    return {
        "env_step": lambda: actor.envs.step(actions),
        "inference": lambda: actor.player.values(seen.observation, seen.first),
        "fold": lambda: actor.cut(rows),
        "add": lambda: shard.keep(made),
        "sample": lambda: shard.draw(config.batch_size, 1.0),
        "learn": lambda: learner.update(part),
        "update": lambda: shard.correct(back),
    }


def make_game(config: Config, num_envs: int, seed: int) -> Envs:
    """Copies of the environment; values are rescaled instead of rewards clipped."""
    clip = None if config.rescaling_epsilon is None else np.inf
    return make_envs(config.env_id, num_envs, seed, reward_clip=clip)


def make_network(config: Config) -> Any:
    """A Q-network for the environment's observations and actions, with or without memory."""
    envs, sizes = make_game(config, 1, config.seed), (config.hidden_sizes, config.lstm_size)
    num_actions, shape = require_discrete(envs, "r2d2"), envs.observation_space.shape or ()
    torch.manual_seed(config.seed)
    return make_q_network(shape, num_actions, *sizes, config.dueling)


def load_policy(config: Config, parts: dict[str, Any]) -> Any:
    """The greedy policy of a checkpoint."""
    network = make_network(config)
    np.copyto(Flat(network).vector.numpy(), parts["learner"]["online"])
    return q_policy(network)


def train(config: Config, runtime: Runtime | None = None) -> Result:
    """Actors play, the replay memory deals, the learner learns, until the run is over.

    Args:
        config: settings.
        runtime: an open one to run on; by default one of its own, as `config` says.
    """
    torch.set_num_threads(config.torch_threads)
    own = own_runtime(config, config.num_actors + config.num_replays + config.num_learners, COSTS)
    with own if runtime is None else nullcontext(runtime) as rt:
        vector = Flat(network := make_network(config)).vector.numpy()
        flow = make_flow(rt, config, vector)
        policy = LivePolicy(q_policy(network), lambda: np.copyto(vector, flow.parameters()))
        entry = flow, row_bytes(config), config.sequence_length
        with Run("r2d2", config, policy, flow.parts, lambda: rt.now, checkpoints="asked") as run:
            run.extra["replay_nbytes"] = size = flow.replay.nbytes
            run.say(f"{config.replay_capacity:,} sequences in replay: {size / 1e6:.1f} MB")
            while run.running():
                book(run, [turn(flow)], *entry)
                if run.checkpoint_due():
                    book(run, flow.drain(), *entry)
                    run.checkpoint()
            book(run, flow.drain(), *entry)
            policy.initial_state(1)
        run.trace(rt.timeline())
    policy.refresh = None  # nobody is left to ask
    return run.result()
