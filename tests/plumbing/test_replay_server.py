"""Shards of a replay memory: they draw as one would; rates; what belongs to the dead is ignored."""

from typing import NamedTuple

import numpy as np
import pytest

from rlbook.data import Transition
from rlbook.maths.priorities import importance_weights, sampling_probabilities
from rlbook.parts.replay import PrioritizedReplay, UniformReplay
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.memory_shard import (
    Made,
    MemorySettings,
    MemoryShard,
    Part,
    Priorities,
    shares,
    whole,
)
from rlbook.plumbing.rate_limiter import RateLimiter
from rlbook.plumbing.replay_server import Draw, ShardedReplay
from rlbook.plumbing.virtual import VirtualRuntime


class Item(NamedTuple):
    """Any NamedTuple of arrays will do."""

    name: np.ndarray


SETTINGS = MemorySettings(capacity=100, priority_exponent=0.6)


COSTS = {"add": 1e-4, "sample": 1e-4, "update": 1e-4}


def virtual(hollow=False, **faults) -> VirtualRuntime:
    cluster = Cluster(nodes=(Node(cores=8),), costs=COSTS, **faults)
    return VirtualRuntime(1, cluster, hollow=hollow)


def fill(runtime, replay, priorities, sizes) -> None:
    """Items 0, 1, 2, … with these priorities, `sizes` of them to shard 0, 1, …"""
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        made = Made(Item(np.arange(start, start + size)), priorities[rows])
        replay.add(runtime.put(made), size)
        start += size


def draw(runtime, replay, rows) -> tuple[Draw, list[Part]]:
    drawn = replay.sample(rows)
    return drawn, runtime.get(drawn.parts)


# -- drawing together ------------------------------------------------------------------------------


def chi_squared(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


def test_shards_of_unequal_totals_draw_together_as_one_memory_would():
    """χ² over all items of three shards, of which one has nearly all priority, and few rows."""
    rng = np.random.default_rng(3)
    priorities = np.concatenate([rng.exponential(1, 40), rng.exponential(9, 12), [0.2] * 8])
    expected = sampling_probabilities(priorities, exponent=0.6)
    with virtual() as runtime:
        replay = ShardedReplay(runtime, SETTINGS, 3, seed=1)
        fill(runtime, replay, priorities, (40, 12, 8))
        counts, draws, rows = np.zeros(60), 400, 7
        for _ in range(draws):
            drawn, parts = draw(runtime, replay, rows)
            joined = whole(parts)
            np.add.at(counts, joined.sample.items.name, 1)
            names = joined.sample.items.name
            assert np.allclose(joined.sample.probabilities, expected[names], rtol=1e-12)
            assert (joined.size, len(names)) == (60, rows)
            replay.update_priorities(drawn, [None] * 3)
        assert np.isclose(replay.total, (priorities**0.6).sum())
    statistic = chi_squared(counts, draws * rows * expected)
    assert statistic < 59 + 4 * np.sqrt(2 * 59)  # strata make it smaller, never larger
    even = np.repeat([1 / 40, 1 / 12, 1 / 8], (40, 12, 8)) / 3
    assert chi_squared(counts, draws * rows * even) > 1_000  # rows dealt evenly would be seen


def test_weights_are_over_all_shards_by_batch_or_by_buffer():
    rng = np.random.default_rng(0)
    priorities = rng.exponential(1, 60) + 0.01
    expected = sampling_probabilities(priorities, exponent=0.6)
    with virtual() as runtime:
        replay = ShardedReplay(runtime, SETTINGS._replace(finds_smallest=True), 3, seed=1)
        fill(runtime, replay, priorities, (30, 20, 10))
        joined = whole(draw(runtime, replay, 9)[1])
    names = joined.sample.items.name
    assert np.isclose(joined.smallest, expected.min(), rtol=1e-12)
    mine = importance_weights(
        joined.sample.probabilities, size=joined.size, exponent=0.4, smallest=joined.smallest
    )
    assert np.allclose(mine, (60 * expected[names]) ** -0.4 / (60 * expected.min()) ** -0.4)
    batch = importance_weights(joined.sample.probabilities, size=joined.size, exponent=0.4)
    assert batch.max() == 1.0 and mine.max() < 1.0


def test_the_rows_of_a_draw_are_dealt_by_totals_and_are_right_on_average():
    with virtual() as runtime:
        replay = ShardedReplay(runtime, SETTINGS._replace(priority_exponent=1.0), 3, seed=1)
        fill(runtime, replay, np.array([1.0, 2.5, 6.5]), (1, 1, 1))
        sizes = np.array(
            [
                [0 if part.sample is None else len(part.sample.keys) for part in parts]
                for _, parts in (draw(runtime, replay, 7) for _ in range(300))
            ]
        )
    assert (sizes.sum(1) == 7).all()
    assert np.ptp(sizes, axis=0).max() <= 1  # never more than a row off
    assert np.allclose(sizes.mean(0), [0.7, 1.75, 4.55], atol=0.1)


def test_each_shard_draws_by_lots_of_its_own():
    """And so does one that replaces a dead one."""
    drawn = []
    for crashes in ((), (Crash("MemoryShard 1", at_s=0.0),)):
        with virtual(crashes=crashes) as runtime:
            replay = ShardedReplay(runtime, SETTINGS, 2, seed=1)
            replay.mend()
            fill(runtime, replay, np.ones(80), (40, 40))
            drawn += [tuple(part.sample.keys) for part in draw(runtime, replay, 40)[1]]
    assert drawn[0] == drawn[2] and len(set(drawn)) == 3


def test_a_total_that_changed_since_its_report_is_corrected_in_the_probabilities():
    """Shard 1 lost most of its priority after its report: its rows are drawn too often."""
    with virtual() as runtime:
        replay = ShardedReplay(runtime, SETTINGS._replace(priority_exponent=1.0), 2, seed=1)
        fill(runtime, replay, np.array([1.0, 1.0, 3.0, 5.0]), (2, 2))
        drawn, _ = draw(runtime, replay, 10)
        back = [runtime.put(None), runtime.put(Priorities(np.array([0, 1]), np.array([0.5, 0.5])))]
        replay.update_priorities(drawn, back)
        _, parts = draw(runtime, replay, 10)  # still dealt by 2 : 8
    assert [len(part.sample.keys) for part in parts] == [2, 8]
    assert np.allclose(parts[1].sample.probabilities, 0.8 * 0.5)
    assert np.allclose(parts[0].sample.probabilities, 0.2 * 0.5)


def test_the_newest_report_counts_whichever_comes_last():
    with virtual() as runtime:
        replay = ShardedReplay(runtime, SETTINGS, 1, seed=1)
        replay.stored(replay.add(runtime.put(Made(Item(np.arange(2)), np.ones(2))), 2))
        drawn = replay.sample(4)
        replay.stored(replay.add(runtime.put(Made(Item(np.arange(3)), np.ones(3))), 3))
        assert replay.total == 5
        replay.update_priorities(drawn, [runtime.put(None)])  # with a report from before
        assert replay.total == 5


@pytest.mark.parametrize("prioritized", [True, False])
def test_one_shard_draws_as_the_memory_of_chapter_03_does(prioritized):
    rows, errors = Item(np.arange(50)), np.linspace(0.1, 2, 50)
    plain = PrioritizedReplay(30, 0.6, seed=7) if prioritized else UniformReplay(30, seed=7)
    plain.add(rows, errors) if prioritized else plain.add(rows)
    with virtual() as runtime:
        settings = MemorySettings(30, prioritized)
        replay = ShardedReplay(runtime, settings, seed=7)
        replay.add(runtime.put(Made(rows, errors)), 50)
        for _ in range(3):
            theirs, (part,) = plain.sample(8), draw(runtime, replay, 8)[1]
            assert np.array_equal(part.sample.keys, theirs.keys)
            assert np.array_equal(part.sample.probabilities, theirs.probabilities)


# -- priorities that come back ---------------------------------------------------------------------


def test_priorities_go_to_the_shard_that_gave_the_rows():
    priorities = np.ones(8)
    with virtual() as runtime:
        replay = ShardedReplay(runtime, SETTINGS, 2, seed=1)
        fill(runtime, replay, priorities, (4, 4))
        drawn, parts = draw(runtime, replay, 8)
        joined = whole(parts)
        fresh = 10.0 + joined.sample.items.name
        back = [runtime.put(one) for one in shares(parts, fresh)]
        replay.update_priorities(drawn, back)
        assert replay.mend() == 0  # and all is stored
        held = [kept["memory"]["scaled_priorities"] for kept in replay.state_dict()["shards"]]
    expected = np.ones(8)
    expected[joined.sample.items.name] = fresh**0.6
    assert np.allclose(np.concatenate(held), expected)


def test_what_comes_back_for_items_that_were_overwritten_is_ignored():
    shard = MemoryShard(SETTINGS._replace(capacity=4), 0)
    shard.keep(Made(Item(np.arange(4)), np.ones(4)))
    _, part = shard.draw(4, 1.0)
    shard.keep(Made(Item(np.arange(4, 7)), np.full(3, 2.0)))
    before = shard.memory.state_dict()["scaled_priorities"]
    assert shard.correct(Priorities(np.array([0, 1, 2, 3]), np.full(4, 99.0))) == 1
    after = shard.memory.state_dict()["scaled_priorities"]
    assert np.array_equal(np.flatnonzero(before != after), [3])
    assert shard.correct(None) == 0


def test_what_comes_back_for_a_shard_that_died_is_ignored():
    """The new shard has keys of its own, equal to those of the dead one."""
    with virtual(crashes=(Crash("MemoryShard 1", at_s=1.0),)) as runtime:
        replay = ShardedReplay(runtime, SETTINGS, 2, seed=1)
        fill(runtime, replay, np.ones(8), (4, 4))
        drawn, parts = draw(runtime, replay, 8)
        back = [runtime.put(one) for one in shares(parts, np.full(8, 99.0))]
        runtime.wait([runtime.put(0)], num_returns=1)
        runtime.now = 2.0
        assert replay.mend() == 1 and len(replay) == 4
        replay.add(runtime.put(Made(Item(np.arange(3)), np.ones(3))), 3)  # shard 0's turn
        replay.add(runtime.put(Made(Item(np.arange(4)), np.ones(4))), 4)
        replay.update_priorities(drawn, back)
        assert replay.mend() == 0
        shards = [kept["memory"] for kept in replay.state_dict()["shards"]]
    assert (shards[1]["scaled_priorities"] == 1).all()
    assert (shards[0]["scaled_priorities"] > 1).sum() == len(set(parts[0].sample.keys))


def test_a_shard_that_dies_before_its_first_report_is_replaced_and_the_others_are_drawn_from():
    with virtual(crashes=(Crash("MemoryShard 1", at_s=0.0),)) as runtime:
        replay = ShardedReplay(runtime, SETTINGS, 2, seed=1)
        assert replay.sample(8) is None
        fill(runtime, replay, np.ones(8), (4, 4))
        _, parts = draw(runtime, replay, 8)
        assert replay.born == [0, 1] and len(replay) == 4
    assert parts[1].sample is None and len(parts[0].sample.keys) == 8
    assert np.allclose(parts[0].sample.probabilities, 1 / 4)


class Maker:
    """Makes four items."""

    def make(self) -> Made:
        return Made(Item(np.arange(4)), np.ones(4))


def test_a_shard_that_had_nothing_when_it_last_reported_is_asked_again():
    with virtual() as runtime:
        replay = ShardedReplay(runtime, SETTINGS, 1, seed=1)
        replay.stored(replay.add(runtime.put(None), 0))
        assert len(replay) == 0 and replay.sample(2) is None
        replay.add(runtime.put(Maker().make()), 4)
        assert len(replay) == 4 and len(draw(runtime, replay, 2)[1][0].sample.keys) == 2


def test_what_died_with_its_maker_is_not_waited_for():
    with virtual(crashes=(Crash("Maker 0", at_s=0.0),)) as runtime:
        replay = ShardedReplay(runtime, SETTINGS, 1, seed=1)
        lost = replay.add(runtime.remote(Maker).remote().make.remote(), 4)
        assert len(replay) == 4 and replay.sample(2) is None and len(replay) == 0
        replay.stored(lost)
        replay.stored(replay.add(runtime.put(Maker().make()), 4))
        assert len(replay) == 4 and replay.sample(2) is not None


def test_a_saved_server_draws_on_as_the_one_that_was_not():
    rng, states = np.random.default_rng(0), []
    for resumed in (False, True):
        with virtual() as runtime:
            replay = ShardedReplay(runtime, SETTINGS, 3, seed=1)
            if resumed:
                replay.load_state_dict(states[0])
            else:
                fill(runtime, replay, rng.exponential(1, 60), (30, 20, 10))
                draw(runtime, replay, 5)
                states.append(replay.state_dict())
            states.append([whole(draw(runtime, replay, 5)[1]).sample.keys for _ in range(4)])
    assert np.array_equal(states[1], states[2])


def test_a_hollow_server_knows_how_much_there_is():
    with virtual(hollow=True) as runtime:
        replay = ShardedReplay(runtime, SETTINGS, 2, seed=1, row_bytes=100)
        for _ in range(3):
            replay.add(runtime.put(None), 60)
        assert len(replay) == 160 and replay.nbytes == 20_000
        drawn = replay.sample(10)
        runtime.get(drawn.parts)
        assert sum(part.nbytes for part in drawn.parts) == 1_000


# -- rates -----------------------------------------------------------------------------------------


def test_acting_and_learning_are_held_to_a_ratio():
    """Whoever may go goes, in an unkind order; the ratio holds within the tolerance always."""
    for kind in ("learner", "actors"):
        limiter, size = RateLimiter(4.0, 100, 64), 0
        for _ in range(3_000):
            acts, draws = limiter.may_insert(0, size), limiter.may_draw(32, size)
            assert acts or draws, "somebody can always go on"
            if acts and (kind == "actors" or not draws):
                size += 10
                limiter.insert(10, size)
            else:
                limiter.draw(32)
            assert -64 <= limiter.owed <= 64 + 40
        assert abs(limiter.drawn / limiter.inserted - 4) < 0.1


def test_nothing_is_drawn_and_nothing_owed_before_the_memory_is_filled():
    limiter = RateLimiter(2.0, 50, 10)
    limiter.insert(40, 40)
    assert limiter.may_insert(1_000, 40) and not limiter.may_draw(1, 40) and limiter.owed == 0
    limiter.insert(20, 60)
    assert limiter.owed == 40 and limiter.may_draw(50, 60) and not limiter.may_draw(51, 60)
    assert not limiter.may_insert(0, 60) and limiter.may_insert(0, 5)
    limiter.insert(5, 5)  # it lost what it held
    assert limiter.owed == 0 and limiter.may_insert(0, 5) and not limiter.may_draw(1, 5)


def test_without_a_ratio_nobody_waits():
    limiter = RateLimiter(None, 50, 0)
    limiter.insert(60, 60)
    limiter.draw(10**9)
    assert limiter.may_draw(10**9, 60) and limiter.may_insert(10**9, 60)
    other = RateLimiter(None, 50, 0)
    other.load_state_dict(limiter.state_dict())
    assert other.drawn == limiter.drawn


def test_a_transition_is_an_item_like_any_other():
    shard = MemoryShard(MemorySettings(10), 0)
    rows = Transition(*(np.arange(6, dtype=np.float32)[:, None] for _ in range(5)))
    assert shard.keep(Made(rows, np.arange(6.0))).size == 6
    assert shard.keep(None).total == pytest.approx((np.arange(6.0) ** 0.6).sum())
    assert isinstance(shard.draw(4, 0.5)[1].sample.items, Transition)
