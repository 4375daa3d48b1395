"""DQN: targets, replay, switches, resuming, learning."""

import numpy as np
import pytest
import torch

from rlbook import dqn
from rlbook.data import Transition
from rlbook.harness.log import METRICS
from rlbook.parts.envs import make_envs
from rlbook.parts.networks import QNetwork
from rlbook.parts.q_learning import td_errors
from rlbook.parts.replay import PrioritizedReplay, UniformReplay
from tests.runs import assert_same_run, ctrl_c_at, same_parameters

QUICK = {
    "progress": False,
    "num_envs": 4,
    "learning_starts": 64,
    "batch_size": 16,
    "hidden_sizes": (16,),
    "log_every_env_steps": 150,
    "epsilon_steps": 300,
    "target_period": 7,
    "replay_capacity": 400,
}

# -- targets and switches ----------------------------------------------------------------------


class Table(torch.nn.Module):
    """Q-values by observation number."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor(rows))

    def forward(self, observation):
        return self.rows[observation[:, 0].long()]


def batch_of(r_t: float, discount_t: float) -> Transition:
    return Transition(
        torch.tensor([[0.0]]),
        torch.tensor([1]),
        torch.tensor([r_t]),
        torch.tensor([discount_t]),
        torch.tensor([[1.0]]),
    )


def test_double_lets_the_online_network_choose_and_the_target_network_judge():
    online = Table([[5.0, 7.0], [3.0, 2.0]])  # at x' it prefers action 0
    target = Table([[0.0, 0.0], [10.0, 20.0]])
    single = td_errors(online, target, batch_of(1.0, 0.5), double=False)
    double = td_errors(online, target, batch_of(1.0, 0.5), double=True)
    assert single.item() == 1.0 + 0.5 * max(10.0, 20.0) - 7.0
    assert double.item() == 1.0 + 0.5 * 10.0 - 7.0
    double.sum().backward()
    assert target.rows.grad is None and online.rows.grad.tolist() == [[0, -1], [0, 0]]


def test_after_a_termination_nothing_is_bootstrapped():
    online = target = Table([[5.0, 7.0], [30.0, 20.0]])
    assert td_errors(online, target, batch_of(1.0, 0.0), double=True).item() == 1.0 - 7.0


def learner_with(config: dqn.Config) -> tuple[dqn.Learner, UniformReplay | PrioritizedReplay]:
    torch.manual_seed(0)
    online, target = QNetwork((3,), 2, (8,)), QNetwork((3,), 2, (8,))
    replay = dqn.make_replay(config, make_envs(config.env_id, 1, 0))
    rng = np.random.default_rng(0)
    n = 200
    replay.add(
        Transition(
            rng.normal(size=(n, 3)).astype(np.float32),
            rng.integers(2, size=n),
            rng.normal(size=n).astype(np.float32),
            np.full(n, 0.9, np.float32),
            rng.normal(size=(n, 3)).astype(np.float32),
        )
    )
    return dqn.Learner(online, target, config), replay


def test_the_target_network_stands_still_between_copies():
    learner, replay = learner_with(dqn.Config(target_period=5, batch_size=32))
    frozen = [p.clone() for p in learner.target.parameters()]
    for update in range(1, 12):
        dqn.learn(learner, replay, learner.config, env_steps=0)
        target = list(learner.target.parameters())
        online = list(learner.online.parameters())
        assert not all(map(torch.equal, frozen, online))
        if update % 5 == 0:
            assert all(map(torch.equal, target, online))
            frozen = [p.clone() for p in target]
        else:
            assert all(map(torch.equal, target, frozen))


def test_prioritised_replay_returns_to_large_errors():
    def share(prioritized: bool) -> float:
        config = dqn.Config(prioritized=prioritized, batch_size=32, learning_rate=0.0)
        learner, replay = learner_with(config)
        items = replay.sample(1).items
        surprise = replay.add(items._replace(r_t=np.array([50.0], np.float32)))[0]
        for _ in range(40):  # every item's own error comes in
            dqn.learn(learner, replay, config, env_steps=0)
        return np.mean([np.mean(replay.sample(100).keys == surprise) for _ in range(100)])

    assert share(False) < 2 / 201
    assert share(True) > 6 / 201


def test_importance_weights_scale_the_loss():
    config = dqn.Config(batch_size=4, double=False)
    learner, replay = learner_with(config)
    sample = replay.sample(4)
    with torch.no_grad():
        items = Transition(*(torch.from_numpy(column) for column in sample.items))
        errors = td_errors(learner.online, learner.target, items, double=False).tolist()
    weights = [1.0, 0.5, 0.25, 0.0]
    huber = [0.5 * e * e if abs(e) <= 1 else abs(e) - 0.5 for e in errors]
    absolute, metrics = learner.update(sample._replace(weights=np.array(weights, np.float32)))
    expected = sum(w * h for w, h in zip(weights, huber, strict=True)) / 4
    assert np.isclose(metrics["loss"], expected, rtol=1e-5)
    assert np.allclose(absolute, np.abs(errors), rtol=1e-5)


def test_epsilon_is_the_share_of_random_actions():
    envs = make_envs("rlbook/Catch-v0", 2_000, 0)
    actor = dqn.make_actor(envs, QNetwork((1, 10, 5), 3, (8,)), dqn.Config(n_step=1))
    greedy = actor.values().argmax(-1)
    transitions, taken = actor.step(0.0)
    assert np.array_equal(transitions.a_tm1, greedy) and taken == 2_000
    greedy = actor.values().argmax(-1)
    explored = np.mean(actor.step(0.6)[0].a_tm1 != greedy)
    assert abs(explored - 0.6 * 2 / 3) < 0.05  # a random action is the greedy one in 1 of 3


def test_rows_say_what_the_table_of_metrics_says():
    config = dqn.Config(**QUICK, total_env_steps=900, update_period=2)
    curves = dqn.train(config).curves
    assert set(curves) <= set(METRICS)
    assert {"q_mean", "replay_size", "replay_ratio", "td_error_mean", "epsilon"} <= set(curves)
    assert curves["replay_size"].max() == config.replay_capacity
    updates = curves["learner_steps"][-1]
    turns = 900 / config.num_envs
    assert abs(updates - (turns - 64 / config.num_envs) / 2) < 20
    assert 0 < curves["replay_ratio"][-1] <= config.batch_size * updates / 900 * 1.05
    assert curves["epsilon"][0] > 0.5 > curves["epsilon"][-1] == pytest.approx(0.01)


def test_a_replay_that_cannot_fit_into_memory_is_refused(tmp_path):
    folder = tmp_path / "run"
    config = dqn.Config(replay_capacity=10**12, run_dir=str(folder), progress=False)
    with pytest.raises(ValueError, match="^replay_capacity: 1,000,000,000,000 transitions"):
        dqn.train(config)
    assert not folder.exists()


# -- runs ------------------------------------------------------------------------------------------


def test_the_same_seed_is_the_same_run_and_another_is_not():
    def run(seed: int):
        return dqn.train(dqn.Config(**QUICK, total_env_steps=600, seed=seed))

    first, again, other = run(3), run(3), run(4)
    assert_same_run(first, again)
    assert not same_parameters(first, other)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "rlbook/Catch-v0", "Acrobot-v1"])
def test_stopped_and_resumed_is_as_never_stopped(env_id, tmp_path):
    chosen = {**QUICK, "env_id": env_id, "update_period": 3, "dueling": True}
    whole = dqn.train(dqn.Config(**chosen, total_env_steps=1_000))
    folder = str(tmp_path / "run")
    half = dqn.train(dqn.Config(**chosen, total_env_steps=500, run_dir=folder))
    assert not same_parameters(half, whole)
    resumed = dqn.train(dqn.Config(**chosen, total_env_steps=1_000, resume=folder))
    assert_same_run(whole, resumed)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("at", [30, 611])
def test_interrupted_and_resumed_is_as_never_interrupted(prioritized, at, tmp_path):
    chosen = {**QUICK, "total_env_steps": 1_000, "prioritized": prioritized}
    whole, folder = dqn.train(dqn.Config(**chosen)), str(tmp_path / "run")
    with ctrl_c_at(at):
        half = dqn.train(dqn.Config(**chosen, run_dir=folder))
    assert half.stopped_because == "interrupted" and half.env_steps < at + 4
    assert_same_run(whole, dqn.train(dqn.Config(**chosen, resume=folder)))


def test_a_window_does_not_reach_from_an_emulator_into_the_next_one():
    """An emulator begins anew: steps before and after do not belong to one transition."""
    config = dqn.Config(n_step=3, env_id="ALE/Pong-v5", num_envs=1)
    envs = make_envs(config.env_id, 1, 0)
    actor = dqn.make_actor(envs, dqn.make_network(config, envs), config)
    actor.step(1.0)
    actor.step(1.0)
    states = envs.state_dict(), actor.state_dict()
    envs.load_state_dict(states[0])
    actor.load_state_dict(states[1])
    assert actor.step(1.0)[0] is None and len(actor.window.steps) == 1


@pytest.mark.parametrize(
    "switches", [{}, {"prioritized": True, "dueling": True}, {"double": False, "n_step": 1}]
)
def test_it_learns_catch(switches):
    config = dqn.Config(
        env_id="rlbook/Catch-v0",
        total_env_steps=30_000,
        stop_at_return=0.9,
        epsilon_steps=3_000,
        learning_starts=500,
        progress=False,
        **switches,
    )
    result = dqn.train(config)
    assert result.stopped_because == "solved"
    assert result.evaluate(200, seed=5).mean >= 0.8
