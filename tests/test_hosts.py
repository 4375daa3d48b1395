"""A cluster of several hosts: training on all of them, and on those that are left.

The hosts are real to Ray: network namespaces with addresses of their own (tests/hosts.py), joined
by Ray's own commands, with a token.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rlbook.harness.checkpoint import load_checkpoint
from tests.hosts import Hosts, ip, wait_until, why_not

WHY_NOT = why_not()


def needs_hosts(test: Callable) -> Callable:
    return pytest.mark.slow(pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)(test))


WHO_IS_WHERE = """
import sys
import ray
from ray._private import state
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
for actor in state.actors().values():
    if actor["State"] == "ALIVE" and actor["Address"]["NodeID"] in hosts:
        print(actor["ActorClassName"], hosts[actor["Address"]["NodeID"]])
print("host", *hosts.values())
"""


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(3) as made:
        for host in range(3):
            made.start_ray(host)
        yield made
    assert made.name not in ip("netns", "list")


def where(hosts: Hosts) -> dict[str, set[str]]:
    """Class → addresses of the hosts where its actors live; "host" → those that are alive."""
    found: dict[str, set[str]] = {}
    for line in hosts.python(0, WHO_IS_WHERE, hosts.head).splitlines():
        kind, *addresses = line.split()
        found.setdefault(kind, set()).update(addresses)
    return found


def env_steps(run_dir: Path) -> int:
    """Of the newest row of a run."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return int(json.loads(lines[-1])["env_steps"]) if lines else 0


def train(run_dir: Path, system: str, *settings: str) -> tuple[str, ...]:
    """The command that docs/cluster.md shows. RAY_ADDRESS says which of the clusters on this
    machine is meant by "auto": processes of all hosts can be seen from each.
    """
    program = (sys.executable, "-m", "rlbook.cli", "train", system, "--ray-address", "auto")
    return (*program, "--run-dir", str(run_dir), *settings)


def cut_while_it_trains(
    hosts: Hosts, cut: int, run_dir: Path, steps: int, *command: str
) -> dict[str, set[str]]:
    """Trains, cuts a host off, sees `steps` more taken on the others, and ends the run with
    Ctrl-C. Who was where before.
    """
    away = hosts.addresses[cut]
    process = hosts.start(0, *command, RAY_ADDRESS=hosts.head)
    try:
        wait_until(lambda: env_steps(run_dir) > 0 or process.poll() is not None, 150, "training")
        assert process.poll() is None, process.communicate()[0]
        before = where(hosts)
        assert before["Actor"] == set(hosts.addresses)
        hosts.cut(cut)
        wait_until(lambda: away not in where(hosts)["host"], 60, "Ray notices the dead host")
        then = env_steps(run_dir)
        wait_until(lambda: env_steps(run_dir) > then + steps, 90, "training goes on")
        assert where(hosts)["Actor"] == set(hosts.addresses) - {away}
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
        hosts.mend(cut)
        hosts.start_ray(cut)
    assert process.returncode == 130, said
    assert json.loads((run_dir / "result.json").read_text())["stopped_because"] == "interrupted"
    return before


@needs_hosts
def test_impala_goes_on_when_a_host_is_cut_off(hosts: Hosts, tmp_path: Path) -> None:
    """Its wire is slow, so that it has unrolls which the learner waits for: they are lost."""
    hosts.slow(1, "20mbit")
    run_dir, many = tmp_path / "run", ("--total-env-steps", "1000000000", "--num-envs", "1024")
    command = train(run_dir, "impala", *many, "--num-actors", "4")
    before = cut_while_it_trains(hosts, 1, run_dir, 300_000, *command)
    assert before["Learner"] == {hosts.addresses[0]}
    assert load_checkpoint(run_dir / "checkpoint.npz", "impala")["extra"]["unrolls_dropped"] >= 1


@needs_hosts
def test_apex_goes_on_when_a_host_is_cut_off(hosts: Hosts, tmp_path: Path) -> None:
    run_dir, many = tmp_path / "run", ("--total-env-steps", "1000000000")
    command = train(run_dir, "apex", *many, "--num-actors", "4")
    before = cut_while_it_trains(hosts, 2, run_dir, 10_000, *command)
    assert before["Learner"] == before["MemoryShard"] == {hosts.addresses[0]}


REFUSED = """
import sys, time
from rlbook.plumbing.runtime import RayRuntime
begun = time.perf_counter()
try:
    RayRuntime(address=sys.argv[1]).__enter__()
except ConnectionError as error:
    print(f"{time.perf_counter() - begun:.1f}", error)
"""


@needs_hosts
def test_a_driver_without_the_token_or_the_address_is_told_so_quickly(hosts: Hosts) -> None:
    there, nobody = hosts.head, f"{hosts.addresses[0][:-1]}99:6379"
    for address, token, said in (
        (there, "x" * 32, "lets nobody in: it wants a token"),
        (nobody, hosts.environment["RAY_AUTH_TOKEN"], "no Ray cluster answers at"),
    ):
        program = (sys.executable, "-c", REFUSED, address)
        (line,) = hosts.run(1, *program, RAY_AUTH_TOKEN=token).splitlines()
        seconds, _, text = line.partition(" ")
        assert text.startswith(f"ray_address: {address} " if address == there else "ray_address")
        assert said in text and float(seconds) < 30


@needs_hosts
def test_learners_on_several_hosts_add_up(hosts: Hosts, tmp_path: Path) -> None:
    few = ("--total-env-steps", "20000", "--num-learners", "3", "--unrolls-per-batch", "3")
    command = train(tmp_path / "run", "impala", *few, "--num-actors", "3")
    hosts.run(0, *command, seconds=150, RAY_ADDRESS=hosts.head)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["stopped_because"] == "total_env_steps"
    states = load_checkpoint(tmp_path / "run" / "checkpoint.npz", "impala")["parts"]["learners"]
    one, *others = [state["parameters"] for state in states["learners"]]
    assert len(others) == 2 and all(np.array_equal(one, other) for other in others)


@needs_hosts
def test_a_learner_whose_host_is_cut_off_ends_the_run(hosts: Hosts, tmp_path: Path) -> None:
    many = ("--total-env-steps", "1000000000", "--num-learners", "3", "--unrolls-per-batch", "3")
    command = train(tmp_path / "run", "impala", *many, "--num-actors", "3")
    process = hosts.start(0, *command, RAY_ADDRESS=hosts.head)
    try:
        wait_until(lambda: env_steps(tmp_path / "run") > 0, 150, "training")
        assert where(hosts)["Learner"] == set(hosts.addresses)
        hosts.cut(1)
        said = process.communicate(timeout=120)[0]
    finally:
        process.kill()
        hosts.mend(1)
        hosts.start_ray(1)
    assert process.returncode not in (0, 130)
    assert "ActorDiedError" in said or "GroupBroken" in said, said


@needs_hosts
def test_the_doctor_counts_all_hosts(hosts: Hosts) -> None:
    doctor = (sys.executable, "-m", "rlbook.cli", "doctor", "--ray-address", hosts.head)
    said = hosts.start(1, *doctor).communicate(timeout=120)[0]
    assert said.count("2 cores") >= 3
    assert "rlbook train impala --num-actors 4 --ray-address auto" in said


@needs_hosts
def test_seed_s_workers_are_on_all_hosts(hosts: Hosts, tmp_path: Path) -> None:
    few = ("--total-env-steps", "20000", "--wiring", "calls", "--num-workers", "3")
    hosts.run(0, *train(tmp_path / "run", "seed_rl", *few), seconds=150, RAY_ADDRESS=hosts.head)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["stopped_because"] == "total_env_steps"


CONNECTED = """
import sys
from rlbook.plumbing.stream_worker import Lost, status
from rlbook.plumbing.streams import StreamSettings
try:
    print(status(sys.argv[1], StreamSettings(connect_s=2.0)))
except Lost as error:
    print(error)
"""


@needs_hosts
@pytest.mark.parametrize("own", [True, False], ids=["own address", "loopback"])
def test_seed_s_server_is_reached_from_another_host_if_it_is_told_to(
    own: bool, hosts: Hosts, tmp_path: Path
) -> None:
    run_dir, many = tmp_path / "run", ("--total-env-steps", "1000000000")
    address = f"{hosts.addresses[0] if own else '127.0.0.1'}:7700"
    listening = ("--wiring", "tcp", "--address", address, *(("--allow-remote",) if own else ()))
    program = (sys.executable, "-m", "rlbook.cli", "train", "seed_rl", "--run-dir", str(run_dir))
    process = hosts.start(0, *program, *many, *listening)
    try:
        wait_until(lambda: env_steps(run_dir) > 0 or process.poll() is not None, 150, "training")
        assert process.poll() is None, process.communicate()[0]
        said = hosts.python(1, CONNECTED, f"{hosts.addresses[0]}:7700")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert ("workers" in said) == own and ("UNAVAILABLE" in said) != own, said
