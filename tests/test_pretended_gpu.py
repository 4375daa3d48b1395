"""What is written for CUDA, on GPUs that there are not; and those pretended GPUs themselves.

Nothing here says that it works on a GPU: `pytest -m cuda` does, where there is one.

How often a learner waits for its GPU, in steady state:

    impala, seed_rl        1 an update        metrics, and with them parameters for the actors
    apex, apex_dpg, r2d2   2 a draw           priorities, metrics; with them the parameters
    seed_rl with replay    1 a fit            priorities, before anything can be drawn; 2 an update
    dppo, alone            1 an epoch's end   what is timed
    dppo, of several       2 a minibatch      what is timed; the sum through the host
"""

import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed, nn

from benchmarks import gpu as gpu_benchmark
from benchmarks import learners as learners_benchmark
from rlbook import apex, apex_dpg, dppo, impala, r2d2, seed_rl
from rlbook.cli import main
from rlbook.harness.run import Result
from rlbook.parts import on_device, q_learning, unroll_replay
from rlbook.parts.flat import Flat
from rlbook.parts.networks import ActorCritic
from rlbook.plumbing import devices, together
from rlbook.plumbing.cluster import Cluster, Node
from rlbook.plumbing.virtual import VirtualRuntime
from tests import test_dppo as on_dppo
from tests.plumbing import test_inference as on_inference
from tests.plumbing import test_learner_group as on_learners
from tests.plumbing import test_replay_group as on_replay
from tests.pretended_gpu import PretendedGPU, Race, Refused
from tests.runs import assert_same_run
from tests.test_apex_dpg import QUICK as QUICK_DPG

HERE = "cuda:0"


@pytest.fixture
def gpu():
    with PretendedGPU(2) as found:
        yield found


# -- the pretended GPU -----------------------------------------------------------------------------


def test_labels_go_along(gpu):
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to("cuda")
    x = torch.ones(5, 3, device=HERE)
    assert x.is_cuda and x.device == torch.device(HERE) and x.get_device() == 0
    found = network(x)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    torch.where(found[:, 0] > 0, found.square().sum(1), 0.0).mean().backward()
    optimizer.step()
    parts = [found, found[1:].T, *network.parameters(), torch.zeros_like(x), x.new_zeros(2)]
    parts += [one.grad for one in network.parameters()]
    parts += [one for kept in optimizer.state.values() for one in kept.values()]
    assert {one.device for one in parts} == {torch.device(HERE)}
    assert not x.cpu().is_cuda and x.to("cuda:1").device.index == 1
    assert x.to(torch.zeros(1)).device.type == "cpu"
    view = nn.Parameter(torch.zeros(2))
    view.data = x[0, :2]
    assert view.is_cuda


def test_a_gradient_finds_its_way_back_to_the_host(gpu):
    weight = torch.ones(2, requires_grad=True)
    (weight.to(HERE) * torch.tensor([2.0, 3.0], device=HERE)).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0, 3.0]
    assert not weight.grad.is_cuda


def adam_with_a_count_on_the_host() -> None:
    weight = torch.zeros(2, device=HERE, requires_grad=True)
    weight.grad = torch.ones(2, device=HERE)
    optimizer = torch.optim.Adam([weight], fused=True)
    optimizer.step()
    optimizer.state[weight]["step"] = torch.tensor(1.0)
    optimizer.step()


def a_gradient_elsewhere() -> None:
    torch.zeros(2, requires_grad=True).grad = torch.zeros(2, device=HERE)


def a_sum_of_gloo() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        distributed.all_reduce(torch.ones(2))
        distributed.all_reduce(torch.ones(2, device=HERE))
    finally:
        distributed.destroy_process_group()


REFUSED: dict[str, Callable[[Any, Any], Any]] = {
    "two devices": lambda x, y: x + y,
    "two GPUs": lambda x, y: x + x.to("cuda:1"),
    "in place": lambda x, y: y.add_(x),
    "into a number of the host": lambda x, y: y.sum().add_(x.sum()),
    "side by side": lambda x, y: torch.cat([x, y]),
    "a number side by side": lambda x, y: torch.stack([x.sum(), y.sum()]),
    "a module elsewhere": lambda x, y: nn.Linear(3, 2)(x),
    "its input elsewhere": lambda x, y: nn.Linear(3, 2).to(HERE)(y),
    "a GPU's index of a host's tensor": lambda x, y: y[torch.zeros(1, dtype=int, device=HERE)],
    "a gather": lambda x, y: x.gather(0, torch.zeros(1, 3, dtype=int)),
    "a loss": lambda x, y: nn.functional.huber_loss(x, y),
    "numpy": lambda x, y: x.numpy(),
    "an array": lambda x, y: np.asarray(x),
    "pinned": lambda x, y: x.pin_memory(),
    "made pinned": lambda x, y: torch.empty(2, device=HERE, pin_memory=True),
    "to another process": lambda x, y: pickle.dumps(x),
    "no such GPU": lambda x, y: x.to("cuda:2"),
    "a generator": lambda x, y: torch.rand(2, device=HERE, generator=torch.Generator()),
    "a state in another order": lambda x, y: nn.LSTM(3, 4).to(HERE)(
        x[None], (torch.zeros(1, 4, 4, device=HERE).mT,) * 2
    ),
    "a generator in place": lambda x, y: x.normal_(generator=torch.Generator()),
    "a gradient elsewhere": lambda x, y: a_gradient_elsewhere(),
    "an optimiser's count": lambda x, y: adam_with_a_count_on_the_host(),
    "gloo": lambda x, y: a_sum_of_gloo(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(gpu, name):
    x, y = torch.ones(4, 3, device=HERE), torch.ones(4, 3)
    with pytest.raises(Refused):
        REFUSED[name](x, y)


def test_what_cuda_allows_is_allowed(gpu):
    x, number = torch.ones(4, 3, device=HERE), torch.tensor(2.0)
    assert (x * number).is_cuda and (x - 1.0).is_cuda and (number + x).is_cuda
    assert x[torch.tensor([0, 2])].is_cuda and torch.where(x > 0, x, 0.0).is_cuda
    x[torch.tensor([0])] = 5.0
    assert x.mul_(number).sum().item() == 2 * (3 * 5 + 9)


def pinned(values: Any = (1.0, 2.0, 3.0)) -> torch.Tensor:
    return torch.tensor(values).pin_memory()


def test_a_copy_to_the_host_is_there_when_it_was_waited_for(gpu):
    x, host = torch.ones(3, device=HERE), torch.empty(3, pin_memory=True)
    waits = [torch.cuda.synchronize, torch.cuda.current_stream().synchronize, x.sum().item]
    for wait in waits:
        host.copy_(x, non_blocking=True)
        x.add_(1)  # in the order of the stream: after the copy
        assert np.isnan(host.numpy()).all()
        with pytest.raises(Race, match="before its copy is there"):
            host.sum()
        wait()
        assert np.array_equal(host.numpy(), x.cpu().numpy() - 1)
    early, late = torch.cuda.Event(), torch.cuda.Event()
    early.record()
    host.copy_(x, non_blocking=True)
    late.record()
    early.synchronize()
    assert np.isnan(host.numpy()).all(), "an event of before does not tell"
    late.synchronize()
    assert not np.isnan(host.numpy()).any()
    assert x.to("cpu", non_blocking=True).isnan is not None


def test_a_pinned_buffer_is_not_to_be_written_to_while_its_copy_is_on_the_way(gpu):
    host = pinned()
    there = host.to(HERE, non_blocking=True)
    torch.cuda.synchronize()
    host.zero_()
    assert there.sum().item() == 6.0
    there.copy_(host, non_blocking=True)
    host.numpy()[0] = 7.0
    with pytest.raises(Race, match="written to while"):
        torch.cuda.synchronize()


def test_from_a_buffer_that_is_not_pinned_a_copy_is_waited_for(gpu):
    host = torch.ones(3)
    there = host.to(HERE, non_blocking=True)
    host.zero_()
    assert sum(gpu.syncs.values()) == 1 and there.sum().item() == 3.0


def test_streams_must_wait_for_each_other(gpu):
    x, side = torch.ones(3, device=HERE), torch.cuda.Stream(HERE)
    with torch.cuda.stream(side), pytest.raises(Race, match="read on stream"):
        x + 1
    with torch.cuda.stream(side), pytest.raises(Race, match="on stream"):
        x.fill_(1.0)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = x + 1
    with pytest.raises(Race):
        y.sum()
    event = side.record_event()
    torch.cuda.current_stream().wait_event(event)
    assert y.sum().item() == 6.0
    with torch.cuda.stream(side):
        z = y * 2
        side.synchronize()
    assert z.sum().item() == 12.0, "who waited for a stream may go on on any"
    with torch.cuda.stream(side):
        z + 1
    with pytest.raises(Race, match="written on stream"):
        z.copy_(x)  # while it is read


COUNTED: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "item": (1, lambda x: x.sum().item()),
    "float": (1, lambda x: float(x.sum())),
    "bool": (1, lambda x: bool(x.any())),
    "tolist": (1, lambda x: x.tolist()),
    "cpu": (1, lambda x: x.cpu()),
    "mask": (1, lambda x: x[x > 0]),
    "set by mask": (1, lambda x: x.__setitem__(x > 0, 1.0)),
    "nonzero": (1, lambda x: x.nonzero()),
    "where": (1, lambda x: torch.where(x > 0)),
    "masked_select": (1, lambda x: x.masked_select(x > 0)),
    "equal": (1, lambda x: torch.equal(x, x)),
    "made of a number": (1, lambda x: torch.tensor(1.0, device=HERE)),
    "index from the host": (1, lambda x: x[torch.tensor([0])]),
    "number from the host": (1, lambda x: x.__setitem__(0, torch.tensor(2.0))),
    "where with a value": (0, lambda x: torch.where(x > 0, x, 0.0)),
    "slice": (0, lambda x: x[1:].mul_(2).sum()),
    "zeros": (0, lambda x: torch.zeros(3, device=HERE) + x.new_full((1,), 2.0)),
    "pinned": (0, lambda x: pinned().to(HERE, non_blocking=True)),
    "set a row": (0, lambda x: x.__setitem__(0, 1.0)),
    "known already": (1, lambda x: (torch.cuda.synchronize(), torch.cuda.synchronize())),
}


@pytest.mark.parametrize("name", COUNTED)
def test_waits_are_counted(gpu, name):
    count, call = COUNTED[name]
    x = torch.ones(3, device=HERE)
    gpu.syncs.clear()
    call(x)
    assert sum(gpu.syncs.values()) == count
    assert all("test_pretended_gpu.py" in where for where in gpu.syncs)


def test_bytes_are_counted(gpu):
    x = torch.ones(3, dtype=torch.float64).to(HERE)
    x[:2].cpu()
    assert (gpu.up, gpu.down) == (24, 16)


def test_without_it_all_is_as_before():
    before = torch.cuda.device_count(), torch.cuda.Stream, torch.autocast
    with PretendedGPU(7):
        assert torch.cuda.device_count() == 7 and torch.cuda.Stream is not before[1]
    assert (torch.cuda.device_count(), torch.cuda.Stream, torch.autocast) == before
    assert torch.ones(2).numpy().sum() == 2


# -- whole runs ------------------------------------------------------------------------------------

SMALL = {"progress": False, "log_every_env_steps": 10_000, "runtime": "virtual"}
REPLAY = {"batch_size": 8, "updates_per_call": 2, "samples_per_insert": 2.0, "target_period": 7}
REPLAY |= {"hidden_sizes": (8,), "num_replays": 2, "broadcast_period": 2}
STEPS = {"unroll_length": 5, "num_envs": 4, "total_env_steps": 300}
CHUNKS = {**SMALL, **REPLAY, **STEPS, "learning_starts": 32, "rate_tolerance": 80}
CHUNKS |= {"total_env_steps": 200}
REACH = "test/Reach-v0"
assert QUICK_DPG, "its module registers that"
IMPALA = impala.Config(**SMALL, **STEPS)
CALLS = {"wiring": "calls", "inference_batch": 4}
HOST: dict[str, Any] = {"inference_devices": ("cpu",)}
SEED = seed_rl.Config(**SMALL, **STEPS, **CALLS)
MEMORY = {"env_id": "rlbook/Memory-v0", "unroll_length": 10, "lstm_size": 8, "hidden_sizes": (8,)}
SEQUENCES = replace(
    SEED, learner="r2d2", **MEMORY, learning_starts=10, batch_size=4, target_period=5
)
R2D2 = r2d2.Config(**SMALL, **REPLAY, num_envs=4, lstm_size=8, learning_starts=10)
R2D2 = replace(R2D2, total_env_steps=600)
APEX = apex.Config(**CHUNKS)
DPG = apex_dpg.Config(**CHUNKS, env_id=REACH)
DPPO = dppo.Config(**SMALL, **{**STEPS, "unroll_length": 8}, epochs=2, minibatch_size=32)
TWO: dict[str, Any] = {"num_learners": 2, "unrolls_per_batch": 2}
PONG: dict[str, Any] = {"env_id": "ALE/Pong-v5", "num_envs": 2, "total_env_steps": 48}
RUNS: dict[str, tuple[Any, Any]] = {
    "impala": (impala, IMPALA),
    "impala, LSTM, Adam": (impala, replace(IMPALA, lstm_size=8, optimizer="adam")),
    "impala, two": (impala, replace(IMPALA, **TWO)),
    "impala, replay": (impala, replace(IMPALA, replay_unrolls=8, unrolls_per_batch=2)),
    "impala, frames": (impala, replace(IMPALA, **PONG)),
    "seed_rl, host acts": (seed_rl, replace(SEED, **HOST)),
    "seed_rl, LSTM": (seed_rl, replace(SEED, lstm_size=8)),
    "seed_rl, two": (seed_rl, replace(SEED, **HOST, **TWO)),
    "seed_rl, frames": (seed_rl, replace(SEED, **PONG, inference_batch=2)),
    "seed_rl, sequences, host acts": (seed_rl, replace(SEQUENCES, **HOST)),
    "apex": (apex, APEX),
    "apex, two": (apex, replace(APEX, num_learners=2, optimizer="rmsprop")),
    "apex_dpg": (apex_dpg, DPG),
    "apex_dpg, two": (apex_dpg, replace(DPG, num_learners=2)),
    "r2d2": (r2d2, R2D2),
    "r2d2, two": (r2d2, replace(R2D2, num_learners=2)),
    "r2d2, no memory": (r2d2, replace(R2D2, lstm_size=0)),
    "dppo": (dppo, DPPO),
    "dppo, alone": (dppo, replace(DPPO, num_workers=1)),
    "dppo, normalized": (dppo, replace(DPPO, normalize_observations=True)),
    "dppo, server": (dppo, replace(DPPO, wiring="parameter_server")),
    "dppo, frames": (dppo, replace(DPPO, **PONG, unroll_length=4, minibatch_size=8)),
}


def train(system: Any, config: Any) -> Result:
    with VirtualRuntime(1, Cluster(nodes=(Node(cores=8),), costs=system.COSTS)) as runtime:
        return system.train(config, runtime)


def vector(result: Result) -> torch.Tensor:
    return Flat(result.policy.network).vector


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_bit_for_bit_and_in_bfloat16_it_is_near(name):
    system, config = RUNS[name]
    if frames := "ALE" in config.env_id:
        pytest.importorskip("ale_py")
    host = train(system, config)
    with PretendedGPU(2) as gpu:
        there = train(system, replace(config, device="cuda"))
        assert gpu.up > 0 and gpu.down > 0 and sum(gpu.syncs.values()) > 3
        if not frames:  # the presets have those
            coarse = train(system, replace(config, device="cuda", precision="bfloat16"))
            assert 0 < (vector(host) - vector(coarse)).abs().max() < 0.2
    assert_same_run(host, there)
    assert host.learner_steps > 3


@pytest.mark.parametrize("config", [SEED, SEQUENCES], ids=["vtrace", "sequences"])
def test_who_acts_by_numpy_on_the_host_acts_by_pytorch_on_a_gpu(config):
    """So that the last bits differ: numpy adds up in another order."""
    host = train(seed_rl, config)
    with PretendedGPU() as gpu:
        there = train(seed_rl, replace(config, device="cuda"))
        assert any("on_device.py" in where for where in gpu.syncs)
    assert torch.allclose(vector(host), vector(there), atol=1e-5)


def test_two_threads_share_a_gpu():
    """One learns, one acts on a stream of its own: as they come, so that no two runs are alike."""
    config = replace(SEED, wiring="unix", num_workers=1, lstm_size=8, total_env_steps=400)
    with PretendedGPU() as gpu:
        result = seed_rl.train(replace(config, device="cuda"))
        assert {stream.clock[stream.number] > 10 for stream in gpu.streams} == {True}
    assert len(gpu.streams) == 2 and result.learner_steps > 3
    assert vector(result).isfinite().all()


@pytest.mark.parametrize("name", ["impala", "seed_rl, LSTM", "r2d2", "apex", "apex_dpg", "dppo"])
@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_another_device(name, first, then, tmp_path):
    """Where there is no GPU too: with optimiser and replay memory, to the same bits."""
    system, config = RUNS[name]
    total = config.total_env_steps
    ends = []
    for number, devices_ in enumerate(((first, then), ("cpu", "cpu"))):
        folder = str(tmp_path / str(number))
        more = {"resume": folder, "total_env_steps": 2 * total, "run_dir": None}
        for device, changes in zip(devices_, ({"run_dir": folder}, more), strict=True):
            ends.append(run_somewhere(system, replace(config, **changes), device))
        assert Result.load(folder).policy.network is not None
    assert torch.equal(vector(ends[0]), vector(ends[2]))
    assert torch.equal(vector(ends[1]), vector(ends[3]))
    assert not torch.equal(vector(ends[0]), vector(ends[1]))


def run_somewhere(system: Any, config: Any, device: str) -> Result:
    if device == "cpu":
        return train(system, config)
    with PretendedGPU():
        return train(system, replace(config, device=device))


def test_the_command_continues_a_gpus_run_where_there_is_none(tmp_path, capsys):
    folder = str(tmp_path / "run")
    run_somewhere(dppo, replace(DPPO, run_dir=folder), "cuda")
    words = ["train", "dppo", "--resume", folder, "--total-env-steps", "600", "--no-progress"]
    if not torch.cuda.is_available():
        assert main(words) != 0 and "no 'cuda'" in capsys.readouterr().err
    assert main([*words, "--device", "cpu"]) == 0
    assert Result.load(folder).env_steps >= 600


# -- how often a learner waits ---------------------------------------------------------------------


def counted(gpu: PretendedGPU, update: Callable[[], Any], updates: int = 3) -> float:
    """Waits of an update, when all has warmed up."""
    update()
    gpu.syncs.clear()
    for _ in range(updates):
        update()
    return sum(gpu.syncs.values()) / updates


@pytest.mark.parametrize("lstm_size", [0, 8])
@pytest.mark.parametrize(("system", "config"), [(impala, IMPALA), (seed_rl, SEED)])
def test_waits_of_an_actor_critics_update(gpu, system, config, lstm_size):
    config = replace(config, lstm_size=lstm_size, device="cuda")
    batch = on_learners.batch_of(replace(on_learners.CONFIG, lstm_size=lstm_size))
    learner = system.Learner(config)
    assert counted(gpu, lambda: learner.update([0], *batch)) == 1


def test_frames_are_put_together_without_a_wait(gpu):
    """Also where episodes begin within an unroll."""
    pytest.importorskip("ale_py")
    config = replace(IMPALA, **PONG, device="cuda")
    learner, actor = impala.Learner(config), impala.Actor(config, 0)
    unroll = actor.unroll(learner.weights())[1]
    assert len(unroll.env_outputs.observation) > len(unroll.env_outputs.first)
    unroll.env_outputs.first[2] = True
    assert counted(gpu, lambda: learner.update([0], unroll)) == 1


@pytest.mark.parametrize(("system", "config"), on_replay.SYSTEMS.values(), ids=on_replay.SYSTEMS)
@pytest.mark.parametrize("updates", [1, 4])
def test_waits_of_a_draw(gpu, system, config, updates):
    config = replace(config, updates_per_call=updates, broadcast_period=1_000)
    (shard,) = on_replay.shards_of(system, config, 1)
    parts = on_replay.narrowed(shard.draw(4 * updates, 1.0))[1:]
    learner = system.Learner(replace(config, device="cuda", batch_size=4))
    assert counted(gpu, lambda: learner.learn(*parts)) == 2
    learner = system.Learner(replace(config, device="cuda", batch_size=4, broadcast_period=1))
    assert counted(gpu, lambda: learner.learn(*parts)) == 2


@pytest.mark.parametrize("lstm_size", [0, 8])
def test_waits_of_a_fit(gpu, lstm_size):
    config = replace(SEQUENCES, lstm_size=lstm_size, device="cuda", **HOST)
    learner = seed_rl.SequenceLearner(config)
    unrolls = on_learners.unrolls_of_a_server(config, 22)
    for unroll in unrolls[:20]:
        learner.keep(unroll)
    sample = learner.memory.sample(4)
    assert counted(gpu, lambda: learner.fit(sample)) == 1
    before = learner.updates
    gpu.syncs.clear()
    learner.update([0], *unrolls[20:])
    assert sum(gpu.syncs.values()) == learner.updates - before + 2 > 3


def member(workers: int, **settings: Any) -> Any:
    config = replace(DPPO, num_workers=workers, device="cuda", num_envs=8, **settings)
    worker = dppo.Worker(config, 0)
    worker.collect(8)
    worker.agree(worker.statistics())
    return worker


@pytest.mark.parametrize("observing", [False, True])
@pytest.mark.parametrize(("workers", "waits"), [(1, 0), (2, 2)])
def test_waits_of_a_minibatch(gpu, workers, waits, observing):
    worker = member(workers, normalize_observations=observing)
    store, device = distributed.HashStore(), worker.device
    others = together.Together(store, 0, 1, device, "gloo") if workers > 1 else None

    def minibatch() -> None:
        worker.weigh(0)
        if others is not None:
            others.add(worker.flat.gradients)
        worker.apply()

    try:
        assert counted(gpu, minibatch) == waits
    finally:
        if others is not None:
            others.leave()


def test_waits_of_those_who_act(gpu):
    """One for each answer; of a small network that learns there, none."""
    pytest.importorskip("ale_py")
    frames = dppo.Worker(replace(DPPO, **PONG, device="cuda"), 0)
    assert counted(gpu, lambda: frames.collect(1)) == 1
    small = member(1)
    assert counted(gpu, lambda: small.act(small.envs.env_output.observation)) == 0
    for lstm_size in (0, 8):
        agent = seed_rl.make_inference(replace(SEED, lstm_size=lstm_size, device="cuda")).agent
        seen, first = np.zeros((4, 4), np.float32), np.zeros(4, bool)
        rows = seen, first, agent.initial_state(4), [(np.random.default_rng(0), 4, 0)]
        assert counted(gpu, partial(agent.act, *rows)) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", ["impala", "impala, LSTM", *on_replay.SYSTEMS])
def test_a_gpu_counts_no_more_waits(name):
    """By PyTorch's own count, which knows nothing of events and streams that are waited for."""
    system, _, memory = name.partition(", ")
    if system == "impala":
        config = replace(on_learners.CONFIG, lstm_size=8 * bool(memory), device="cuda")
        batch, learner = on_learners.batch_of(config), impala.Learner(config)
        update = partial(learner.update, [0], *batch)
    else:
        module, config = on_replay.SYSTEMS[system]
        (shard,) = on_replay.shards_of(module, config, 1)
        parts = on_replay.narrowed(shard.draw(24, 1.0))[1:]
        config = replace(config, device="cuda", broadcast_period=1_000)
        update = partial(module.Learner(config).learn, *parts)
    for _ in range(3):
        update()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in found if "synchronizing CUDA operation" in str(one.message)]
    assert len(waits) <= (1 if system == "impala" else 2)


# -- parts, presets, benchmarks --------------------------------------------------------------------

ON_A_GPU: dict[str, Callable[[], Any]] = {
    "a learner": lambda: on_learners.test_a_learner_on_a_gpu_is_one_on_the_cpu(0),
    "with an LSTM": lambda: on_learners.test_a_learner_on_a_gpu_is_one_on_the_cpu(8),
    "unrolls": on_learners.test_unrolls_arrive_on_a_gpu_as_they_are,
    "no clip": lambda: on_learners.test_a_gradient_is_clipped_on_a_gpu_as_on_the_cpu(1e9),
    "a clip": lambda: on_learners.test_a_gradient_is_clipped_on_a_gpu_as_on_the_cpu(0.1),
    "checkpoint": on_learners.test_a_gpu_goes_to_a_checkpoint_and_back,
    "bfloat16": lambda: on_learners.test_a_learner_of_seed_rl_in_bfloat16_is_near_float32("cuda"),
    "sequences": lambda: on_learners.test_a_learner_of_sequences_in_bfloat16_is_near_float32(
        "cuda", 8
    ),
    **{
        f"acts, {size}, {replays}": lambda s=size, r=replays: (
            on_inference.test_it_says_the_same_from_another_device("cuda", s, r)
        )
        for size in (0, 5)
        for replays in (False, True)
    },
    **{
        name: lambda found=found: on_replay.test_on_a_gpu_it_learns_what_it_learns_on_the_cpu(
            *found
        )
        for name, found in on_replay.SYSTEMS.items()
    },
    "round": lambda: on_dppo.test_on_a_gpu_a_round_is_the_same_but_for_the_last_bits(
        "all_reduce", True
    ),
    "frames": on_dppo.test_frames_are_acted_on_where_they_are_learnt_from,
}
"""Those of the tests for a GPU that need one process."""


@pytest.mark.parametrize("name", ON_A_GPU)
def test_what_tests_a_gpu_passes_on_a_pretended_one(gpu, name):
    ON_A_GPU[name]()


def test_parameters_set_out_and_arrive(gpu):
    flat = Flat(nn.Linear(5, 5).to(HERE))
    copy, expected = devices.HostCopy(flat), flat.vector.cpu().numpy()
    later = copy.begin()
    flat.vector.zero_()
    assert np.array_equal(later(), expected) and not later().base.is_cuda
    copy.put(expected)
    copy.put(expected)
    assert np.array_equal(copy.take(), expected)
    assert devices.gpu_of(flat.vector.device) == "GPU-0"


@pytest.mark.parametrize("name", [*gpu_benchmark.SMALL, "impala, resnet"])
def test_the_presets_for_one_gpu_train_on_it(name):
    """With a rehearsal's numbers: device "auto", bfloat16, frames as bytes."""
    pytest.importorskip("ale_py")
    name, _, torso = name.partition(", ")
    system = {"impala": impala, "seed_rl": seed_rl, "apex": apex, "dppo": dppo, "r2d2": r2d2}[name]
    config = system.PRESETS["one_gpu"]
    words = gpu_benchmark.SMALL[name].replace("-", "_").split()
    flags: dict[str, Any] = {
        word[2:]: int(n) for word, n in zip(words[::2], words[1::2], strict=True)
    }
    tiny: dict[str, Any] = {
        "total_env_steps": gpu_benchmark.TINY_STEPS,
        "torch_threads": 1,
        "progress": False,
    }
    if torso:
        flags["torso"] = torso
    if system is seed_rl:
        tiny |= {"wiring": "calls", "inference_batch": 4}
    config = replace(config, **flags, **tiny, runtime="virtual")
    assert (config.device, config.precision) == ("auto", "bfloat16")
    with PretendedGPU() as gpu:
        result = train(system, config)
    assert gpu.up > 100_000 and result.learner_steps >= 1
    assert vector(result).isfinite().all()


def test_the_benchmark_of_learners_runs(gpu):
    for case in learners_benchmark.CASES[:2]:
        row = learners_benchmark.update(case, (2, 2), 0.0)
        assert row["device"] == HERE and row["samples"] == 4 and "why not" not in row
    rows = learners_benchmark.copies((2, 2), 0.0)
    assert [row["case"] for row in rows] == ["pageable", "pinned", "pinned for it"]
    assert all(row["GB/s"] > 0 for row in rows)


# -- mistakes --------------------------------------------------------------------------------------


def test_a_sum_through_the_host_waits_for_what_it_adds(gpu, monkeypatch):
    worker, device = member(1), torch.device(HERE)
    group = together.Together(distributed.HashStore(), 0, 1, device)
    try:
        worker.weigh(0)
        before = worker.flat.gradients.cpu()
        for _ in range(3):  # its pinned buffer is used again
            group.add(worker.flat.gradients)
        assert group.backend == "gloo" and torch.equal(worker.flat.gradients.cpu(), before)
        monkeypatch.setattr(type(torch.cuda.current_stream()), "synchronize", lambda self: None)
        with pytest.raises(Race, match="before its copy is there"):
            group.add(worker.flat.gradients)
    finally:
        group.leave()


def test_who_takes_parameters_too_soon_takes_nothing(gpu, monkeypatch):
    copy = devices.HostCopy(Flat(nn.Linear(2, 2).to(HERE)))
    assert np.isfinite(copy.take()).all()
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: None)
    assert np.isnan(copy.take()).all()


def test_a_copy_on_a_stream_of_its_own_waits_for_what_it_is_made_of(gpu, monkeypatch):
    network = ActorCritic((4,), 2, (8,))
    there = on_device.OnDevice(network, HERE)
    assert len(there(np.zeros((3, 4), np.float32))) == 2
    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", lambda self, other: None)
    with pytest.raises(Race, match="written on stream"):
        on_device.OnDevice(network, HERE)


def test_answers_that_were_not_waited_for_are_none(gpu, monkeypatch):
    there, seen = on_device.OnDevice(ActorCritic((4,), 2, (8,)), HERE), np.zeros((3, 4), "f4")
    assert all(np.isfinite(answer).all() for answer in there(seen))
    monkeypatch.setattr(on_device.OnDevice, "_wait", lambda self: None)
    assert all(np.isnan(answer).all() for answer in there(seen))


def test_a_buffer_for_all_batches_would_be_overwritten_on_its_way(gpu, monkeypatch):
    buffers: dict[Any, torch.Tensor] = {}

    def joined(arrays: Any, axis: int, device: torch.device) -> torch.Tensor:
        whole = torch.from_numpy(np.concatenate(arrays, axis))
        key = whole.shape, whole.dtype
        if key not in buffers:
            buffers[key] = torch.empty_like(whole, pin_memory=True)
        np.copyto(buffers[key].numpy(), whole.numpy())
        return buffers[key].to(device, non_blocking=True)

    monkeypatch.setattr(unroll_replay, "joined", joined)
    batch = on_learners.batch_of(on_learners.CONFIG)
    batch[0].env_outputs.reward[:] += 0.5  # of the shape of discounts
    with pytest.raises(Race, match="written to while"):
        impala.Learner(replace(on_learners.CONFIG, device="cuda")).update([0], *batch)


def test_weights_left_on_the_host_are_refused(gpu, monkeypatch):
    def there(array: Any, device: torch.device) -> torch.Tensor:
        return on_device.there(array, device if array.ndim > 1 else torch.device("cpu"))

    config = replace(on_replay.APEX, device="cuda", updates_per_call=1)
    (shard,) = on_replay.shards_of(apex, on_replay.APEX, 1)
    parts = on_replay.narrowed(shard.draw(4, 1.0))[1:]
    monkeypatch.setattr(q_learning, "there", there)
    with pytest.raises((Refused, ValueError), match="on cpu|on one device|number of indices"):
        apex.Learner(replace(config, batch_size=4)).learn(*parts)
