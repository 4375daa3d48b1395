"""The parameter server: k shards do what one does; nothing pushed is lost; sums come out right."""

import os
import signal

import numpy as np
import pytest

from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.codecs import DeltaDecoder, Half, Identity, TopK, decode, make_codec
from rlbook.plumbing.param_server import ParameterServer, alive, shard_bounds
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime
from rlbook.plumbing.shard import OPTIMIZERS, Aggregator, Gradient, ServerSettings, Shard
from rlbook.plumbing.virtual import VirtualRuntime

SIZE = 101
START = np.random.default_rng(0).normal(size=SIZE).astype(np.float32)


def gradients(count: int, seed: int = 1, dtype=np.float32) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=SIZE).astype(dtype) for _ in range(count)]


def pieces(runtime, vector, server, version=0, samples=1, magnitude=1.0, codec=None):
    """References to a gradient's pieces, as if a worker had returned them."""
    codec = codec or Identity()
    return [
        runtime.put(Gradient(codec.encode(vector[a:b]), version, samples, magnitude))
        for a, b in server.bounds
    ]


def virtual(seed=1, **cluster):
    return VirtualRuntime(seed, Cluster(nodes=(Node(cores=8),), **cluster))


def test_bounds_cover_everything_once_and_evenly():
    for shards in (1, 2, 7, 100, 101):
        bounds = shard_bounds(SIZE, shards)
        assert [i for a, b in bounds for i in range(a, b)] == list(range(SIZE))
        sizes = {b - a for a, b in bounds}
        assert max(sizes) - min(sizes) <= 1
    for shards in (0, 102):
        with pytest.raises(ValueError, match="shards: must be 1 to 101"):
            shard_bounds(SIZE, shards)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("codec", ["none", "fp16"])
def test_k_shards_are_one_shard_bit_for_bit(optimizer, codec):
    """Also refusals: each shard judges alone, and all agree."""
    settings = ServerSettings(optimizer, 0.01, max_staleness=3, max_sigmas=3.0)
    found = []
    for shards in (1, 2, 3, 16):
        with virtual() as runtime:
            server = ParameterServer(runtime, START, shards, settings, snapshot_every=7)
            rng = np.random.default_rng(2)
            for i, vector in enumerate(gradients(60)):
                about = {"version": max(0, i - rng.integers(8)), "magnitude": rng.lognormal()}
                server.push(pieces(runtime, vector, server, **about, codec=make_codec(codec)))
            found.append((server.weights(), server.receipts()))
    for weights, receipts in found[1:]:
        assert np.array_equal(weights, found[0][0])
        assert receipts == found[0][1]
    reasons = {reason for receipt in found[0][1] for reason in receipt.refused}
    assert reasons == {"", "stale", "outlier"}


def test_staleness_is_counted_when_the_gradient_is_applied():
    shard = Shard(START, ServerSettings("sgd", 0.1))
    zero = Identity().encode(np.zeros(SIZE, np.float32))
    first = shard.push(Gradient(zero, version=0, samples=1, magnitude=1.0))
    second = shard.push(Gradient(zero, version=0, samples=1, magnitude=1.0))
    third = shard.push(Gradient(zero, version=2, samples=1, magnitude=1.0))
    assert [r.staleness for r in (first, second, third)] == [(0,), (1,), (0,)]
    assert [r.version for r in (first, second, third)] == [1, 2, 3]


def test_gradients_together_are_weighted_by_their_samples():
    one, two = np.full(SIZE, 1.0, np.float32), np.full(SIZE, 5.0, np.float32)
    shard = Shard(np.zeros(SIZE, np.float32), ServerSettings("sgd", 1.0))
    shard.push_together(
        Gradient(Identity().encode(one), 0, samples=3, magnitude=1.0),
        Gradient(Identity().encode(two), 0, samples=1, magnitude=1.0),
    )
    expected = -(3 * 1.0 + 1 * 5.0) / (3 + 1)
    assert np.allclose(decode(shard.pull().blob), expected)
    assert shard.version == 1


def test_the_mean_gradient_is_scaled_down_not_each_of_them():
    """Two that point apart have a small mean, which passes; two that agree are scaled down."""
    one = np.zeros(SIZE, np.float32)
    one[:2] = 3.0, 4.0
    for other, expected in ((-one, 0 * one), (one, one / 5 * 2), (0.2 * one - one, 0.1 * one)):
        shard = Shard(0 * one, ServerSettings("sgd", 1.0, max_mean_norm=2.0))
        shard.push_together(
            Gradient(Identity().encode(one), 0, samples=1, magnitude=1.0),
            Gradient(Identity().encode(other), 0, samples=1, magnitude=1.0),
        )
        assert np.allclose(-decode(shard.pull().blob), expected, atol=1e-5)


def test_gradients_of_no_sample_at_all_move_nothing():
    shard = Shard(START, ServerSettings("sgd", 1.0))
    none = Gradient(Identity().encode(0 * START), 0, samples=0, magnitude=0.0)
    shard.push_together(none, none)
    assert np.array_equal(decode(shard.pull().blob), START)


def test_what_is_refused_changes_neither_parameters_nor_version():
    shard = Shard(START, ServerSettings("adam", 0.1, max_staleness=0))
    blob = Identity().encode(np.ones(SIZE, np.float32))
    shard.push(Gradient(blob, 0, 1, 1.0))
    before = decode(shard.pull().blob).copy()
    receipt = shard.push(Gradient(blob, 0, 1, 1.0))
    assert receipt.refused == ("stale",) and receipt.version == 1
    assert np.array_equal(decode(shard.pull().blob), before)
    assert shard.push(Gradient(blob, 1, 1, float("nan"))).refused == ("not finite",)
    assert shard.push(Gradient(blob, 1, 1, 1.0)).refused == ("",)


def test_only_the_taken_count_among_gradients_together():
    settings = ServerSettings("sgd", 1.0, max_staleness=0)
    shard = Shard(np.zeros(SIZE, np.float32), settings)
    blob = Identity().encode(np.ones(SIZE, np.float32))
    shard.push(Gradient(blob, 0, 1, 1.0))
    mixed = [Gradient(blob, 1, 1, 1.0), Gradient(Identity().encode(START), 0, 9, 1.0)]
    assert shard.push_together(*mixed).refused == ("", "stale")
    assert np.array_equal(decode(shard.pull().blob), np.full(SIZE, -2.0))


def test_a_local_server_changes_nothing_but_the_number_of_messages():
    """(Σ n g of each group, Σ n of each group) carries all that the root needs."""
    vectors, samples = gradients(6, dtype=np.float64), [5, 1, 7, 2, 2, 9]
    results = []
    for groups in ([[0, 1, 2, 3, 4, 5]], [[0, 1, 2], [3, 4, 5]], [[0], [1, 2], [3, 4, 5]]):
        shard = Shard(START.astype(np.float64), ServerSettings("sgd", 1.0))
        combined = [
            Aggregator(1).combine(
                *[Gradient(Identity().encode(vectors[i]), 0, samples[i], 1.0) for i in group]
            )
            for group in groups
        ]
        shard.push_together(*combined)
        results.append(decode(shard.pull().blob))
    flat = START - sum(n * g for n, g in zip(samples, vectors, strict=True)) / sum(samples)
    for result in results:
        assert np.allclose(result, flat, rtol=0, atol=1e-12)


def test_a_local_server_keeps_the_pieces_of_each_shard_apart():
    blobs = [[Identity().encode(np.full(2, 10.0 * i + k)) for k in range(3)] for i in range(2)]
    given = [Gradient(blob, 4 + i, 1, 1.0 + i) for i in range(2) for blob in blobs[i]]
    combined = Aggregator(3).combine(*given)
    assert [decode(g.blob)[0] for g in combined] == [5.0, 6.0, 7.0]
    assert {(g.version, g.samples, g.magnitude) for g in combined} == {(4, 2, 2.0)}


def test_clients_by_name_get_differences_of_their_own():
    settings = ServerSettings("sgd", 0.5, weights_codec="topk:0.1+fp16")
    shard = Shard(START, settings)
    decoders = {"a": DeltaDecoder(), "b": DeltaDecoder()}
    sizes = []
    for i, vector in enumerate(gradients(20)):
        shard.push(Gradient(Identity().encode(vector), i, 1, 1.0))
        for name in ("a", "b") if i % 3 == 0 else ("a",):
            blob = shard.pull(name).blob
            sizes.append(len(blob))
            decoders[name].apply(blob)
            assert np.array_equal(decoders[name].weights, shard.clients[name].shadow)
    assert sizes[0] > START.nbytes > 3 * sizes[-1]
    for _ in range(40):  # nothing changes any more: what was left out arrives
        last = decoders["a"].apply(shard.pull("a").blob)
    assert np.allclose(last, decode(shard.pull().blob), atol=1e-3)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("at_s", [0.0005, 0.011, 0.033, 0.2])
def test_a_shard_that_dies_comes_back_as_it_was(shards, at_s):
    """Snapshot, then the same pushes again: bit for bit what an undisturbed server has."""

    def run(crashes):
        with virtual(crashes=crashes) as runtime:
            settings = ServerSettings("adam", 0.01, max_sigmas=4.0)
            costs = {"push": 0.001, "push_together": 0.001}
            server = ParameterServer(
                runtime, START, shards, settings, snapshot_every=16, costs=costs
            )
            receipts = []
            for i, vector in enumerate(gradients(50)):
                server.push(pieces(runtime, vector, server, version=i))
                receipts += server.receipts(newest=3)
            return server.weights(), receipts + server.receipts(), server.revived

    undisturbed, receipts, _ = run(())
    weights, others, revived = run((Crash(f"Shard {shards - 1}", at_s=at_s),))
    assert revived == (at_s < 0.1)
    assert np.array_equal(weights, undisturbed)
    assert [r._replace(staleness=()) for r in receipts] == [
        r._replace(staleness=()) for r in others
    ]


def test_its_state_goes_on_with_another_server():
    with virtual() as runtime:
        settings = ServerSettings("rmsprop", 0.01, max_sigmas=3.0, weights_codec="fp16")
        one = ParameterServer(runtime, START, 2, settings)
        other = ParameterServer(runtime, np.zeros_like(START), 2, settings)
        for i, vector in enumerate(gradients(20)):
            one.push(pieces(runtime, vector, one, version=i))
            one.pull("client")
        one.settle()
        other.settle()
        other.load_state_dict(one.state_dict())
        for i, vector in enumerate(gradients(20, seed=5)):
            for server in (one, other):
                server.push(pieces(runtime, vector, server, version=20 + i))
        assert np.array_equal(one.weights(), other.weights())
        left, right = (runtime.get(server.pull("client")) for server in (one, other))
        assert left == right


def test_counted_bytes_are_those_on_the_wire():
    """What a codec counts, against what the virtual wire carried (pickle's frame included)."""
    for codec in (Identity(), Half(), TopK(0.05)):
        with virtual() as runtime:
            server = ParameterServer(runtime, START)
            given = pieces(runtime, START, server, codec=codec)
            counted = len(codec.encode(START))
            assert counted <= given[0].nbytes <= counted + 150


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="optimizer: must be one of"):
        Shard(START, ServerSettings("adamw", 0.1))
    with pytest.raises(ValueError, match="max_staleness"):
        Shard(START, ServerSettings(max_staleness=-1))


class Mortal(Shard):
    """A shard that tells its process."""

    def process(self) -> int:
        return os.getpid()


def test_a_real_shard_killed_by_sigkill_loses_nothing(monkeypatch):
    monkeypatch.setattr("rlbook.plumbing.param_server.Shard", Mortal)
    settings = ServerSettings("adam", 0.01)
    with virtual() as runtime:
        server = ParameterServer(runtime, START, 2, settings)
        for i, vector in enumerate(gradients(40)):
            server.push(pieces(runtime, vector, server, version=i))
        undisturbed = server.weights()
    with RayRuntime(num_cpus=2) as runtime:
        server = ParameterServer(runtime, START, 2, settings, snapshot_every=16)
        for i, vector in enumerate(gradients(40)):
            if i in (10, 25):
                victim = server.shards[i % 2]
                os.kill(runtime.get(victim.process.remote()), signal.SIGKILL)
            server.push(pieces(runtime, vector, server, version=i))
        weights, receipts = server.weights(), server.receipts()
        assert server.revived == 2
        assert np.array_equal(weights, undisturbed)
        assert [r.version for r in receipts] == list(range(41 - len(receipts), 41))
        assert alive(runtime, server.shards[0])
        os.kill(runtime.get(server.shards[0].process.remote()), signal.SIGKILL)
        with pytest.raises(ActorDiedError):
            runtime.get(server.shards[0].pull.remote())


def test_receipts_from_before_a_snapshot_outlive_the_shard():
    """None is lost and none comes twice, wherever the death falls among pushes and snapshots."""
    for at_s in np.arange(0.001, 0.02, 0.002):
        with virtual(crashes=(Crash("Shard 0", at_s=at_s),)) as runtime:
            costs = {"push": 0.001}
            server = ParameterServer(
                runtime, START, 1, ServerSettings("sgd", 0.1), snapshot_every=5, costs=costs
            )
            for i, vector in enumerate(gradients(23)):
                server.push(pieces(runtime, vector, server, version=i))
            server.settle()
            assert [receipt.version for receipt in server.receipts()] == list(range(1, 24))
            assert server.revived == 1


def test_a_local_server_that_compresses_owes_and_pays_later():
    """Σ sent + residual = Σ means, and its state goes on."""
    local, other = Aggregator(1, "topk:0.05"), Aggregator(1, "topk:0.05")
    whole, sent = np.zeros(SIZE), np.zeros(SIZE)
    for i, (one, two) in enumerate(zip(gradients(20), gradients(20, seed=2), strict=True)):
        pair = [Gradient(Identity().encode(vector), 0, 1, 1.0) for vector in (one, two)]
        combined = local.combine(*pair)
        if i == 10:
            other.load_state_dict(local.state_dict())
        if i > 10:
            assert other.combine(*pair) == combined
        whole += (one + two) / 2
        sent += decode(combined.blob)
    assert np.allclose(sent + local.encoders[0].residual, whole, atol=1e-4)
    assert np.abs(whole - sent).max() > 0.1
