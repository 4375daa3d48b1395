"""Devices dealt out to processes, and what their tensors travel by; on described computers."""

import pytest
import torch

from rlbook.plumbing.places import backend_for, own_device


@pytest.fixture
def gpus(monkeypatch):
    """Says how many GPUs this computer has."""

    def have(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return have


def named(device: str, processes: int) -> list[str]:
    return [str(own_device(device, index)) for index in range(processes)]


def test_processes_are_dealt_out_to_gpus_in_turn(gpus):
    gpus(2)
    assert named("cuda", 3) == named("auto", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert named("cuda:1", 2) == ["cuda:1", "cuda:1"] and named("cpu", 2) == ["cpu", "cpu"]
    for wrong in ("cuda:2", "mps"):
        with pytest.raises(ValueError, match=f"device: no {wrong!r} here: there are GPUs 0 to 1"):
            own_device(wrong, 0)


def test_without_a_gpu_auto_is_the_cpu_and_cuda_is_refused(gpus):
    gpus(0)
    assert named("auto", 2) == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="device: no 'cuda' here: PyTorch finds no GPU"):
        own_device("cuda", 0)


@pytest.mark.parametrize(
    ("places", "backend"),
    [
        (["cuda:0", "cuda:1"], "nccl"),
        (["cuda:0"], "nccl"),
        (["cuda:0", "cuda:0"], "gloo"),
        (["cuda:0", "cpu"], "gloo"),
        (["cpu", "cpu"], "gloo"),
    ],
)
def test_nccl_is_for_those_who_share_no_gpu(places, backend):
    devices = [torch.device(place) for place in places]
    assert backend_for("auto", devices) == backend and backend_for("gloo", devices) == "gloo"
    if backend == "nccl":
        assert backend_for("nccl", devices) == "nccl"
    else:
        with pytest.raises(ValueError, match="nccl: needs a GPU for each process"):
            backend_for("nccl", devices)
