"""Replay: the sum tree against a naive one, the ring against a list, frequencies by χ²."""

import json
import math
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbook.data import Transition
from rlbook.parts.replay import PrioritizedReplay, Sample, SumTree, UniformReplay


def transitions(numbers: Any) -> Transition:
    """Items that only count: every field of item i says i."""
    n = np.asarray(numbers)
    return Transition(
        obs_tm1=np.stack([n, n], axis=1).astype(np.float32),
        a_tm1=n.astype(np.int64),
        r_t=n.astype(np.float32),
        discount_t=(n * 0 + 0.5).astype(np.float32),
        obs_t=np.stack([n, n + 1], axis=1).astype(np.float32),
    )


def assert_whole(items: Transition) -> None:
    """No field may belong to another item than the others."""
    n = items.a_tm1
    for found, expected in zip(items, transitions(n), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- the sum tree

PRIORITY = st.one_of(st.just(0.0), st.floats(1e-6, 1e6))


@settings(deadline=None, max_examples=150)
@given(data=st.data(), capacity=st.integers(1, 33))
def test_sum_tree_does_what_a_plain_list_does(data: st.DataObject, capacity: int) -> None:
    tree, naive = SumTree(capacity), [0.0] * capacity
    writes = st.lists(st.tuples(st.integers(0, capacity - 1), PRIORITY), max_size=12)
    for batch in data.draw(st.lists(writes, max_size=5)):
        tree.set([i for i, _ in batch], [p for _, p in batch])  # equal indices: the last one counts
        for i, p in batch:
            naive[i] = p
        tree.check_valid()
        assert tree.get(range(capacity)).tolist() == naive
        assert tree.total == pytest.approx(math.fsum(naive), rel=1e-12)
    if sum(naive) == 0:
        with pytest.raises(ValueError, match="every priority is 0"):
            tree.find([0.0])
        return
    for fraction in (0.0, 0.1, 0.5, 0.9, 0.999999):
        x = fraction * tree.total
        (found,) = tree.find([x])
        before, slack = math.fsum(naive[:found]), 1e-9 * tree.total
        assert naive[found] > 0
        assert before - slack <= x < before + naive[found] + slack


def test_find_walks_by_prefix_sums_exactly() -> None:
    tree = SumTree(5)
    tree.set([0, 1, 2, 3, 4], [1.0, 0.0, 2.0, 4.0, 1.0])
    found = tree.find([0.0, 0.99, 1.0, 2.99, 3.0, 6.99, 7.0, 7.99])
    assert found.tolist() == [0, 0, 2, 2, 3, 3, 4, 4]
    assert tree.find([]).tolist() == []
    tree.set([0], [0.0])
    assert tree.find([0.0, -0.0]).tolist() == [2, 2]


def test_rounding_never_leads_to_an_empty_leaf() -> None:
    rng = np.random.default_rng(0)
    for capacity in (3, 8, 100, 1000):
        tree = SumTree(capacity)
        priorities = rng.random(capacity) ** 20 * (rng.random(capacity) < 0.3)
        priorities[capacity // 2] = 1.0
        tree.set(np.arange(capacity), priorities)
        beyond = [tree.total, np.nextafter(tree.total, np.inf), 10 * tree.total, 0.0]
        ends = np.cumsum(priorities)
        assert (tree.get(tree.find(beyond)) > 0).all()
        assert (tree.get(tree.find(np.concatenate((ends, np.nextafter(ends, 0))))) > 0).all()


@pytest.mark.parametrize("capacity", [1000, 8192, 20_000, 70_001])
def test_a_deep_tree_finds_what_running_sums_find(capacity: int) -> None:
    """Above 1,024 leaves there are levels to walk, above 8,192 levels that `set` keeps itself."""
    rng, tree, naive = np.random.default_rng(capacity), SumTree(capacity), np.zeros(capacity)
    for size in (capacity, 1, 32, 700, 0, 32):
        leaves = rng.integers(capacity, size=size)
        values = rng.integers(0, 4, size).astype(np.float64)  # integers: every sum is exact
        tree.set(leaves, values)
        naive[leaves] = values
        ends = np.cumsum(naive)
        for x in (rng.random(300) * ends[-1], np.sort(rng.integers(0, int(ends[-1]), 300))):
            assert tree.find(x).tolist() == np.searchsorted(ends, x, side="right").tolist()
        tree.check_valid()
        assert tree.total == ends[-1] and tree.get(range(capacity)).tolist() == naive.tolist()


def test_a_million_updates_leave_no_error_behind() -> None:
    rng, tree, naive = np.random.default_rng(0), SumTree(20_000), np.zeros(20_000)
    for _ in range(250):
        leaves = rng.integers(20_000, size=4_000)
        values = 10.0 ** rng.uniform(-12, 12, 4_000)  # large ones that go would leave errors
        tree.set(leaves, values)
        naive[leaves] = values
    tree.set(np.arange(20_000), small := rng.random(20_000) * 1e-9)
    assert tree.total == pytest.approx(math.fsum(small), rel=1e-13)
    tree.check_valid()


def test_sum_tree_refuses_and_then_is_as_before() -> None:
    tree = SumTree(6)
    tree.set([0, 5], [1.0, 2.0])
    for indices, priorities in (
        ([1, 2], [1.0, math.nan]),
        ([1, 2], [1.0, -0.5]),
        ([1, 2], [1.0, math.inf]),
        ([1, 2], [1.0, 1.7e308]),
        ([1, 2], [1.0]),
        ([1, 6], [1.0, 1.0]),
        ([1, -1], [1.0, 1.0]),
        ([1.0, 2.0], [1.0, 1.0]),
    ):
        with pytest.raises(ValueError):
            tree.set(indices, priorities)
        assert tree.get(range(6)).tolist() == [1.0, 0, 0, 0, 0, 2.0]
        tree.check_valid()
    for bad in ([math.nan], [-0.1], [[1.0]]):
        with pytest.raises(ValueError, match="prefix_sums"):
            tree.find(bad)
    for capacity in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="capacity"):
            SumTree(capacity)  # type: ignore[arg-type]


def test_check_valid_sees_a_node_that_is_no_sum() -> None:
    tree = SumTree(20_000)  # deep enough for levels that are walked and levels added up whole
    tree.set([0, 1], [1.0, 2.0])
    tree.check_valid()
    for node in (1024, 2048, 8192, 16_384):
        tree._nodes[node] += 1e-9
        with pytest.raises(RuntimeError, match="sum of its children"):
            tree.check_valid()
        tree._nodes[node] -= 1e-9
        tree.set([0, 1], [1.0, 2.0])
        tree.check_valid()
    small = SumTree(4)
    small.set([0, 1], [1.0, 2.0])
    assert small.total == 3.0
    small._before[1] += 1e-9
    with pytest.raises(RuntimeError, match="running sum"):
        small.check_valid()


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    assert not counts[expected == 0].any()
    used = expected > 0
    return float(((counts[used] - expected[used]) ** 2 / expected[used]).sum())


# The 99.9 % quantiles of χ² with 9 and 99 degrees of freedom, from a table.
LIMIT_9, LIMIT_99 = 27.88, 148.23


def test_tree_draws_in_proportion_to_priority() -> None:
    rng = np.random.default_rng(1)
    priorities = np.arange(10.0)
    tree = SumTree(10)
    tree.set(np.arange(10), priorities)
    # Batches of one: with a single stratum the draws are independent, as χ² assumes.
    counts = np.bincount([tree.sample(1, rng)[0] for _ in range(20_000)], minlength=10)
    assert chi_square(counts, priorities / priorities.sum()) < LIMIT_9
    assert chi_square(counts, np.arange(10) ** 0.9 / (np.arange(10) ** 0.9).sum()) > LIMIT_9


def test_strata_give_each_leaf_its_share_of_every_batch() -> None:
    tree = SumTree(4)
    tree.set([0, 1, 2, 3], [1.0, 2.0, 3.0, 2.0])
    found = tree.sample(8, np.random.default_rng(0))
    assert np.bincount(found).tolist() == [1, 2, 3, 2]


# ---------------------------------------------------------------- the ring


@pytest.mark.parametrize("make", [UniformReplay, PrioritizedReplay])
def test_the_ring_keeps_the_youngest_items_whole(make: Any) -> None:
    rng = np.random.default_rng(0)
    replay, kept, added = make(7), deque(maxlen=7), 0
    for size in [1, 3, 0, 2, 7, 5, 20, 4, 8, 1, 1]:  # also more than fit at once
        keys = replay.add(transitions(np.arange(added, added + size)))
        assert keys.tolist() == list(range(added, added + size))
        kept.extend(range(added, added + size))
        added += size
        replay.check_valid()
        assert len(replay) == len(kept)
        batch = replay.sample(int(rng.integers(1, 300)))
        assert_whole(batch.items)
        assert batch.keys.tolist() == batch.items.a_tm1.tolist()  # item i has key i
        assert set(batch.keys) <= set(kept)
    assert set(replay.sample(1000).keys) == set(kept)
    assert isinstance(batch, Sample) and isinstance(batch.items, Transition)


def test_items_are_copies() -> None:
    replay = UniformReplay[Transition](3)
    items = transitions([5])
    replay.add(items)
    items.obs_t[:] = 99
    replay.sample(2).items.obs_t[:] = 77
    assert_whole(replay.sample(2).items)


def test_uniform_draws_are_uniform() -> None:
    replay = UniformReplay[Transition](100, seed=3)
    replay.add(transitions(np.arange(250)))
    batch = replay.sample(50_000)
    assert chi_square(np.bincount(batch.keys - 150, minlength=100), np.full(100, 0.01)) < LIMIT_99
    assert (batch.probabilities == 0.01).all()
    assert (batch.weights == 1).all() and batch.weights.dtype == np.float32


class Frames(NamedTuple):
    frame: Any
    action: Any


def test_memory_is_known_before_the_first_add() -> None:
    example = Frames(np.zeros((4, 84, 84), np.uint8), np.int64(0))
    replay = UniformReplay(10, example=example)
    assert replay.nbytes == 10 * (4 * 84 * 84 + 8)
    with pytest.raises(ValueError, match="frame must be uint8"):
        replay.add(Frames(np.zeros((2, 4, 84, 84), np.float32), np.zeros(2, np.int64)))
    prioritized = PrioritizedReplay(16, example=example)
    assert prioritized.nbytes == 16 * (4 * 84 * 84 + 8) + (2 * 16 + 2 + 16 + 1) * 8


def test_items_that_do_not_fit_are_refused_and_nothing_is_stored() -> None:
    replay = PrioritizedReplay[Any](8)
    replay.add(transitions([0, 1]))
    good = transitions([2, 3])
    for match, items in (
        ("one N", good._replace(r_t=good.r_t[:1])),
        ("one N", good._replace(r_t=np.float32(1))),
        ("r_t must be float32", good._replace(r_t=good.r_t.astype(np.float64))),
        ("obs_t must be float32", good._replace(obs_t=good.obs_t[:, :1])),
        ("must have fields", Frames(good.obs_t, good.a_tm1)),
        ("NamedTuple", (good.obs_t, good.a_tm1)),
        ("NamedTuple", good._replace(r_t=np.array(["a", "b"]))),
    ):
        with pytest.raises(ValueError, match=match):
            replay.add(items)
    for bad in ([1.0, math.nan], [1.0, -1.0], [1.0, math.inf], [1.0]):
        with pytest.raises(ValueError, match="priorities"):
            replay.add(good, bad)
    assert len(replay) == 2 and replay.total_priority == 2.0
    replay.check_valid()


@pytest.mark.parametrize("make", [UniformReplay, PrioritizedReplay])
def test_what_cannot_be_sampled_is_refused(make: Any) -> None:
    replay = make(4)
    with pytest.raises(ValueError, match="empty"):
        replay.sample(1)
    replay.add(transitions([0]))
    for size in (0, -1, 1.5):
        with pytest.raises(ValueError, match="batch_size"):
            replay.sample(size)


# ---------------------------------------------------------------- priorities


def test_prioritized_frequencies_probabilities_and_weights() -> None:
    replay = PrioritizedReplay[Transition](16, 0.5, 0.4, seed=5)
    priorities = np.arange(10.0)
    replay.add(transitions(np.arange(10)), priorities)
    expected = priorities**0.5 / (priorities**0.5).sum()
    counts = np.zeros(10, dtype=int)
    for _ in range(10_000):
        counts[replay.sample(1).keys[0]] += 1
    assert chi_square(counts, expected) < LIMIT_9
    batch = replay.sample(64, importance_exponent=0.7)
    np.testing.assert_allclose(batch.probabilities, expected[batch.keys])
    weights = (10 * expected[batch.keys]) ** -0.7
    np.testing.assert_allclose(batch.weights, weights / weights.max(), rtol=1e-6)
    assert batch.weights.dtype == np.float32 and batch.weights.max() == 1.0
    by_default = replay.sample(64)
    weights = (10 * expected[by_default.keys]) ** -0.4
    np.testing.assert_allclose(by_default.weights, weights / weights.max(), rtol=1e-6)


def test_priorities_of_evicted_items_fall_on_no_one() -> None:
    replay = PrioritizedReplay[Transition](4, 1.0)
    old = replay.add(transitions([0, 1, 2, 3]), [1.0, 1.0, 1.0, 1.0])
    new = replay.add(transitions([4, 5]), [2.0, 3.0])  # overwrite items 0 and 1
    assert replay.update_priorities(old, [50.0, 60.0, 7.0, 8.0]) == 2
    assert replay.total_priority == 2.0 + 3.0 + 7.0 + 8.0
    assert replay.update_priorities(new, [0.0, 0.0]) == 2
    assert set(replay.sample(200).keys) == {2, 3}
    replay.add(transitions([6]))  # gets the largest priority of those that counted: 8, not 60
    assert replay.total_priority == 8.0 + 8.0
    replay.check_valid()


def test_of_equal_keys_the_last_priority_counts() -> None:
    replay = PrioritizedReplay[Transition](4, 1.0)
    keys = replay.add(transitions([0, 1]))
    replay.update_priorities([keys[0], keys[1], keys[0]], [5.0, 1.0, 2.0])
    assert replay.total_priority == 2.0 + 1.0
    replay.check_valid()


def test_bad_updates_are_refused_and_nothing_changes() -> None:
    replay = PrioritizedReplay[Transition](4, 1.0)
    replay.add(transitions([0, 1, 2, 3, 4]), [9.0, 1.0, 2.0, 3.0, 4.0])
    for keys, priorities in (
        ([1, 2], [1.0, math.nan]),
        ([1, 0], [1.0, math.nan]),  # also for an item that is gone
        ([1, 2], [1.0, -1.0]),
        ([1, 2], [1.0, math.inf]),
        ([1, 2], [1.0]),
        ([1, 5], [1.0, 1.0]),
        ([1, -1], [1.0, 1.0]),
        ([1.5, 2.0], [1.0, 1.0]),
    ):
        with pytest.raises(ValueError):
            replay.update_priorities(keys, priorities)
        assert replay.total_priority == 1.0 + 2.0 + 3.0 + 4.0
    for arguments in ((-0.1, 0.4), (0.6, math.nan), (math.inf, 0.4)):
        with pytest.raises(ValueError, match="exponent"):
            PrioritizedReplay(4, *arguments)
    with pytest.raises(ValueError, match="exponent"):
        replay.sample(1, importance_exponent=-1.0)


def test_zero_priorities() -> None:
    replay = PrioritizedReplay[Transition](4, 0.0)  # α = 0: uniform, but 0 stays 0
    replay.add(transitions([0, 1, 2]), [0.0, 5.0, 1.0])
    batch = replay.sample(100)
    assert set(batch.keys) == {1, 2} and (batch.probabilities == 0.5).all()
    replay.update_priorities([1, 2], [0.0, 0.0])  # all 0: all alike
    batch = replay.sample(100)
    assert set(batch.keys) == {0, 1, 2}
    assert (batch.probabilities == 1 / 3).all() and (batch.weights == 1).all()


@settings(deadline=None, max_examples=60)
@given(data=st.data(), capacity=st.integers(1, 9))
def test_prioritized_replay_does_what_a_dictionary_does(data: st.DataObject, capacity: int) -> None:
    replay, model, added, largest = PrioritizedReplay[Transition](capacity, 1.0), {}, 0, 1.0
    for _ in range(data.draw(st.integers(1, 8))):
        size = data.draw(st.integers(0, 12))
        given_ones = data.draw(st.none() | st.lists(PRIORITY, min_size=size, max_size=size))
        new = dict(zip(range(added, added + size), given_ones or [largest] * size, strict=True))
        replay.add(transitions(list(range(added, added + size))), given_ones)
        added += size
        model = {k: p for k, p in {**model, **new}.items() if k >= added - capacity}
        largest = max([largest, *(p for k, p in new.items() if k in model)])
        if added:
            pairs = st.lists(st.tuples(st.integers(0, added - 1), PRIORITY), max_size=6)
            updates = data.draw(pairs)
            replay.update_priorities(
                np.array([k for k, _ in updates], dtype=int), [p for _, p in updates]
            )
            for k, p in updates:
                if k in model:
                    model[k] = p
                    largest = max(largest, p)
        replay.check_valid()
        assert len(replay) == len(model)
        assert replay.total_priority == pytest.approx(math.fsum(model.values()), rel=1e-12)
        if model:
            batch = replay.sample(20)
            assert_whole(batch.items)
            total = math.fsum(model.values())
            expected = [model[k] / total if total else 1 / len(model) for k in batch.keys.tolist()]
            np.testing.assert_allclose(batch.probabilities, expected, rtol=1e-9)
            assert (batch.probabilities > 0).all()


# ---------------------------------------------------------------- state


def same(a: Sample[Any], b: Sample[Any]) -> bool:
    pairs = zip([*a.items, *a[1:]], [*b.items, *b[1:]], strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("make", [UniformReplay, PrioritizedReplay])
@pytest.mark.parametrize("added", [0, 3, 23])
def test_continuing_from_a_state_is_the_same_run_bit_for_bit(make: Any, added: int) -> None:
    def go_on(replay: Any) -> list[Sample[Any]]:
        batches = []
        for start in range(100, 130, 6):
            replay.add(transitions(np.arange(start, start + 6)))
            batches.append(replay.sample(9))
            if isinstance(replay, PrioritizedReplay):
                replay.update_priorities(batches[-1].keys, batches[-1].keys * 0.37 + 0.1)
        return batches

    original, other = make(10, seed=4), make(10, seed=99)
    original.add(transitions(np.arange(added)))
    if added:
        original.sample(5)
        if isinstance(original, PrioritizedReplay):
            original.update_priorities([added - 1], [9.0])  # so the largest seen is no default
    state = original.state()
    plain = {k: v for k, v in state.items() if not isinstance(v, np.ndarray) and k != "fields"}
    assert json.loads(json.dumps(plain)) == plain
    other.load_state(state)
    other.check_valid()
    expected = go_on(original)  # must not reach back into the state or into `other`
    assert all(same(a, b) for a, b in zip(expected, go_on(other), strict=True))
    again = make(10, seed=5)
    again.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(expected, go_on(again), strict=True))


def test_a_loaded_replay_can_be_sampled_before_anything_is_added() -> None:
    original, other = UniformReplay[Transition](5), UniformReplay[Transition](5)
    original.add(transitions(range(8)))
    other.load_state(original.state())
    a, b = original.sample(6), other.sample(6)
    assert same(a, b) and a.items._fields == b.items._fields


def test_a_state_that_does_not_fit_is_refused_and_nothing_changes() -> None:
    original = PrioritizedReplay[Transition](5, seed=1)
    original.add(transitions(range(3)), [1.0, 2.0, 3.0])
    state = original.state()
    target = PrioritizedReplay[Transition](5, seed=2)
    target.add(transitions([7]))
    before = json.dumps({k: str(v) for k, v in target.state().items()})
    for change in (
        {"capacity": 6},
        {"added": 4},
        {"added": -1},
        {"added": "3"},
        {"priority_exponent": 0.1},
        {"scaled_priorities": np.array([1.0, math.nan, 1.0])},
        {"scaled_priorities": np.ones(2)},
        {"max_priority": -1.0},
        {"rng": {"bit_generator": "MT19937"}},
        {"fields": {**state["fields"], "r_t": np.zeros(2, np.float32)}},
        {"fields": {**state["fields"], "r_t": np.zeros(3, np.float64)}},
        {"fields": {"r_t": np.zeros(3, np.float32)}},
        {"fields": {}},
        {"fields": None},
    ):
        with pytest.raises(ValueError):
            target.load_state({**state, **change})
        assert json.dumps({k: str(v) for k, v in target.state().items()}) == before
    for name in state:
        with pytest.raises(ValueError, match=name):
            target.load_state({k: v for k, v in state.items() if k != name})
    target.load_state(state)
    assert same(target.sample(4), original.sample(4))


def test_check_valid_sees_a_priority_in_an_empty_slot() -> None:
    replay = PrioritizedReplay[Transition](5)
    replay.add(transitions([0]))
    replay._tree.set([3], [1.0])
    with pytest.raises(RuntimeError, match="empty slot"):
        replay.check_valid()
