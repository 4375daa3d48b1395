"""Transitions that keep each frame once: what is drawn is what whole stacks would give."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbook.data import Transition, tree_nbytes
from rlbook.parts.envs import Step, make_envs
from rlbook.parts.frame_ring import FramedTransitions, FrameRing, frames_each, stored_bytes
from rlbook.parts.n_step import Trail
from rlbook.parts.replay import PrioritizedReplay, UniformReplay


def a_game(lengths: list[int], rows: int, planes: int, seed: int) -> list[tuple[Any, ...]]:
    """(stack, reward of arriving, ended, begun) of each row of one copy; every second end is a
    termination.
    """
    rng, found, episode = np.random.default_rng(seed), [], 0
    while len(found) < rows:
        stack, last = np.zeros((planes, 1, 2), np.uint8), lengths[episode % len(lengths)]
        for t in range(last + 1):
            stack = np.concatenate([stack[1:], rng.integers(1, 256, (1, 1, 2), np.uint8)])
            ended = t == last
            discount = np.float32(not (ended and episode % 2))
            found.append((stack, np.float32(rng.random()), discount, ended, t == 0))
        episode += 1
    return found[:rows]


def steps_of(games: list[list[tuple[Any, ...]]]) -> list[Step]:
    """The steps between their rows (NEXT_STEP autoreset)."""
    found = []
    for before, after in pairwise(zip(*games, strict=True)):
        seen, _, _, _, _ = (np.stack(column) for column in zip(*before, strict=True))
        obs_t, reward, discount, ended, first = (np.stack(c) for c in zip(*after, strict=True))
        action = (np.arange(len(seen)) + len(found)) % 3
        found.append(Step(seen, action, reward, discount, obs_t, ended, ~first))
    return found


def both_ways(
    steps: list[Step], chunk: int, n: int, rng: np.random.Generator
) -> list[tuple[Any, Any]]:
    """(whole, framed) of each chunk, with priorities."""
    trails, found = (Trail(n, 0.9), Trail(n, 0.9, True)), []
    for at in range(0, len(steps), chunk):
        for step in steps[at : at + chunk]:
            q = rng.random((len(step.ended), 4))
            for trail in trails:
                trail.push(step, q)
        trails[1].load_state_dict(trails[1].state_dict())
        end = rng.random((len(steps[0].ended), 4))
        pair = [trail.fold(end) for trail in trails]
        assert (pair[0] is None) == (pair[1] is None)
        if pair[0] is not None:
            found.append((pair[0], pair[1]))
    return found


def same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and all(
        np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True)
    )


def example(planes: int = 4) -> Transition:
    seen, zero = np.zeros((planes, 1, 2), np.uint8), np.float32(0)
    return Transition(seen, np.int64(0), zero, zero, seen)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    copies=st.integers(1, 3),
    planes=st.integers(2, 5),
    n=st.integers(1, 7),
    chunk=st.integers(1, 25),
    capacity=st.integers(1, 90),
    seed=st.integers(0, 99),
)
def test_what_is_drawn_is_what_whole_stacks_give(lengths, copies, planes, n, chunk, capacity, seed):
    games = [a_game(lengths[i:] + lengths[:i], 120, planes, seed + i) for i in range(copies)]
    rng, draws = np.random.default_rng(seed), 0
    each = frames_each(planes, chunk, n)
    ours = PrioritizedReplay[Any](capacity, seed=seed, example=example(planes), frames=each)
    plain = PrioritizedReplay[Any](capacity, seed=seed)
    for whole, small in both_ways(steps_of(games), chunk, n, rng):
        assert same(small[1:], whole[1:]) and isinstance(small[0], FramedTransitions)
        assert np.array_equal(ours.add(*small), plain.add(*whole))
        ours.check_valid()
        if not len(plain):
            continue
        one, other = ours.sample(9), plain.sample(9)
        assert same(one.items, other.items)
        assert all(np.array_equal(a, b) for a, b in zip(one[1:], other[1:], strict=True))
        priorities = rng.random(9)
        ours.update_priorities(one.keys, priorities)
        plain.update_priorities(other.keys, priorities)
        draws += 1
        if draws == 3:
            state = ours.state()
            ours = PrioritizedReplay(capacity, seed=99, example=example(planes), frames=each)
            ours.load_state(state)
    assert draws or n > 100


def filled(frames: int = 60, capacity: int = 100) -> tuple[UniformReplay[Any], list[Any]]:
    games = [a_game([1_000], frames, 4, i) for i in range(2)]
    pairs = both_ways(steps_of(games), 10, 3, np.random.default_rng(0))
    replay = UniformReplay[Any](capacity, example=example(), frames=frames_each(4, 10, 3))
    for _, small in pairs:
        replay.add(small[0])
    return replay, pairs


def test_frames_are_given_up_with_their_last_transition():
    replay, pairs = filled(200)
    ring: Any = replay._ring
    made = sum(len(small[0].r_t) for _, small in pairs)
    assert made > 300 and len(replay) == 100
    assert 5 <= len(ring._chunks) <= 6, "20 transitions each"
    assert min(chunk.end for chunk in ring._chunks.values()) > ring.oldest_key


def test_bytes_are_told_before_and_hold():
    """Of a long game, to the frames of a chunk of which some transitions are overwritten."""
    for capacity in (40, 400):
        replay, pairs = filled(500, capacity)
        one = pairs[-2][1][0]  # the last one is shorter
        more = replay._ring.held_nbytes - replay.nbytes  # type: ignore[attr-defined]
        assert 0 <= more <= one.frames.nbytes
        told = replay.nbytes / capacity
        assert round(told) == stored_bytes(example(), frames_each(4, 10, 3))
        assert tree_nbytes(one) / len(one.r_t) == pytest.approx(told - 8), "the chunk's number"
    assert stored_bytes(example(), 0.0) == tree_nbytes(example())
    assert frames_each(1, 10, 3) == 0.0 and frames_each(4, 10, 3) == 1.6


def test_of_atari_each_frame_is_kept_once():
    pytest.importorskip("ale_py")
    envs, rng = make_envs("ALE/Breakout-v5", 2, 0), np.random.default_rng(0)
    steps = [envs.transition(rng.integers(4, size=2)) for _ in range(450)]
    assert sum(int(step.ended.sum()) for step in steps) >= 2
    one = Transition(steps[0].obs_t[0], np.int64(0), *[np.float32(0)] * 2, steps[0].obs_t[0])
    ours = UniformReplay[Any](700, example=one, frames=frames_each(4, 25, 3))
    plain = UniformReplay[Any](700)
    for whole, small in both_ways(steps, 25, 3, rng):
        ours.add(small[0])
        plain.add(whole[0])
    assert same(ours.sample(300).items, plain.sample(300).items)
    assert plain.nbytes / ours.nbytes > 6.4


def test_what_comes_from_another_process_is_not_held_on_to():
    replay, pairs = filled()
    state = replay.state()
    expected = replay.sample(50).items
    for _, small in pairs:
        small[0].frames[:] = 0
    replay.load_state({**replay.state(), "rng": state["rng"]})
    assert same(replay.sample(50).items, expected)
    other = filled(40)[0]
    state["frames"] = [frames.copy() for frames in state["frames"]]
    other.load_state(state)
    for frames in state["frames"]:
        frames[:] = 0
    assert same(other.sample(50).items, expected)
    one = pairs[-1][1][0]
    one.frames.flags.writeable = False  # as arrays from another process are
    replay.add(one)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda one: one._replace(frames=one.frames.astype(np.float32)), "frames must be uint8"),
        (
            lambda one: one._replace(frames=one.frames[:, :, :1]),
            r"frames must be uint8 \[F, 1, 2\]",
        ),
        (lambda one: one._replace(frames=one.frames[:-1]), "does not lie within"),
        (lambda one: one._replace(at_tm1=one.at_tm1 - 1), "does not lie within"),
        (lambda one: one._replace(r_t=one.r_t[:-1]), "of one N"),
        (lambda one: one._replace(r_t=one.r_t.astype(float)), "r_t must be float32"),
        (lambda one: example(), "must be FramedTransitions, not Transition"),
    ],
)
def test_items_that_do_not_fit_are_refused_and_nothing_is_stored(change, words):
    replay, pairs = filled()
    before = replay.state()
    with pytest.raises(ValueError, match=words):
        replay.add(change(pairs[-1][1][0]))
    after = replay.state()
    assert before["added"] == after["added"] and len(before["frames"]) == len(after["frames"])
    replay.check_valid()


def test_it_needs_to_be_told_what_a_stack_is():
    for wrong in (None, Transition(*[np.float32(0)] * 5), (1, 2)):
        with pytest.raises(ValueError, match="need an example, a Transition of stacks"):
            UniformReplay[Any](5, example=wrong, frames=1.5)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state["frames"].pop(), "shorter|longer"),
        (lambda state: (state["frames"].pop(), state["ends"].pop()), "missing"),
        (lambda state: state.update(came=state["came"] + 1), "missing"),
        (lambda state: state.update(frames=[f[:9] for f in state["frames"]]), "does not lie"),
        (lambda state: state.update(frames=[f[0] for f in state["frames"]]), "frames must be"),
        (lambda state: state.pop("ends"), "no 'ends'"),
        (lambda state: state["fields"].pop("chunk"), "must have fields"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change, words):
    replay, pairs = filled()
    state, other = replay.state(), filled(40)[0]
    change(state)
    expected = filled(40)[0].sample(20).items
    with pytest.raises(ValueError, match=words):
        other.load_state(state)
    assert same(other.sample(20).items, expected)


def test_check_valid_sees_transitions_without_frames():
    replay, _ = filled()
    ring: Any = replay._ring
    assert isinstance(ring, FrameRing)
    replay.check_valid()
    ring._chunks.pop(max(ring._chunks))
    with pytest.raises(RuntimeError, match="frames"):
        replay.check_valid()
