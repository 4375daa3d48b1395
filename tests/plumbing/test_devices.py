"""Devices: what is refused, whose device is whose, Ray's options, copies, autocast, compilation."""

import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlbook.parts.flat import Flat
from rlbook.parts.networks import ActorCritic
from rlbook.parts.recurrent import RecurrentActorCritic
from rlbook.parts.stored import reading
from rlbook.plumbing import devices as dv
from rlbook.plumbing.runtime import RayRuntime

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPUS = torch.cuda.device_count()


@dataclass(frozen=True, kw_only=True)
class Config(dv.DeviceFields):
    """Of a system on Ray; for tests."""

    num_learners: int = 1
    ray_address: str | None = None

    def __post_init__(self) -> None:
        self.check_devices()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "gpu"}, "device: must be cpu"),
        ({"device": "cuda:"}, "device: must be cpu"),
        ({"device": "auto,cpu"}, "device: of several, each by its number"),
        ({"device": f"cuda:{GPUS}"}, f"device: this computer has no 'cuda:{GPUS}'"),
        ({"device": f"cpu,cuda:{GPUS}"}, f"no 'cuda:{GPUS}'"),
        ({"precision": "float16"}, "precision: must be one of float32, bfloat16; got 'float16'"),
        ({"learner_backend": "mpi"}, "learner_backend: must be one of"),
        ({"gpus_per_learner": 0.0}, "gpus_per_learner: must be above 0"),
        ({"gpus_per_learner": 2.0}, "gpus_per_learner: must be above 0 and at most 1, got 2.0"),
        ({"learner_backend": "nccl"}, "nccl needs a whole GPU"),
        ({"learner_backend": "nccl", "device": "auto", "gpus_per_learner": 0.5}, "a whole GPU"),
    ],
)
def test_bad_values_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


@pytest.mark.skipif(GPUS > 0, reason="of a computer without a GPU")
def test_a_gpu_is_refused_where_there_is_none_but_not_on_a_cluster():
    with pytest.raises(ValueError, match="device: this computer has no 'cuda': it has no GPU"):
        Config(device="cuda")
    assert Config(device="cuda", ray_address="auto").device == "cuda"
    with reading():  # what a run on another computer has stored
        assert Config(device="cuda:7").device == "cuda:7"
    with pytest.raises(ValueError, match="no 'cuda:7'"):
        replace(Config(), device="cuda:7")
    assert dv.device_here(Config(device="auto"), 3) == torch.device("cpu")


def test_each_takes_its_own_of_several_devices(monkeypatch):
    def all_of(device: str, count: int = 4) -> list[str]:
        return [str(dv.own_device(device, index)) for index in range(count)]

    assert all_of("cpu") == ["cpu"] * 4
    assert all_of("cuda:1,cuda:0,cpu") == ["cuda:1", "cuda:0", "cpu", "cuda:1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert all_of("cuda") == all_of("auto") == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert all_of("cuda:1") == ["cuda:1"] * 4
    assert Config(device="cuda:1,cuda:0").device == "cuda:1,cuda:0"
    with pytest.raises(ValueError, match="no 'cuda:2': it has GPUs cuda:0 to cuda:1"):
        Config(device="cuda:2")


def test_sums_go_by_nccl_where_everybody_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    assert dv.backend_for("auto", ["a", "b"]) == dv.backend_for("nccl", ["a", "b"]) == "nccl"
    assert dv.backend_for("auto", ["a", "a"]) == dv.backend_for("auto", ["a", ""]) == "gloo"
    assert dv.backend_for("gloo", ["a", "b"]) == "gloo"
    for gpus in (["a", "a"], ["a", ""]):
        with pytest.raises(ValueError, match="nccl needs a GPU for each process alone, got"):
            dv.backend_for("nccl", gpus)
    assert dv.gpu_of(torch.device("cpu")) == ""


class Sees:
    """An actor that tells which GPUs it sees."""

    def gpus(self) -> str | None:
        import os

        return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_ray_gives_learners_gpus_or_parts_of_them(monkeypatch):
    """GPUs are a number to Ray: two that do not exist do for this."""
    import ray

    cluster = {"ray_address": "auto"}
    assert dv.placed(Config()) == {}
    with RayRuntime(num_cpus=2) as runtime:
        assert dv.placed(Config(device="auto")) == ({"num_gpus": 1, "num_cpus": 0} if GPUS else {})
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 2.0})
        whole = {"num_gpus": 1.0, "num_cpus": 0}
        assert dv.placed(Config(device="cuda", num_learners=2, **cluster)) == whole
        assert dv.placed(Config(device="cuda:1", num_learners=2, **cluster)) == {}
        assert dv.placed(Config(device="auto", num_learners=2)) == whole
        assert dv.placed(Config(device="auto", num_learners=3))["num_gpus"] == 0.5
        assert dv.placed(Config(device="auto", num_learners=6))["num_gpus"] == 0.3333
        assert dv.placed(Config(device="auto"), 6)["num_gpus"] == 0.3333
        half = Config(device="cuda", num_learners=4, gpus_per_learner=0.5, **cluster)
        assert dv.placed(half)["num_gpus"] == 0.5
        for settings in ({"num_learners": 3}, {"num_learners": 3, "gpus_per_learner": 0.6}):
            with pytest.raises(ValueError, match="device: 3 learners with .* on Ray's 2 GPUs"):
                dv.placed(Config(device="cuda", **settings, **cluster))
        # What placement by hand relies on: who asks for no GPU sees all.
        free = runtime.remote(Sees, runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": "2,5"}})
        assert runtime.get(free.remote().gpus.remote()) == "2,5"


def test_what_comes_to_the_host_is_a_copy():
    flat = Flat(torch.nn.Linear(3, 2))
    copy = dv.HostCopy(flat)
    before = copy.take()
    later, expected = copy.begin(), flat.vector.clone()
    flat.vector.zero_()
    assert np.array_equal(before, expected) and np.array_equal(later(), expected)
    copy.put(before)
    assert torch.equal(flat.vector, expected)


def small(**settings) -> SimpleNamespace:
    return SimpleNamespace(**{"precision": "float32", "compile": False, **settings})


def test_products_are_made_in_the_precision_asked_for():
    layer, x = torch.nn.Linear(4, 4), torch.randn(5, 4)
    cpu = torch.device("cpu")
    with dv.autocast(small(), cpu):
        assert layer(x).dtype == torch.float32
    with dv.autocast(small(precision="bfloat16"), cpu):
        assert layer(x).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")
def test_a_compiled_network_says_and_learns_the_same():
    torch.manual_seed(0)
    plain, fast = ActorCritic((4,), 2), ActorCritic((4,), 2)
    fast.load_state_dict(plain.state_dict())
    flats = Flat(plain), Flat(fast)
    assert dv.compiled(fast, small(compile=True)) is fast
    x = torch.randn(6, 4)
    for network in (plain, fast):
        logits, values = network(x)
        (logits.square().sum() + values.sum()).backward()
    assert torch.allclose(flats[0].gradients, flats[1].gradients, rtol=1e-5, atol=1e-6)
    assert flats[1].gradients.abs().sum() > 0 and fast._compiled_call_impl is not None


def test_of_a_network_with_memory_the_torso_is_compiled():
    network = dv.compiled(RecurrentActorCritic((4,), 2), small(compile=True))
    assert network.torso._compiled_call_impl is not None and network._compiled_call_impl is None
    assert dv.compiled(ActorCritic((4,), 2), small())._compiled_call_impl is None


@on_gpu
def test_parameters_come_from_the_gpu_as_they_were_when_they_set_out():
    device = torch.device("cuda", 0)
    network = torch.nn.Linear(2000, 2000).to(device)
    flat, big = Flat(network), torch.randn(4000, 4000, device=device)
    copy, expected = dv.HostCopy(flat), flat.vector.cpu().numpy()
    for _ in range(20):  # the copy sets out while the GPU has work, and the vector changes after it
        big = big @ big / big.norm()
    later = copy.begin()
    flat.vector.zero_()
    assert np.array_equal(later(), expected)
    copy.put(expected)
    assert np.array_equal(copy.take(), expected)
    assert dv.gpu_of(device) and dv.device_here(small(device="cuda")) == device


def test_without_ray_nothing_is_asked_of_it() -> None:
    """An import of Ray writes to stderr in a notebook, unless `RayRuntime` makes it."""
    code = (
        "import sys; from rlbook import impala; from rlbook.plumbing.devices import placed;"
        "assert placed(impala.Config(device='auto')) == {}; assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
