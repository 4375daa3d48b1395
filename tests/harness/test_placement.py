"""Advice on described machines: it adds up, and every command is one that the system accepts."""

import pytest

from rlbook.cli import _config
from rlbook.harness.placement import Host, advise, lines, plan

LAPTOP = [Host(cores=2, memory_gib=8.0)]
ONE_GPU = [Host(cores=16, memory_gib=128.0, gpus=1)]
EIGHT_GPUS = [Host(cores=64, memory_gib=512.0, gpus=8)]
TWO_HOSTS = [Host(cores=16, memory_gib=64.0, gpus=1), Host(cores=32, memory_gib=64.0)]
FEW_CORES = [Host(cores=6, memory_gib=64.0, gpus=4)]
MACHINES = {
    "laptop": LAPTOP,
    "one GPU": ONE_GPU,
    "eight GPUs": EIGHT_GPUS,
    "two hosts": TWO_HOSTS,
    "few cores": FEW_CORES,
    "two small hosts": [*LAPTOP, *LAPTOP],
}


@pytest.mark.parametrize(
    ("hosts", "acting", "learners"),
    [
        (LAPTOP, 2, 1),
        (ONE_GPU, 16 - 1 - 1, 1),
        (EIGHT_GPUS, 64 - 8 - 1, 8),
        (TWO_HOSTS, 48 - 1 - 1, 1),
        (FEW_CORES, 6 - 1 - 1, 1),
        ([Host(cores=1, memory_gib=4.0)], 2, 1),
        ([Host(cores=64, memory_gib=8.0)], 16 - 1 - 1, 1),  # of half a GiB each
    ],
)
def test_cores_are_shared_out(hosts: list[Host], acting: int, learners: int) -> None:
    assert plan(hosts)[:2] == (acting, learners)


def test_what_is_in_the_way_is_said() -> None:
    assert "6 cores feed 1 of 4 GPUs" in plan(FEW_CORES).notes[0]
    assert "memory is enough for 14" in plan([Host(cores=64, memory_gib=8.0)]).notes[0]
    assert plan(LAPTOP).notes == plan(ONE_GPU).notes == ()
    assert any("NCCL" in note for note in plan(EIGHT_GPUS).notes)
    with pytest.raises(ValueError, match="hosts"):
        plan([])


@pytest.mark.parametrize("hosts", MACHINES.values(), ids=MACHINES)
def test_every_command_is_accepted(hosts: list[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: hosts[0].gpus)
    shares = plan(hosts)
    for advice in advise(hosts):
        config = _config(advice.system, list(advice.flags), "train")
        device = getattr(config, "device", None)
        assert device in (None, "auto" if any(host.gpus for host in hosts) else "cpu")
        assert (getattr(config, "ray_address", None) == "auto") == (len(hosts) > 1)
        if advice.system in ("impala", "apex", "apex_dpg", "r2d2"):
            assert (config.num_actors, config.num_learners) == shares[:2]


def test_the_commands_by_name() -> None:
    said = {advice.system: str(advice) for advice in advise(EIGHT_GPUS)}
    assert said["impala"] == (
        "rlbook train impala --num-actors 55 --num-learners 8 --unrolls-per-batch 8 --device auto"
    )
    assert said["apex"] == "rlbook train apex --num-actors 55 --num-learners 8 --device auto"
    assert said["dppo"] == "rlbook train dppo --num-workers 8 --device auto"
    assert "--num-inference 7 --inference-devices cuda:1 cuda:2" in said["seed_rl"]
    said = {advice.system: str(advice) for advice in advise(TWO_HOSTS)}
    assert said["impala"] == "rlbook train impala --num-actors 46 --device auto --ray-address auto"
    assert "--wiring calls" in said["seed_rl"] and "--wiring parameter_server" in said["a3c"]
    text = lines(LAPTOP)
    assert text[0] == "To begin with, on 2 cores, 8 GiB, no GPUs:"
    assert "    rlbook train impala --num-actors 2" in text
    assert "    rlbook train dppo --num-workers 2" in text
    assert "    rlbook train a3c --num-workers 2" in text
