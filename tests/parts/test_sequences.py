"""Sequences cut from streams: against whole episodes cut by hand, in pieces of any size."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlbook.parts.sequences import Rows, Sequence, SequenceCutter, as_tensors, unpacked

SHAPES = [
    {"burn_in": 2, "length": 4, "overlap": 2, "tail": 2},
    {"burn_in": 0, "length": 4, "overlap": 0, "tail": 1},
    {"burn_in": 5, "length": 3, "overlap": 2, "tail": 4},  # burn-in of more than one period
    {"burn_in": 0, "length": 1, "overlap": 0, "tail": 3},  # transitions
    {"burn_in": 3, "length": 10, "overlap": 5, "tail": 5},  # longer than most episodes
]


def stream(
    env: int, rows: int, rng: np.random.Generator, longest: int = 12
) -> list[dict[str, Any]]:
    """Rows of one copy: each number tells where it is from."""
    found: list[dict[str, Any]] = []
    episode = 0
    while len(found) < rows:
        steps = int(rng.integers(1, longest + 1))
        for t in range(steps + 1):
            mark = 10_000.0 * (env + 1) + 100 * episode + t
            found.append(
                {
                    "observation": np.float32([mark, -mark]),
                    "action": int(mark) % 7,
                    "reward": np.float32(mark + 0.5),
                    "discount": np.float32(not (t == steps - 1 and episode % 2)),
                    "valid": t < steps,
                    "q": np.float32([mark, mark + 1]),
                    "hidden": np.float32([mark + 0.25]),
                    "cell": np.float32([mark + 0.75]),
                }
            )
        episode += 1
    return found[:rows]


def as_rows(streams: list[list[dict[str, Any]]]) -> Rows:
    names = Rows._fields
    columns = {n: np.array([[row[n] for row in one] for one in streams]) for n in names}
    return Rows(**{name: column.swapaxes(0, 1) for name, column in columns.items()})


def by_hand(one: list[dict[str, Any]], shape: dict[str, int], whole: bool) -> list[dict[str, Any]]:
    """The sequences of one copy's stream, each written out; `whole`: of ended episodes alone."""
    warm, m, overlap, n = (shape[name] for name in ("burn_in", "length", "overlap", "tail"))
    episodes: list[list[dict[str, Any]]] = [[]]
    for row in one:
        episodes[-1].append(row)
        if not row["valid"]:
            episodes.append([])
    found = []
    for episode in episodes:
        ended = bool(episode) and not episode[-1]["valid"]
        steps = len(episode) - ended
        learnt, start = 0, 0
        while episode and (learnt < steps or not ended):
            complete = ended or start + m + n <= len(episode)
            if not complete or (whole and not ended):
                break
            rows = range(start - warm, start + m + n)
            found.append({"rows": [episode[t] if 0 <= t < len(episode) else None for t in rows]})
            found[-1]["steps"] = [t for t in range(start, start + m) if t < steps]
            learnt, start = start + m, start + m - overlap
    return found


def same(sequence: Sequence, q: np.ndarray, index: int, wanted: list[Any], shape: Any) -> bool:
    """Whether a sequence is the one that is wanted, field by field; padding must be zero."""
    zero = {name: np.zeros(2 if name in ("observation", "q") else 1) for name in Rows._fields}
    for t, row in enumerate(wanted):
        full = zero if row is None else row
        if not np.array_equal(sequence.observation[index, t], full["observation"]):
            return False
        if t >= shape["burn_in"] and not np.array_equal(q[t - shape["burn_in"], index], full["q"]):
            return False
        if t < len(wanted) - 1:
            counts = row is not None and row["valid"]
            for name in ("action", "reward", "discount"):
                if getattr(sequence, name)[index, t] != (row[name] if counts else 0):
                    return False
            if sequence.valid[index, t] != counts:
                return False
    first = zero if wanted[0] is None else wanted[0]
    return bool(sequence.hidden[index] == first["hidden"] and sequence.cell[index] == first["cell"])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 3, 20, 200])
def test_sequences_are_those_that_are_cut_by_hand(shape, chunk):
    rng = np.random.default_rng(chunk)
    streams = [stream(env, 200, rng) for env in range(3)]
    cutter, found = SequenceCutter(3, **shape), []
    for at in range(0, 200, chunk):
        cut = cutter.push(as_rows([one[at : at + chunk] for one in streams]))
        if cut is not None:
            sequences, q = cut
            assert q.shape[:2] == (shape["length"] + shape["tail"], len(sequences.valid))
            found += [(sequences, q, index) for index in range(len(sequences.valid))]
        assert len(cutter.rows.valid) <= chunk + sum(shape.values()) + 1, "it forgets"
    for one in streams:
        wanted = by_hand(one, shape, whole=False)
        env = one[0]["observation"][0] // 10_000
        mine = [f for f in found if f[0].observation[f[2]].max() // 10_000 == env]
        assert len(mine) == len(wanted) > 20
        for (sequences, q, index), expected in zip(mine, wanted, strict=True):
            assert same(sequences, q, index, expected["rows"], shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_of_an_episode_is_learnt_from_and_none_more_than_its_overlap(shape):
    one = stream(0, 300, np.random.default_rng(5))
    counts: dict[float, int] = {}
    sequences, _ = SequenceCutter(1, **shape).push(as_rows([one]))
    learnt = slice(shape["burn_in"], shape["burn_in"] + shape["length"])
    for marks, valid in zip(
        sequences.observation[:, learnt, 0], sequences.valid[:, learnt], strict=True
    ):
        assert valid.any(), "no sequence is empty"
        for mark in marks[valid]:
            counts[mark] = counts.get(mark, 0) + 1
    last = max(row for row in range(300) if not one[row]["valid"])
    steps = {float(row["observation"][0]) for row in one[:last] if row["valid"]}
    assert steps <= set(counts)
    period = shape["length"] - shape["overlap"]
    assert max(counts.values()) <= -(-shape["length"] // period)


def test_a_sequence_that_crosses_an_episode_would_be_noticed():
    """A planted mistake: with the mark of an episode's end taken away, sequences differ."""
    shape = SHAPES[0]
    one = stream(0, 60, np.random.default_rng(1), longest=5)
    sequences, _ = SequenceCutter(1, **shape).push(as_rows([one]))
    for row in sequences.observation[..., 0]:
        assert len({int(mark) // 100 for mark in row[row > 0]}) == 1
    merged = [{**row, "valid": True} for row in one]
    sequences, _ = SequenceCutter(1, **shape).push(as_rows([merged]))
    crossing = [
        len({int(mark) // 100 for mark in row[row > 0]}) for row in sequences.observation[..., 0]
    ]
    assert max(crossing) > 1


def test_saved_and_restored_it_goes_on():
    shape = SHAPES[2]
    rows = as_rows([stream(env, 90, np.random.default_rng(env)) for env in range(2)])
    early, late = (Rows(*(c[part] for c in rows)) for part in (slice(0, 37), slice(37, 90)))
    one, other = SequenceCutter(2, **shape), SequenceCutter(2, **shape)
    one.push(early)
    other.load_state_dict(one.state_dict())
    for mine, theirs in zip(one.push(late)[0], other.push(late)[0], strict=True):
        assert np.array_equal(mine, theirs)
    one.clear()
    fresh = SequenceCutter(2, **shape)
    for mine, theirs in zip(one.push(early)[0], fresh.push(early)[0], strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize(
    "wrong", [{"overlap": 4}, {"overlap": -1}, {"burn_in": -1}, {"tail": 0}, {"length": 0}]
)
def test_shapes_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="sequences need"):
        SequenceCutter(1, **{**SHAPES[0], **wrong})


# -- stacks of frames ------------------------------------------------------------------------------


def frames_stream(steps: list[int], planes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stacks [T, k, 1, 2] of episodes of so many steps, and which rows begin a step."""
    rng, rows, valid = np.random.default_rng(seed), [], []
    for count in steps:
        stack = np.zeros((planes, 1, 2), np.uint8)
        for t in range(count + 1):
            stack = np.concatenate([stack[1:], rng.integers(1, 256, (1, 1, 2), np.uint8)])
            rows.append(stack)
            valid.append(t < count)
    return np.stack(rows), np.array(valid)


def as_stacks(streams: list[tuple[np.ndarray, np.ndarray]], length: int) -> Rows:
    observation = np.stack([one[0][:length] for one in streams], 1)
    valid = np.stack([one[1][:length] for one in streams], 1)
    number = np.arange(length * len(streams)).reshape(length, -1)
    wide = number[..., None].astype(np.float32)
    one = np.ones_like(number, np.float32)
    return Rows(observation, number, number + one, one, valid, wide, wide + 1, wide + 2)


@given(
    steps=st.lists(st.lists(st.integers(1, 14), min_size=4, max_size=9), min_size=1, max_size=3),
    planes=st.integers(2, 5),
    shape=st.sampled_from(SHAPES),
    chunk=st.integers(1, 30),
)
def test_sequences_that_hold_each_frame_once_hold_the_same(steps, planes, shape, chunk):
    streams = [frames_stream(one, planes, seed) for seed, one in enumerate(steps)]
    length = min(len(one[1]) for one in streams)
    rows = as_stacks(streams, length)
    cutters = [SequenceCutter(len(steps), **shape, planes=k) for k in (1, planes)]
    size = shape["burn_in"] + shape["length"] + shape["tail"]
    for at in range(0, length, chunk):
        part = Rows(*(column[at : at + chunk] for column in rows))
        whole, small = (cutter.push(part) for cutter in cutters)
        assert (whole is None) == (small is None)
        if at > 20:  # what is held goes through a checkpoint
            fresh = SequenceCutter(len(steps), **shape, planes=planes)
            fresh.load_state_dict(cutters[1].state_dict())
            cutters[1] = fresh
        if whole is None or small is None:
            continue
        for name, one, other in zip(Sequence._fields, whole[0], small[0], strict=True):
            assert name == "observation" or np.array_equal(one, other)
        assert np.array_equal(whole[1], small[1])
        assert small[0].observation.shape[1:] == (size + planes - 1, 1, 2)
        again = unpacked(as_tensors(small[0]), small[0].valid.T)
        assert torch.equal(again.observation, as_tensors(whole[0]).observation)
        assert again.observation.dtype == torch.uint8
        same = unpacked(as_tensors(whole[0]), whole[0].valid.T)
        assert torch.equal(same.observation, again.observation), "whole ones stay"


def test_a_cutter_of_frames_keeps_one_frame_a_row():
    rows = as_stacks([frames_stream([9] * 20, 4, 0)], 200)
    cutter = SequenceCutter(1, **SHAPES[0], planes=4)
    cutter.push(rows)
    assert cutter.rows is not None and cutter.rows.observation.shape[1:] == (1, 1, 2)
    assert len(cutter.rows.valid) < 20
