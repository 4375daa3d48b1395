"""Ape-X: many actors fill one prioritised replay memory, one learner draws from it.

    Actor 0 … N−1                 Replay 0 … R−1                Learner
      Q, ε_i     ─ transitions, ──►  drawn with  ── batches ──►   Q, target Q
         ▲         priorities        p^α / Σ p^α                  │    │
         │                              ▲                         │    │
         │                              └────── priorities ───────┘    │
         └───────────────── weights, every so many updates ────────────┘

      who waits: actors, while the learner is behind `samples_per_insert`;
                 the learner, while there is nothing more to draw

This is DQN (Mnih et al., 2015; double, dueling, n-step) with: actors that only play, each with an ε
of its own; a replay memory that all of them fill; and priorities which the actors compute from the
Q-values that they acted by, so that new experience is drawn by what it is worth from the start
(Horgan et al., 2018, "Distributed prioritized experience replay"). With one actor, drawn uniformly,
in turns (update_rule "sync"), it is DQN.

Differs from the paper: an actor steps B copies of its environment, each with an ε of its own (B = 1
there); acting and learning are held to a ratio, where the paper lets both run free; a full memory
forgets the oldest at once, not every 100 updates; a draw may hold the batches of several updates,
whose priorities return together; k learners (`num_learners`, one there) each take 1/k of every
batch and make the same steps. An actor or a shard that dies is replaced; when a learner dies the
run ends, and its checkpoint goes on. The score is that of the copies that explore least. Shards of
stacked frames keep each frame once, for each chunk that it comes in.

Book: chapter 10
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from rlbook.data import Transition, tree_nbytes
from rlbook.harness import one_gpu
from rlbook.harness.config import RunConfig, above, at_least, at_most, within
from rlbook.harness.doctor import require_memory
from rlbook.harness.run import Result, Run
from rlbook.maths.exploration import epsilon_ladder
from rlbook.parts.envs import Envs, make_envs, require_discrete
from rlbook.parts.flat import Flat
from rlbook.parts.frame_ring import frames_each, stored_bytes
from rlbook.parts.meter import Meter
from rlbook.parts.n_step import Trail
from rlbook.parts.networks import GreedyPolicy, LivePolicy, QNetwork, action_values
from rlbook.parts.numpy_mlp import numpy_action_values
from rlbook.parts.optim import RMSProp
from rlbook.parts.q_learning import epsilon_greedy, td_gradient
from rlbook.parts.replay import weighed
from rlbook.plumbing.cluster import own_runtime
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.memory_shard import Made, Memory, MemorySettings, MemoryShard, Part, handed_on
from rlbook.plumbing.param_server import Alive
from rlbook.plumbing.replay_books import Report, book
from rlbook.plumbing.replay_flow import ReplayFlow, Turn, remote_flow
from rlbook.plumbing.replay_learner import Found, LearnerFields, ReplayLearner, on_its_device
from rlbook.plumbing.replay_place import opened
from rlbook.plumbing.replay_server import Replay
from rlbook.plumbing.runtime import Runtime
from rlbook.plumbing.team import place_seed


@dataclass(frozen=True, kw_only=True)
class Config(LearnerFields, RunConfig):
    """Settings; the defaults solve CartPole-v1 in some seconds of training."""

    num_actors: int = 2
    """N, processes that act (360 in the paper, with one copy each)."""
    num_envs: int = 16
    """Copies of the environment that an actor steps together (1 in the paper)."""
    unroll_length: int = 25
    """Vector steps of a chunk: what an actor sends at once (50 transitions in the paper)."""
    replay: Literal["shards", "redis"] = "shards"
    """Processes of our own, or a Redis server, which actors and learner speak to themselves; there
    stacks of frames lie whole."""
    num_replays: int = 1
    """R, shards of the replay memory (1 in the paper; 4 in RLlib's)."""
    prioritized: bool = True
    """Draw by priority, or uniformly."""
    priority_exponent: float = 0.6
    """α (0.6 in the paper)."""
    importance_exponent: float = 0.4
    """β (0.4 in the paper)."""
    weight_normalization: Literal["batch", "buffer"] = "batch"
    """Importance weights are divided by their largest in the batch, or in the whole memory."""
    replay_capacity: int = 50_000
    """Transitions kept over all shards (2 M in the paper)."""
    learning_starts: int = 1_000
    """Transitions in replay before the first update (50 000 in the paper)."""
    samples_per_insert: float | None = 3.0
    """Transitions drawn for each that comes in (0.8 in the paper's runs, by its figures); those of
    rows on which an episode begins count too. None: nobody waits for anybody, as in the paper."""
    rate_tolerance: int = 4_000
    """Transitions by which drawing may be ahead or behind of that."""
    update_rule: Literal["async", "sync"] = "async"
    """"sync": all actors play a chunk, then all is learnt that is owed, and so on."""
    batch_size: int = 128
    """Transitions of one update (512 in the paper)."""
    updates_per_call: int = 12
    """Batches that are drawn, and priorities that return, together."""
    calls_in_flight: int = 2
    """Draws at the learner; with 2 the next is on its way while it learns."""
    broadcast_period: int = 12
    """Updates between two weights for the actors (400 steps of an actor in the paper)."""
    target_period: int = 50
    """Updates between copies to the target network (2500 in the paper)."""
    double: bool = True
    """Choose the next action by the online network, value it by the target network."""
    dueling: bool = True
    """Separate heads for the value and the advantages."""
    n_step: int = 5
    """Steps of reward before the bootstrap (3 in the paper)."""
    discount: float = 0.99
    """γ (0.99 in the paper)."""
    epsilon_base: float = 0.4
    """ε of the most exploring copy (0.4 in the paper)."""
    epsilon_alpha: float = 7.0
    """α of the ladder ε_i = base^(1 + α i / (N − 1)) (7 in the paper)."""
    scored_fraction: float = 0.5
    """Part of the copies, those that explore least, whose episodes are the score."""
    optimizer: Literal["adam", "rmsprop"] = "adam"
    """Adam, or centred RMSProp with ε inside the root, as in the paper."""
    learning_rate: float = 1e-3
    """η (2.5e-4 / 4 in the paper)."""
    optimizer_epsilon: float = 1e-8
    """ε of the optimiser (1.5e-7 in the paper)."""
    max_gradient_norm: float = 10.0
    """The gradient is scaled down to this Euclidean norm (40 in the paper)."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Fully connected layers of the torso (frames get convolutions)."""
    runtime: Literal["ray", "virtual"] = "ray"
    """Real processes, or the seeded virtual cluster."""
    ray_address: str | None = None
    """An existing Ray cluster to join; None starts one here."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        self.check_learners()
        at_least(self, 1, "num_actors", "unroll_length", "num_replays", "replay_capacity")
        at_least(self, 1, "learning_starts", "batch_size", "updates_per_call", "calls_in_flight")
        at_least(self, 1, "broadcast_period", "target_period", "n_step")
        at_least(self, 0.0, "learning_rate", "max_gradient_norm", "epsilon_alpha")
        within(self, 0.0, 1.0, "discount", "priority_exponent", "importance_exponent")
        within(self, 0.0, 1.0, "epsilon_base", "scored_fraction")
        above(self, 0.0, "optimizer_epsilon")
        if self.samples_per_insert is not None:
            above(self, 0.0, "samples_per_insert")
        at_most(self, "num_replays", "replay_capacity")
        at_most(self, "learning_starts", "replay_capacity")
        if 2 * self.rate_tolerance < self.batch_size * self.updates_per_call:
            raise ValueError(
                "rate_tolerance: must be at least half of what is drawn at once (updates_per_call"
                f" · batch_size), or actors and learner wait for each other, got"
                f" {self.rate_tolerance}"
            )

    @property
    def all_envs(self) -> int:
        """Copies of the environment over all actors."""
        return self.num_actors * self.num_envs

    @property
    def finds_smallest(self) -> bool:
        """Whether the smallest priority of the whole memory is needed."""
        return self.weight_normalization == "buffer"

    @property
    def memory_settings(self) -> MemorySettings:
        """Of all shards together."""
        how = self.prioritized, self.priority_exponent, self.finds_smallest
        return MemorySettings(self.replay_capacity, *how)


PRESETS = {
    "default": Config(),
    "one_gpu": Config(**one_gpu.APEX),
    "uniform": Config(prioritized=False),
    "redis": Config(replay="redis"),
    # The paper: 360 actors with one copy each. As many processes as a computer has cores here.
    "paper": Config(
        env_id="ALE/Pong-v5",
        total_env_steps=50_000_000,
        unroll_length=50,
        replay_capacity=2_000_000,
        learning_starts=50_000,
        samples_per_insert=None,
        batch_size=512,
        updates_per_call=1,
        broadcast_period=25,
        target_period=2_500,
        n_step=3,
        optimizer="rmsprop",
        learning_rate=2.5e-4 / 4,
        optimizer_epsilon=1.5e-7,
        max_gradient_norm=40.0,
    ),
}

COSTS = {"env_step": 30e-6, "inference": 18e-6, "fold": 0.11e-3, "add": 45e-6}
COSTS |= {"sample": 45e-6, "learn": 0.7e-3, "update": 20e-6}
"""Seconds of a unit of work on the virtual cluster, where none are given: one step of 16 copies of
CartPole, one forward pass of 16 rows, making transitions and priorities of a chunk of 400, storing
them, drawing a batch of 128, one update with it, storing the priorities of a draw. `units_of_work`
measures them here."""


SMALLEST_PRIORITY = 1e-6
"""Added to |TD error|, so that nothing is never drawn again."""


class Actor(Alive):
    """Plays, and says what its experience is worth.

    Args:
        config: of the system.
        index: its place.
        born: how many actors were in this place before (they died): a new one draws anew.
        metered: report where the time went (of the wall, so never on a virtual clock).
        memory: a client of the replay memory, if that is on a server.
    """

    def __init__(
        self,
        config: Config,
        index: int,
        born: int = 0,
        metered: bool = False,
        memory: Memory | None = None,
    ) -> None:
        torch.set_num_threads(1)
        seed = place_seed(config.seed, index, born)
        self.config, self.memory, self.rng = config, memory, np.random.default_rng([seed, 1])
        self.envs = make_envs(config.env_id, config.num_envs, seed)
        self.flat = Flat(network := make_network(config, self.envs))
        self.forward = numpy_action_values(network) or (lambda seen: action_values(network, seen))
        packs = self.envs.planes > 1 and memory is None
        self.trail = Trail(config.n_step, config.discount, packs)
        base, alpha, copies = config.epsilon_base, config.epsilon_alpha, config.all_envs
        ladder = epsilon_ladder(copies, base=base, alpha=alpha)
        self.epsilon = ladder[index :: config.num_actors]  # every actor has all kinds
        self.scored = self.epsilon <= ladder[-max(1, round(config.scored_fraction * copies))]
        self.meter = Meter(metered)
        self.meter.watch(self.envs, "transition", "env")
        self.meter.watch(self, "values", "inference")

    def play(self, weights: Vector) -> tuple[Report, Made | None]:
        """T steps of B copies with these parameters; None if no transition is complete."""
        self.meter.begin()
        np.copyto(self.flat.vector.numpy(), weights.values)
        env_steps, q_mean = 0, 0.0
        for _ in range(self.config.unroll_length):
            q = self.values()
            step = self.envs.transition(epsilon_greedy(q, self.epsilon, self.rng))
            self.trail.push(step, q)
            env_steps += int(step.valid.sum())
            q_mean += float(q.max(-1).mean()) / self.config.unroll_length
        made = self.make(self.values() if self.config.prioritized else None)
        wire = weights.values.nbytes + tree_nbytes(made)
        episodes = [one for one in self.envs.episodes() if self.scored[one.env]]
        metrics = {"q_mean": q_mean, **self.meter.fractions()}
        items = 0 if made is None else len(made.items.r_t)
        return Report(env_steps, items, wire, episodes, metrics), handed_on(made, self.memory)

    def make(self, q: np.ndarray | None) -> Made | None:
        """The transitions that are complete, with |R + γⁿ max Q − Q| by the Q-values of acting;
        q `[B, A]` is of what the copies show now, None if nobody asks for priorities.
        """
        if (folded := self.trail.fold(q)) is None:
            return None
        transitions, errors = folded
        return Made(transitions, None if errors is None else errors + SMALLEST_PRIORITY)

    def values(self) -> np.ndarray:
        """Q of what the copies show now, `[B, A]`."""
        return self.forward(self.envs.env_output.observation)

    def state_dict(self) -> dict[str, Any]:
        """Environments, unfinished transitions and random generator."""
        parts = {"envs": self.envs.state_dict(), "trail": self.trail.state_dict()}
        return {**parts, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; nothing is unfinished if the episodes were begun anew."""
        self.envs.load_state_dict(state["envs"])
        self.trail.load_state_dict(
            {"steps": [], "q": []} if self.envs.restarted else state["trail"]
        )
        self.rng.bit_generator.state = state["rng"]


class Learner(ReplayLearner):
    """Fits the online network to targets that the target network makes."""

    def __init__(
        self,
        config: Config,
        rank: int = 0,
        metered: bool = False,
        memory: Memory | None = None,
    ) -> None:
        torch.set_num_threads(config.torch_threads)
        envs = make_envs(config.env_id, 1, config.seed)
        self.online = on_its_device(make_network(config, envs), config, rank)
        self.target = on_its_device(make_network(config, envs), config, rank)
        flat, flat_target = Flat(self.online), Flat(self.target)
        parts = flat, flat_target, make_optimizer(config, flat)
        super().__init__(*parts, config, rank, metered, memory)

    def gradient(self, batch: Part) -> Found:
        """Of the mean of weighted losses of a batch; a row's priority is its |TD error|."""
        config, sample = self.config, batch.sample
        assert sample is not None
        exponent = config.importance_exponent if config.prioritized else 0.0
        size, least = batch.size, batch.smallest
        sample = weighed(sample, size=size, exponent=exponent, smallest=least)
        networks, double = (self.online, self.target), config.double
        absolute, metrics = td_gradient(self.flat, networks, sample, double, self.cast())
        return Found(absolute + SMALLEST_PRIORITY, len(absolute), metrics)


def turn(flow: ReplayFlow) -> Turn:
    """The driver's part: whatever may go on goes on, then it waits for whoever is first."""
    while flow.may_learn():
        flow.learn()  # a draw of all shards, before the learner has asked for it
    while flow.may_act():
        flow.act()  # with the newest weights there are
    return flow.first()


def make_flow(
    runtime: Runtime, config: Config, parameters: np.ndarray, replay: Replay
) -> ReplayFlow:
    """Actors and learner on a runtime, and the flow between them and the replay memory."""
    rows = config.unroll_length * config.num_envs
    sizes: dict[str, Any] = {"report": Report(rows, rows, 0, [], {}), "chunk_rows": rows}
    sizes |= {"made_bytes": rows * kept_bytes(config)}
    sizes |= {"forwards": config.unroll_length + config.prioritized}
    return remote_flow(runtime, Actor, Learner, replay, config, parameters, **sizes)


def open_replay(
    runtime: Runtime, config: Config, memory: Memory | None = None
) -> AbstractContextManager[Replay]:
    """The replay memory; ValueError if what it may hold can never fit into this machine's."""
    if memory is None:
        rows, size = config.replay_capacity, kept_bytes(config)
        require_memory("replay_capacity", rows, size, f"of {config.env_id}")
    return opened(runtime, config, settings_of(config), example(config), memory)


def example(config: Config) -> Transition:
    """An item of the replay memory."""
    seen, one = make_envs(config.env_id, 1, 0).env_output.observation[0], np.float32(0)
    return Transition(seen, np.int64(0), one, one, seen)


def item_bytes(config: Config) -> int:
    """Of a transition that is drawn, with priority."""
    return tree_nbytes(example(config)) + 8


def kept_bytes(config: Config) -> int:
    """Of a transition as an actor sends it and the memory keeps it, with priority."""
    return stored_bytes(example(config), settings_of(config).frames) + 8


def settings_of(config: Config) -> MemorySettings:
    """Of all shards together; of stacks of frames they keep each frame once, Redis whole stacks."""
    planes = make_envs(config.env_id, 1, 0).planes if config.replay == "shards" else 1
    each = frames_each(planes, config.unroll_length, config.n_step)
    return config.memory_settings._replace(example=example(config), frames=each)


def units_of_work(config: Config) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts."""
    actor, learner, actions = Actor(config, 0), Learner(config), np.zeros(config.num_envs, int)
    shard = MemoryShard(settings_of(config), config.seed)
    q, step = actor.values(), actor.envs.transition(actions)
    steps, rows = config.unroll_length + config.n_step - 1, config.batch_size

    def fold() -> Made | None:
        actor.trail.steps, actor.trail.q = [step] * steps, [q] * steps
        return actor.make(q)

    made = fold()
    shard.keep(made)
    batch, draw = (shard.draw(count, 1.0)[1] for count in (rows, rows * config.updates_per_call))
    back = learner.learn(draw)[2]
    return {
        "env_step": lambda: actor.envs.transition(actions),
        "inference": actor.values,
        "fold": fold,
        "add": lambda: shard.keep(made),
        "sample": lambda: shard.draw(rows, 1.0),
        "learn": lambda: learner.update(batch),
        "update": lambda: shard.correct(back),
    }


def make_optimizer(config: Config, flat: Flat) -> torch.optim.Optimizer:
    """Of all parameters as one vector: one step instead of eight."""
    rate, epsilon = config.learning_rate, config.optimizer_epsilon
    if config.optimizer == "adam":
        return torch.optim.Adam([flat.vector], lr=rate, eps=epsilon)
    return RMSProp([flat.vector], lr=rate, alpha=0.95, eps=epsilon, centered=True)


def make_network(config: Config, envs: Envs) -> QNetwork:
    """A Q-network for the environment's observations and actions."""
    num_actions = require_discrete(envs, "apex")
    torch.manual_seed(config.seed)
    shape = envs.observation_space.shape or ()
    return QNetwork(shape, num_actions, config.hidden_sizes, config.dueling)


def load_policy(config: Config, parts: dict[str, Any]) -> GreedyPolicy:
    """The greedy policy of a checkpoint."""
    network = make_network(config, make_envs(config.env_id, 1, config.seed))
    np.copyto(Flat(network).vector.numpy(), parts["learner"]["online"])
    return GreedyPolicy(network)


def train(config: Config, runtime: Runtime | None = None, memory: Memory | None = None) -> Result:
    """Actors play, the learner learns, until the run is over.

    Args:
        config: settings.
        runtime: an open one to run on; by default one of its own, as `config` says.
        memory: with "redis", a client of a memory on a server that runs already, and goes on to
            run; by default a server is started for the run.
    """
    torch.set_num_threads(config.torch_threads)
    own = own_runtime(config, config.num_actors + config.num_replays + config.num_learners, COSTS)
    with (
        own if runtime is None else nullcontext(runtime) as rt,
        open_replay(rt, config, memory) as replay,
    ):
        network = make_network(config, make_envs(config.env_id, 1, config.seed))
        vector = Flat(network).vector.numpy()
        flow = make_flow(rt, config, vector, replay)
        policy = LivePolicy(GreedyPolicy(network), lambda: np.copyto(vector, flow.parameters()))
        entry = flow, item_bytes(config), 1
        with Run("apex", config, policy, flow.parts, lambda: rt.now, checkpoints="asked") as run:
            run.extra["replay_nbytes"] = size = replay.nbytes
            run.say(f"{config.replay_capacity:,} transitions in replay: {size / 1e6:.1f} MB")
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
