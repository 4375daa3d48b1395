"""Ape-X DPG: Ape-X for actions that are numbers; a policy is learnt beside the critic.

    Actor 0 … N−1                 Replay 0 … R−1                Learner
      μ, Q, σ_i  ─ transitions, ──►  drawn with  ── batches ──►   μ, Q and their targets
         ▲         priorities        p^α / Σ p^α                  │    │
         │                              ▲                         │    │
         │                              └────── priorities ───────┘    │
         └───────────────── weights, every so many updates ────────────┘

This is Ape-X with another loss: the network is a deterministic policy μ(x) with a critic Q(x, a);
the critic's n-step target is R + γⁿ Q⁻(x', μ⁻(x')), and the policy climbs Q (Horgan et al., 2018,
"Distributed prioritized experience replay", section 3 and appendix D). Actors explore by Gaussian
noise, and note Q of what they did and of what μ would have done, so that priorities cost one pass.

Differs from the paper: each copy has a noise of its own, from a ladder like that of ε (one σ for
all there), so that some copies' returns are those of nearly the policy alone; the gradient is
scaled down to a norm; and all in which `apex` differs.

Book: chapter 10
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from rlbook.data import Transition, tree_nbytes
from rlbook.harness.config import RunConfig, above, at_least, at_most, within
from rlbook.harness.doctor import require_memory
from rlbook.harness.run import Result, Run
from rlbook.maths.exploration import epsilon_ladder
from rlbook.parts.deterministic import (
    ActionTrail,
    DeterministicNetwork,
    DeterministicPolicy,
    dpg_gradient,
    noisy_actions,
    require_bounded,
)
from rlbook.parts.envs import Envs, make_envs
from rlbook.parts.flat import Flat
from rlbook.parts.meter import Meter
from rlbook.parts.networks import LivePolicy
from rlbook.parts.replay import weighed
from rlbook.plumbing.cluster import own_runtime
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.memory_shard import Made, Memory, MemorySettings, MemoryShard, Part, handed_on
from rlbook.plumbing.param_server import Alive
from rlbook.plumbing.replay_books import Report, book
from rlbook.plumbing.replay_flow import ReplayFlow, Turn, remote_flow
from rlbook.plumbing.replay_learner import (
    Found,
    LearnerFields,
    ReplayLearner,
    on_its_device,
)
from rlbook.plumbing.replay_place import opened
from rlbook.plumbing.replay_server import Replay
from rlbook.plumbing.runtime import Runtime
from rlbook.plumbing.team import place_seed


@dataclass(frozen=True, kw_only=True)
class Config(LearnerFields, RunConfig):
    """Settings; the defaults swing Pendulum-v1 up. Those that `apex` has mean the same there."""

    env_id: str = "Pendulum-v1"
    """An environment whose actions are vectors of numbers between bounds."""
    num_actors: int = 2
    """N, processes that act."""
    num_envs: int = 8
    """Copies of the environment that an actor steps together."""
    total_env_steps: int = 30_000
    """Stop after so many environment steps."""
    unroll_length: int = 25
    """Vector steps of a chunk: what an actor sends at once."""
    replay: Literal["shards", "redis"] = "shards"
    """Processes of our own, or a Redis server."""
    num_replays: int = 1
    """R, shards of the replay memory."""
    prioritized: bool = True
    """Draw by priority, or uniformly."""
    priority_exponent: float = 0.6
    """α (0.6 in the paper)."""
    importance_exponent: float = 0.4
    """β (0.4 in the paper)."""
    replay_capacity: int = 100_000
    """Transitions kept over all shards (1 M in the paper)."""
    learning_starts: int = 1_000
    """Transitions in replay before the first update."""
    samples_per_insert: float | None = 32.0
    """Transitions drawn for each that comes in; None: nobody waits for anybody."""
    rate_tolerance: int = 20_000
    """Transitions by which drawing may be ahead or behind of that."""
    update_rule: Literal["async", "sync"] = "async"
    """"sync": all actors play a chunk, then all is learnt that is owed, and so on."""
    batch_size: int = 128
    """Transitions of one update (256 in the paper)."""
    updates_per_call: int = 12
    """Batches that are drawn, and priorities that return, together."""
    calls_in_flight: int = 2
    """Draws at the learner."""
    broadcast_period: int = 12
    """Updates between two weights for the actors."""
    target_period: int = 100
    """Updates between copies to the target network (100 in the paper)."""
    n_step: int = 5
    """Steps of reward before the bootstrap (5 in the paper)."""
    discount: float = 0.99
    """γ (0.99 in the paper)."""
    noise_base: float = 0.4
    """σ of the most exploring copy, in halves of the range of an action (0.3 for all there)."""
    noise_alpha: float = 7.0
    """α of the ladder σ_i = base^(1 + α i / (N − 1))."""
    scored_fraction: float = 0.5
    """Part of the copies, those that explore least, whose episodes are the score."""
    learning_rate: float = 1e-3
    """η of policy and critic (1e-4 in the paper)."""
    max_gradient_norm: float = 40.0
    """The gradient is scaled down to this Euclidean norm."""
    hidden_sizes: tuple[int, ...] = (128, 128)
    """Fully connected layers of policy and critic ((300, 200) and (400, 300) in the paper)."""
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
        at_least(self, 0.0, "learning_rate", "max_gradient_norm", "noise_alpha")
        within(self, 0.0, 1.0, "discount", "priority_exponent", "importance_exponent")
        within(self, 0.0, 1.0, "noise_base", "scored_fraction")
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
    def memory_settings(self) -> MemorySettings:
        """Of all shards together."""
        return MemorySettings(self.replay_capacity, self.prioritized, self.priority_exponent)


DEFAULT = Config()
PRESETS = {"default": DEFAULT, "uniform": replace(DEFAULT, prioritized=False)}

COSTS = {"env_step": 150e-6, "inference": 150e-6, "fold": 0.1e-3, "add": 45e-6}
COSTS |= {"sample": 45e-6, "learn": 1.3e-3, "update": 20e-6}
"""Seconds of a unit of work on the virtual cluster, where none are given: one step of 8 copies of
Pendulum, one pass of policy and critic for 8 rows, the rest as in `apex`."""

SMALLEST_PRIORITY = 1e-6
"""Added to |TD error|, so that nothing is never drawn again."""


class Actor(Alive):
    """Plays with noise, and says what its experience is worth.

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
        self.network = make_network(config, self.envs)
        self.flat = Flat(self.network)
        self.trail = ActionTrail(config.n_step, config.discount)
        copies = config.all_envs
        ladder = epsilon_ladder(copies, base=config.noise_base, alpha=config.noise_alpha)
        self.noise = ladder[index :: config.num_actors]  # every actor has all kinds
        self.scored = self.noise <= ladder[-max(1, round(config.scored_fraction * copies))]
        self.meter = Meter(metered)
        self.meter.watch(self.envs, "transition", "env")
        self.meter.watch(self, "act", "inference")

    def play(self, weights: Vector) -> tuple[Report, Made | None]:
        """T steps of B copies with these parameters; None if no transition is complete."""
        self.meter.begin()
        np.copyto(self.flat.vector.numpy(), weights.values)
        env_steps, q_mean = 0, 0.0
        for _ in range(self.config.unroll_length):
            action, q = self.act()
            step = self.envs.transition(action)
            self.trail.push(step, q)
            env_steps += int(step.valid.sum())
            q_mean += float(self.trail.best(q).mean()) / self.config.unroll_length
        made = self.make(self.act()[1] if self.config.prioritized else None)
        wire = weights.values.nbytes + tree_nbytes(made)
        episodes = [one for one in self.envs.episodes() if self.scored[one.env]]
        metrics = {"q_mean": q_mean, **self.meter.fractions()}
        items = 0 if made is None else len(made.items.r_t)
        return Report(env_steps, items, wire, episodes, metrics), handed_on(made, self.memory)

    def act(self) -> tuple[np.ndarray, np.ndarray]:
        """What it would do now, and what that and the policy's own action are worth."""
        return noisy_actions(self.network, self.envs.env_output.observation, self.noise, self.rng)

    def make(self, q: np.ndarray | None) -> Made | None:
        """The transitions that are complete, with |R + γⁿ Q(x', μ(x')) − Q(x, a)|."""
        if (folded := self.trail.fold(q)) is None:
            return None
        transitions, errors = folded
        return Made(transitions, None if errors is None else errors + SMALLEST_PRIORITY)

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
    """Fits the critic to targets that the target networks make; the policy climbs the critic."""

    def __init__(
        self,
        config: Config,
        rank: int = 0,
        metered: bool = False,
        memory: Memory | None = None,
    ) -> None:
        torch.set_num_threads(config.torch_threads)
        envs = make_envs(config.env_id, 1, config.seed)
        networks = make_network(config, envs), make_network(config, envs)
        self.networks = tuple(on_its_device(network, config, rank) for network in networks)
        flat, flat_target = map(Flat, self.networks)
        optimizer = torch.optim.Adam([flat.vector], lr=config.learning_rate)
        super().__init__(flat, flat_target, optimizer, config, rank, metered, memory)

    def gradient(self, batch: Part) -> Found:
        """Of both losses of a batch; a row's priority is the critic's |TD error|."""
        config, sample = self.config, batch.sample
        assert sample is not None
        exponent = config.importance_exponent if config.prioritized else 0.0
        size, least = batch.size, batch.smallest
        sample = weighed(sample, size=size, exponent=exponent, smallest=least)
        absolute, metrics = dpg_gradient(self.flat, self.networks, sample, self.cast())
        return Found(absolute + SMALLEST_PRIORITY, len(absolute), metrics)


def turn(flow: ReplayFlow) -> Turn:
    """The driver's part: whatever may go on goes on, then it waits for whoever is first."""
    while flow.may_learn():
        flow.learn()
    while flow.may_act():
        flow.act()
    return flow.first()


def make_flow(
    runtime: Runtime, config: Config, parameters: np.ndarray, replay: Replay
) -> ReplayFlow:
    """Actors and learner on a runtime, and the flow between them and the replay memory."""
    rows = config.unroll_length * config.num_envs
    sizes: dict[str, Any] = {"report": Report(rows, rows, 0, [], {}), "chunk_rows": rows}
    sizes |= {"made_bytes": rows * item_bytes(config)}
    sizes |= {"forwards": config.unroll_length + config.prioritized}
    return remote_flow(runtime, Actor, Learner, replay, config, parameters, **sizes)


def example(config: Config) -> Transition:
    """An item of the replay memory."""
    envs = make_envs(config.env_id, 1, 0)
    seen, one = envs.env_output.observation[0], np.float32(0)
    return Transition(seen, require_bounded(envs, "apex_dpg").low, one, one, seen)


def item_bytes(config: Config) -> int:
    """Of a transition, with priority."""
    return tree_nbytes(example(config)) + 8


def units_of_work(config: Config) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts."""
    actor, learner = Actor(config, 0), Learner(config)
    shard = MemoryShard(config.memory_settings, config.seed)
    action, q = actor.act()
    step = actor.envs.transition(action)
    steps, rows = config.unroll_length + config.n_step - 1, config.batch_size

    def fold() -> Made | None:
        actor.trail.steps, actor.trail.q = [step] * steps, [q] * steps
        return actor.make(q)

    made = fold()
    shard.keep(made)
    batch, draw = (shard.draw(count, 1.0)[1] for count in (rows, rows * config.updates_per_call))
    back = learner.learn(draw)[2]
    return {
        "env_step": lambda: actor.envs.transition(action),
        "inference": actor.act,
        "fold": fold,
        "add": lambda: shard.keep(made),
        "sample": lambda: shard.draw(rows, 1.0),
        "learn": lambda: learner.update(batch),
        "update": lambda: shard.correct(back),
    }


def make_network(config: Config, envs: Envs) -> DeterministicNetwork:
    """Policy and critic for the environment's observations and actions."""
    space = require_bounded(envs, "apex_dpg")
    torch.manual_seed(config.seed)
    shape = envs.observation_space.shape or ()
    return DeterministicNetwork(shape, space.low, space.high, config.hidden_sizes)


def load_policy(config: Config, parts: dict[str, Any]) -> DeterministicPolicy:
    """The policy of a checkpoint, without noise."""
    network = make_network(config, make_envs(config.env_id, 1, config.seed))
    np.copyto(Flat(network).vector.numpy(), parts["learner"]["online"])
    return DeterministicPolicy(network)


def train(config: Config, runtime: Runtime | None = None, memory: Memory | None = None) -> Result:
    """Actors play, the learner learns, until the run is over.

    Args:
        config: settings.
        runtime: an open one to run on; by default one of its own, as `config` says.
        memory: with "redis", a client of a memory on a server that runs already.
    """
    torch.set_num_threads(config.torch_threads)
    if memory is None:
        capacity, size = config.replay_capacity, item_bytes(config)
        require_memory("replay_capacity", capacity, size, f"of {config.env_id}")
    own = own_runtime(config, config.num_actors + config.num_replays + config.num_learners, COSTS)
    with (
        own if runtime is None else nullcontext(runtime) as rt,
        opened(rt, config, config.memory_settings, example(config), memory) as replay,
    ):
        network = make_network(config, make_envs(config.env_id, 1, config.seed))
        vector = Flat(network).vector.numpy()
        flow = make_flow(rt, config, vector, replay)
        policy = LivePolicy(
            DeterministicPolicy(network), lambda: np.copyto(vector, flow.parameters())
        )
        entry = flow, item_bytes(config), 1
        with Run("apex_dpg", config, policy, flow.parts, lambda: rt.now, "asked") as run:
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
