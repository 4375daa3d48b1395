"""A3C: actor-learners that share parameters and wait for nobody.

    wiring "shared_memory"                          wiring "parameter_server"

    Worker 0   Worker 1   Worker …   (processes)    Worker 0   Worker 1   Worker …   (anywhere)
      │  ▲       │  ▲       │  ▲                      │  ▲       │  ▲
      │  │ θ' ← θ│  │       │  │                gradient │ weights  (the driver hands references on)
      ▼  │       ▼  │       ▼  │                      ▼  │       ▼  │
    ┌──────────────────────────────────┐            ┌────────────────────────────────┐
    │ θ · statistics g · counts, in    │            │ Shard 0 │ Shard 1 │ …          │
    │ shared memory, without locks     │            │ parameters, g, version         │
    └──────────────────────────────────┘            └────────────────────────────────┘

    a worker's round:  θ' ← θ · act T steps · gradient d of the loss at θ' ·
                       g ← α g + (1 − α) d² · θ ← θ − η d / √(g + ε)

This is A2C with: workers that do not wait for each other (Mnih et al., 2016, "Asynchronous methods
for deep reinforcement learning", algorithm S3), updates without locks (Recht et al., 2011,
"Hogwild!"), and RMSProp whose statistics all share. Lost updates are counted: beside each parameter
lies the number of updates that reached it, and both are read and written as one.

Differs from the paper: processes in place of threads, with B copies of the environment each (preset
`paper`: one); λ-returns (`lambda_` 1 gives the paper's n-step returns); a mean over the rows of an
unroll where the paper adds up; a bound on the gradient's norm. The wiring "parameter_server" is how
distributed systems do it: each gradient is applied whole, none is lost, all are somewhat stale.

Book: chapter 08
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.data import AgentOutput, Unroll
from rlbook.harness.config import RunConfig, above, at_least, one_of, within
from rlbook.harness.run import Result, Run
from rlbook.maths.descent import Move, adam_move, rmsprop_move
from rlbook.maths.losses import entropy_loss, policy_gradient_loss, value_loss
from rlbook.maths.returns import lambda_returns
from rlbook.parts.acting import Sampler, make_actor_critic, sampling_policy
from rlbook.parts.envs import Envs, Episode, make_envs, require_discrete
from rlbook.parts.flat import Flat
from rlbook.parts.meter import Meter
from rlbook.parts.networks import LivePolicy
from rlbook.parts.recurrent import unrolled
from rlbook.parts.unroll import collect_unroll
from rlbook.plumbing.cluster import own_runtime
from rlbook.plumbing.codecs import Identity
from rlbook.plumbing.crew import Crew
from rlbook.plumbing.hogwild import InSharedMemory, counted_parameters, updates_lost
from rlbook.plumbing.param_server import SERVER_COSTS, priced_server, shard_bounds
from rlbook.plumbing.runtime import RayRuntime, Runtime
from rlbook.plumbing.served import Served, make_team, units_of_worker
from rlbook.plumbing.shard import Gradient, Receipt, ServerSettings, Weights, fates, put_weights
from rlbook.plumbing.shared import SharedArrays
from rlbook.plumbing.team import place_seed


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    """Settings; the defaults solve CartPole-v1 in about a second of training."""

    wiring: Literal["shared_memory", "parameter_server"] = "shared_memory"
    """Where the parameters live."""
    num_workers: int = 2
    """N, processes that act and learn, each with `num_envs` copies (16 threads in the paper)."""
    update: Literal["hogwild", "locked"] = "hogwild"
    """In shared memory: without locks, or one at a time."""
    optimizer: Literal["rmsprop", "adam"] = "rmsprop"
    """RMSProp with ε inside the root, as in the paper; or Adam."""
    share_statistics: bool = True
    """In shared memory: one g for all ("considerably more robust", section 4), or one each."""
    share_step: bool = True
    """Adam corrects its means for all workers' updates; False: for its own alone (a mistake)."""
    rounds_per_report: int = 4
    """In shared memory: updates between two words to the driver. A worker has two such requests at
    once: so many rounds it may still play when the run is over, or while the driver evaluates."""
    unroll_length: int = 8
    """T, steps between updates (t_max = 5 in the paper)."""
    discount: float = 0.98
    """γ (0.99 in the paper)."""
    lambda_: float = 0.9
    """λ of the λ-returns; 1 gives the paper's n-step returns."""
    learning_rate: float = 2.5e-3
    """η (drawn from 1e-4 to 1e-2 in the paper; 7e-4 was good over many games)."""
    anneal_learning_rate: bool = False
    """In shared memory: η falls linearly to 0 over `total_env_steps`, as in the paper."""
    rmsprop_decay: float = 0.99
    """α, how much of g is kept (0.99 in the paper)."""
    rmsprop_epsilon: float = 1e-5
    """ε inside the root (0.1 in preset `paper`, as accounts of the authors' runs have it)."""
    value_cost: float = 0.5
    """Weight of the value loss ½ (V − target)²."""
    entropy_cost: float = 0.0
    """Weight of the entropy bonus, β (0.01 in the paper)."""
    max_gradient_norm: float = 0.5
    """The gradient is scaled down to this Euclidean norm."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Fully connected layers of the torso."""
    lstm_size: int = 0
    """Cells of an LSTM between torso and heads (256 in the paper's A3C LSTM); 0 for none."""
    num_shards: int = 1
    """With a parameter server: servers that hold a slice of the parameters each."""
    calls_in_flight: int = 1
    """With a parameter server: gradients asked of a worker at once."""
    max_staleness: int | None = None
    """With a parameter server: refuse gradients that are more versions old; None takes all."""
    runtime: Literal["ray", "virtual"] = "ray"
    """With a parameter server: real processes, or the seeded virtual cluster."""
    ray_address: str | None = None
    """With a parameter server: an existing Ray cluster to join; None starts one here."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        one_of(self, "wiring", ("shared_memory", "parameter_server"))
        one_of(self, "update", ("hogwild", "locked"))
        one_of(self, "optimizer", ("rmsprop", "adam"))
        one_of(self, "runtime", ("ray", "virtual"))
        at_least(self, 1, "num_workers", "unroll_length", "rounds_per_report")
        at_least(self, 1, "num_shards", "calls_in_flight")
        within(self, 0.0, 1.0, "discount", "lambda_", "rmsprop_decay")
        at_least(self, 0.0, "learning_rate", "value_cost", "entropy_cost", "max_gradient_norm")
        at_least(self, 0, "lstm_size")
        above(self, 0.0, "rmsprop_epsilon")
        if self.wiring == "parameter_server" and self.anneal_learning_rate:
            raise ValueError("anneal_learning_rate: the shards' step size is fixed; needs False")

    @property
    def all_envs(self) -> int:
        """Copies of the environment over all workers."""
        return self.num_workers * self.num_envs


PAPER = Config(
    num_envs=1,
    unroll_length=5,
    discount=0.99,
    lambda_=1.0,
    learning_rate=7e-4,
    anneal_learning_rate=True,
    rmsprop_epsilon=0.1,
    entropy_cost=0.01,
    max_gradient_norm=40.0,
)
PRESETS = {
    "default": Config(),
    "paper": PAPER,
    "parameter_server": Config(
        wiring="parameter_server", unroll_length=16, learning_rate=5e-3, calls_in_flight=2
    ),
    "memory": Config(
        env_id="rlbook/Memory-v0", lstm_size=32, num_envs=8, unroll_length=20, learning_rate=1e-2
    ),
    "atari": replace(
        PAPER, env_id="ALE/Pong-v5", num_envs=4, unroll_length=20, total_env_steps=10_000_000
    ),
}

COSTS = {"env_step": 40e-6, "inference": 15e-6, "learn": 1e-3} | SERVER_COSTS
"""Seconds of a unit of work on the virtual cluster, where none are given: one step of 32 copies of
CartPole, one forward pass of 32 rows in numpy, one gradient of 512 rows, and what a server does.
`units_of_work` measures them here."""


def loss_function(
    network: nn.Module, unroll: Unroll, config: Config
) -> tuple[Tensor, dict[str, Tensor]]:
    """Policy gradient, value and entropy, each a mean over the unroll's valid rows."""
    logits, values = unrolled(network, unroll)
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
    """What the driver learns of a worker's work."""

    env_steps: int
    learner_steps: int
    """Updates made by the worker itself; with a parameter server receipts tell."""
    episodes: list[Episode]
    metrics: dict[str, float]


Shared = SharedArrays | None
"""Parameters, statistics and counts (see `rlbook.plumbing.hogwild`), or none."""


class Worker:
    """An actor-learner: acts with a private copy θ' of the parameters and computes gradients.

    Args:
        config: of the system.
        index: worker 0 draws as the single process of chapter 04 does.
        memory: what it shares with others; None with a parameter server.
        born: how many workers were in this place before (they died): a new one draws anew.
        meter: report where the time went (of the wall, so never on a virtual clock).
    """

    def __init__(
        self, config: Config, index: int, memory: Shared = None, born: int = 0, meter: bool = False
    ) -> None:
        torch.set_num_threads(1)
        seed = place_seed(config.seed, index, born)
        self.config, self.index, self.memory = config, index, memory
        self.envs = make_envs(config.env_id, config.num_envs, seed)
        self.network = make_network(config, self.envs)
        self.flat = Flat(self.network)
        self.sampler = Sampler(self.network, config.num_envs, np.random.default_rng([seed, 1]))
        self.samples, self.metrics = 0, dict[str, float]()
        self.meter = Meter(meter)
        self.meter.watch(self.envs, "step", "env")
        self.meter.watch(self.sampler, "act", "inference")
        self.meter.watch(self, "differentiate", "gradient")

    def rounds(self, count: int) -> Report:
        """So many rounds in shared memory, paused by nobody; the metrics are of the last one."""
        self.meter.begin()
        env_steps = 0
        for _ in range(count):
            for _ in self.round():
                pass
            env_steps += self.samples
        return self.report(env_steps, count)

    def round(self) -> Iterator[str]:
        """Algorithm S3's loop, once. Pauses wherever another worker could come in between."""
        assert self.memory is not None
        locked = self.config.update == "locked"
        with self.memory.lock() if locked else nullcontext():
            np.copyto(self.flat.vector.numpy(), self.memory["parameters"]["value"])
        yield "read parameters"
        self.differentiate(self.unroll())
        yield "computed gradient"
        if locked:
            with self.memory.lock():
                for _ in self.update(self.memory):
                    pass
        else:
            yield from self.update(self.memory)

    def update(self, memory: SharedArrays) -> Iterator[str]:
        """Read, compute, write: first the statistics, then the parameters with their counts."""
        memory["updates"][self.index] += 1
        memory["env_steps"][self.index] += self.samples
        shared = memory["statistics"][0 if self.config.share_statistics else self.index]
        statistics = shared.copy()
        yield "read statistics"
        move = self.move(memory, torch.from_numpy(statistics))
        np.copyto(shared, move.statistics.numpy())
        yield "wrote statistics"
        pairs = memory["parameters"].copy()
        yield "read pairs"
        torch.from_numpy(pairs["value"]).addcdiv_(move.along, move.root, value=-move.scale)
        pairs["count"] += 1
        np.copyto(memory["parameters"], pairs)
        yield "wrote pairs"

    def move(self, memory: SharedArrays, statistics: Tensor) -> Move:
        """Where the optimiser goes with the worker's gradient."""
        config, rate, made = self.config, self.config.learning_rate, memory["updates"]
        if config.anneal_learning_rate:
            rate *= max(0.0, 1 - int(memory["env_steps"].sum()) / config.total_env_steps)
        rule = partial(rmsprop_move, decay=config.rmsprop_decay, epsilon=config.rmsprop_epsilon)
        if config.optimizer == "adam":
            step = int(made.sum() if config.share_step else made[self.index])
            rule = partial(adam_move, step=step)
        return rule(statistics=statistics, gradient=self.flat.gradients, learning_rate=rate)

    def gradient(self, *weights: Weights) -> tuple[Report | Gradient, ...]:
        """T steps with these parameters: a report, then the gradient's pieces for the shards."""
        self.meter.begin()
        put_weights(self.flat.vector.numpy(), weights)
        norm = self.differentiate(self.unroll())
        whole = self.flat.gradients.numpy()
        bounds = shard_bounds(len(whole), len(weights))
        pieces = [
            Gradient(Identity().encode(whole[a:b]), w.version, self.samples, norm)
            for w, (a, b) in zip(weights, bounds, strict=True)
        ]
        return self.report(self.samples, 0), *pieces

    def report(self, env_steps: int, made: int) -> Report:
        """What the driver learns: steps taken, updates made, and how it went."""
        return Report(env_steps, made, self.envs.episodes(), self.metrics | self.meter.fractions())

    def unroll(self) -> Unroll:
        """T steps of B copies, with the recurrent state before them."""
        state = self.sampler.state
        unroll = collect_unroll(self.envs, self.act, self.config.unroll_length)
        return unroll._replace(agent_state=state)

    def act(self, observation: np.ndarray) -> AgentOutput:
        """Samples an action for each copy."""
        return self.sampler.act(observation, self.envs.env_output.first)

    def differentiate(self, unroll: Unroll) -> float:
        """Leaves the clipped gradient in `flat.gradients`; returns its norm before."""
        loss, metrics = loss_function(self.network, unroll, self.config)
        self.flat.gradients.zero_()
        loss.backward()
        norm = self.flat.clip(self.config.max_gradient_norm)
        self.samples = int(unroll.valid.sum())
        self.metrics = {**{k: v.item() for k, v in metrics.items()}, "gradient_norm": norm}
        return norm

    def alive(self) -> bool:
        """True; a call that only a living process answers."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Environments, random generator and recurrent state."""
        return {"envs": self.envs.state_dict(), "sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.envs.load_state_dict(state["envs"])
        self.sampler.load_state_dict(state["sampler"])


def in_shared_memory(config: Config, parameters: np.ndarray, stack: ExitStack) -> InSharedMemory:
    """The first wiring: processes on this machine, which end with the `stack`."""
    owners = 1 if config.share_statistics else config.num_workers
    kinds = 2 if config.optimizer == "adam" else 1
    memory = counted_parameters(parameters, config.num_workers, kinds, owners)

    def arguments(index: int, born: int) -> tuple[Any, ...]:
        return config, index, memory, born, True

    crew = Crew(Worker, arguments, config.num_workers, inherit=[memory.descriptor])
    return InSharedMemory(stack.enter_context(crew), memory, config.rounds_per_report)


def with_server(config: Config, parameters: np.ndarray, runtime: Runtime) -> Served:
    """The second wiring: workers and shards on a runtime."""
    server = priced_server(runtime, parameters, config.num_shards, server_settings(config))
    metered = isinstance(runtime, RayRuntime)
    team = make_team(
        runtime,
        Worker,
        lambda index, born: (config, index, None, born, metered),
        server,
        size=config.num_workers,
        calls_in_flight=config.calls_in_flight,
        steps=config.unroll_length,
        report=Report(config.unroll_length * config.num_envs, 0, [], {}),
    )
    return Served(runtime, server, team)


def server_settings(config: Config) -> ServerSettings:
    """The optimiser and the gate of each shard."""
    rule = {"alpha": config.rmsprop_decay, "eps": config.rmsprop_epsilon}
    rmsprop = config.optimizer == "rmsprop"
    return ServerSettings(
        optimizer="a3c_rmsprop" if rmsprop else "adam",
        learning_rate=config.learning_rate,
        options=tuple(rule.items()) if rmsprop else (),
        max_staleness=config.max_staleness,
    )


def units_of_work(config: Config) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts."""
    return units_of_worker(Worker(config, 0), server_settings(config))


def make_network(config: Config, envs: Envs) -> Any:
    """A network for the environment's observations and actions, with or without memory."""
    num_actions, shape = require_discrete(envs, "a3c"), envs.observation_space.shape or ()
    torch.manual_seed(config.seed)
    return make_actor_critic(shape, num_actions, config.hidden_sizes, config.lstm_size)


def load_policy(config: Config, parts: dict[str, Any]) -> Any:
    """The policy of a checkpoint."""
    network = make_network(config, make_envs(config.env_id, 1, config.seed))
    if config.wiring == "shared_memory":
        vector = parts["memory"]["parameters"]["value"]
    else:
        vector = np.concatenate([shard["parameters"] for shard in parts["server"]["shards"]])
    np.copyto(Flat(network).vector.numpy(), vector)
    return sampling_policy(network)


def book(run: Run, reports: Sequence[Report], receipts: Sequence[Receipt]) -> None:
    """Enters a turn's reports, and what became of earlier pushes, into the run's books."""
    applied = sum(not all(receipt.refused) for receipt in receipts)
    memory = run.parts.get("memory")
    metrics = fates(run.extra, receipts) if memory is None else updates_lost(memory)
    if memory is not None:
        run.extra |= metrics
    run.record(env_steps=0, learner_steps=applied, metrics=metrics)
    for report in reports:
        run.record(**report._asdict())


def train(config: Config, runtime: Runtime | None = None) -> Result:
    """Workers act, learn and update what they share, until the run is over.

    Args:
        config: settings.
        runtime: with a parameter server an open one to run on; by default one of its own.
    """
    torch.set_num_threads(config.torch_threads)
    flat = Flat(network := make_network(config, make_envs(config.env_id, 1, config.seed)))
    vector = flat.vector.numpy()
    with ExitStack() as stack:
        if config.wiring == "shared_memory":
            wiring: Any = in_shared_memory(config, vector, stack)
        else:
            own: Any = own_runtime(config, config.num_workers + config.num_shards, COSTS)
            wiring = with_server(config, vector, runtime or stack.enter_context(own))
        policy = LivePolicy(sampling_policy(network), lambda: wiring.pull(vector))
        run = Run("a3c", config, policy, wiring.parts, lambda: wiring.now, checkpoints="asked")
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
