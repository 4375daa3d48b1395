"""R2D2: its loss by loops, what it reduces to, what memory is worth, who dies, who remembers."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlbook import apex as ax
from rlbook import r2d2
from rlbook.data import Transition
from rlbook.harness.checkpoint import load_checkpoint
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.maths.exploration import epsilon_ladder
from rlbook.parts.flat import Flat
from rlbook.parts.q_learning import td_errors
from rlbook.parts.recurrent_q import RecurrentGreedyPolicy
from rlbook.parts.replay import Sample
from rlbook.parts.sequences import Sequence, as_tensors, read_again
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.faults import sigkill
from rlbook.plumbing.memory_shard import Part
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime
from rlbook.plumbing.virtual import VirtualRuntime
from tests.counters import register, stacked_envs
from tests.runs import assert_same_run, same_parameters

QUICK = r2d2.Config(
    progress=False,
    num_envs=4,
    lstm_size=8,
    hidden_sizes=(8,),
    batch_size=8,
    updates_per_call=2,
    samples_per_insert=4.0,
    learning_starts=20,
    target_period=10,
    total_env_steps=3_000,
    log_every_env_steps=500,
)
SYNC = replace(QUICK, update_rule="sync")
COUNTED = replace(
    QUICK,
    env_id="test/Counter-v0",
    num_envs=3,
    sequence_length=6,
    sequence_overlap=2,
    burn_in_length=3,
    n_step=3,
)
"""Both ends of episodes come within a sequence, again and again."""


def virtual(seed=1, cores=8, hollow=False, **cluster) -> VirtualRuntime:
    nodes = (Node(cores=cores),)
    return VirtualRuntime(seed, Cluster(nodes=nodes, costs=r2d2.COSTS, **cluster), hollow=hollow)


def train(config: r2d2.Config, seed: int = 1, **cluster) -> Result:
    with virtual(seed, **cluster) as runtime:
        return r2d2.train(config, runtime)


def sequences_of(config: r2d2.Config, turns: int = 6) -> tuple[Sequence, np.ndarray, r2d2.Learner]:
    """What actor 0 makes with the parameters of a learner, and the priorities that it gives."""
    register()
    actor, learner = r2d2.Actor(config, 0), r2d2.Learner(config)
    made = [actor.play(learner.newest())[1] for _ in range(turns)]
    items = Sequence(*map(np.concatenate, zip(*(one.items for one in made if one), strict=True)))
    return items, np.concatenate([one.priorities for one in made if one]), learner


def in_float64(items: Sequence) -> Sequence:
    """Observations scaled, so that nothing saturates."""
    changed = {"observation": items.observation.astype(float) / 50}
    for name in ("reward", "discount", "hidden", "cell"):
        changed[name] = getattr(items, name).astype(float)
    return items._replace(**changed)


def as_sample(items: Sequence, weights: np.ndarray | None = None) -> Sample:
    count = len(items.valid)
    even = np.full(count, 1 / count)
    return Sample(items, np.arange(count), even, np.ones(count) if weights is None else weights)


def two_networks(learner: r2d2.Learner) -> tuple[torch.nn.Module, torch.nn.Module]:
    """In float64, the target's parameters not the online ones."""
    online, target = learner.online.double(), learner.target.double()
    generator = torch.Generator().manual_seed(3)
    for parameter in target.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.3 * noise
    return online, target


# -- the loss --------------------------------------------------------------------------------------


def squeeze(x: float, epsilon: float | None) -> float:
    if epsilon is None:
        return x
    return math.copysign(math.sqrt(abs(x) + 1) - 1, x) + epsilon * x


def unsqueeze(x: float, epsilon: float | None) -> float:
    if epsilon is None:
        return x
    root = math.sqrt(1 + 4 * epsilon * (abs(x) + 1 + epsilon))
    return math.copysign(((root - 1) / (2 * epsilon)) ** 2 - 1, x)


def loss_by_loops(q, q_target, items, weights, config):
    """Sums over steps written out, O(m n); also the priorities."""
    total, rows, priorities = 0.0, 0, []
    cut, last = config.burn_in_length, items.valid.shape[1]
    for i in range(len(items.valid)):
        errors = []
        for t in range(cut, cut + config.sequence_length):
            if not items.valid[i, t]:
                continue
            value, factor, at = 0.0, 1.0, t
            while at < min(t + config.n_step, last) and items.valid[i, at]:
                value += factor * items.reward[i, at]
                factor *= config.discount * items.discount[i, at]
                at += 1
            chooser = q if config.double else q_target
            best = chooser[at - cut, i].argmax()
            value += factor * unsqueeze(
                q_target[at - cut, i, best].item(), config.rescaling_epsilon
            )
            target = squeeze(value, config.rescaling_epsilon)
            errors.append(target - q[t - cut, i, items.action[i, t]].item())
            size = abs(errors[-1])
            total += weights[i] * (0.5 * size**2 if size <= 1 else size - 0.5)
        rows += len(errors)
        sizes = [abs(error) for error in errors]
        mix = config.priority_mix
        priorities.append(mix * max(sizes) + (1 - mix) * sum(sizes) / len(sizes) + 1e-6)
    return total / rows, priorities


@pytest.mark.parametrize("epsilon", [None, 1e-3, 0.1])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("n_step", [1, 3, 9])
def test_the_loss_is_the_papers_by_loops(epsilon, double, n_step):
    config = replace(COUNTED, rescaling_epsilon=epsilon, double=double, n_step=n_step)
    items, _, learner = sequences_of(config)
    items, (online, target) = in_float64(items), two_networks(learner)
    learnt = items.valid[:, 3 : 3 + 6]
    terminated = (items.discount == 0) & items.valid
    assert terminated.any() and not learnt.all() and not items.valid[:, 0].all()
    weights = np.random.default_rng(0).uniform(0.1, 1, len(items.valid))
    loss, priorities, metrics = r2d2.loss_function(
        online, target, as_sample(items, weights), config
    )
    batch = as_tensors(items)
    with torch.no_grad():
        q, q_target = (read_again(net, batch, burn_in=3, stored=True) for net in (online, target))
    wanted, expected = loss_by_loops(q, q_target, items, weights, config)
    assert math.isclose(loss.item(), wanted, rel_tol=1e-9) and loss.item() == metrics["loss"]
    assert np.allclose(priorities, expected, rtol=1e-9)


def test_at_a_time_limit_the_final_observation_is_bootstrapped_from():
    """Episodes of the counter are truncated in turn; the last step's target has γ Q(x_end)."""
    config = replace(COUNTED, n_step=1, rescaling_epsilon=None, sequence_length=30, double=False)
    items, _, learner = sequences_of(config, turns=10)
    items, (online, target) = in_float64(items), two_networks(learner)
    batch = as_tensors(items)
    with torch.no_grad():
        q, q_target = (read_again(net, batch, burn_in=3, stored=True) for net in (online, target))
    errors = r2d2.td_errors(q, q_target, batch, config)
    ends = 0
    for i in range(len(items.valid)):
        steps = np.flatnonzero(items.valid[i, 3:33])
        t = steps[-1]
        if t + 1 == 30 or items.valid[i, 3 + t + 1]:
            continue
        ended = items.discount[i, 3 + t] == 0
        value = 0.0 if ended else config.discount * q_target[t + 1, i].max().item()
        wanted = items.reward[i, 3 + t] + value - q[t, i, items.action[i, 3 + t]].item()
        assert math.isclose(errors[t, i].item(), wanted, rel_tol=1e-9)
        assert not errors[t + 1 :, i].any()
        ends += not ended
    assert ends > 2


def test_padding_does_not_matter():
    items, _, learner = sequences_of(COUNTED)
    items, networks = in_float64(items), two_networks(learner)
    loss, priorities, _ = r2d2.loss_function(*networks, as_sample(items), COUNTED)
    assert not items.valid.all()
    spoilt = items._replace(
        action=np.where(items.valid, items.action, 1),
        reward=np.where(items.valid, items.reward, 77.0),
        discount=np.where(items.valid, items.discount, 0.5),
    )
    seen = np.concatenate([items.valid, np.zeros_like(items.valid[:, :1])], axis=1)
    seen[:, 1:] |= items.valid  # a final observation is no step, but it is seen
    spoilt.observation[~seen] = 5.0
    again, found, _ = r2d2.loss_function(*networks, as_sample(spoilt), COUNTED)
    assert torch.equal(loss, again) and np.array_equal(priorities, found)
    spoilt.reward[0, 3 + np.flatnonzero(items.valid[0, 3:])[0]] += 1.0
    assert not torch.equal(loss, r2d2.loss_function(*networks, as_sample(spoilt), COUNTED)[0])


# -- state: stored, zero, burn-in ------------------------------------------------------------------

MEMORY = replace(QUICK, env_id="rlbook/MaskedCartPole-v0", sequence_length=6, sequence_overlap=3)


@pytest.mark.parametrize("burn_in", [0, 4])
def test_with_the_parameters_that_acted_the_stored_state_gives_the_actors_values(burn_in):
    config = replace(MEMORY, burn_in_length=burn_in)
    register()
    actor, learner = r2d2.Actor(config, 0), r2d2.Learner(config)
    weights, found = learner.newest(), []
    np.copyto(actor.flat.vector.numpy(), weights.values)
    for _ in range(5):
        found.append(actor.player.cutter.push(actor.player.rows(20)))
    for items, q in (one for one in found if one is not None):
        batch = as_tensors(items)
        seen = torch.from_numpy(np.abs(items.observation).sum(-1) > 0).T[burn_in:]
        with torch.no_grad():
            stored = read_again(learner.online, batch, burn_in=burn_in, stored=True)
            zero = read_again(learner.online, batch, burn_in=burn_in, stored=False)
        assert torch.allclose(stored[seen], torch.from_numpy(q)[seen], atol=1e-5)
    gap = (zero - torch.from_numpy(q)).abs().amax(-1)
    begins = ~items.hidden.any(-1)
    assert begins.any() and not begins.all(), "both from within an episode and from its beginning"
    assert gap[0, begins].max() < 1e-5 < 1e-4 < gap[0, ~begins].min()


def test_the_burn_in_warms_up_both_networks_and_has_no_gradient():
    config = replace(MEMORY, burn_in_length=4)
    items, _, learner = sequences_of(config)
    whole = items._replace(**{k: v[items.valid.all(1)] for k, v in items._asdict().items()})
    batch = as_tensors(whole)
    observation = batch.observation.clone().requires_grad_()
    q = read_again(learner.online, batch._replace(observation=observation), burn_in=4, stored=True)
    q.sum().backward()
    assert not observation.grad[:4].any() and observation.grad[4:].abs().amax(-1).min() > 0
    changed = batch.observation.clone()
    changed[:4] += 1.0
    with torch.no_grad():
        for net in (learner.online, learner.target):
            before = read_again(net, batch, burn_in=4, stored=True)
            after = read_again(net, batch._replace(observation=changed), burn_in=4, stored=True)
            assert not torch.allclose(before, after, atol=1e-4)
        losses = set()
        for state in ("stored", "zero"):
            for burn_in in (0, 4):
                rows = slice(4 - burn_in, None)
                cut = whole._replace(
                    observation=whole.observation[:, rows],
                    **{k: getattr(whole, k)[:, rows] for k in ("action", "reward", "discount")},
                    valid=whole.valid[:, rows],
                )
                variant = replace(config, state_init=state, burn_in_length=burn_in)
                nets = learner.online, learner.target
                losses.add(r2d2.loss_function(*nets, as_sample(cut), variant)[1].sum())
    assert len(losses) == 4, "four ways to begin, four results"


@pytest.mark.parametrize("burn_in", [0, 4])
@pytest.mark.parametrize("state_init", ["stored", "zero"])
def test_both_networks_begin_with_the_state_that_the_settings_say(state_init, burn_in):
    config = replace(MEMORY, burn_in_length=burn_in, state_init=state_init)
    items, _, learner = sequences_of(config)
    items, networks = in_float64(items), two_networks(learner)
    assert items.hidden.any() and items.cell.any(), "from within episodes"
    found = r2d2.loss_function(*networks, as_sample(items), config)[0].item()
    losses = {}
    for mine in (True, False):  # whether the online network begins with the stored state
        for its in (True, False):  # and the target network
            with torch.no_grad():
                q, q_target = (
                    read_again(net, as_tensors(items), burn_in=burn_in, stored=stored)
                    for net, stored in zip(networks, (mine, its), strict=True)
                )
            losses[mine, its], _ = loss_by_loops(
                q, q_target, items, np.ones(len(items.valid)), config
            )
    stored = state_init == "stored"
    for pair, loss in losses.items():
        assert math.isclose(found, loss, rel_tol=1e-9) == (pair == (stored, stored)), pair


@pytest.mark.parametrize("epsilon", [None, 1e-3])
def test_priorities_of_the_actors_are_those_of_the_learner(epsilon):
    """The target network is the online one at first: then both find the same errors."""
    items, mine, learner = sequences_of(replace(MEMORY, rescaling_epsilon=epsilon))
    learner.config = replace(learner.config, rescaling_epsilon=epsilon)
    sample = as_sample(items)._replace(weights=np.ones(len(mine), np.float32))
    theirs, _ = learner.update(Part(sample, 100))
    assert np.allclose(mine, theirs, rtol=1e-3, atol=1e-5) and mine.std() > 0.01 * mine.mean()


# -- reductions ------------------------------------------------------------------------------------

PLAIN = {
    "env_id": "CartPole-v1",
    "num_envs": 6,
    "n_step": 3,
    "hidden_sizes": (16,),
    "max_gradient_norm": 10.0,
    "priority_exponent": 0.6,
    "importance_exponent": 0.4,
    "optimizer_epsilon": 1e-8,
    "learning_rate": 1e-3,
    "batch_size": 32,
    "updates_per_call": 1,
    "learning_starts": 32,
    "target_period": 5,
    "unroll_length": 25,
    "progress": False,
}
WITHOUT = {"lstm_size": 0, "burn_in_length": 0, "rescaling_epsilon": None}


def pair(**changes) -> tuple[r2d2.Config, ax.Config]:
    mine = r2d2.Config(
        **{**PLAIN, **WITHOUT, "sequence_length": 1, "sequence_overlap": 0, **changes}
    )
    return mine, ax.Config(**PLAIN, rate_tolerance=100)


def transitions(items: Sequence, n_step: int, discount: float) -> list[np.ndarray]:
    """Sequences of one step as n-step transitions: the columns, in the order of the sequences."""
    reward, factor = items.reward[:, 0].copy(), discount * items.discount[:, 0]
    after = items.observation[:, 1].copy()
    alive = items.valid[:, 0].copy()
    for k in range(1, n_step):
        alive &= items.valid[:, k] if k < items.valid.shape[1] else False
        reward += np.where(alive, factor * items.reward[:, k], 0)
        factor = np.where(alive, factor * discount * items.discount[:, k], factor)
        after[alive] = items.observation[alive, k + 1]
    return [items.observation[:, 0], items.action[:, 0], reward, factor, after]


def in_order(columns: list[np.ndarray]) -> np.ndarray:
    """An order that does not depend on who wrote them down."""
    rows = np.concatenate([c.reshape(len(c), -1) for c in columns[:1] + columns[4:]], axis=1)
    return np.lexsort(rows.T)


def both_make(turns: int = 8):
    """What an actor of each makes with the same parameters: columns, priorities; sequences."""
    mine, theirs = pair()
    actors = r2d2.Actor(mine, 1), ax.Actor(theirs, 1)
    weights = ax.Learner(theirs).newest()
    assert np.array_equal(weights.values, r2d2.Learner(mine).newest().values)
    found = [[actor.play(weights)[1] for _ in range(turns)] for actor in actors]
    made = [
        (
            type(one[0].items)(*map(np.concatenate, zip(*(m.items for m in one), strict=True))),
            np.concatenate([m.priorities for m in one]),
        )
        for one in found
    ]
    return mine, theirs, *made


def test_sequences_of_one_step_are_the_transitions_of_ape_x():
    config, _, (sequences, mine), (expected, theirs) = both_make()
    columns = transitions(sequences, config.n_step, np.float32(config.discount))
    count = len(theirs)
    assert 0 <= count - len(mine) <= 3 * config.num_envs, "those in the making may differ"
    found = {row.tobytes(): i for i, row in enumerate(np.asarray(expected.obs_tm1))}
    where = [found[row.tobytes()] for row in columns[0]]
    assert len(set(where)) == len(where) > 400
    for column, other in zip(columns, expected, strict=True):
        assert np.allclose(column, np.asarray(other)[where], rtol=1e-6)
    assert np.allclose(mine, theirs[where], rtol=1e-4, atol=1e-6)
    assert (columns[3] == 0).any()


def forty_updates_agree(**changes) -> None:
    """AssertionError unless R2D2, with changes, updates as Ape-X does: in float64, on the same
    batches, with weights and a target network.
    """
    config, theirs, (sequences, _), _ = both_make()
    changed = replace(config, **changes)
    mine, ape_x = r2d2.Learner(changed), ax.Learner(theirs)
    state = np.zeros((len(sequences.valid), changed.lstm_size))
    sequences = in_float64(sequences)._replace(hidden=state, cell=state)
    for learner in (mine, ape_x):
        learner.online.double(), learner.target.double()
        learner.flat, learner.flat_target = Flat(learner.online), Flat(learner.target)
        learner.optimizer = torch.optim.Adam([learner.flat.vector], lr=1e-3, eps=1e-8)
    start, rng = mine.flat.vector.clone(), np.random.default_rng(0)
    columns = transitions(sequences, config.n_step, config.discount)
    for _ in range(40):
        rows, chances = rng.integers(len(columns[0]), size=32), rng.uniform(0.001, 0.01, 32)
        items = Sequence(*(column[rows] for column in sequences))
        batch = r2d2_sample(items, rows, chances)
        other = batch._replace(items=Transition(*(column[rows] for column in columns)))
        priorities, metrics = mine.update(Part(batch, 500))
        expected, wanted = ape_x.update(Part(other, 500))
        assert np.allclose(priorities, expected, rtol=1e-6)
        for name in ("loss", "td_error_mean", "gradient_norm"):
            assert math.isclose(metrics[name], wanted[name], rel_tol=1e-6), name
        assert (mine.flat.vector - ape_x.flat.vector).abs().max() < 1e-6
        assert (
            torch.equal(mine.flat_target.vector, ape_x.flat_target.vector)
            or (mine.flat_target.vector - ape_x.flat_target.vector).abs().max() < 1e-6
        )
    assert (start - mine.flat.vector).abs().max() > 1e-2


def test_without_memory_burn_in_and_rescaling_updates_are_those_of_ape_x():
    forty_updates_agree()


@pytest.mark.parametrize(
    "turned_on",
    [{"lstm_size": 8}, {"burn_in_length": 1}, {"rescaling_epsilon": 1e-3}],
    ids=lambda one: next(iter(one)),
)
def test_with_any_of_the_three_they_are_others(turned_on):
    with pytest.raises(AssertionError):
        forty_updates_agree(**turned_on)


def r2d2_sample(items: Sequence, keys: np.ndarray, chances: np.ndarray) -> Sample:
    return Sample(items, keys, chances, np.ones(len(keys), np.float32))


def test_without_memory_the_loss_on_sequences_is_the_mean_over_their_transitions():
    config, _ = pair(sequence_length=7, sequence_overlap=0)
    actor, learner = r2d2.Actor(config, 0), r2d2.Learner(config)
    items = [actor.play(learner.newest())[1].items for _ in range(3)]
    items = in_float64(Sequence(*map(np.concatenate, zip(*items, strict=True))))
    networks = two_networks(learner)
    loss, _, _ = r2d2.loss_function(*networks, as_sample(items), config)
    columns: list[list[np.ndarray]] = []
    for t in range(7):
        rows = items.valid[:, t]
        parts = {k: getattr(items, k)[rows, t:] for k in ("observation", "action", "reward")}
        tail = items._replace(
            **parts, discount=items.discount[rows, t:], valid=items.valid[rows, t:]
        )
        columns.append(transitions(tail, config.n_step, config.discount))
    batch = Transition(*(torch.from_numpy(np.concatenate(c)) for c in zip(*columns, strict=True)))
    errors = td_errors(*networks, batch, double=True)
    wanted = torch.nn.functional.huber_loss(errors, torch.zeros_like(errors))
    assert math.isclose(loss.item(), wanted.item(), rel_tol=1e-9)
    assert not items.valid[:, :7].all(), "ends of episodes are among them"


# -- learning --------------------------------------------------------------------------------------


def test_memory_is_learnt_with_an_lstm_and_not_without():
    config = replace(r2d2.PRESETS["default"], progress=False, stop_at_return=0.9)
    solved = train(replace(config, total_env_steps=40_000))
    assert solved.stopped_because == "solved" and solved.evaluate(200).mean > 0.9
    assert isinstance(solved.policy.policy, RecurrentGreedyPolicy)
    without = train(replace(config, lstm_size=0, total_env_steps=10_000))
    assert abs(without.evaluate(400).mean) < 0.2


def test_copies_of_all_actors_make_the_ladder_and_the_least_exploring_are_the_score():
    config = replace(QUICK, num_actors=3, num_envs=4)
    actors = [r2d2.Actor(config, index) for index in range(3)]
    ladder = np.sort(np.concatenate([actor.player.epsilon for actor in actors]))
    assert np.allclose(ladder, np.sort(epsilon_ladder(12)))
    scored = np.concatenate([actor.player.epsilon[actor.scored] for actor in actors])
    assert np.array_equal(np.sort(scored), ladder[:6])
    for actor in actors:
        weights = r2d2.Learner(config).newest()
        found = [one.env for _ in range(5) for one in actor.play(weights)[0].episodes]
        assert set(found) == set(np.flatnonzero(actor.scored))


def test_an_actor_explores_as_often_as_its_ladder_says():
    config = replace(QUICK, num_actors=1, num_envs=64, epsilon_base=0.5, epsilon_alpha=1.0)
    actor = r2d2.Actor(config, 0)
    rows = actor.player.rows(600)
    other = (rows.action != rows.q.argmax(-1)).mean(0)
    assert np.allclose(other, actor.player.epsilon / 2, atol=0.1)
    assert abs(other.mean() - actor.player.epsilon.mean() / 2) < 0.01


def test_rewards_are_clipped_only_where_values_are_not_rescaled():
    config = replace(QUICK, env_id="ALE/Pong-v5", num_envs=1, num_actors=1)
    assert r2d2.make_game(config, 1, 0).reward_clip == np.inf
    assert r2d2.make_game(replace(config, rescaling_epsilon=None), 1, 0).reward_clip == 1.0


def test_frames_and_memory_go_through_one_network():
    config = replace(QUICK, env_id="ALE/Pong-v5", num_envs=2, unroll_length=14)
    config = replace(config, sequence_length=4, sequence_overlap=2, burn_in_length=2, n_step=2)
    items, _, learner = sequences_of(config, turns=1)
    assert items.observation.dtype == np.uint8 and len(items.valid) >= 4
    before = learner.newest().values
    even = np.full(len(items.valid), 0.1)
    batch = Part(Sample(items, np.arange(len(even)), even, even), len(even))
    _, metrics = learner.update(batch)
    assert np.isfinite(metrics["loss"]) and not np.array_equal(before, learner.newest().values)


# -- the virtual cluster ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", [QUICK, SYNC], ids=["async", "sync"])
def test_the_same_seed_gives_the_same_run_and_another_order_gives_another(base):
    config = replace(base, num_actors=3, num_replays=2)
    one, same, other = train(config), train(config), train(config, seed=2, jitter=0.5)
    assert one.learner_steps > 20
    assert_same_run(one, same)
    assert one.wall_time_s == same.wall_time_s
    assert same_parameters(one, other) == (base is SYNC)  # who waits for all has one order


def test_the_replay_ratio_is_the_one_that_is_asked_for():
    for wanted in (2.0, 8.0):
        config = replace(SYNC, samples_per_insert=wanted, total_env_steps=8_000)
        assert 0.8 * wanted < train(config).metrics["replay_ratio"] <= 1.15 * wanted
    free = train(replace(QUICK, samples_per_insert=None))
    assert free.learner_steps > 0 and free.stopped_because == "total_env_steps"


def test_a_hollow_run_predicts_the_same_clock():
    config = replace(QUICK, total_env_steps=6_000, learning_starts=1)
    found = []
    for hollow in (False, True):
        with virtual(hollow=hollow) as runtime:
            result = r2d2.train(config, runtime)
        found.append((result.env_steps / result.wall_time_s, result.learner_steps))
    (rate, steps), (hollow_rate, hollow_steps) = found
    assert 0.7 < hollow_rate / rate < 1.4 and 0.7 < hollow_steps / steps < 1.4


def test_units_of_work_have_the_names_that_costs_have():
    units = r2d2.units_of_work(QUICK)
    assert units.keys() == r2d2.COSTS.keys()
    for work in units.values():
        work()


# -- faults ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [QUICK, SYNC], ids=["async", "sync"])
@pytest.mark.parametrize("who", ["Actor", "MemoryShard"])
def test_actors_and_shards_may_die_while_others_go_on(base, who):
    config = replace(base, num_actors=3, num_replays=2)
    whole = train(config).wall_time_s
    crashes = (Crash(f"{who} 0", at_s=0.4 * whole), Crash(f"{who} 1", at_s=0.6 * whole))
    result = train(config, crashes=crashes)
    assert result.stopped_because == "total_env_steps" and result.learner_steps > 10
    new = {"Actor": ("Actor 3", "Actor 4"), "MemoryShard": ("MemoryShard 2", "MemoryShard 3")}
    assert set(new[who]) <= {span.who for span in result.spans}


def test_the_death_of_the_learner_ends_the_run_and_says_who():
    with pytest.raises(ActorDiedError, match="Learner 0 died"):
        train(QUICK, crashes=(Crash("Learner 0", at_s=0.05),))


def test_real_actors_and_shards_killed_by_sigkill_are_replaced(capfd):
    config = replace(r2d2.Config(), progress=False, total_env_steps=30_000, num_replays=2)
    with RayRuntime(num_cpus=5) as runtime:
        with sigkill("Actor", after_s=0.3), sigkill("MemoryShard", after_s=0.6):
            result = r2d2.train(config, runtime)
    assert result.stopped_because == "total_env_steps"
    assert {"Actor 2", "MemoryShard 2"} <= {span.who for span in result.spans}
    assert capfd.readouterr() == ("", "")


# -- small and odd settings ------------------------------------------------------------------------


@pytest.mark.parametrize("update_rule", ["async", "sync"])
def test_one_of_everything_is_enough(tmp_path, update_rule):
    """One actor, one copy, one step a turn, sequences of one step; and the end is saved."""
    ones = dict.fromkeys(
        (
            *("num_actors", "num_envs", "unroll_length", "sequence_length", "n_step"),
            *("batch_size", "updates_per_call", "calls_in_flight", "broadcast_period"),
            *("num_replays", "learning_starts", "target_period", "lstm_size", "replay_capacity"),
        ),
        1,
    )
    small = {"sequence_overlap": 0, "burn_in_length": 0, "hidden_sizes": (1,)}
    config = replace(QUICK, **ones, **small, update_rule=update_rule, samples_per_insert=1.0)
    config = replace(config, target_period=7)
    result = train(replace(config, total_env_steps=60, run_dir=str(tmp_path / "run")))
    assert 60 <= result.env_steps <= 62 and result.learner_steps > 40
    saved = Result.load(tmp_path / "run")
    assert saved.env_steps == result.env_steps and same_parameters(result, saved)
    learner = load_checkpoint(tmp_path / "run" / "checkpoint.npz")["parts"]["learner"]
    assert learner["updates"] == result.learner_steps, "what was in flight at the end counts"


def test_a_memory_dealt_to_shards_still_holds_what_learning_starts_with():
    config = replace(QUICK, num_replays=3, replay_capacity=20, learning_starts=20)
    assert train(config).learner_steps > 0


@pytest.mark.parametrize("env_id", ["test/Counter-v0", "CartPole-v1", "ALE/Pong-v5"])
@pytest.mark.parametrize("lstm_size", [0, 8])
def test_the_example_of_an_item_has_the_shapes_and_types_of_what_actors_make(env_id, lstm_size):
    config = replace(COUNTED, env_id=env_id, lstm_size=lstm_size, num_envs=2)
    items, _, _ = sequences_of(config, turns=2)
    for one, many in zip(r2d2.example(config), items, strict=True):
        assert (one.shape, one.dtype) == (many.shape[1:], many.dtype)
    exact = sum(column.nbytes for column in items) / len(items.valid) + 8
    assert r2d2.row_bytes(config) == exact


def test_a_run_says_how_large_its_replay_memory_is_before_it_starts(capsys):
    config = replace(QUICK, progress=True, total_env_steps=300)
    result = train(config)
    assert result.extra["replay_nbytes"] == config.replay_capacity * r2d2.row_bytes(config)
    size = f"{result.extra['replay_nbytes'] / 1e6:.1f} MB"
    assert f"10,000 sequences in replay: {size}" in capsys.readouterr().out


FRAMES = replace(COUNTED, env_id="test/Frames-v0", replay_capacity=60)


@pytest.mark.parametrize("changes", [{}, {"update_rule": "sync"}, {"lstm_size": 0}])
def test_frames_that_are_told_once_change_nothing_but_the_bytes(monkeypatch, changes):
    """Across ends and time limits of episodes, in a memory that is overwritten many times."""
    register()
    config = replace(FRAMES, **changes, total_env_steps=1_500, num_replays=2)
    whole = train(config)
    monkeypatch.setattr(r2d2, "make_envs", stacked_envs)
    packed = train(config)
    assert whole.learner_steps > 20 and whole.metrics["replay_size"] >= 60
    assert same_parameters(packed, whole)
    assert packed.metrics["loss"] == whole.metrics["loss"]
    rows = config.burn_in_length + config.sequence_length + config.n_step
    less = 24 * (4 * rows - (rows + 3))  # bytes of a sequence
    assert whole.extra["replay_nbytes"] - packed.extra["replay_nbytes"] == less * 60
    assert packed.extra["wire_bytes"] < whole.extra["wire_bytes"] - less * packed.learner_steps * 8


def test_the_optimiser_is_what_the_settings_say():
    config = replace(MEMORY, optimizer_epsilon=3e-4, learning_rate=2e-3, max_gradient_norm=1e-3)
    items, _, learner = sequences_of(config)
    known = learner.optimizer.param_groups[0]
    assert (known["lr"], known["eps"]) == (2e-3, 3e-4)
    _, metrics = learner.update(Part(as_sample(items), len(items.valid)))
    assert metrics["gradient_norm"] > 2e-3
    assert math.isclose(learner.flat.gradients.norm().item(), 1e-3, rel_tol=1e-3)
    assert r2d2.make_network(config).value_head is not None
    assert r2d2.make_network(replace(config, dueling=False)).value_head is None


def test_every_actor_draws_for_itself_and_one_that_is_born_later_anew():
    config = replace(QUICK, num_actors=2, epsilon_alpha=0.0, epsilon_base=1.0)
    actors = [r2d2.Actor(config, 0), r2d2.Actor(config, 1), r2d2.Actor(config, 0, born=1)]
    seen = [actor.player.rows(20) for actor in actors]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not np.array_equal(seen[one].action, seen[other].action)
        assert not np.array_equal(seen[one].observation, seen[other].observation)


def test_where_episodes_must_begin_anew_nothing_that_was_uncut_is_kept():
    actor = r2d2.Actor(QUICK, 0)
    actor.player.rows(3)
    actor.player.cutter.push(actor.player.rows(4))
    state = actor.player.state_dict()
    assert state["cutter"]["rows"] is not None
    actor.player.load_state_dict(state)
    assert actor.player.cutter.rows is not None
    state["envs"]["env"] = None  # an environment that cannot be saved
    actor.player.load_state_dict(state)
    assert actor.player.cutter.rows is None and not actor.player.cutter.starts.any()


def test_a_turn_costs_a_virtual_actor_its_steps_its_forward_passes_and_the_cutting():
    result = train(replace(SYNC, num_actors=1, total_env_steps=200), jitter=0.0)
    turns = [end - start for who, what, start, end in result.spans if what == "play"]
    wanted = QUICK.unroll_length * (r2d2.COSTS["env_step"] + r2d2.COSTS["inference"])
    assert turns and np.allclose(turns, wanted + r2d2.COSTS["fold"], rtol=1e-6)


def test_actions_that_are_not_counted_are_refused_in_one_line():
    register()
    with pytest.raises(ValueError, match="^env_id: .* r2d2 needs a discrete one"):
        train(replace(QUICK, env_id="test/Continuous-v0"))


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        SYNC,
        replace(QUICK, num_replays=2, num_actors=3),
        replace(QUICK, state_init="zero", burn_in_length=0),
        replace(QUICK, lstm_size=0, env_id="CartPole-v1"),
        replace(QUICK, num_learners=2),
        FRAMES,
    ],
    ids=["sync", "async", "zero", "feedforward", "learners", "frames"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, monkeypatch, config):
    """The power fails after a checkpoint; what is resumed ends as if it had not."""
    register()
    if config is FRAMES:
        monkeypatch.setattr(r2d2, "make_envs", stacked_envs)
    config = replace(config, checkpoint_every_s=0.05)
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))
    saved = []
    save, record = Run.checkpoint, Run.record

    def saving(run: Run) -> None:
        save(run)
        saved.append(run.env_steps)

    def until(run: Run, **turn) -> None:
        record(run, **turn)
        if saved and saved[-1] > 1_000 and run.env_steps > saved[-1] + 100:
            raise EOFError

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", saving)
        patch.setattr(Run, "record", until)
        with pytest.raises(EOFError):
            train(replace(config, run_dir=str(tmp_path / "cut")))
    assert saved[-1] < config.total_env_steps - 300
    resumed = train(replace(config, resume=str(tmp_path / "cut")))
    assert_same_run(whole, resumed)
    assert whole.extra == resumed.extra and whole.learner_steps > 10
    assert np.isclose(whole.wall_time_s, resumed.wall_time_s, rtol=1e-9, atol=0)
    assert same_parameters(whole, Result.load(tmp_path / "cut"))


# -- real processes --------------------------------------------------------------------------------


def test_a_real_run_learns_says_nothing_and_goes_on(tmp_path, capfd):
    config = replace(r2d2.Config(), progress=False, total_env_steps=20_000)
    config = replace(config, run_dir=str(tmp_path / "run"))
    with RayRuntime(num_cpus=4) as runtime:
        first = r2d2.train(config, runtime)
        assert same_parameters(first, Result.load(tmp_path / "run"))
        more = {"run_dir": None, "resume": str(tmp_path / "run"), "total_env_steps": 22_000}
        second = r2d2.train(replace(config, **more), runtime)
    assert capfd.readouterr() == ("", "")
    assert first.metrics["episode_return_mean"] > 0.8
    assert second.learner_steps > first.learner_steps
    for part in ("env_time", "inference_time", "learner_idle"):
        known = [x for x in first.curves[f"{part}_fraction"] if x is not None and x == x]
        assert known and 0 < min(known) <= max(known) < 1


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("state_init", "random"),
        ("update_rule", "lazy"),
        ("burn_in_length", -1),
        ("n_step", 0),
        ("discount", 1.5),
        ("rescaling_epsilon", 0.0),
        ("samples_per_insert", 0.0),
        ("learning_starts", 20_000),
        ("num_replays", 0),
        ("priority_mix", 2.0),
        ("optimizer_epsilon", 0.0),
    ],
)
def test_bad_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        replace(r2d2.Config(), **{field: value})


def test_an_overlap_of_the_whole_sequence_and_too_large_a_memory_are_refused():
    with pytest.raises(ValueError, match="^sequence_overlap: must be less than sequence_length"):
        replace(r2d2.Config(), sequence_overlap=10)
    with pytest.raises(ValueError, match="^replay_capacity: .* GiB"):
        train(replace(QUICK, env_id="ALE/Pong-v5", replay_capacity=50_000_000))


def test_presets_are_what_they_say():
    paper = r2d2.PRESETS["paper"]
    assert (paper.sequence_length, paper.sequence_overlap, paper.burn_in_length) == (80, 40, 40)
    assert (paper.priority_exponent, paper.importance_exponent, paper.priority_mix) == (
        0.9,
        0.6,
        0.9,
    )
    assert r2d2.PRESETS["feedforward"].lstm_size == 0
    assert r2d2.PRESETS["masked"].env_id == "rlbook/MaskedCartPole-v0"
