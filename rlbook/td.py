"""Learning from samples, on tables: Monte Carlo, TD(0), n-step TD, TD(λ), SARSA, Expected SARSA,
Q-learning.

              ┌──────── one process, no waiting ────────┐
    env ──► Actor: state, reward ──► Step ──► Learner: table[s] ──┐
     ▲        │ action                        += α (target − ·)   │
     └────────┘◄───────────── the newest table ◄──────────────────┘

This is chapter 1's Bellman backup with: the sum over successors replaced by the one successor that
happened, and a step of size α towards that sample instead of an assignment. The algorithms differ
in their *target* alone, and each is a function below.

Differs from the textbook (Sutton and Barto 2018, chapters 5–7 and 12): the step size may shrink
with the visits, so that the estimates converge instead of hovering; an episode cut at a time limit
is bootstrapped, not taken for an end.

Book: chapter 02
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from rlbook.harness.config import BaseConfig, at_least, one_of, within
from rlbook.harness.run import Result, Run
from rlbook.parts.envs import Episode
from rlbook.parts.gridworld import ENV_ID, GridWorld
from rlbook.parts.tabular import (
    Floats,
    TablePolicy,
    TabularMDP,
    action_values,
    epsilon_greedy,
    greedy,
    make_tabular_env,
    mdp_of,
    optimal_values,
    policy_values,
)

PREDICTION = ("first_visit_monte_carlo", "every_visit_monte_carlo", "td", "n_step_td", "td_lambda")
CONTROL = ("sarsa", "expected_sarsa", "q_learning")

Values = list[float]
"""v(s), one number a state. Plain lists: reading one element of a NumPy array costs several times
as much."""
ActionValues = list[list[float]]
"""q(s, a), one row a state."""
StepSize = Callable[..., float]
"""``alpha(s)`` or ``alpha(s, a)``: counts the visit and returns the step size for it."""


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """What the tabular learners are told."""

    env_id: str = ENV_ID
    """A grid of the book, or any Gymnasium environment that shows its transition table."""
    algorithm: str = "q_learning"
    """One of PREDICTION (values of a fixed policy) or CONTROL (a policy of its own)."""
    discount: float = 0.99
    """γ, below 1."""
    step_size: float = 0.5
    """α at the first visit."""
    step_size_power: float = 0.7
    """α shrinks as 1 / visits^power: 0 keeps it constant, 1 averages all samples (with step_size
    1)."""
    n_step: int = 4
    """Rewards before n-step TD bootstraps."""
    lambda_: float = 0.8
    """λ of TD(λ): 0 is TD(0), 1 is Monte Carlo."""
    epsilon: float = 0.1
    """Probability of a random action. The policy that PREDICTION evaluates is the optimal one with
    this ε."""
    exploring_starts: bool = True
    """Begin each episode in a random state (grids of the book only)."""
    initial_value: float = 0.0
    """What the table holds at first."""
    total_env_steps: int = 200_000
    """Stop after so many environment steps (at the end of that episode)."""
    stop_at_return: float | None = None
    """Stop when solved: the training mean reaches this return and 100 fresh episodes confirm it."""
    log_every_env_steps: int = 2_000
    """One row of metrics for so many environment steps."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        one_of(self, "algorithm", PREDICTION + CONTROL)
        at_least(self, 1, "n_step", "total_env_steps", "log_every_env_steps")
        within(self, 0, 1, "step_size", "step_size_power", "lambda_", "epsilon")
        if not 0 <= self.discount < 1:
            raise ValueError(f"discount: must be at least 0 and below 1, got {self.discount}")
        if self.step_size == 0:
            raise ValueError("step_size: must be above 0, or nothing is learnt")


class Step(NamedTuple):
    """One step of the environment."""

    state: int
    action: int
    reward: float
    discount: float
    """0.0 if the environment terminated, else 1.0 (also where a time limit cut the episode)."""
    next_state: int
    next_action: int
    """What the behaviour policy will do there: SARSA is named after these five (s, a, r, s',
    a')."""


# --- the targets


def monte_carlo(
    steps: Iterable[Step], values: Values, alpha: StepSize, gamma: float, first_visit: bool
) -> None:
    """Target: the return that followed, known when the episode is over (Sutton and Barto 2018,
    section 5.1).
    """
    episode = list(steps)
    first = {step.state: t for t, step in reversed(list(enumerate(episode)))}
    # After a termination nothing follows; after a time limit the estimate has to speak for what
    # would have.
    target = episode[-1].discount * values[episode[-1].next_state]
    for t in reversed(range(len(episode))):
        state = episode[t].state
        target = episode[t].reward + gamma * target
        if not first_visit or first[state] == t:
            values[state] += alpha(state) * (target - values[state])


def td(steps: Iterable[Step], values: Values, alpha: StepSize, gamma: float) -> None:
    """Target: r + γ v(s') (eq. 6.2)."""
    for step in steps:
        target = step.reward + gamma * step.discount * values[step.next_state]
        values[step.state] += alpha(step.state) * (target - values[step.state])


def n_step_td(steps: Iterable[Step], values: Values, alpha: StepSize, gamma: float, n: int) -> None:
    """Target: n rewards, then γⁿ v (eq. 7.1); fewer rewards where the episode ends before."""
    window: deque[Step] = deque()

    def update_oldest() -> None:
        target = window[-1].discount * values[window[-1].next_state]
        for step in reversed(window):
            target = step.reward + gamma * target
        state = window.popleft().state
        values[state] += alpha(state) * (target - values[state])

    for step in steps:
        window.append(step)
        if len(window) == n:
            update_oldest()
    while window:
        update_oldest()


def td_lambda(
    steps: Iterable[Step], values: Values, alpha: StepSize, gamma: float, lambda_: float
) -> None:
    """Target: the λ-average of all n-step targets, by accumulating traces (section 12.2).

    Each TD error is sent back to the states that led to it; the trace carries the step size of its
    visit.
    """
    traces: dict[int, float] = {}
    for step in steps:
        error = step.reward + gamma * step.discount * values[step.next_state] - values[step.state]
        traces[step.state] = traces.get(step.state, 0.0) + alpha(step.state)
        for state, trace in traces.items():
            values[state] += trace * error
            traces[state] = gamma * lambda_ * trace


def sarsa(steps: Iterable[Step], q: ActionValues, alpha: StepSize, gamma: float) -> None:
    """Target: r + γ q(s', a') with the action that will be taken (eq. 6.7): learns the value of
    its own behaviour.
    """
    for step in steps:
        target = step.reward + gamma * step.discount * q[step.next_state][step.next_action]
        row = q[step.state]
        row[step.action] += alpha(step.state, step.action) * (target - row[step.action])


def expected_sarsa(
    steps: Iterable[Step], q: ActionValues, alpha: StepSize, gamma: float, epsilon: float
) -> None:
    """Target: r + γ Σ_a π(a | s') q(s', a) for the ε-greedy π (eq. 6.9): SARSA without the luck of
    a'.
    """
    for step in steps:
        after = q[step.next_state]
        expected = (1 - epsilon) * max(after) + epsilon * sum(after) / len(after)
        target = step.reward + gamma * step.discount * expected
        row = q[step.state]
        row[step.action] += alpha(step.state, step.action) * (target - row[step.action])


def q_learning(steps: Iterable[Step], q: ActionValues, alpha: StepSize, gamma: float) -> None:
    """Target: r + γ max_a q(s', a) (eq. 6.8; Watkins 1989): learns the optimal values whatever the
    behaviour.
    """
    for step in steps:
        target = step.reward + gamma * step.discount * max(q[step.next_state])
        row = q[step.state]
        row[step.action] += alpha(step.state, step.action) * (target - row[step.action])


# --- who acts, who learns
# ----------------------------------------------------------------------------------------------


class Actor:
    """Plays one episode at a time, step by step, so that each action comes from the newest
    table.
    """

    def __init__(self, env: gym.Env[Any, Any], seed: int, exploring_starts: bool) -> None:
        if exploring_starts and not isinstance(env.unwrapped, GridWorld):
            raise ValueError("exploring_starts: only the book's grids can begin in any state")
        self.env = env
        self.rng = random.Random(seed)
        self.starts = np.flatnonzero(~mdp_of(env).terminal).tolist() if exploring_starts else []
        self.last_return, self.last_length = 0.0, 0
        env.reset(seed=seed)

    def episode(self, behaviour: Callable[[int], int]) -> Iterator[Step]:
        """Yield the steps of one episode; ``behaviour(state)`` chooses each action."""
        options = {"state": self.rng.choice(self.starts)} if self.starts else None
        state, _ = self.env.reset(options=options)
        action, over = behaviour(state), False
        self.last_return, self.last_length = 0.0, 0
        while not over:
            next_state, reward, terminated, truncated, _ = self.env.step(action)
            self.last_return += float(reward)
            self.last_length += 1
            over = terminated or truncated
            next_action = behaviour(next_state)
            discount = 0.0 if terminated else 1.0
            yield Step(state, action, float(reward), discount, next_state, next_action)
            state, action = next_state, next_action

    def state_dict(self) -> dict[str, Any]:
        """Both random generators, between two episodes."""
        return {"rng": self.rng.getstate(), "env": self.env.unwrapped.np_random.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        self.rng.setstate(state["rng"])
        self.env.unwrapped.np_random.bit_generator.state = state["env"]


class Learner:
    """The table, the visits, and the update that ``config.algorithm`` names."""

    def __init__(self, mdp: TabularMDP, config: Config) -> None:
        self.config = config
        self.controls = config.algorithm in CONTROL
        shape = (mdp.num_states, mdp.num_actions) if self.controls else (mdp.num_states,)
        table = np.full(shape, config.initial_value)
        table[mdp.terminal] = 0.0
        self.table: Any = table.tolist()
        self.visits: Any = np.zeros(shape, dtype=int).tolist()
        self.mdp = mdp
        optimum = greedy(action_values(mdp, optimal_values(mdp, config.discount), config.discount))
        self.evaluated = epsilon_greedy(optimum, mdp.num_actions, config.epsilon)
        self._fixed = self.evaluated.cumsum(axis=1).tolist()
        self.exact = exact_answer(mdp, config)

    def behaviour(self, rng: random.Random) -> Callable[[int], int]:
        """The policy that acts: ε-greedy in the table (control), or the fixed one that is
        evaluated (prediction).
        """
        epsilon, actions, fixed = self.config.epsilon, self.mdp.num_actions, self._fixed
        draw = rng.random

        def choose(state: int) -> int:
            if draw() < epsilon:
                return int(draw() * actions)
            row = self.table[state]
            best = max(row)
            if row.count(best) == 1:
                return int(row.index(best))
            return rng.choice([action for action, q in enumerate(row) if q == best])

        def sample(state: int) -> int:
            number = draw()
            row = fixed[state]
            return next((a for a in range(actions - 1) if number < row[a]), actions - 1)

        return choose if self.controls else sample

    def alpha(self, state: int, action: int | None = None) -> float:
        """step_size / visits^power, this visit included."""
        row, index = (self.visits, state) if action is None else (self.visits[state], action)
        row[index] += 1
        power = self.config.step_size_power
        return self.config.step_size / row[index] ** power if power else self.config.step_size

    def learn(self, steps: Iterable[Step]) -> None:
        """Update the table from one episode."""
        config, table = self.config, self.table
        common = (steps, table, self.alpha, config.discount)
        match config.algorithm:
            case "first_visit_monte_carlo":
                monte_carlo(*common, first_visit=True)
            case "every_visit_monte_carlo":
                monte_carlo(*common, first_visit=False)
            case "td":
                td(*common)
            case "n_step_td":
                n_step_td(*common, n=config.n_step)
            case "td_lambda":
                td_lambda(*common, lambda_=config.lambda_)
            case "sarsa":
                sarsa(*common)
            case "expected_sarsa":
                expected_sarsa(*common, epsilon=config.epsilon)
            case "q_learning":
                q_learning(*common)

    def q(self) -> Floats:
        """q(s, a) ``[S, A]``: the table, or for prediction one backup of it through the model (to
        have a policy to show).
        """
        table = np.array(self.table)
        return table if self.controls else action_values(self.mdp, table, self.config.discount).T

    def error(self) -> float:
        """Root mean squared error against the exact answer, over all entries that are not
        terminal.
        """
        live = ~self.mdp.terminal
        return float(np.sqrt(np.mean((np.array(self.table) - self.exact)[live] ** 2)))

    def state_dict(self) -> dict[str, Any]:
        """The table and the visits."""
        return {"table": np.array(self.table), "visits": np.array(self.visits), "q": self.q()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        self.table, self.visits = state["table"].tolist(), state["visits"].tolist()


def exact_answer(mdp: TabularMDP, config: Config) -> Floats:
    """What the table should come to: v_π ``[S]``, q* ``[S, A]``, or for (Expected) SARSA q of the
    best ε-soft policy.
    """
    if config.algorithm in PREDICTION:
        optimum = greedy(action_values(mdp, optimal_values(mdp, config.discount), config.discount))
        policy = epsilon_greedy(optimum, mdp.num_actions, config.epsilon)
        return policy_values(mdp, policy, config.discount)
    own = mdp if config.algorithm == "q_learning" else mdp.soften(config.epsilon)
    return action_values(mdp, optimal_values(own, config.discount), config.discount).T.copy()


def train(config: Config) -> Result:
    """Learn from samples of ``config.env_id``; ``value_error`` in the curves compares with the
    exact answer.

    ``Result.extra`` holds ``table`` (``[S]`` or ``[S, A]``), ``exact`` of the same shape, and
    ``visits``.
    Raises ``ValueError`` for an environment that is unknown or does not show its probabilities
    (needed to compare).
    """
    env = make_tabular_env(config.env_id)
    learner = Learner(mdp_of(env), config)
    actor = Actor(env, config.seed, config.exploring_starts)
    behaviour = learner.behaviour(actor.rng)
    every = config.log_every_env_steps
    parts = {"learner": learner, "actor": actor}
    with Run("td", config, TablePolicy(learner.q), parts) as run:
        while run.running():
            learner.learn(actor.episode(behaviour))
            length = actor.last_length
            row_is_due = run.env_steps // every < (run.env_steps + length) // every
            run.record(
                env_steps=length,
                learner_steps=length,
                episodes=[Episode(0, actor.last_return, length)],
                metrics={"value_error": learner.error()} if row_is_due else None,
            )
        run.record(env_steps=0, metrics={"value_error": learner.error()})
        run.extra = {
            "table": np.array(learner.table),
            "exact": learner.exact,
            "visits": np.array(learner.visits),
        }
    env.close()
    return run.result()


def load_policy(config: Config, parts: dict[str, Any]) -> TablePolicy:
    """The greedy policy of a stored run."""
    q = parts["learner"]["q"]
    return TablePolicy(lambda: q)
