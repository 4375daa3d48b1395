"""Who goes where: for each system, how many processes of which kind a machine or a cluster carries.

    hosts: cores, memory, GPUs ──► advise ──► rlbook train SYSTEM --num-actors … --device …

A rule of thumb to begin with, from what there is and not from what a run needs; `rlbook why` says
afterwards what bound it. A core for each learner, one for the driver and whoever holds experience;
all others act. A GPU is for learning, and is worth it only if enough cores feed it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

PROCESS_GIB = 0.5
"""Memory of a process with PyTorch, a network and some small environments (0.5 to 0.6 GiB were
seen); one with an emulator's frames needs more."""
CORES_PER_GPU = 4
"""A GPU with fewer cores to feed it waits for environments most of the time."""


class Host(NamedTuple):
    """One computer."""

    cores: int
    memory_gib: float
    gpus: int = 0


class Plan(NamedTuple):
    """How a number of cores is shared out."""

    acting: int
    """Processes that step environments."""
    learners: int
    notes: tuple[str, ...]
    """What was in the way."""


class Advice(NamedTuple):
    """The command to begin with."""

    system: str
    flags: tuple[str, ...]

    def __str__(self) -> str:
        """As it is typed."""
        return " ".join(["rlbook train", self.system, *self.flags])


def plan(hosts: Sequence[Host]) -> Plan:
    """Learners and actors for all hosts together.

    ValueError if there is no host, or one without a core.
    """
    if not hosts or any(host.cores < 1 for host in hosts):
        raise ValueError("hosts: there must be one, and each needs a core")
    cores, gpus = sum(host.cores for host in hosts), sum(host.gpus for host in hosts)
    notes = []
    learners = min(max(1, gpus), max(1, cores // CORES_PER_GPU))
    if learners < gpus:
        notes.append(f"{cores} cores feed {learners} of {gpus} GPUs; the others would wait")
    acting = max(2, cores - learners - 1)
    fit = max(1, sum(int(host.memory_gib / PROCESS_GIB) for host in hosts) - learners - 1)
    if fit < acting:
        notes.append(f"memory is enough for {fit} processes that act, cores for {acting}")
    if gpus > 1:
        notes.append("gradients between GPUs go by NCCL, which was not tried on more than one")
    return Plan(min(acting, fit), learners, tuple(notes))


def advise(hosts: Sequence[Host]) -> list[Advice]:
    """A command for each system of several processes, with flags that its config accepts."""
    shares, gpus = plan(hosts), sum(host.gpus for host in hosts)
    acting, learners = shares.acting, shares.learners
    device = ("--device", "auto") if gpus else ()
    there = ("--ray-address", "auto") if len(hosts) > 1 else ()
    group = ("--num-learners", str(learners)) if learners > 1 else ()
    everybody = min(sum(host.cores for host in hosts), acting + learners)  # act and learn
    shards = ("--num-shards", "2") if everybody > 8 else ()
    served = ("--wiring", "parameter_server") if len(hosts) > 1 else ()
    workers, actors = ("--num-workers", str(everybody)), ("--num-actors", str(acting))
    batches = {"apex": 128, "apex_dpg": 128, "r2d2": 32}
    flags: dict[str, tuple[str, ...]] = {
        "parameter_server": (*workers, *shards),
        "gorila": (*workers, *shards),
        "a3c": (*workers, *(shards if served else ()), *served),
        "dppo": (*_dppo(everybody, learners, gpus), *device, *served),
        "impala": (*actors, *group, *_batch("--unrolls-per-batch", 1, learners), *device),
        "seed_rl": (*_seed(hosts, acting, learners), *device),
    }
    flags |= {
        name: (*actors, *group, *_batch("--batch-size", size, learners), *device)
        for name, size in batches.items()
    }
    return [Advice(name, (*flags[name], *there)) for name in sorted(flags)]


def lines(hosts: Sequence[Host]) -> list[str]:
    """The advice, for people."""
    what = "; ".join(
        f"{host.cores} cores, {host.memory_gib:.0f} GiB, {host.gpus or 'no'} GPUs" for host in hosts
    )
    shown = [f"To begin with, on {what}:", *(f"    {one}" for one in advise(hosts))]
    return shown + [f"    ({note})" for note in plan(hosts).notes]


def _batch(flag: str, size: int, learners: int) -> tuple[str, ...]:
    """Batches of equal shares, where the default's cannot be divided."""
    divided = math.ceil(size / learners) * learners
    return (flag, str(divided)) if divided != size else ()


def _dppo(everybody: int, learners: int, gpus: int) -> tuple[str, ...]:
    """Whoever acts learns too: a worker for each GPU, or for each core."""
    return ("--num-workers", str(learners if gpus else everybody))


def _seed(hosts: Sequence[Host], acting: int, learners: int) -> tuple[str, ...]:
    """Streams end at one host, and at one learner; the other GPUs act there."""
    workers = ("--num-workers", str(acting))
    if len(hosts) > 1:
        group = ("--num-learners", str(learners), "--unrolls-per-batch", str(learners))
        return (*workers, "--wiring", "calls", *(group if learners > 1 else ()))
    if learners == 1:
        return workers
    others = [f"cuda:{number}" for number in range(1, learners)]
    return (*workers, "--num-inference", str(len(others)), "--inference-devices", *others)
