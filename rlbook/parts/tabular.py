"""Finite Markov decision processes as arrays, and their exact solution.

A small MDP is usually written as a dense array ``P[s, a, s']``. A 200 × 200 grid would need 40
000² entries an action, nearly all of them zero, so this type keeps, for every state s, only the J
places where one may land:

    successors[j, s]        the j-th place s'
    probabilities[a, j, s]  P(s' | s, a); one column when it is the same for every state
    rewards[a, j, s]        r(s, a, s'); one row or column when it does not vary

The state is the last axis, so that one row holds the same move for all states and NumPy walks
through memory in order. γ is not part of the MDP here: the algorithms take it as an argument.

The exact solution (a linear system, Sutton and Barto 2018, eq. 4.4) serves as the yardstick for
everything that learns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rlbook.parts.envs import register_own_envs

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

EXACT_LIMIT = 4_000
"""The most states for which the dense linear system is built (128 MB at this size)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TabularMDP:
    """A finite MDP in successor form.

    Fields: ``successors`` int64 ``[J, S]``; ``probabilities`` float64 ``[A, J, S]`` or ``[A, J,
    1]``; ``rewards`` float64 ``[A or 1, J, S or 1]``; ``terminal`` bool ``[S]``; ``start`` float64
    ``[S]``, the distribution of the first state.

    Raises ``ValueError``, naming the field, for a wrong shape, a successor that is no state,
    probabilities that are negative or do not sum to 1, or a terminal state that can be left or
    that still pays a reward.
    """

    successors: Ints
    probabilities: Floats
    rewards: Floats
    terminal: Bools
    start: Floats

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_values(self)

    @classmethod
    def from_dense(
        cls,
        transitions: Floats,
        rewards: Floats,
        terminal: Bools | None = None,
        start: Floats | None = None,
    ) -> TabularMDP:
        """Build from ``transitions`` P ``[S, A, S]`` and ``rewards`` ``[S, A]`` or ``[S, A, S]``.

        ``terminal`` defaults to no terminal state, ``start`` to the uniform distribution over the
        others.
        """
        transitions = np.asarray(transitions, dtype=np.float64)
        rewards = np.asarray(rewards, dtype=np.float64)
        if transitions.ndim != 3 or transitions.shape[0] != transitions.shape[2]:
            raise ValueError(f"transitions must be [S, A, S], got {transitions.shape}")
        num_states, num_actions, _ = transitions.shape
        if rewards.shape not in {(num_states, num_actions), transitions.shape}:
            raise ValueError(f"rewards must be [S, A] or [S, A, S], got {rewards.shape}")
        if terminal is None:
            terminal = np.zeros(num_states, dtype=bool)
        if start is None:
            start = ~terminal / np.count_nonzero(~terminal)
        rewards = rewards if rewards.ndim == 3 else rewards[:, :, None]
        rewards = np.broadcast_to(rewards, transitions.shape)
        return cls(
            successors=np.repeat(np.arange(num_states)[:, None], num_states, axis=1),
            probabilities=np.ascontiguousarray(transitions.transpose(1, 2, 0)),
            rewards=np.ascontiguousarray(rewards.transpose(1, 2, 0)),
            terminal=np.asarray(terminal, dtype=bool),
            start=np.asarray(start, dtype=np.float64),
        )

    @property
    def num_states(self) -> int:
        """S, the number of states."""
        return self.successors.shape[1]

    @property
    def num_actions(self) -> int:
        """A, the number of actions."""
        return self.probabilities.shape[0]

    @cached_property
    def expected_rewards(self) -> Floats:
        """R(s, a) = Σ_s' P(s' | s, a) r(s, a, s'), float64 ``[A, S]``."""
        summed = (self.probabilities * self.rewards).sum(axis=1)
        return np.ascontiguousarray(np.broadcast_to(summed, (self.num_actions, self.num_states)))

    def dense(self) -> Floats:
        """P as the textbook writes it, float64 ``[S, A, S]``; for small MDPs only."""
        states, actions = self.num_states, self.num_actions
        transitions = np.zeros((states, actions, states))
        rows = np.arange(states)
        for action in range(actions):
            for j, successors in enumerate(self.successors):
                weight = np.broadcast_to(self.probabilities[action, j], states)
                transitions[rows, action, successors] += weight
        return transitions

    def block(self, first: int, stop: int) -> TabularMDPBlock:
        """Rows ``first`` to ``stop`` of the model: what one worker needs to back up those
        states.
        """
        shared = self.probabilities.shape[2] == 1
        paid_alike = self.rewards.shape[2] == 1
        return TabularMDPBlock(
            successors=np.ascontiguousarray(self.successors[:, first:stop]),
            probabilities=self.probabilities
            if shared
            else np.ascontiguousarray(self.probabilities[:, :, first:stop]),
            rewards=self.rewards if paid_alike else self.rewards[:, :, first:stop].copy(),
            expected_rewards=np.ascontiguousarray(self.expected_rewards[:, first:stop]),
            first=first,
        )

    @property
    def whole(self) -> TabularMDPBlock:
        """All states as one block."""
        return self.block(0, self.num_states)

    def soften(self, epsilon: float) -> TabularMDP:
        """The same MDP when an ε-greedy player's hand slips: action a becomes uniformly random
        with probability ``epsilon``.

        The best policy here is the best ε-soft policy of the original MDP (Sutton and Barto 2018,
        section 5.4).
        """
        if self.rewards.shape[0] > 1:
            raise ValueError("rewards must not depend on the action to soften an MDP")
        uniform = np.full((self.num_actions, self.num_actions), epsilon / self.num_actions)
        mixing = (1 - epsilon) * np.eye(self.num_actions) + uniform
        probabilities = np.einsum("ab,bjs->ajs", mixing, self.probabilities)
        return replace(self, probabilities=probabilities)


@dataclass(frozen=True, kw_only=True, eq=False)
class TabularMDPBlock:
    """The rows of a :class:`TabularMDP` that start at state ``first``: n states, each with its J
    successors.

    Fields: ``successors`` ``[J, n]``; ``probabilities`` ``[A, J, n]`` or ``[A, J, 1]``; ``rewards``
    ``[A or 1, J, n or 1]``; ``expected_rewards`` ``[A, n]``.
    """

    successors: Ints
    probabilities: Floats
    rewards: Floats
    expected_rewards: Floats
    first: int

    @property
    def stop(self) -> int:
        """One past the last state of this block."""
        return self.first + self.successors.shape[1]


def outcome_table(model: TabularMDPBlock) -> list[list[list[tuple[float, int, float]]]]:
    """``table[s][a]``: the possible outcomes (probability, successor, reward), equal successors
    merged.
    """
    shape = (model.probabilities.shape[0], *model.successors.shape)
    probabilities = np.broadcast_to(model.probabilities, shape).transpose(2, 0, 1).tolist()
    rewards = np.broadcast_to(model.rewards, shape).transpose(2, 0, 1).tolist()
    table = []
    for successors, weights, pays in zip(
        model.successors.T.tolist(), probabilities, rewards, strict=True
    ):
        actions = []
        for weight, pay in zip(weights, pays, strict=True):
            merged: dict[tuple[int, float], float] = {}
            for probability, successor, reward in zip(weight, successors, pay, strict=True):
                if probability > 0:
                    merged[successor, reward] = merged.get((successor, reward), 0.0) + probability
            actions.append([(p, successor, reward) for (successor, reward), p in merged.items()])
        table.append(actions)
    return table


def action_values(mdp: TabularMDP | TabularMDPBlock, values: Floats, gamma: float) -> Floats:
    """One Bellman backup: q(s, a) = R(s, a) + γ Σ_s' P(s' | s, a) v(s').

    ``values`` ``[S]`` covers *all* states, also when only a block is backed up. Returns ``[A, S]``
    (``[A, n]`` for a block).
    """
    landing = np.take(values, mdp.successors, mode="clip")
    if mdp.probabilities.shape[2] == 1:
        expected = mdp.probabilities[:, :, 0] @ landing
    else:
        expected = np.einsum("ajs,js->as", mdp.probabilities, landing)
    expected *= gamma
    expected += mdp.expected_rewards
    return expected


def policy_values(mdp: TabularMDP, policy: Ints | Floats, gamma: float) -> Floats:
    """Solve (I − γ P_π) v = r_π exactly; v is 0 in terminal states.

    ``policy``: one action per state, int ``[S]``, or probabilities ``[S, A]``. Returns float64
    ``[S]``.
    Raises ``ValueError`` for more than ``EXACT_LIMIT`` states, and for γ = 1 with a policy that
    may never end.
    """
    if mdp.num_states > EXACT_LIMIT:
        raise ValueError(f"{mdp.num_states} states: the exact solve is for {EXACT_LIMIT} at most")
    probabilities = as_probabilities(policy, mdp.num_actions)
    live = np.flatnonzero(~mdp.terminal)
    transitions = np.einsum("sa,sat->st", probabilities, mdp.dense())[np.ix_(live, live)]
    rewards = np.einsum("sa,as->s", probabilities, mdp.expected_rewards)[live]
    values = np.zeros(mdp.num_states)
    try:
        values[live] = np.linalg.solve(np.eye(len(live)) - gamma * transitions, rewards)
    except np.linalg.LinAlgError:
        raise ValueError("gamma = 1 needs a policy that ends from every state") from None
    return values


def optimal_values(mdp: TabularMDP, gamma: float) -> Floats:
    """v*: policy improvement with an exact solve at each step, until no action is better. Returns
    float64 ``[S]``.

    ``gamma`` must be below 1 unless every policy ends. Exact to rounding; the yardstick of
    chapters 1 and 2.
    """
    policy = np.zeros(mdp.num_states, dtype=np.int64)
    rows = np.arange(mdp.num_states)
    while True:
        values = policy_values(mdp, policy, gamma)
        q = action_values(mdp, values, gamma)
        better = q.max(axis=0) > q[policy, rows] + 1e-12 * (1 + np.abs(values))
        if not better.any():
            return values
        policy = np.where(better, q.argmax(axis=0), policy)


def greedy(q: Floats) -> Ints:
    """The action of the largest value in each state; among (numerically) equal ones the first.
    ``[A, S]`` → int64 ``[S]``.

    The tolerance keeps rounding in the last digits from choosing among actions that are equally
    good.
    """
    best = q.max(axis=0)
    return np.argmax(q >= best - 1e-9 * (1 + np.abs(best)), axis=0)


def as_probabilities(policy: Ints | Floats, num_actions: int) -> Floats:
    """A policy as probabilities ``[S, A]``, given so or as one action per state ``[S]``."""
    given = np.asarray(policy)
    return np.eye(num_actions)[given] if given.ndim == 1 else given.astype(np.float64)


def epsilon_greedy(actions: Ints, num_actions: int, epsilon: float) -> Floats:
    """``actions`` int ``[S]`` with probability 1 − ε, any action at random with probability ε.
    Returns ``[S, A]``.
    """
    return (1 - epsilon) * np.eye(num_actions)[actions] + epsilon / num_actions


def make_tabular_env(env_id: str, **options: Any) -> gym.Env[Any, Any]:
    """``env_id`` as an ordinary environment, the book's grids included. Raises ``ValueError`` if
    it is unknown.
    """
    register_own_envs()
    try:
        return gym.make(env_id, **options)
    except (gym.error.Error, ModuleNotFoundError, TypeError) as error:
        raise ValueError(f"env_id: cannot make {env_id!r}: {error}") from error


def mdp_of(env: gym.Env[Any, Any]) -> TabularMDP:
    """The MDP behind ``env``: its ``mdp`` attribute, or Gymnasium's own table ``P`` (FrozenLake,
    CliffWalking, Taxi).

    Raises ``ValueError`` when the env keeps its dynamics to itself.
    """
    inner = env.unwrapped
    if isinstance(getattr(inner, "mdp", None), TabularMDP):
        return inner.mdp  # type: ignore[attr-defined]
    table = getattr(inner, "P", None)
    if not isinstance(table, dict):
        raise ValueError(
            "env_id: tabular systems need an env that shows its transition probabilities, "
            "such as rlbook/GridWorld-v0 or FrozenLake-v1"
        )
    states, actions = len(table), len(table[0])
    transitions, rewards = np.zeros((states, actions, states)), np.zeros((states, actions, states))
    terminal = np.zeros(states, dtype=bool)
    for state in range(states):
        for action in range(actions):
            for probability, successor, reward, ends in table[state][action]:
                transitions[state, action, successor] += probability
                # Two ways to one successor may pay differently: keep their mean.
                rewards[state, action, successor] += probability * reward
                terminal[successor] |= ends
    rewards /= np.where(transitions > 0, transitions, 1.0)
    transitions[terminal] = np.eye(states)[terminal][:, None, :]
    rewards[terminal] = 0.0
    start = np.asarray(getattr(inner, "initial_state_distrib", ~terminal / (~terminal).sum()))
    return TabularMDP.from_dense(transitions, rewards, terminal, start)


class TablePolicy:
    """Acts by a table of action values ``q`` ``[S, A]``, greedily; read anew at every call, so it
    follows a learner.

    Observations are state numbers ``[B]``, or one-hot rows ``[B, S]`` as vectors of environments
    give them.
    """

    def __init__(self, q: Callable[[], Floats]) -> None:
        self.q = q

    def initial_state(self, num_envs: int) -> None:
        """A table has no memory."""

    def act(
        self, observation: NDArray[Any], state: Any, first: Bools, rng: np.random.Generator
    ) -> tuple[Ints, Any]:
        """Actions int64 ``[B]`` and the (absent) next state."""
        one_hot = observation.ndim == 2
        states = observation.argmax(axis=1) if one_hot else observation.astype(np.int64)
        return self.q()[states].argmax(axis=1), state


def _check_shapes(mdp: TabularMDP) -> None:
    places, states = mdp.successors.shape
    actions = mdp.probabilities.shape[0]
    allowed: dict[str, set[tuple[int, ...]]] = {
        "probabilities": {(actions, places, n) for n in (1, states)},
        "rewards": {(a, places, n) for a in (1, actions) for n in (1, states)},
        "terminal": {(states,)},
        "start": {(states,)},
    }
    for name, shapes in allowed.items():
        shape = getattr(mdp, name).shape
        if shape not in shapes:
            raise ValueError(f"{name} has shape {shape}, allowed are {sorted(shapes)}")


def _check_values(mdp: TabularMDP) -> None:
    states = np.arange(mdp.num_states)
    if mdp.successors.min() < 0 or mdp.successors.max() >= mdp.num_states:
        raise ValueError(f"successors must name states 0 to {mdp.num_states - 1}")
    for name, sums in (
        ("probabilities", mdp.probabilities.sum(axis=1)),
        ("start", mdp.start.sum()),
    ):
        if getattr(mdp, name).min() < 0 or not np.allclose(sums, 1.0, rtol=0, atol=1e-9):
            raise ValueError(f"{name} must be at least 0 and sum to 1")
    leaves = (mdp.probabilities > 0) & (mdp.successors != states)[None]
    if (leaves.any(axis=(0, 1)) & mdp.terminal).any():
        raise ValueError("terminal: a terminal state must lead to itself only")
    if mdp.expected_rewards[:, mdp.terminal].any():
        raise ValueError("rewards: a terminal state must pay nothing")
