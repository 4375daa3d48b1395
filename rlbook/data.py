"""The shapes that flow through every system: NamedTuples of arrays, time first.

A *vector* of B environments takes T steps. Row t of an unroll is the step from observation x_t to
x_{t+1}:

    env_outputs   x_0      x_1      x_2   …   x_T        T + 1 rows, [T+1, B, ...]
    agent_outputs     a_0      a_1     …  a_{T-1}        T rows,     [T, B, ...]
                      └ reward[1], discount[1], first[1]: what a_0 led to

The last observation of one unroll is the first of the next, so that x_T can be bootstrapped from.
`discount` is 0.0 where the environment *terminated* and 1.0 everywhere else, also at a time limit;
`first` marks the observation after a reset. The row that leads from a final observation to a reset
(`first[t+1]`) is no step of the environment: it is not *valid*.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class EnvOutput(NamedTuple):
    """What an environment says at one moment: arrays `[B, ...]`; `[T+1, B, ...]` in an unroll."""

    observation: Any
    """x_t."""
    reward: Any
    """Reward on arriving at x_t; 0 after a reset."""
    discount: Any
    """0.0 if x_t is terminal, else 1.0 (γ enters later, once, in a system)."""
    first: Any
    """True if x_t was made by a reset."""


class AgentOutput(NamedTuple):
    """What the policy said to x_t: arrays `[B, ...]`, or `[T, B, ...]` in an unroll."""

    action: Any
    """The action taken (int64)."""
    logits: Any
    """Unnormalised log-probabilities of the behaviour policy, `[..., A]`."""
    value: Any
    """The value that the actor's network gave x_t, `[...]`."""


class Transition(NamedTuple):
    """One step, or n steps folded into one, as a replay memory holds it: arrays `[N, ...]`."""

    obs_tm1: Any
    a_tm1: Any
    r_t: Any
    """Reward; for n steps Σ γ^k r, k < n."""
    discount_t: Any
    """What multiplies the value of obs_t: γ^k for the k steps taken, 0 after a termination."""
    obs_t: Any


class Unroll(NamedTuple):
    """T steps of B environments by one actor."""

    env_outputs: EnvOutput
    """`[T+1, B, ...]`."""
    agent_outputs: AgentOutput
    """`[T, B, ...]`."""
    agent_state: Any = None
    """Recurrent state before x_0, or None."""
    actor: int = 0
    version: int = 0
    """Version of the parameters that the actor acted with."""
    begins: bool = False
    """It does not follow from the actor's unroll before. Told by servers (SEED RL) alone."""

    @property
    def valid(self) -> np.ndarray:
        """`[T, B]` bool: False on rows that lead from a final observation to a reset."""
        return ~self.env_outputs.first[1:]


def tree_map(function: Callable[..., Any], *trees: Any) -> Any:
    """Applies `function` to the leaves of trees of one structure; None stays.

    A tree is made of NamedTuples, tuples, lists and dicts.
    """
    tree = trees[0]
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: tree_map(function, *(t[key] for t in trees)) for key in tree}
    if isinstance(tree, tuple | list):
        leaves = [tree_map(function, *branch) for branch in zip(*trees, strict=True)]
        return type(tree)(*leaves) if hasattr(tree, "_fields") else type(tree)(leaves)
    return function(*trees)


def tree_nbytes(tree: Any) -> int:
    """Bytes of all arrays in a tree (numpy arrays and torch tensors; other leaves count as 0)."""
    total = 0

    def add(leaf: Any) -> None:
        nonlocal total
        total += int(getattr(leaf, "nbytes", 0))

    tree_map(add, tree)
    return total
