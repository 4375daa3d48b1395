"""Codecs against slow readings of their definitions; what is sent plus what is left is the sum."""

import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.plumbing import blobs, codecs
from rlbook.plumbing.codecs import (
    Codec,
    DeltaDecoder,
    DeltaEncoder,
    ErrorFeedback,
    Half,
    Identity,
    Int8,
    Sign,
    TopK,
    decode,
    make_codec,
    ratio,
)

NAMES = [
    "none",
    "fp16",
    "int8",
    "sign",
    "topk:0.01+fp16",
    "topk:0.2+none",
    "topk:0.2+int8",
    "topk:0.5+sign",
    "topk:1.0+none",
]
FLOATS = (np.float32, np.float64)
every_codec = pytest.mark.parametrize("name", NAMES)
every_dtype = pytest.mark.parametrize("dtype", FLOATS)


def vectors(
    largest: float = 1e6, length: int | None = None, dtype: Any = None
) -> st.SearchStrategy[np.ndarray]:
    """Finite vectors, zeros and equal values among them; up to several blocks of 256 long."""
    kinds = st.just(dtype) if dtype is not None else st.sampled_from(FLOATS)
    lengths = st.just(length) if length is not None else st.sampled_from([0, 1, 2, 7, 8, 9, 300])

    def of(kind: Any) -> st.SearchStrategy[np.ndarray]:
        most = float(kind(min(largest, float(np.finfo(kind).max))))
        width = np.dtype(kind).itemsize * 8
        numbers = st.floats(-most, most, width=width)
        few = st.sampled_from([0.0, -0.0, 1.0, -1.0, float(kind(0.1)), most, -most])
        elements = st.one_of(numbers, few)
        return hnp.arrays(kind, lengths, elements=elements, fill=few)

    return kinds.flatmap(of)


def normal(size: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size).astype(dtype)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


# ---------------------------------------------------------------- literal readings, value by value


def slow_half(x: np.ndarray) -> list[float]:
    """Python's own half precision; what it finds too large becomes the largest half."""
    said = []
    for value in x.tolist():
        try:
            said.append(struct.unpack("<e", struct.pack("<e", value))[0])
        except OverflowError:
            said.append(math.copysign(65504.0, value))
    return said


def slow_int8(x: np.ndarray) -> list[float]:
    said: list[float] = []
    for start in range(0, len(x), 256):
        block = [float(value) for value in x[start : start + 256]]
        scale = float(x.dtype.type(max(abs(value) for value in block) / 127))
        said += [round(value / scale) * scale if scale else 0.0 for value in block]
    return said


def slow_sign(x: np.ndarray) -> list[float]:
    mean = math.fsum(abs(float(value)) for value in x) / max(1, len(x))
    return [mean if value >= 0 else -mean for value in x]


def slow_top(x: np.ndarray, k: int) -> list[int]:
    """Sorted by size, then by index: the first k."""
    return sorted(sorted(range(len(x)), key=lambda i: (-abs(float(x[i])), i))[:k])


@settings(deadline=None)
@given(x=vectors(largest=1e30))
def test_half_is_pythons_half(x: np.ndarray) -> None:
    # From float64, the nearest half is found in one step; from float32 as well.
    assert decode(Half().encode(x)).tolist() == slow_half(x)


@settings(deadline=None)
@given(x=vectors())
def test_int8_is_the_nearest_multiple_of_the_blocks_scale(x: np.ndarray) -> None:
    found, wanted = decode(Int8().encode(x)), np.array(slow_int8(x))
    steps = np.repeat([np.abs(x[i : i + 256]).max() / 127 for i in range(0, len(x), 256)], 256)
    step = steps[: len(x)].astype(np.float64)
    # Where a value lies between two multiples, rounding of the division may take the other one.
    tiny = float(np.finfo(x.dtype).tiny)
    assert np.all(np.abs(found.astype(np.float64) - x) <= step * 0.50001 + 200 * tiny)
    halves = np.abs(np.abs(x.astype(np.float64) - wanted) - step / 2) < step * 1e-4
    near = np.abs(found - wanted) <= step * 1e-4 + 200 * tiny
    assert np.all(near | halves)


@settings(deadline=None)
@given(x=vectors())
def test_sign_is_the_mean_size_with_each_sign(x: np.ndarray) -> None:
    found = decode(Sign().encode(x))
    assert found == pytest.approx(slow_sign(x), rel=1e-5, abs=1e-30)
    assert ((found >= 0) == (x >= 0)).all() or not found.any()


@settings(deadline=None)
@given(x=vectors(), fraction=st.sampled_from([0.01, 0.1, 0.34, 1.0]))
def test_top_k_is_the_first_of_the_sorted(x: np.ndarray, fraction: float) -> None:
    k = min(len(x), max(1, math.ceil(round(fraction * len(x), 9))))
    wanted = np.zeros_like(x)
    chosen = slow_top(x, k)
    wanted[chosen] = x[chosen]
    blob = TopK(fraction, Identity()).encode(x)
    assert same_bits(decode(blob), wanted)
    inner = decode(Half().encode(x[chosen]))  # the entries by another codec: the same positions
    wanted[chosen] = inner
    assert same_bits(decode(TopK(fraction, Half()).encode(x)), wanted)


@every_dtype
def test_by_hand(dtype: Any) -> None:
    x = np.array([3.0, -1.0, 0.0, 4.0], dtype)
    assert decode(Sign().encode(x)).tolist() == [2.0, -2.0, 2.0, 2.0]  # (3 + 1 + 0 + 4) / 4
    assert decode(TopK(0.5).encode(x)).tolist() == [3.0, 0.0, 0.0, 4.0]
    assert decode(TopK(0.01).encode(x)).tolist() == [0.0, 0.0, 0.0, 4.0]  # at least one
    equal = np.array([1.0, -1.0, 1.0, 2.0, -1.0], dtype)
    assert decode(TopK(0.6).encode(equal)).tolist() == [1.0, -1.0, 0.0, 2.0, 0.0]
    assert decode(Int8().encode(np.array([127.0, -2.4, 0.6], dtype))).tolist() == [127, -2, 1]
    assert decode(Half().encode(np.array([1e6, -1e6], dtype))).tolist() == [65504.0, -65504.0]


@every_dtype
def test_identity_keeps_every_bit(dtype: Any) -> None:
    x = np.array([0.0, -0.0, np.nan, np.inf, np.finfo(dtype).max, 5e-324, 0.1], dtype)
    for vector in (x, x[::2], np.zeros(0, dtype)):
        assert same_bits(decode(Identity().encode(vector)), vector)


def test_an_outlier_spoils_its_own_block_alone() -> None:
    x = normal(512)
    alone = decode(Int8().encode(x))
    x[0] = 1e6
    beside = decode(Int8().encode(x))
    assert same_bits(beside[256:], alone[256:])
    assert not beside[1:256].any()  # one scale is 7,874: all others round to 0


def test_k_is_of_the_decimal_that_was_written() -> None:
    assert [TopK(0.07).count(size) for size in (100, 101, 1, 0)] == [7, 8, 1, 0]
    assert 0.07 * 100 > 7


@pytest.mark.parametrize(
    ("positions", "size", "bytes_each"),
    [
        ([0, 255], 300, 1),
        ([255, 256], 300, 1),
        ([256, 257], 300, 2),
        ([0, 257], 300, 2),
        ([0, 65_535], 70_000, 2),
        ([65_535, 65_536], 70_000, 2),
        ([65_536, 65_537], 70_000, 4),
        ([1, 65_538], 70_000, 4),
        ([0, 1, 69_999], 70_000, 4),
    ],
)
def test_positions_at_the_edges_of_their_integers(
    positions: list[int], size: int, bytes_each: int
) -> None:
    x = np.zeros(size, np.float32)
    x[positions] = np.arange(1, len(positions) + 1)
    blob = TopK((len(positions) - 0.5) / size, Identity()).encode(x)
    assert same_bits(decode(blob), x)
    assert len(blob) == 8 + 5 + len(positions) * bytes_each + 8 + len(positions) * 4


# ---------------------------------------------------------------- all codecs alike


@every_codec
@settings(deadline=None, max_examples=40)
@given(x=vectors(largest=math.inf))
def test_a_blob_says_itself_what_it_is(name: str, x: np.ndarray) -> None:
    codec = make_codec(name)
    before = x.tobytes()
    blob = codec.encode(x)
    found = codec.decode(blob)
    assert (found.dtype, found.shape) == (x.dtype, x.shape) and found.flags.writeable
    assert np.isfinite(found).all()  # whatever was finite stays so
    for other in (decode(blob), Sign().decode(bytearray(blob)), decode(memoryview(blob))):
        assert same_bits(other, found)
    assert codec.encode(x) == blob and x.tobytes() == before  # pure


@every_codec
@every_dtype
def test_the_length_of_a_blob_is_what_travels(name: str, dtype: Any) -> None:
    """Known before, and nearly the size that a message on the wire really has."""
    size, item = 9_000, np.dtype(dtype).itemsize
    x, codec = normal(size, dtype=dtype), make_codec(name)
    blob = codec.encode(x)

    def plain(kind: Codec, count: int) -> int:
        scales = -(-count // 256) * item
        sizes = {"none": count * item, "fp16": 2 * count, "int8": scales + count}
        return 8 + sizes.get(kind.name, item + -(-count // 8))

    if isinstance(codec, TopK):
        k = codec.count(size)
        wide = 2 if k < 1000 else 1  # the widest gap between 90 of 9,000 is above 255
        assert len(blob) == 8 + 5 + k * wide + plain(codec.values, k)
    else:
        assert len(blob) == plain(codec, size)
    assert ratio(blob, x) == size * item / len(blob)
    message = cloudpickle.dumps(blob, protocol=5)
    assert 0 < len(message) - len(blob) <= 64
    assert pickle.loads(message) == blob


def test_one_percent_in_halves_is_fifty_times_smaller() -> None:
    """Of a network as small as Catch's, and of one of 1.7 million weights."""
    for size, least in ((1_000, 50), (9_000, 90), (1_700_000, 95)):
        x = normal(size)
        assert ratio(make_codec("topk:0.01+fp16").encode(x), x) >= least


@every_codec
def test_a_lossy_codec_keeps_a_part_of_the_vector(name: str) -> None:
    """‖x − C(x)‖² ≤ (1 − δ)‖x‖²: what the proofs of convergence ask (Stich et al. 2018, def. 2.1).

    δ = k / P for top-k, and ‖x‖₁² / (P ‖x‖²) for the scaled sign (Karimireddy et al. 2019).
    """
    codec = make_codec(name)
    for seed in range(5):
        x = normal(1_000, seed, np.float64) ** 3
        error = float(np.sum((x - decode(codec.encode(x))) ** 2))
        square = float(np.sum(x**2))
        if name == "sign":
            assert error == pytest.approx(square - np.abs(x).sum() ** 2 / len(x))
        elif isinstance(codec, TopK) and isinstance(codec.values, Identity):
            assert error <= (1 - codec.count(len(x)) / len(x)) * square + 1e-12
        assert error < square


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_a_lossy_codec_refuses_what_is_not_finite(name: str) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        x = normal(300)
        x[7] = bad
        with pytest.raises(ValueError, match=f"1 of 300 values .* at index 7: {bad}"):
            make_codec(name).encode(x)


@every_codec
@pytest.mark.parametrize(
    "vector",
    [np.zeros((2, 2), np.float32), np.zeros(3, np.int64), np.zeros(3, np.float16), [1.0, 2.0]],
)
def test_only_flat_floats_are_vectors(name: str, vector: Any) -> None:
    with pytest.raises(ValueError, match="flat numpy array of float32 or float64"):
        make_codec(name).encode(vector)


# ---------------------------------------------------------------- names


@every_codec
def test_names_lead_back(name: str) -> None:
    codec = make_codec(name)
    assert codec.name == name and make_codec(codec.name) == codec


def test_top_k_without_a_plus_is_in_halves() -> None:
    assert make_codec("topk:0.01") == TopK(0.01) == TopK(0.01, Half())


@pytest.mark.parametrize(
    "text",
    ["", "zip", "fp16:3", "topk", "topk:", "topk:0", "topk:1.1", "topk:nan", "topk:0.1+"]
    + ["topk:0.1+topk:0.1", "topk:0.1+zip", "sign+fp16", "topk:x", "topk:-1"],
)
def test_an_unknown_name_is_told_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match="there are none, fp16, int8, sign, topk:F and topk:F.V"):
        make_codec(text)


def test_top_k_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1, not 0"):
        TopK(0.0)
    with pytest.raises(ValueError, match="cannot be another TopK"):
        TopK(0.1, TopK(0.1))


# ---------------------------------------------------------------- damaged blobs


@every_codec
def test_a_cut_or_lengthened_blob_is_refused(name: str) -> None:
    blob = make_codec(name).encode(normal(300))
    for length in range(len(blob)):
        with pytest.raises(ValueError, match="^damaged blob: .*$"):
            decode(blob[:length])
    with pytest.raises(ValueError, match="damaged blob"):
        decode(blob + b"\0")


@every_codec
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_changed_byte_is_refused_or_is_another_vector(name: str, data: st.DataObject) -> None:
    blob = bytearray(make_codec(name).encode(normal(300)))
    # The size in the header comes last: a large one is a large vector, of zeros above all.
    places = [i for i in range(len(blob)) if i not in (6, 7)]
    blob[data.draw(st.sampled_from(places))] = data.draw(st.integers(0, 255))
    try:
        found = decode(blob)
    except ValueError as error:
        assert str(error).startswith("damaged blob: ") and "\n" not in str(error)
    else:
        assert found.ndim == 1 and found.dtype in FLOATS


@given(blob=st.binary(max_size=60), ours=st.booleans())
def test_other_bytes_are_refused(blob: bytes, ours: bool) -> None:
    if ours:  # of a size that fits into memory
        blob = b"rc" + blob[:4] + b"\0\0" + blob[4:]
    try:
        decode(blob)
    except ValueError as error:
        assert str(error).startswith("damaged blob: ")


def test_a_blob_of_a_blob_of_a_blob_is_refused() -> None:
    inner = TopK(1.0).encode(np.ones(1, np.float32))
    nested = blobs.framed(
        blobs.TOPK, np.ones(1, np.float32), struct.pack("<IB", 1, 0), b"\0", inner
    )
    with pytest.raises(ValueError, match="damaged blob"):
        decode(nested)


@pytest.mark.parametrize("entries", [np.ones(2, np.float64), np.ones(1, np.float32)])
def test_entries_of_another_dtype_or_number_are_refused(entries: np.ndarray) -> None:
    """Two positions of a float32 vector; one entry would fill both, two doubles be rounded."""
    top, inner = struct.pack("<IB", 2, 0), Identity().encode(entries)
    blob = blobs.framed(blobs.TOPK, np.ones(5, np.float32), top, b"\0\1", inner)
    with pytest.raises(ValueError, match="do not belong together"):
        decode(blob)
    right = Identity().encode(np.ones(2, np.float32))
    blob = blobs.framed(blobs.TOPK, np.ones(5, np.float32), top, b"\0\1", right)
    assert decode(blob).tolist() == [1.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(("place", "value"), [(0, 0), (1, 0), (2, 5), (3, 2)])
def test_another_mark_kind_or_dtype_is_refused(place: int, value: int) -> None:
    blob = bytearray(Identity().encode(normal(9)))
    blob[place] = value
    with pytest.raises(ValueError, match="does not begin as a codec's blob does"):
        decode(blob)


@pytest.mark.parametrize("width", [3, 200])
def test_another_width_of_positions_is_refused(width: int) -> None:
    blob = bytearray(TopK(0.5).encode(normal(9)))
    blob[8 + 4] = width
    with pytest.raises(ValueError, match="do not fit into it"):
        decode(blob)


def test_what_is_no_blob_is_refused() -> None:
    with pytest.raises(ValueError, match="a blob is bytes, not ndarray"):
        decode(normal(9))  # type: ignore[arg-type]


# ---------------------------------------------------------------- error feedback


def assert_nothing_is_lost(
    sender: ErrorFeedback, steps: list[np.ndarray], kept: Callable[[], Any]
) -> None:
    """Σ decode(sent) + residual = Σ vectors, to the rounding of one addition a step."""
    sent = np.zeros(len(steps[0]))
    largest = 0.0
    for vector in steps:
        sent += decode(sender.encode(vector))
        largest = max(largest, *np.abs(vector), *np.abs(kept()), 1e-30)
    total = np.sum(np.asarray(steps, np.float64), axis=0)
    error = np.abs(sent + kept().astype(np.float64) - total).max()
    epsilon = float(np.finfo(steps[0].dtype).eps)
    assert error <= 4 * (len(steps) + 1) * epsilon * max(largest, float(np.abs(sent).max()))


@every_codec
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_is_sent_and_what_is_left_is_the_sum(name: str, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    length = data.draw(st.sampled_from([1, 9, 300]))
    steps = data.draw(st.lists(vectors(1e5, length, dtype), min_size=1, max_size=6))
    sender = ErrorFeedback(make_codec(name))
    assert_nothing_is_lost(sender, steps, lambda: sender.residual)


class Forgets(ErrorFeedback):
    """The mistake: what was left out last time is not said this time."""

    def encode(self, vector: np.ndarray) -> bytes:
        self.residual = None
        return super().encode(vector)


class Blind(ErrorFeedback):
    """The mistake: the residual is of the vector, not of what was really said."""

    def encode(self, vector: np.ndarray) -> bytes:
        blob = super().encode(vector)
        self.residual = vector - decode(blob)
        return blob


@pytest.mark.parametrize("mistake", [Forgets, Blind])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("none", "topk:1.0+none")])
def test_a_forgotten_residual_is_found(name: str, mistake: type[ErrorFeedback]) -> None:
    sender = mistake(make_codec(name))
    with pytest.raises(AssertionError):
        assert_nothing_is_lost(
            sender, [normal(300, seed) for seed in range(6)], lambda: sender.residual
        )


@every_codec
def test_without_error_feedback_something_is_lost(name: str) -> None:
    """The same constant gradient 400 times: with feedback the mean arrives, else only a part."""
    gradient = normal(256)
    gradient[:5] = [1e-4, -1e-4, 3.0, 1e-9, 0.01]
    codec, sender = make_codec(name), ErrorFeedback(make_codec(name))
    bare = np.mean([decode(codec.encode(gradient)) for _ in range(400)], axis=0, dtype=np.float64)
    fed = np.mean([decode(sender.encode(gradient)) for _ in range(400)], axis=0, dtype=np.float64)
    norm = np.linalg.norm(gradient)
    lossless = name in ("none", "topk:1.0+none")
    if lossless:
        assert same_bits(decode(codec.encode(gradient)), gradient)
        return
    assert np.linalg.norm(fed - gradient) < 0.3 * np.linalg.norm(bare - gradient)
    assert np.linalg.norm(fed - gradient) < 0.15 * norm


@every_dtype
def test_identity_with_feedback_keeps_every_bit(dtype: Any) -> None:
    sender = ErrorFeedback(Identity())
    for _ in range(3):
        x = np.array([0.0, -0.0, 0.1, np.finfo(dtype).max, 5e-324], dtype)
        assert same_bits(decode(sender.encode(x)), x)
        assert sender.residual is not None and not sender.residual.any()


@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_sent(name: str, bad: float) -> None:
    sender, untouched = ErrorFeedback(make_codec(name)), ErrorFeedback(make_codec(name))
    for one in (sender, untouched):
        one.encode(normal(300))
    x = normal(300, 1)
    x[[7, 8]] = bad
    with pytest.raises(ValueError, match="2 of 300 .* nothing sent, the residual is unchanged"):
        sender.encode(x)
    assert sender.encode(normal(300, 2)) == untouched.encode(normal(300, 2))


def test_vectors_must_stay_alike() -> None:
    sender = ErrorFeedback(Sign())
    sender.encode(normal(300))
    for other in (normal(299), normal(300, dtype=np.float64)):
        with pytest.raises(ValueError, match="does not fit those before, of 300 float32"):
            sender.encode(other)


@every_codec
def test_feedback_continues_from_its_state(name: str, tmp_path: Path) -> None:
    """Through a checkpoint on disk; the state is a copy."""
    sender = ErrorFeedback(make_codec(name))
    assert sender.state_dict()["residual"] is None
    sender.encode(normal(300))
    save_checkpoint(tmp_path / "state.npz", sender.state_dict())
    uninterrupted = [sender.encode(normal(300, seed)) for seed in (1, 2)]
    resumed = ErrorFeedback(make_codec(name))
    resumed.load_state_dict(load_checkpoint(tmp_path / "state.npz"))
    assert [resumed.encode(normal(300, seed)) for seed in (1, 2)] == uninterrupted


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    sender = ErrorFeedback(Sign())
    sender.encode(normal(300))
    residual = sender.residual
    other = ErrorFeedback(Half()).state_dict()
    broken = {"codec": "sign", "residual": np.full(3, np.nan, np.float32)}
    for state, why in ((other, "codec fp16, not sign"), ({}, "no state"), (broken, "not finite")):
        with pytest.raises(ValueError, match=why):
            sender.load_state_dict(state)
        assert sender.residual is residual


# ---------------------------------------------------------------- delta updates


def walk(steps: int, size: int = 600, dtype: Any = np.float32) -> list[np.ndarray]:
    """Weights that move a little at each step."""
    weights = normal(size, 0, dtype)
    moved = [weights]
    for seed in range(1, steps):
        weights = weights + (0.01 * normal(size, seed, dtype)).astype(dtype)
        moved.append(weights)
    return moved


@every_codec
@every_dtype
def test_the_shadow_is_what_the_receiver_has(name: str, dtype: Any) -> None:
    encoder, decoder = DeltaEncoder(make_codec(name)), DeltaDecoder()
    for version, weights in enumerate(walk(30, dtype=dtype)):
        found = decoder.apply(encoder.encode(weights, 3 * version))
        assert encoder.shadow is not None and same_bits(encoder.shadow, found)
        assert found is decoder.weights and decoder.version == encoder.version == 3 * version
        if version == 0 or name == "none":
            assert same_bits(found, weights)  # whole, and exact


@settings(deadline=None, max_examples=60)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_the_shadow_is_what_the_receiver_has_whatever_comes(data: st.DataObject, name: str) -> None:
    dtype = data.draw(st.sampled_from(FLOATS))
    encoder, decoder = DeltaEncoder(make_codec(name)), DeltaDecoder()
    for version in range(data.draw(st.integers(1, 6))):
        if data.draw(st.booleans()):
            encoder.reset()
        decoder.apply(encoder.encode(data.draw(vectors(1e8, 9, dtype)), version))
        assert encoder.shadow is not None and decoder.weights is not None
        assert same_bits(encoder.shadow, decoder.weights)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "topk:0.01+fp16"])
def test_errors_of_updates_do_not_add_up(name: str) -> None:
    """After 300 updates the receiver is as near as after 100; and still weights are all reached."""
    encoder, decoder = DeltaEncoder(make_codec(name)), DeltaDecoder()
    distance = []
    for version, weights in enumerate(walk(300)):
        found = decoder.apply(encoder.encode(weights, version))
        distance.append(float(np.linalg.norm(found - weights)))
    assert np.mean(distance[200:]) <= 1.2 * np.mean(distance[50:100]) + 1e-6
    for version in range(300, 400):
        found = decoder.apply(encoder.encode(weights, version))
    assert np.linalg.norm(found - weights) <= 0.1 * np.mean(distance[200:]) + 1e-5


def test_differences_that_forget_what_was_left_out_do_add_up() -> None:
    """The planted mistake that the test above looks for."""
    codec, weights = make_codec("topk:0.2+none"), walk(300)
    found, distance = weights[0], []
    for before, after in zip(weights, weights[1:], strict=False):
        found = found + decode(codec.encode(after - before))  # no shadow: the last weights instead
        distance.append(float(np.linalg.norm(found - after)))
    assert np.mean(distance[200:]) > 1.5 * np.mean(distance[50:100])


def state_of(decoder: DeltaDecoder) -> tuple[Any, ...]:
    return None if decoder.weights is None else decoder.weights.tobytes(), decoder.version


@pytest.mark.parametrize("name", ["fp16", "topk:0.2+none"])
def test_a_difference_to_other_weights_is_refused(name: str) -> None:
    encoder, decoder = DeltaEncoder(make_codec(name)), DeltaDecoder()
    weights = walk(6)
    # The same version twice: the number of the update tells them apart.
    updates = [encoder.encode(weights[v], version) for v, version in enumerate([0, 1, 1, 1, 2])]
    with pytest.raises(ValueError, match="number -?0, version -1: reset the encoder"):
        decoder.apply(updates[1])  # nothing to add it to
    wrong = {0: [2, 3, 4], 1: [1, 3, 4], 2: [1, 2, 4], 3: [1, 2, 3]}
    for now, others in wrong.items():
        decoder.apply(updates[now])
        for other in others:
            before = state_of(decoder)
            with pytest.raises(ValueError, match=f"the update is number {other}, .*reset"):
                decoder.apply(updates[other])
            assert state_of(decoder) == before
    decoder.apply(updates[4])
    assert encoder.shadow is not None and decoder.weights is not None
    assert same_bits(decoder.weights, encoder.shadow)


@every_dtype
def test_updates_with_identity_are_exact_where_differences_are_not(dtype: Any) -> None:
    before, after = np.array([1e8], dtype), np.array([0.1], dtype)
    assert not same_bits(before + (after - before), after)
    encoder, decoder = DeltaEncoder(Identity()), DeltaDecoder()
    for version, weights in enumerate([before, after]):
        assert same_bits(decoder.apply(encoder.encode(weights, version)), weights)


@every_codec
def test_updates_continue_from_their_states(name: str, tmp_path: Path) -> None:
    """Both sides through a checkpoint on disk, before the first update and after the second."""
    weights = walk(4)
    for begun in (0, 2):
        encoder, decoder = DeltaEncoder(make_codec(name)), DeltaDecoder()
        for version in range(begun):
            decoder.apply(encoder.encode(weights[version], version))
        state = {"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}
        save_checkpoint(tmp_path / "state.npz", state)
        later = [encoder.encode(w, 2 + v) for v, w in enumerate(weights[2:])]
        kept = load_checkpoint(tmp_path / "state.npz")
        resumed, receiver = DeltaEncoder(make_codec(name)), DeltaDecoder()
        resumed.load_state_dict(kept["encoder"])
        receiver.load_state_dict(kept["decoder"])
        assert state_of(receiver) == state_of(decoder)
        assert [resumed.encode(w, 2 + v) for v, w in enumerate(weights[2:])] == later
        for update in later:
            assert same_bits(receiver.apply(update), decoder.apply(update))


def test_states_are_copies_and_what_does_not_fit_changes_nothing() -> None:
    encoder, decoder, sender = DeltaEncoder(Half()), DeltaDecoder(), ErrorFeedback(Half())
    decoder.apply(encoder.encode(normal(9), 0))
    sender.encode(normal(9))
    sides: list[tuple[Any, str, str]] = [
        (encoder, "weights", "shadow"),
        (decoder, "weights", "weights"),
        (sender, "residual", "residual"),
    ]
    for side, key, name in sides:
        before, state = getattr(side, name), side.state_dict()
        kept = before.copy()
        state[key][:] = np.nan
        assert same_bits(before, kept)
        for bad, why in (({}, "no state"), (state, "9 of 9 values are not finite")):
            with pytest.raises(ValueError, match=why):
                side.load_state_dict(bad)
            assert getattr(side, name) is before
    with pytest.raises(ValueError, match="codec sign, not fp16"):
        encoder.load_state_dict(DeltaEncoder(Sign()).state_dict())


def test_a_reset_begins_anew() -> None:
    """A restored server is at an older version, and sends whole weights first."""
    encoder, decoder, weights = DeltaEncoder(Sign()), DeltaDecoder(), walk(3)
    decoder.apply(encoder.encode(weights[0], 5))
    lost = encoder.encode(weights[1], 6)
    encoder.reset()
    assert same_bits(decoder.apply(encoder.encode(weights[2], 2)), weights[2])
    with pytest.raises(ValueError, match="reset the encoder"):
        decoder.apply(lost)
    newcomer = DeltaDecoder()
    decoder.apply(encoder.encode(weights[1], 3))
    with pytest.raises(ValueError, match="reset the encoder"):
        newcomer.apply(encoder.encode(weights[1], 4))


def test_versions_do_not_fall_and_weights_stay_alike() -> None:
    encoder = DeltaEncoder(Half())
    with pytest.raises(ValueError, match="version -2"):
        encoder.encode(normal(9), -2)
    encoder.encode(normal(9), 4)
    shadow, bad = encoder.shadow, np.full(9, np.nan, np.float32)
    for weights, version, why in (
        (normal(9), 3, "version 3 comes after version 4"),
        (normal(8), 5, "weights of 8 float32 does not fit|weights of 8 float32 do not fit"),
        (bad, 5, "9 of 9 values are not finite"),
    ):
        with pytest.raises(ValueError, match=why):
            encoder.encode(weights, version)
        assert encoder.shadow is shadow and encoder.version == 4


def test_nobody_changes_the_weights_by_accident() -> None:
    encoder, decoder, mine = DeltaEncoder(Half()), DeltaDecoder(), normal(9)
    found = decoder.apply(encoder.encode(mine, 0))
    mine[0] = 7.0  # the learner goes on with its own array
    assert encoder.shadow is not None and same_bits(encoder.shadow, found)
    for array in (found, encoder.shadow):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1.0
    old = found.copy()
    decoder.apply(encoder.encode(mine, 1))
    assert same_bits(found, old)  # each update is a new array


@pytest.mark.parametrize("cut", [0, 1, 2, 22, 23, 30, 40])
def test_a_damaged_update_is_refused(cut: int) -> None:
    update = DeltaEncoder(Half()).encode(normal(9), 0)
    assert len(update) == codecs.DELTA_HEADER.size + 8 + 9 * 4
    with pytest.raises(ValueError, match="^damaged (update|blob)"):
        DeltaDecoder().apply(update[:cut])
    with pytest.raises(ValueError, match="damaged update"):
        DeltaDecoder().apply(Half().encode(normal(30)))
    with pytest.raises(ValueError, match="damaged update"):
        DeltaDecoder().apply(None)  # type: ignore[arg-type]
