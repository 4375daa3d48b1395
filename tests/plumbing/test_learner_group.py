"""Learners of a group are one learner: in each precision, compiled, on GPUs; who fails ends it."""

import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlbook import impala as ip
from rlbook import seed_rl as sr
from rlbook.data import Unroll
from rlbook.parts.flat import Flat
from rlbook.parts.unroll_replay import side_by_side
from rlbook.plumbing.crew import Crew
from rlbook.plumbing.faults import sigkill
from rlbook.plumbing.inference import Who
from rlbook.plumbing.learner_group import LearnerGroup
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime
from rlbook.plumbing.together import TIMEOUT_S

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
compiles = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

CONFIG = ip.Config(
    num_envs=4,
    unroll_length=6,
    num_actors=5,
    unrolls_per_batch=5,
    learning_rate=0.01,
    progress=False,
)
"""Five unrolls a batch: no number of learners but 1 and 5 gets equal shares."""


def batch_of(config: ip.Config) -> list[Unroll]:
    weights = ip.Learner(replace(config, device="cpu")).weights()
    return [ip.Actor(config, index).unroll(weights)[1] for index in range(5)]


def parameters_of_one(config: ip.Config, batch: list[Unroll], updates: int = 4) -> np.ndarray:
    """By one learner on the whole batch."""
    one = ip.Learner(replace(config, num_learners=1))
    for _ in range(updates):
        one.update([0], *batch)
    return one.newest().values


def parameters_of_many(config: ip.Config, batch: list[Unroll], updates: int = 4) -> np.ndarray:
    """By `num_learners` processes that meet: the same in all."""
    k = config.num_learners
    with Crew(ip.Learner, lambda rank, _: (config, rank), k) as learners:
        learners.ask(0, "host", "127.0.0.1")
        _, port = learners.first()
        learners.each("meet", [("127.0.0.1", port, rank, k) for rank in range(k)])
        for _ in range(updates):
            learners.each("update", [([0], *batch[rank::k]) for rank in range(k)])
        found = [newest.values for newest in learners.each("newest")]
    assert all(np.array_equal(one, found[0]) for one in found), "all make the same steps"
    return found[0]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("k", [2, 4])
def test_k_real_learners_are_one(k, reduction):
    config = replace(CONFIG, num_learners=k, loss_reduction=reduction, max_gradient_norm=0.1)
    batch = batch_of(config)
    one, many = parameters_of_one(config, batch), parameters_of_many(config, batch)
    assert np.abs(one - parameters_of_one(config, batch, 0)).max() > 0.01, "they moved"
    assert np.allclose(one, many, atol=2e-6)


def test_learners_in_bfloat16_are_one_and_near_float32():
    config = replace(CONFIG, num_learners=2, precision="bfloat16")
    batch = batch_of(config)
    start = parameters_of_one(config, batch, 0)
    moved = [
        parameters - start
        for parameters in (
            parameters_of_one(replace(config, precision="float32"), batch),
            parameters_of_one(config, batch),
            parameters_of_many(config, batch),
        )
    ]
    exact, one, many = moved
    size = np.linalg.norm(exact)
    assert 0 < np.linalg.norm(one - exact) < 0.1 * size
    assert np.linalg.norm(many - one) < 0.1 * size
    assert one.dtype == np.float32


@compiles
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_learner_is_one_that_is_not(precision):
    config = replace(CONFIG, precision=precision)
    batch = batch_of(config)
    plain = parameters_of_one(config, batch)
    learner = ip.Learner(replace(config, compile=True))
    for _ in range(4):
        learner.update([0], *batch)
    assert learner.network._compiled_call_impl is not None
    tolerance = 1e-5 if precision == "float32" else 0.02
    assert np.allclose(learner.newest().values, plain, atol=tolerance)


def test_memory_learns_in_bfloat16_too():
    """The LSTM and the losses stay in float32."""
    config = replace(CONFIG, env_id="rlbook/Memory-v0", lstm_size=8, precision="bfloat16")
    batch = batch_of(config)
    exact = parameters_of_one(replace(config, precision="float32"), batch)
    assert 0 < np.abs(parameters_of_one(config, batch) - exact).max() < 0.02


def test_what_a_learner_keeps_is_on_the_host():
    learner = ip.Learner(replace(CONFIG, optimizer="adam"))
    learner.update([0], *batch_of(CONFIG))
    state, again = learner.state_dict(), ip.Learner(replace(CONFIG, optimizer="adam"))
    before = learner.newest().values
    again.load_state_dict(state)
    learner.flat.vector.zero_()
    assert np.array_equal(state["parameters"], before), "a copy"
    assert np.array_equal(again.newest().values, before) and again.version == 1


def fails() -> None:
    raise LookupError("this unroll is lost")


def test_a_learner_that_fails_or_is_killed_ends_the_run_at_once():
    """And not when the others lose their patience, who wait for it in the middle of a sum."""
    config = replace(CONFIG, num_learners=2, total_env_steps=10_000_000)
    with RayRuntime(num_cpus=2) as runtime:
        with sigkill("Learner", after_s=0.5) as fault, pytest.raises(ActorDiedError):
            ip.train(config, runtime)
        killed_at = fault._there_at + fault.killed[0][1]
        assert time.perf_counter() - killed_at < TIMEOUT_S / 2
        remote = runtime.remote(ip.Learner)
        for rank in range(2):  # its call never begins, so that it cannot tell the others
            group = LearnerGroup(runtime, lambda rank: remote.remote(config, rank), 2)
            batch = [runtime.put(unroll) for unroll in batch_of(config)]
            metrics, _ = group.update([0], batch)
            assert group.wait([metrics]) == metrics and group.answer(metrics)["loss"] != 0
            batch[rank] = runtime.remote(fails).remote()
            metrics, _ = group.update([0], batch)
            begun = time.monotonic()
            with pytest.raises(LookupError, match="this unroll is lost"):
                group.wait([metrics])
                group.answer(metrics)
            assert time.monotonic() - begun < TIMEOUT_S / 2


def unrolls_of_a_server(config: sr.Config, count: int) -> list[Unroll]:
    worker, server = sr.EnvWorker(config, 0), sr.make_inference(config)
    found, row = [], worker.here()[1]
    while len(found) < count:
        if (unroll := server.observe(Who(0, 0), row)) is not None:
            found.append(unroll)
        row = worker.step(server.act([0])[0])[1]
    return found


SEED = sr.Config(num_envs=4, unroll_length=6, lstm_size=8, progress=False)
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=on_gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_learner_of_seed_rl_in_bfloat16_is_near_float32(device):
    batch, found = unrolls_of_a_server(SEED, 2), []
    exact = replace(SEED, device=device)
    for config in (SEED, exact, replace(exact, precision="bfloat16")):
        learner = sr.Learner(config)
        for _ in range(3):
            learner.update([0], *batch)
        found.append(learner.newest().values)
    assert np.allclose(found[1], found[0], atol=1e-5)
    assert 0 < np.abs(found[2] - found[1]).max() < 0.02


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lstm_size", [0, 8])
def test_a_learner_of_sequences_in_bfloat16_is_near_float32(device, lstm_size):
    config = replace(SEED, learner="r2d2", learning_starts=8, batch_size=8, lstm_size=lstm_size)
    exact = replace(config, device=device)
    first = sr.SequenceLearner(config)
    for unroll in unrolls_of_a_server(config, 8):
        first.keep(unroll)
    sample, found = first.memory.sample(8), []
    for settings in (config, exact, replace(exact, precision="bfloat16")):
        learner = sr.SequenceLearner(settings)
        priorities = [learner.fit(sample)[0] for _ in range(3)][-1]
        found.append((learner.newest().values, priorities))
    (here, known), (there, same), (coarse, near) = found
    assert np.allclose(here, there, atol=1e-5) and np.allclose(known, same, rtol=1e-3)
    assert 0 < np.abs(coarse - there).max() < 0.02 and np.allclose(near, same, rtol=0.05)


@on_gpu
@pytest.mark.parametrize("lstm_size", [0, 8])
def test_a_learner_on_a_gpu_is_one_on_the_cpu(lstm_size):
    config = replace(CONFIG, lstm_size=lstm_size)
    batch = batch_of(config)
    here = parameters_of_one(config, batch)
    there = parameters_of_one(replace(config, device="cuda"), batch)
    assert np.allclose(here, there, atol=1e-5)


@on_gpu
def test_unrolls_arrive_on_a_gpu_as_they_are():
    batch = batch_of(CONFIG)
    device = torch.device("cuda", 0)
    whole, there = side_by_side(batch), side_by_side(batch, device)
    for name in ("observation", "reward", "discount"):
        column = getattr(there.env_outputs, name)
        assert column.device == device
        assert np.array_equal(column.cpu().numpy(), getattr(whole.env_outputs, name))
    assert np.array_equal(there.valid, whole.valid), "on the host, where they are counted"


@on_gpu
@pytest.mark.parametrize("most", [0.0, 0.1, 1e9])
def test_a_gradient_is_clipped_on_a_gpu_as_on_the_cpu(most):
    for size in (0.0, 1.0):
        here, there = (Flat(torch.nn.Linear(3, 2).to(device)) for device in ("cpu", "cuda"))
        norms = []
        for flat in (here, there):
            flat.gradients.fill_(size)
            norms.append(float(flat.clipped(most)))
        assert np.allclose(*norms, rtol=1e-6)
        assert torch.allclose(here.gradients, there.gradients.cpu(), rtol=1e-6)


@on_gpu
def test_a_gpu_goes_to_a_checkpoint_and_back():
    config = replace(CONFIG, device="cuda", optimizer="adam")
    learner, again, batch = ip.Learner(config), ip.Learner(config), batch_of(config)
    learner.update([0], *batch)
    state = learner.state_dict()
    assert all(
        not one.is_cuda
        for kept in state["optimizer"]["state"].values()
        for one in kept.values()
        if isinstance(one, torch.Tensor)
    )
    again.load_state_dict(state)
    for one in (learner, again):
        one.update([0], *batch)
    assert np.array_equal(learner.newest().values, again.newest().values)


@on_gpu
def test_two_learners_on_one_gpu_are_one():
    """Through the host by gloo: NCCL takes no two ranks on one GPU."""
    config = replace(CONFIG, num_learners=2, device="cuda:0")
    batch = batch_of(config)
    one, many = parameters_of_one(config, batch), parameters_of_many(config, batch)
    assert np.allclose(one, many, atol=1e-5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_learners_on_two_gpus_are_one():
    """By NCCL, from GPU to GPU."""
    config = replace(CONFIG, num_learners=2, device="cuda", learner_backend="nccl")
    batch = batch_of(config)
    one, many = parameters_of_one(config, batch), parameters_of_many(config, batch)
    assert np.allclose(one, many, atol=1e-5)
