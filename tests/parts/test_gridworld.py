"""GridWorld and the tabular MDP behind it: the map, the model, the samples, what is refused."""

import dataclasses
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from rlbook.parts.gridworld import (
    ENV_ID,
    MAPS,
    GridMap,
    GridWorld,
    draw_map,
    gridworld_mdp,
    random_map,
    register,
    register_map,
)
from rlbook.parts.tabular import (
    TablePolicy,
    TabularMDP,
    action_values,
    as_probabilities,
    epsilon_greedy,
    greedy,
    make_tabular_env,
    mdp_of,
    optimal_values,
    policy_values,
)


def two_states() -> TabularMDP:
    """State 0: stay for 1 or leave for 3; state 1 is terminal."""
    transitions = np.zeros((2, 2, 2))
    transitions[0, 0, 0] = transitions[0, 1, 1] = 1.0
    transitions[1, :, 1] = 1.0
    rewards = np.array([[1.0, 3.0], [0.0, 0.0]])
    return TabularMDP.from_dense(transitions, rewards, np.array([False, True]))


def random_mdp(seed: int, states: int = 7, actions: int = 3) -> TabularMDP:
    """Dense random dynamics, the last state terminal, rewards that depend on (s, a, s')."""
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.ones(states), size=(states, actions))
    rewards = rng.normal(size=(states, actions, states))
    terminal = np.arange(states) == states - 1
    transitions[-1], rewards[-1] = np.eye(states)[-1], 0.0
    return TabularMDP.from_dense(transitions, rewards, terminal)


def test_neighbours_bounce_off_walls_and_edges():
    grid = GridMap(["S.", "#G"])
    # states: 0 = S, 1 = top right, 2 = G; moves: up, right, down, left
    assert grid.neighbours().tolist() == [[0, 1, 1], [1, 1, 2], [0, 2, 2], [0, 0, 2]]


def test_slip_goes_sideways_half_each():
    grid = GridMap(["...", ".S.", "..G"])
    mdp = gridworld_mdp(grid, slip=0.2)
    centre = grid.numbers[1, 1]
    up = mdp.dense()[centre, 0]
    expected = {(0, 1): 1 - 0.2, (1, 0): 0.2 / 2, (1, 2): 0.2 / 2}
    for (row, column), probability in expected.items():
        assert up[grid.numbers[row, column]] == pytest.approx(probability, abs=1e-15)
    assert up.sum() == pytest.approx(1.0, abs=1e-15)


def test_rewards_belong_to_the_cell_landed_on():
    grid = GridMap(["SGP"])
    mdp = gridworld_mdp(GridMap(["GSP"]), step_reward=-0.5, goal_reward=2.0, pit_reward=-3.0)
    assert mdp.expected_rewards[:, 1].tolist() == [-0.5, -3.0, -0.5, 2.0]
    assert not mdp.expected_rewards[:, [0, 2]].any()
    assert grid.letters.tolist() == ["S", "G", "P"]


@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_samples_follow_the_model(slip):
    env = GridWorld("small", slip=slip)
    env.reset(seed=0)
    transitions, draws = env.mdp.dense(), 4_000
    for state in (0, 5, 7):
        for action in range(4):
            counts: Counter[int] = Counter()
            for _ in range(draws):
                env.reset(options={"state": state})
                successor, reward, terminated, truncated, _ = env.step(action)
                counts[successor] += 1
                assert terminated == env.mdp.terminal[successor] and not truncated
                assert (
                    reward
                    == env.mdp.rewards[
                        0, np.argmax(env.mdp.successors[:, state] == successor), state
                    ]
                )
            for successor, probability in enumerate(transitions[state, action]):
                spread = 5 * np.sqrt(probability * (1 - probability) / draws)
                assert abs(counts[successor] / draws - probability) <= spread


def test_gymnasium_knows_the_grids():
    register()
    register()
    for env_id in (ENV_ID, "rlbook/Cliff-v0", "rlbook/Rooms-v0", "rlbook/Corridor-v0"):
        env = gym.make(env_id)
        check_env(env.unwrapped, skip_render_check=True)
    own = register_map("rlbook/TestOnly-v0", rows=["SG"], max_episode_steps=3)
    env = gym.make(own)
    env.reset(seed=0)
    assert [env.step(0)[3] for _ in range(3)] == [False, False, True]  # truncated, not terminated


def test_same_seed_same_episode():
    def episode(seed: int) -> list[int]:
        env = GridWorld("rooms", slip=0.5)
        env.reset(seed=seed)
        return [env.step(t % 4)[0] for t in range(50)]

    assert episode(3) == episode(3)
    assert episode(3) != episode(4)


def test_picture_shows_map_and_player():
    env = GridWorld("small", render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    assert before.shape == (3 * 32, 4 * 32, 3) and before.dtype == np.uint8
    env.step(0)
    assert (env.render() != before).any()
    assert (draw_map(env.grid) != before).any(axis=-1).sum() > 100


def test_random_map_is_seeded():
    assert random_map(9, 11, seed=1) == random_map(9, 11, seed=1)
    assert random_map(9, 11, seed=1) != random_map(9, 11, seed=2)
    rows = random_map(40, 50, walls=0.3, pits=0.1, seed=0)
    assert rows[0][0] == "S" and rows[-1][-1] == "G"
    cells = "".join(rows)
    assert abs(cells.count("#") / 2_000 - 0.3) < 0.04 and abs(cells.count("P") / 2_000 - 0.1) < 0.03


def test_big_map_has_forty_thousand_cells():
    assert GridMap(random_map(200, 200, walls=0.0)).cells.size == 40_000


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([], "row"),
        (["S.", "G"], "length"),
        (["S?G"], "unknown"),
        (["S.."], "goal"),
        (["GP"], "start"),
    ],
)
def test_bad_maps_are_refused(rows, word):
    with pytest.raises(ValueError, match=word):
        GridMap(rows)


def test_bad_arguments_are_refused():
    for arguments, word in [
        ({"map_name": "nowhere"}, "map_name"),
        ({"slip": 1.5}, "slip"),
        ({"render_mode": "human"}, "render_mode"),
    ]:
        with pytest.raises(ValueError, match=word):
            GridWorld(**arguments)
    env = GridWorld()
    with pytest.raises(ValueError, match="state"):
        env.reset(options={"state": 99})
    with pytest.raises(ValueError, match="env_id"):
        make_tabular_env("rlbook/NoSuchGrid-v0")
    with pytest.raises(ValueError, match="env_id.*probabilities"):
        mdp_of(gym.make("CartPole-v1"))


def test_dense_round_trip():
    mdp = random_mdp(0)
    again = TabularMDP.from_dense(
        mdp.dense(),
        np.broadcast_to(mdp.rewards, mdp.probabilities.shape).transpose(2, 0, 1),
        mdp.terminal,
    )
    np.testing.assert_allclose(again.dense(), mdp.dense(), atol=1e-15)
    np.testing.assert_allclose(again.expected_rewards, mdp.expected_rewards, atol=1e-14)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("probabilities", lambda p: p * 1.01),
        ("probabilities", lambda p: p - 0.5 * np.sign(p)),
        ("successors", lambda s: s + 5),
        ("terminal", lambda t: ~t),
        ("terminal", lambda t: t[:-1]),
        ("start", lambda p: p * 2),
        ("rewards", lambda r: r + 1.0),  # the terminal state pays
    ],
)
def test_planted_mistakes_are_refused(field, change):
    mdp = two_states()
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(mdp, **{field: change(getattr(mdp, field))})


def test_policy_values_by_hand():
    gamma = 0.9
    stay = policy_values(two_states(), np.array([0, 0]), gamma)
    leave = policy_values(two_states(), np.array([1, 0]), gamma)
    half = policy_values(two_states(), np.full((2, 2), 0.5), gamma)
    assert stay == pytest.approx([1 / (1 - 0.9), 0])
    assert leave == pytest.approx([3, 0])
    # v = ½ (1 + γ v) + ½ · 3
    assert half == pytest.approx([(0.5 * 1 + 0.5 * 3) / (1 - 0.5 * 0.9), 0])


def test_optimal_values_choose_by_gamma():
    # leaving pays 3 at once, staying 1 / (1 − γ): staying wins from γ = 2/3 on
    assert optimal_values(two_states(), 0.5)[0] == pytest.approx(3)
    assert optimal_values(two_states(), 0.8)[0] == pytest.approx(1 / (1 - 0.8))
    assert greedy(np.array([[1.0], [1.0 + 1e-12], [0.5]])).tolist() == [
        0
    ]  # rounding does not choose


@pytest.mark.parametrize("seed", range(3))
def test_optimal_values_beat_every_policy(seed):
    mdp, gamma = random_mdp(seed, states=4, actions=2), 0.9
    policies = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    best = np.max([policy_values(mdp, policy, gamma) for policy in policies], axis=0)
    np.testing.assert_allclose(optimal_values(mdp, gamma), best, atol=1e-12)


def test_exact_solve_says_what_it_cannot_do():
    endless = gridworld_mdp(GridMap(["S.G"]))
    with pytest.raises(ValueError, match="gamma = 1"):
        policy_values(endless, np.zeros(3, dtype=int), 1.0)
    with pytest.raises(ValueError, match="exact solve"):
        policy_values(GridWorld("big").mdp, np.zeros(32_006, dtype=int), 0.9)


def test_soften_is_epsilon_greedy_play():
    mdp, epsilon, gamma = GridWorld("small", slip=0.1).mdp, 0.3, 0.95
    policy = np.random.default_rng(0).integers(4, size=mdp.num_states)
    played = policy_values(mdp, epsilon_greedy(policy, 4, epsilon), gamma)
    softened = policy_values(mdp.soften(epsilon), policy, gamma)
    np.testing.assert_allclose(played, softened, atol=1e-12)
    with pytest.raises(ValueError, match="action"):
        random_mdp(0).soften(0.1)


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "CliffWalking-v1"])
def test_gymnasium_tables_become_mdps(env_id):
    env = make_tabular_env(env_id)
    mdp = mdp_of(env)
    env.reset(seed=0)
    v = optimal_values(mdp, 0.99)
    q = action_values(mdp, v, 0.99)
    np.testing.assert_allclose(q.max(axis=0), v, atol=1e-9)
    if env_id == "CliffWalking-v1":
        start = int(np.argmax(mdp.start))
        # thirteen steps of −1 along the cliff
        assert v[start] == pytest.approx(-sum(0.99**k for k in range(13)))


def test_a_block_is_rows_of_the_whole():
    for mdp in (random_mdp(1), GridWorld("rooms", slip=0.2).mdp):
        values = np.random.default_rng(0).normal(size=mdp.num_states)
        whole = action_values(mdp, values, 0.9)
        block = mdp.block(2, 5)
        np.testing.assert_allclose(action_values(block, values, 0.9), whole[:, 2:5], atol=1e-14)
        assert (block.first, block.stop) == (2, 5)


def test_table_policy_reads_numbers_and_one_hot_rows():
    table = np.array([[0.0, 1.0], [2.0, 0.0]])
    policy = TablePolicy(lambda: table)
    rng = np.random.default_rng(0)
    for observation in (np.array([0, 1, 1]), np.eye(2)[[0, 1, 1]]):
        actions, state = policy.act(observation, None, np.ones(3, bool), rng)
        assert actions.tolist() == [1, 0, 0] and state is None
    table[0, 0] = 5.0
    assert policy.act(np.array([0]), None, np.ones(1, bool), rng)[0].tolist() == [0]


def test_policies_as_probabilities():
    assert as_probabilities(np.array([1, 0]), 2).tolist() == [[0, 1], [1, 0]]
    assert epsilon_greedy(np.array([1]), 4, 0.2)[0] == pytest.approx([0.05, 0.85, 0.05, 0.05])
    assert set(MAPS) == {"corridor", "small", "cliff", "rooms"}
