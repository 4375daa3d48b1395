"""Value iteration and policy iteration (Bellman 1957; Howard 1960): plain, vectorised, and in
parallel.

                              train(): the driver conducts
          put(values) once    ┌─────────────────────────┐    references to new values
        ┌─────────────────────│  values v [S], residual │◄────────────────────┐
        ▼                     └─────────────────────────┘                     │
    object store ──► Block 0: states 0 … n−1      one Bellman backup of ──────┤
                 └─► Block 1: states n … 2n−1     its own states ─────────────┘

This is the textbook's dynamic programming with: three backends for one and the same backup (nested
loops; arrays; a block of states for each worker process), a stopping rule that bounds the error,
and two ways to wait: for all workers (``sync``) or for whichever is first (``async``, Bertsekas
1982).

Differs from the textbook: sweeps are Jacobi sweeps (all states from the old values), so that the
order of the states does not matter and the backends agree; policy iteration evaluates by sweeps
instead of a linear system, so that it scales to large maps, and changes an action only for a clear
gain, so that rounding cannot make it cycle.

Book: chapter 01
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlbook.harness.config import BaseConfig, at_least, one_of
from rlbook.harness.run import Result, Run
from rlbook.parts.gridworld import ENV_ID
from rlbook.parts.tabular import (
    Floats,
    Ints,
    TablePolicy,
    TabularMDP,
    TabularMDPBlock,
    action_values,
    greedy,
    make_tabular_env,
    mdp_of,
    outcome_table,
)
from rlbook.plumbing.runtime import RayRuntime, Runtime

ALGORITHMS = ("value_iteration", "policy_iteration")
BACKENDS = ("plain", "vectorised", "parallel")


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """What the tabular planners are told."""

    env_id: str = ENV_ID
    """A grid of the book, or any Gymnasium environment that shows its transition table."""
    algorithm: str = "value_iteration"
    """"value_iteration" or "policy_iteration"."""
    backend: str = "vectorised"
    """"plain", "vectorised" or "parallel" (worker processes on Ray)."""
    exchange: str = "sync"
    """Parallel value iteration waits for all workers ("sync") or for the first ("async")."""
    discount: float = 0.99
    """γ, below 1."""
    tolerance: float = 1e-8
    """Values end within this of the exact ones, in every state."""
    max_sweeps: int = 1_000_000
    """Give up after so many rounds."""
    num_workers: int = 2
    """Worker processes of the parallel backend."""
    sweeps_per_message: int = 1
    """Backups that a worker makes of its own block before it answers (value iteration)."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        one_of(self, "algorithm", ALGORITHMS)
        one_of(self, "backend", BACKENDS)
        one_of(self, "exchange", ("sync", "async"))
        at_least(self, 1, "max_sweeps", "num_workers", "sweeps_per_message")
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount: must be at least 0 and below 1, got {self.discount}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance: must be above 0, got {self.tolerance}")
        if self.exchange == "async":
            one_of(self, "backend", ("parallel",))
            one_of(self, "algorithm", ("value_iteration",))


class Solution(NamedTuple):
    """What an algorithm found, and how it got there."""

    values: Floats
    """v, float64 ``[S]``."""
    policy: Ints
    """The greedy action of each state, int64 ``[S]``."""
    residuals: Floats
    """Largest change of any value in each round, ``[rounds]``."""


class Backend(Protocol):
    """One Bellman backup of all states, done in one of three ways. ``values`` float64 ``[S]``,
    ``policy`` int64 ``[S]``.
    """

    gamma: float

    def improve(self, values: Floats) -> Floats:
        """v(s) ← max_a q(s, a): the optimality backup."""

    def evaluate(self, values: Floats, policy: Ints) -> Floats:
        """v(s) ← q(s, π(s)): the backup of a fixed policy."""

    def action_values(self, values: Floats) -> Floats:
        """q(s, a) ``[A, S]``."""


class Plain:
    """The backup as nested Python loops: state, action, successor."""

    def __init__(self, model: TabularMDPBlock, gamma: float) -> None:
        self.gamma = gamma
        self.model = model
        self.table = outcome_table(model)

    def improve(self, values: Floats, sweeps: int = 1) -> Floats:
        """v(s) ← max_a Σ_s' P(s' | s, a) (r + γ v(s')); ``sweeps`` as in :class:`Block`."""
        old, gamma = values.tolist(), self.gamma
        for _ in range(sweeps):
            new = []
            for actions in self.table:
                best = float("-inf")
                for outcomes in actions:
                    q = 0.0
                    for probability, successor, reward in outcomes:
                        q += probability * (reward + gamma * old[successor])
                    if q > best:
                        best = q
                new.append(best)
            old[self.model.first : self.model.stop] = new
        return np.array(new)

    def evaluate(self, values: Floats, policy: Ints) -> Floats:
        """v(s) ← Σ_s' P(s' | s, π(s)) (r + γ v(s'))."""
        old, gamma, new = values.tolist(), self.gamma, []
        chosen = policy[self.model.first : self.model.stop].tolist()
        for actions, action in zip(self.table, chosen, strict=True):
            q = 0.0
            for probability, successor, reward in actions[action]:
                q += probability * (reward + gamma * old[successor])
            new.append(q)
        return np.array(new)

    def action_values(self, values: Floats) -> Floats:
        """q(s, a) ``[A, n]``."""
        everywhere = np.ones(len(values), dtype=np.int64)
        actions = range(self.model.probabilities.shape[0])
        return np.stack([self.evaluate(values, action * everywhere) for action in actions])


class Block:
    """The backup as array operations on a block of states; the whole MDP is one block, a worker
    process holds one of several.

    The scratch arrays are allocated once: at 40 000 states, fresh memory would cost as much as the
    arithmetic.
    """

    def __init__(self, model: TabularMDPBlock, gamma: float) -> None:
        actions, places = model.probabilities.shape[:2]
        states = model.successors.shape[1]
        self.gamma = gamma
        self.model = model
        self.weights = gamma * model.probabilities
        self.landing = np.empty((places, states))
        self.q = np.empty((actions, states))
        # Small products stay on one thread: handing them to several costs more than they take.
        self.cuts = [slice(first, first + 8_192) for first in range(0, states, 8_192)]

    def action_values(self, values: Floats) -> Floats:
        """q(s, a) = R(s, a) + Σ_j γ P(s'_j | s, a) v(s'_j) for this block's states, ``[A, n]``;
        the next call reuses the array.
        """
        np.take(values, self.model.successors, out=self.landing, mode="clip")
        if self.weights.shape[2] == 1:
            weights = self.weights[:, :, 0]
            for cut in self.cuts:
                np.matmul(weights, self.landing[:, cut], out=self.q[:, cut])
        else:
            np.einsum("ajs,js->as", self.weights, self.landing, out=self.q)
        self.q += self.model.expected_rewards
        return self.q

    def improve(self, values: Floats, sweeps: int = 1) -> Floats:
        """The optimality backup of this block, ``[n]``; ``sweeps`` > 1 repeats it with the other
        blocks' values as they were.
        """
        new = self.action_values(values).max(axis=0)
        if sweeps > 1:
            values = values.copy()
        for _ in range(sweeps - 1):
            values[self.model.first : self.model.stop] = new
            self.action_values(values).max(axis=0, out=new)
        return new

    def evaluate(self, values: Floats, policy: Ints) -> Floats:
        """The backup of ``policy`` ``[S]`` for this block, ``[n]``."""
        chosen = policy[None, self.model.first : self.model.stop]
        return np.take_along_axis(self.action_values(values), chosen, axis=0)[0]


class Parallel:
    """The backup with the states dealt out to worker processes; the driver waits for all of
    them.
    """

    def __init__(
        self,
        mdp: TabularMDP,
        gamma: float,
        runtime: Runtime,
        num_workers: int,
        sweeps: int = 1,
        worker: type[Block] | type[Plain] = Block,
    ) -> None:
        edges = np.linspace(0, mdp.num_states, num_workers + 1).astype(int).tolist()
        self.blocks = [slice(*pair) for pair in zip(edges[:-1], edges[1:], strict=True)]
        remote = runtime.remote(worker)
        self.workers = [remote.remote(mdp.block(b.start, b.stop), gamma) for b in self.blocks]
        self.gamma = gamma
        self.runtime = runtime
        self.sweeps = sweeps

    def improve(self, values: Floats) -> Floats:
        """Broadcast the values once, back up every block, put the pieces together."""
        shared = self.runtime.put(values)
        pieces = [worker.improve.remote(shared, self.sweeps) for worker in self.workers]
        return np.concatenate(self.runtime.get(pieces))

    def evaluate(self, values: Floats, policy: Ints) -> Floats:
        """The same for a fixed policy."""
        shared, fixed = self.runtime.put(values), self.runtime.put(policy)
        pieces = [worker.evaluate.remote(shared, fixed) for worker in self.workers]
        return np.concatenate(self.runtime.get(pieces))

    def action_values(self, values: Floats) -> Floats:
        """q(s, a) ``[A, S]``."""
        shared = self.runtime.put(values)
        pieces = [worker.action_values.remote(shared) for worker in self.workers]
        return np.concatenate(self.runtime.get(pieces), axis=1)


Report = Callable[[int, float, Floats], None]


def value_iteration(
    backend: Backend,
    values: Floats,
    *,
    tolerance: float,
    max_sweeps: int = 1_000_000,
    report: Report | None = None,
) -> Solution:
    """Repeat v ← max_a q until v is within ``tolerance`` of v* in every state (Sutton and Barto
    2018, eq. 4.10).

    ``values`` ``[S]`` is where to start. ``report(round, residual, values)`` is called after each
    sweep.
    Stops early, without the guarantee, after ``max_sweeps``.
    """
    residuals: list[float] = []
    while len(residuals) < max_sweeps:
        new = backend.improve(values)
        residuals.append(largest_change(new, values))
        values = new
        if report is not None:
            report(len(residuals), residuals[-1], values)
        if settled(residuals[-1], values, tolerance, backend.gamma):
            break
    return Solution(values, greedy(backend.action_values(values)), np.array(residuals))


def policy_iteration(
    backend: Backend,
    values: Floats,
    *,
    tolerance: float,
    max_sweeps: int = 1_000_000,
    report: Report | None = None,
) -> Solution:
    """Evaluate the policy to ``tolerance``, make it greedy, repeat until no action changes (Howard
    1960).

    Arguments as in :func:`value_iteration`; residuals are those of all evaluation sweeps, one
    after the other.
    """
    residuals: list[float] = []
    # Values known to `known` give differences known to twice that; what a gain below it may be
    # worth in the long run, and the evaluation itself, then stay within the tolerance.
    known = tolerance * (1 - backend.gamma) / 3
    policy = greedy(backend.action_values(values))
    while True:
        while len(residuals) < max_sweeps:
            new = backend.evaluate(values, policy)
            residuals.append(largest_change(new, values))
            values = new
            if report is not None:
                report(len(residuals), residuals[-1], values)
            if settled(residuals[-1], values, known, backend.gamma):
                break
        q = backend.action_values(values)
        gain = q.max(axis=0) - np.take_along_axis(q, policy[None], axis=0)[0]
        better = gain > 2 * known + rounding(values)
        if not better.any() or len(residuals) >= max_sweeps:
            return Solution(values, greedy(q), np.array(residuals))
        policy = np.where(better, q.argmax(axis=0), policy)


def asynchronous_value_iteration(
    backend: Parallel,
    values: Floats,
    *,
    tolerance: float,
    max_sweeps: int = 1_000_000,
    report: Report | None = None,
) -> Solution:
    """Value iteration that waits for whichever block is first (Bertsekas 1982): no worker ever
    waits for another.

    A block may be computed from values that are older than the newest; every backup still brings
    the values nearer to v*.
    Small changes of stale blocks prove nothing, so a round that waits for all has the last word.
    ``max_sweeps`` counts messages.
    """
    runtime = backend.runtime
    residuals: list[float] = []
    values = values.copy()

    def start(index: int) -> Any:
        return backend.workers[index].improve.remote(runtime.put(values), backend.sweeps)

    while len(residuals) < max_sweeps:
        unsettled = set(range(len(backend.workers)))
        in_flight = {start(index): index for index in unsettled}
        while unsettled and len(residuals) < max_sweeps:
            (ready,), _ = runtime.wait(list(in_flight), num_returns=1)
            index = in_flight.pop(ready)
            new, block = runtime.get(ready), backend.blocks[index]
            change = largest_change(new, values[block])
            quiet = settled(change, values, tolerance, backend.gamma)
            unsettled = unsettled - {index} if quiet else unsettled | {index}
            residuals.append(change)
            values[block] = new
            if report is not None:
                report(len(residuals), change, values)
            in_flight[start(index)] = index
        runtime.get(list(in_flight))
        new = backend.improve(values)
        residuals.append(largest_change(new, values))
        values = new
        if settled(residuals[-1], values, tolerance, backend.gamma):
            break
    return Solution(values, greedy(backend.action_values(values)), np.array(residuals))


def solve(mdp: TabularMDP, config: Config, report: Report | None = None) -> Solution:
    """Solve ``mdp`` as ``config`` says (its ``env_id`` is not looked at), from values of 0."""
    rules: dict[str, Any] = {
        "tolerance": config.tolerance,
        "max_sweeps": config.max_sweeps,
        "report": report,
    }
    start = np.zeros(mdp.num_states)
    algorithm = value_iteration if config.algorithm == "value_iteration" else policy_iteration
    if config.backend == "plain":
        return algorithm(Plain(mdp.whole, config.discount), start, **rules)
    if config.backend == "vectorised":
        return algorithm(Block(mdp.whole, config.discount), start, **rules)
    workers = min(config.num_workers, mdp.num_states)
    with RayRuntime(num_cpus=workers) as runtime:
        backend = Parallel(mdp, config.discount, runtime, workers, config.sweeps_per_message)
        if config.exchange == "async":
            return asynchronous_value_iteration(backend, start, **rules)
        return algorithm(backend, start, **rules)


class Learnt:
    """The solution as something that a checkpoint can hold."""

    def __init__(self, q: Floats) -> None:
        self.q = q

    def state_dict(self) -> dict[str, Any]:
        """q(s, a) ``[S, A]``."""
        return {"q": self.q}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        self.q = state["q"]


def train(config: Config) -> Result:
    """Plan in the model behind ``config.env_id``; no step is taken in it.

    ``Result.extra`` holds ``values`` ``[S]``, ``policy`` ``[S]`` and ``residuals`` (one a round).
    Raises ``ValueError`` for an environment that is unknown or does not show its probabilities.
    """
    mdp = mdp_of(make_tabular_env(config.env_id))
    learnt = Learnt(np.zeros((mdp.num_states, mdp.num_actions)))
    policy = TablePolicy(lambda: learnt.q)
    with Run("mdp", config, policy, {"learnt": learnt}) as run:
        while run.running():
            run.stopped_because = "finished"
            if run.extra:  # resumed: a plan that is made stays as it is
                break
            solution = solve(mdp, config)
            learnt.q = action_values(mdp, solution.values, config.discount).T.copy()
            run.extra = {
                "values": solution.values,
                "policy": solution.policy,
                "residuals": solution.residuals,
            }
            sweeps = len(solution.residuals)
            metrics = {"sweeps": sweeps, "bellman_residual": float(solution.residuals[-1])}
            run.record(env_steps=0, learner_steps=sweeps, metrics=metrics)
    return run.result()


def load_policy(config: Config, parts: dict[str, Any]) -> TablePolicy:
    """The greedy policy of a stored run."""
    q = parts["learnt"]["q"]
    return TablePolicy(lambda: q)


def settled(residual: float, values: Floats, tolerance: float, gamma: float) -> bool:
    """Whether a last change of ``residual`` proves ‖v − v*‖ ≤ ``tolerance``, or is mere rounding.

    Each sweep shrinks the error by γ, so ‖v_k − v*‖ ≤ γ / (1 − γ) · ‖v_k − v_{k−1}‖ (Puterman
    1994, theorem 6.3.1).
    """
    return gamma * residual <= max(tolerance * (1 - gamma), rounding(values))


def rounding(values: Floats) -> float:
    """A few units in the last place of the largest value: below it, sweeps change nothing."""
    return 4 * float(np.finfo(np.float64).eps) * max(1.0, float(np.abs(values).max()))


def largest_change(new: Floats, old: Floats) -> float:
    """‖new − old‖∞."""
    return float(np.max(np.abs(new - old)))
