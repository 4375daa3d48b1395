"""Learning from samples: targets by hand, methods against the exact answer, resume, reductions."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from rlbook import td
from rlbook.harness.run import Result
from rlbook.maths.returns import lambda_returns, n_step_returns
from rlbook.parts.gridworld import GridWorld, register_map
from rlbook.parts.tabular import mdp_of, optimal_values, policy_values

GAMMA = 0.9
# 0 → 1 → 0 → 2 (terminal): state 0 is visited twice
EPISODE = [
    td.Step(0, 0, 1.0, 1.0, 1, 1),
    td.Step(1, 1, 2.0, 1.0, 0, 0),
    td.Step(0, 0, 4.0, 0.0, 2, 0),
]


def cut(episode: list[td.Step]) -> list[td.Step]:
    """The same episode, ended by a time limit instead of a termination."""
    return [*episode[:-1], episode[-1]._replace(discount=1.0)]


def half(*_: int) -> float:
    return 0.5


def test_first_and_every_visit_by_hand():
    first, every = [10.0, 20.0, 0.0], [10.0, 20.0, 0.0]
    td.monte_carlo(EPISODE, first, half, GAMMA, first_visit=True)
    td.monte_carlo(EPISODE, every, half, GAMMA, first_visit=False)
    late, middle = 4.0, 2 + 0.9 * 4
    early = 1 + 0.9 * (2 + 0.9 * 4)
    assert first == pytest.approx([10 + 0.5 * (early - 10), 20 + 0.5 * (middle - 20), 0])
    after_late = 10 + 0.5 * (late - 10)
    assert every[0] == pytest.approx(after_late + 0.5 * (early - after_late))
    assert every[1] == first[1]


def test_td_by_hand():
    values = [10.0, 20.0, 99.0]
    td.td(EPISODE, values, half, GAMMA)
    v0 = 10 + 0.5 * (1 + 0.9 * 20 - 10)
    v1 = 20 + 0.5 * (2 + 0.9 * v0 - 20)
    assert values == pytest.approx([v0 + 0.5 * (4 - v0), v1, 99])  # nothing beyond a termination


def test_control_by_hand():
    start = [[1.0, 3.0], [5.0, 7.0], [9.0, 9.0]]
    steps = EPISODE[:1]  # 0, action 0, reward 1, to state 1 where action 1 will follow
    tables = {name: [row.copy() for row in start] for name in td.CONTROL}
    td.sarsa([steps[0]._replace(next_action=0)], tables["sarsa"], half, GAMMA)
    td.expected_sarsa(steps, tables["expected_sarsa"], half, GAMMA, epsilon=0.2)
    td.q_learning(steps, tables["q_learning"], half, GAMMA)
    after = {"sarsa": 5.0, "expected_sarsa": 0.8 * 7 + 0.2 * (5 + 7) / 2, "q_learning": 7.0}
    for name, table in tables.items():
        assert table[0] == pytest.approx([1 + 0.5 * (1 + 0.9 * after[name] - 1), 3])
        assert table[1:] == start[1:]
    for name in td.CONTROL:  # terminated: the table beyond counts for nothing
        table = [row.copy() for row in start]
        extra = {"epsilon": 0.2} if name == "expected_sarsa" else {}
        getattr(td, name)([EPISODE[2]], table, half, GAMMA, **extra)
        assert table[0] == pytest.approx([1 + 0.5 * (4 - 1), 3])


def random_episode(seed: int, length: int = 9, states: int = 30) -> list[td.Step]:
    """No state twice, so that online updates cannot disturb one another's targets."""
    rng = random.Random(seed)
    path = rng.sample(range(states), length + 1)
    rewards = [rng.gauss(0, 1) for _ in range(length)]
    return [
        td.Step(path[t], 0, rewards[t], float(t < length - 1), path[t + 1], 0)
        for t in range(length)
    ]


@pytest.mark.parametrize("ended", [True, False], ids=["terminated", "cut"])
@pytest.mark.parametrize("n", [1, 3, 20])
def test_n_step_targets_are_those_of_the_maths(n, ended):
    episode = random_episode(n)
    episode = episode if ended else cut(episode)
    old = np.random.default_rng(n).normal(size=30).tolist()
    new = old.copy()
    td.n_step_td(episode, new, lambda s: 1.0, GAMMA, n)  # α = 1: the new value is the target
    states = [step.state for step in episode]
    expected = n_step_returns(
        rewards=torch.tensor([step.reward for step in episode], dtype=torch.float64),
        discounts=torch.tensor([GAMMA * step.discount for step in episode], dtype=torch.float64),
        values=torch.tensor([old[s] for s in states], dtype=torch.float64),
        bootstrap_value=torch.tensor(old[episode[-1].next_state], dtype=torch.float64),
        n=n,
    )
    assert [new[s] for s in states] == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("lambda_", [0.0, 0.7, 1.0])
def test_traces_give_the_lambda_return(lambda_):
    """Backward view = forward view where no state comes twice and V hardly changes meanwhile."""
    episode, alpha = random_episode(5), 1e-9
    old = np.random.default_rng(5).normal(size=30).tolist()
    new = old.copy()
    td.td_lambda(episode, new, lambda s: alpha, GAMMA, lambda_)
    states = [step.state for step in episode]
    expected = lambda_returns(
        rewards=torch.tensor([step.reward for step in episode], dtype=torch.float64),
        discounts=torch.tensor([GAMMA * step.discount for step in episode], dtype=torch.float64),
        values=torch.tensor([old[s] for s in states], dtype=torch.float64),
        bootstrap_value=torch.tensor(0.0, dtype=torch.float64),
        lambda_=lambda_,
    )
    targets = [old[s] + (new[s] - old[s]) / alpha for s in states]
    assert targets == pytest.approx(expected.tolist(), abs=1e-5)


def test_reductions():
    """n = 1 and λ = 0 are TD(0) bit for bit; n beyond the episode is Monte Carlo."""
    values = {name: [0.3, -0.2, 0.0] for name in ("td", "n", "lambda", "long", "monte carlo")}
    td.td(EPISODE, values["td"], half, GAMMA)
    td.n_step_td(EPISODE, values["n"], half, GAMMA, 1)
    td.td_lambda(EPISODE, values["lambda"], half, GAMMA, 0.0)
    assert values["td"] == values["n"] == values["lambda"]
    unique = random_episode(1)
    long, whole = [0.1] * 30, [0.1] * 30
    td.n_step_td(unique, long, half, GAMMA, 100)
    td.monte_carlo(unique, whole, half, GAMMA, first_visit=True)
    assert long == whole


def test_a_time_limit_is_no_end():
    ended, stopped = [0.0, 0.0, 50.0], [0.0, 0.0, 50.0]
    for update in (
        lambda steps, v: td.monte_carlo(steps, v, half, GAMMA, first_visit=True),
        lambda steps, v: td.td(steps, v, half, GAMMA),
        lambda steps, v: td.n_step_td(steps, v, half, GAMMA, 5),
        lambda steps, v: td.td_lambda(steps, v, half, GAMMA, 0.5),
    ):
        one, other = ended.copy(), stopped.copy()
        update(EPISODE, one)
        update(cut(EPISODE), other)
        assert other[0] > one[0] + 5  # γ · 50 or more stands behind the limit


SETTINGS = {
    "first_visit_monte_carlo": {"step_size": 1.0, "step_size_power": 1.0},
    "every_visit_monte_carlo": {"step_size": 1.0, "step_size_power": 1.0},
    "td": {"step_size_power": 0.7},
    "n_step_td": {"step_size_power": 0.7},
    "td_lambda": {"step_size_power": 0.7},
    "sarsa": {"epsilon": 0.3, "step_size_power": 0.7},
    "expected_sarsa": {"epsilon": 0.3},
    "q_learning": {"epsilon": 0.5},
}


@pytest.mark.parametrize("algorithm", td.PREDICTION + td.CONTROL)
def test_converges_to_the_exact_answer(algorithm):
    config = td.Config(algorithm=algorithm, total_env_steps=300_000, seed=1, **SETTINGS[algorithm])
    result = td.train(config)
    early = result.curves["value_error"][0]
    assert result.metrics["value_error"] < 0.02
    assert result.metrics["value_error"] < early / 3
    np.testing.assert_allclose(result.extra["table"], result.extra["exact"], atol=0.1)


def test_exact_answers_are_fixed_points():
    """At the exact table the *expected* update is nothing, summed over the model."""
    env = GridWorld("small", slip=0.2)
    model = mdp_of(env)
    dense = model.dense()
    for algorithm in td.CONTROL:
        config = td.Config(algorithm=algorithm, epsilon=0.25)
        q = td.exact_answer(model, config)
        after = q.max(axis=1)
        if algorithm != "q_learning":
            after = 0.75 * after + 0.25 * q.mean(axis=1)
        expected = model.expected_rewards.T + config.discount * dense @ after
        np.testing.assert_allclose(q, expected, atol=1e-10)
    values = td.exact_answer(model, td.Config(algorithm="td", epsilon=0.0))
    np.testing.assert_allclose(values, optimal_values(model, 0.99), atol=1e-10)


def test_sarsa_walks_safe_and_q_learning_along_the_cliff():
    """Sutton and Barto's example 6.6: it matters whose actions you bootstrap from."""
    lengths = {}
    for algorithm in ("q_learning", "expected_sarsa"):
        config = td.Config(
            env_id="rlbook/Cliff-v0",
            algorithm=algorithm,
            exploring_starts=False,
            step_size_power=0.0,
            total_env_steps=100_000,
        )
        result = td.train(config)
        lengths[algorithm] = result.evaluate(episodes=1).lengths[0]
    assert lengths["q_learning"] == 13 and lengths["expected_sarsa"] in (15, 17)


def test_same_seed_same_run():
    def table(seed: int) -> np.ndarray:
        return td.train(td.Config(seed=seed, total_env_steps=3_000)).extra["table"]

    np.testing.assert_array_equal(table(1), table(1))
    assert (table(1) != table(2)).any()


@pytest.mark.parametrize("algorithm", ["td", "q_learning"])
def test_resumed_equals_uninterrupted(algorithm, tmp_path):
    long = td.Config(algorithm=algorithm, total_env_steps=9_000)
    short = dataclasses.replace(long, total_env_steps=4_000, run_dir=str(tmp_path / "run"))
    td.train(short)
    resumed = td.train(dataclasses.replace(long, resume=str(tmp_path / "run")))
    straight = td.train(long)
    np.testing.assert_array_equal(resumed.extra["table"], straight.extra["table"])
    np.testing.assert_array_equal(resumed.extra["visits"], straight.extra["visits"])
    assert resumed.env_steps == straight.env_steps


def test_train_keeps_a_run(tmp_path):
    folder = tmp_path / "run"
    result = td.train(td.Config(total_env_steps=20_000, run_dir=str(folder)))
    summary = json.loads((folder / "result.json").read_text())
    assert summary["system"] == "td" and summary["env_steps"] == result.env_steps >= 20_000
    again = Result.load(folder)
    assert again.evaluate(episodes=20).mean == result.evaluate(episodes=20).mean
    assert result.extra["visits"].sum() == result.env_steps


def test_stops_when_solved():
    config = td.Config(total_env_steps=400_000, stop_at_return=0.6, exploring_starts=False)
    result = td.train(config)
    assert result.stopped_because == "solved" and result.env_steps < 400_000


def test_time_limits_are_bootstrapped_in_training():
    """A corridor cut after two steps: no episode spans it, yet its values come out right."""
    env_id = register_map("rlbook/TestCut-v0", map_name="corridor", slip=0.1, max_episode_steps=2)
    config = td.Config(env_id=env_id, algorithm="td", epsilon=0.2, total_env_steps=60_000)
    result = td.train(config)
    assert result.metrics["value_error"] < 0.02


def test_prediction_evaluates_the_policy_it_says():
    model = GridWorld("small", slip=0.2).mdp
    learner = td.Learner(model, td.Config(algorithm="td", epsilon=0.4))
    np.testing.assert_allclose(learner.exact, policy_values(model, learner.evaluated, 0.99))
    behaviour = learner.behaviour(random.Random(0))
    draws = np.bincount([behaviour(0) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(draws, learner.evaluated[0], atol=0.02)


def test_epsilon_greedy_breaks_ties_at_random():
    learner = td.Learner(GridWorld().mdp, td.Config(epsilon=0.0))
    behaviour = learner.behaviour(random.Random(0))
    assert {behaviour(3) for _ in range(100)} == {0, 1, 2, 3}
    learner.table[3][2] = 1.0
    assert {behaviour(3) for _ in range(100)} == {2}


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"algorithm": "magic"}, "algorithm"),
        ({"discount": 1.0}, "discount"),
        ({"epsilon": 1.5}, "epsilon"),
        ({"step_size": 0.0}, "step_size"),
        ({"step_size_power": 2.0}, "step_size_power"),
        ({"lambda_": -0.1}, "lambda_"),
        ({"n_step": 0}, "n_step"),
        ({"total_env_steps": 0}, "total_env_steps"),
    ],
)
def test_bad_values_are_refused(arguments, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        td.Config(**arguments)


def test_environments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="env_id"):
        td.train(td.Config(env_id="CartPole-v1"))
    with pytest.raises(ValueError, match="exploring_starts"):
        td.train(td.Config(env_id="FrozenLake-v1"))
