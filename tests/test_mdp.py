"""Planning: hand-computed answers, the theory's bounds, and three backends that agree."""

import dataclasses
import json

import numpy as np
import pytest

from rlbook import mdp
from rlbook.harness.run import Result
from rlbook.parts.gridworld import GridMap, GridWorld, gridworld_mdp, random_map
from rlbook.parts.tabular import action_values, mdp_of, optimal_values, policy_values
from rlbook.plumbing.runtime import RayRuntime
from tests.parts.test_gridworld import random_mdp, two_states

GAMMA = 0.9
WORLDS = {
    "two": two_states(),
    "small": GridWorld("small", slip=0.2).mdp,
    "rooms": GridWorld("rooms", slip=0.1).mdp,
    "dense": random_mdp(0),
}


def test_one_backup_by_hand():
    """Corridor S.G: after k sweeps the value of a cell is what k steps can earn."""
    model = gridworld_mdp(GridMap(["S.G"]), step_reward=-1.0, goal_reward=10.0)
    for backend in (mdp.Plain(model.whole, GAMMA), mdp.Block(model.whole, GAMMA)):
        v0 = np.zeros(3)
        v1 = backend.improve(v0)
        v2 = backend.improve(v1)
        v3 = backend.improve(v2)
        assert v1 == pytest.approx([-1, 10, 0])
        assert v2 == pytest.approx([-1 + 0.9 * 10, 10, 0])
        assert v3 == pytest.approx(v2)
        right = np.array([1, 1, 1])
        assert backend.evaluate(v0, right) == pytest.approx([-1, 10, 0])
        q = backend.action_values(v2)
        assert q[3] == pytest.approx([-1 + 0.9 * 8, -1 + 0.9 * 8, 0])  # left


@pytest.mark.parametrize("algorithm", mdp.ALGORITHMS)
@pytest.mark.parametrize("backend", ["plain", "vectorised"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_within_tolerance_of_the_exact_solve(algorithm, backend, world, gamma):
    model, exact = WORLDS[world], optimal_values(WORLDS[world], gamma)
    for tolerance in (0.1, 1e-10):
        config = mdp.Config(
            algorithm=algorithm, backend=backend, discount=gamma, tolerance=tolerance
        )
        solution = mdp.solve(model, config)
        assert np.abs(solution.values - exact).max() <= tolerance + 1e-12 * np.abs(exact).max()
    # the policy is as good as the values say, and v solves Bellman's optimality equation
    np.testing.assert_allclose(policy_values(model, solution.policy, gamma), exact, atol=1e-7)
    q = action_values(model, solution.values, gamma)
    np.testing.assert_allclose(q.max(axis=0), solution.values, atol=1e-9)


def test_sweeps_contract_by_gamma():
    rng = np.random.default_rng(0)
    for model in WORLDS.values():
        block = mdp.Block(model.whole, GAMMA)
        for _ in range(20):
            one, other = rng.normal(size=(2, model.num_states)) * 10
            before = np.abs(one - other).max()
            assert np.abs(block.improve(one) - block.improve(other)).max() <= GAMMA * before + 1e-12
            policy = rng.integers(model.num_actions, size=model.num_states)
            after = np.abs(block.evaluate(one, policy) - block.evaluate(other, policy)).max()
            assert after <= GAMMA * before + 1e-12


def test_plain_equals_vectorised_to_rounding():
    rng = np.random.default_rng(1)
    for model in (*WORLDS.values(), GridWorld(rows=random_map(30, 40, pits=0.1)).mdp):
        values = rng.normal(size=model.num_states)
        policy = rng.integers(model.num_actions, size=model.num_states)
        plain, block = mdp.Plain(model.whole, GAMMA), mdp.Block(model.whole, GAMMA)
        np.testing.assert_allclose(plain.improve(values), block.improve(values), atol=1e-12)
        np.testing.assert_allclose(
            plain.evaluate(values, policy), block.evaluate(values, policy), atol=1e-12
        )
        np.testing.assert_allclose(
            plain.action_values(values), block.action_values(values), atol=1e-12
        )


@pytest.mark.parametrize("kind", [mdp.Plain, mdp.Block])
def test_repeated_sweeps_hold_the_other_blocks_still(kind):
    model = WORLDS["rooms"]
    values = np.random.default_rng(2).normal(size=model.num_states)
    block = kind(model.block(10, 30), GAMMA)
    once = values.copy()
    once[10:30] = block.improve(values)
    np.testing.assert_allclose(block.improve(values, 2), block.improve(once), atol=1e-12)
    assert (values == np.random.default_rng(2).normal(size=model.num_states)).all()  # untouched


def test_many_cuts_equal_one_product():
    """More states than one cut of the product holds."""
    model = GridWorld(rows=random_map(100, 100, walls=0.0), slip=0.2).mdp
    values = np.random.default_rng(0).normal(size=model.num_states)
    block = mdp.Block(model.whole, GAMMA)
    assert len(block.cuts) == 2
    np.testing.assert_allclose(
        block.action_values(values), action_values(model, values, GAMMA), atol=1e-12
    )


def test_policy_iteration_improves_strictly_and_seldom():
    """Howard's point: each policy is better than the last, so a few of them are enough."""
    model = WORLDS["rooms"]
    policies: list[np.ndarray] = []

    class Watched(mdp.Block):
        def evaluate(self, values, policy):
            if not policies or (policies[-1] != policy).any():
                policies.append(policy)
            return super().evaluate(values, policy)

    start = np.zeros(model.num_states)
    mdp.policy_iteration(Watched(model.whole, GAMMA), start, tolerance=1e-8)
    assert 2 <= len(policies) <= 25
    worth = [policy_values(model, policy, GAMMA) for policy in policies]
    for before, after in zip(worth[:-1], worth[1:], strict=True):
        assert (after >= before - 1e-9).all() and after.sum() > before.sum()


def test_rounding_ends_what_tolerance_cannot():
    config = mdp.Config(discount=0.999, tolerance=1e-300, env_id="rlbook/Cliff-v0")
    model = GridWorld("cliff", step_reward=-1e6, pit_reward=-1e8).mdp
    for algorithm in mdp.ALGORITHMS:
        solution = mdp.solve(model, mdp.Config(**{**vars(config), "algorithm": algorithm}))
        exact = optimal_values(model, 0.999)
        assert np.abs(solution.values - exact).max() <= 1e-10 * np.abs(exact).max()


def test_max_sweeps_stops():
    for algorithm in mdp.ALGORITHMS:
        config = mdp.Config(algorithm=algorithm, max_sweeps=3)
        assert len(mdp.solve(WORLDS["rooms"], config).residuals) == 3


@pytest.mark.slow
def test_parallel_equals_vectorised():
    """Blocks in processes of their own: the same numbers, for both algorithms, kinds and waits."""
    model, tolerance = WORLDS["rooms"], 1e-10
    start = np.zeros(model.num_states)
    rules = {"tolerance": tolerance}
    alone = mdp.Block(model.whole, GAMMA)
    with RayRuntime(num_cpus=3) as runtime:
        pair = mdp.Parallel(model, GAMMA, runtime, 2)
        for algorithm in (mdp.value_iteration, mdp.policy_iteration):
            together, single = algorithm(pair, start, **rules), algorithm(alone, start, **rules)
            np.testing.assert_allclose(together.values, single.values, rtol=0, atol=1e-12)
            assert (together.policy == single.policy).all()
            assert len(together.residuals) == len(single.residuals)
        plain = mdp.Parallel(model, GAMMA, runtime, 1, 5, worker=mdp.Plain)
        exact = optimal_values(model, GAMMA)
        solution = mdp.value_iteration(plain, start, **rules)
        assert np.abs(solution.values - exact).max() <= tolerance
        # one worker, five sweeps a message: a fifth of the rounds
        needed = len(mdp.value_iteration(alone, start, **rules).residuals)
        assert len(solution.residuals) <= needed // 5 + 2
        eager = mdp.asynchronous_value_iteration(
            mdp.Parallel(model, GAMMA, runtime, 3, 2), start, **rules
        )
        assert np.abs(eager.values - exact).max() <= tolerance
        assert not start.any()  # the caller's array is left alone


@pytest.mark.slow
def test_train_in_parallel(tmp_path):
    folder = str(tmp_path / "run")
    config = mdp.Config(backend="parallel", exchange="async", num_workers=99, run_dir=folder)
    result = mdp.train(config)
    exact = optimal_values(WORLDS["small"], config.discount)
    assert np.abs(result.extra["values"] - exact).max() <= config.tolerance


def test_train_keeps_a_run(tmp_path):
    folder = tmp_path / "run"
    result = mdp.train(mdp.Config(env_id="rlbook/Rooms-v0", run_dir=str(folder)))
    summary = json.loads((folder / "result.json").read_text())
    assert summary["system"] == "mdp" and summary["stopped_because"] == "finished"
    assert summary["env_steps"] == 0 and summary["sweeps"] == len(result.extra["residuals"])
    again = Result.load(folder)
    np.testing.assert_array_equal(again.extra["values"], result.extra["values"])
    evaluated = again.evaluate(episodes=50)
    # undiscounted returns of a good policy: no pits here, so at worst some detours
    assert evaluated.mean > 0
    resumed = mdp.train(mdp.Config(env_id="rlbook/Rooms-v0", resume=str(folder)))
    assert resumed.learner_steps == result.learner_steps
    np.testing.assert_array_equal(resumed.extra["values"], result.extra["values"])


def test_evaluated_return_is_what_the_plan_promises():
    """Monte Carlo of the plan against its values, with γ near 1 so that both mean the same."""
    result = mdp.train(mdp.Config(discount=0.999999))
    model = mdp_of(GridWorld("small", slip=0.2))
    promised = float(model.start @ result.extra["values"])
    evaluated = result.evaluate(episodes=400)
    assert abs(evaluated.mean - promised) <= 5 * evaluated.standard_error


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"discount": 1.0}, "discount"),
        ({"discount": -0.1}, "discount"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"algorithm": "magic"}, "algorithm"),
        ({"backend": "gpu"}, "backend"),
        ({"exchange": "sometimes"}, "exchange"),
        ({"exchange": "async"}, "backend"),
        (
            {"exchange": "async", "backend": "parallel", "algorithm": "policy_iteration"},
            "algorithm",
        ),
        ({"num_workers": 0}, "num_workers"),
        ({"sweeps_per_message": 0}, "sweeps_per_message"),
        ({"max_sweeps": 0}, "max_sweeps"),
    ],
)
def test_bad_values_are_refused(arguments, field):
    with pytest.raises(ValueError, match=f"^{field}"):
        mdp.Config(**arguments)


def test_environments_without_a_model_are_refused():
    for env_id in ("CartPole-v1", "NoSuchEnv-v0"):
        with pytest.raises(ValueError, match="env_id"):
            mdp.train(mdp.Config(env_id=env_id))


def test_planted_mistakes_are_seen():
    """The comparison that the other tests rely on tells a wrong backup from a right one."""
    model = WORLDS["rooms"]
    values = np.random.default_rng(0).normal(size=model.num_states)
    right = mdp.Plain(model.whole, GAMMA).improve(values)
    block = mdp.Block(model.whole, GAMMA)
    np.testing.assert_allclose(block.improve(values), right, atol=1e-12)
    undiscounted = mdp.Block(model.whole, 1.0)
    turned = mdp.Block(model.whole, GAMMA)
    turned.weights = turned.weights[:, ::-1]  # up means down
    unpaid = mdp.Block(model.whole, GAMMA)
    unpaid.model = dataclasses.replace(
        model.whole, expected_rewards=0 * model.whole.expected_rewards
    )
    for wrong in (undiscounted, turned, unpaid):
        assert np.abs(wrong.improve(values) - right).max() > 1e-3
