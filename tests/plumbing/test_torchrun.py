"""torchrun's ranks: the same run as without; one message for bad settings; nobody hangs."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import distributed

from rlbook import cli, dppo
from rlbook.harness.result import Result
from rlbook.plumbing import group, torchrun
from rlbook.plumbing.cluster import Cluster, Node
from rlbook.plumbing.crew import CrewError
from rlbook.plumbing.group import SharedBoard
from rlbook.plumbing.torchrun import Launch, RankCrew, StoreBoard, interface_to, launched
from rlbook.plumbing.virtual import VirtualRuntime
from tests.hosts import Hosts, why_not
from tests.runs import same_parameters

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ALONE = ["--standalone", "--nproc-per-node", "2"]
QUICK = {
    "num_envs": 8,
    "unroll_length": 16,
    "epochs": 2,
    "minibatch_size": 128,
    "log_every_env_steps": 500,
}
FLAGS = [word for k, v in QUICK.items() for word in (f"--{k.replace('_', '-')}", str(v))]
WHY_NOT = why_not()


@contextmanager
def started(*words: object, how: list[str] = ALONE, folder: Path) -> Iterator[subprocess.Popen]:
    """torchrun with these words; at the end nobody is left."""
    process = subprocess.Popen(
        [*TORCHRUN, *how, *map(str, words)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    family = [psutil.Process(process.pid)]
    try:
        yield process
        family += family[0].children(recursive=True) if process.poll() is None else []
    finally:
        process.kill()
        process.communicate()
        for other in family[1:]:
            if other.is_running():
                other.kill()


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def train(*words: object, folder: Path, how: list[str] = ALONE) -> tuple[int, str, str]:
    with started("-m", "rlbook", "train", "dppo", *FLAGS, *words, how=how, folder=folder) as run:
        return ended(run)


def ranks(process: subprocess.Popen) -> list[psutil.Process]:
    """By number."""
    children = psutil.Process(process.pid).children()
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def wait_for_rows(folder: Path, process: subprocess.Popen) -> None:
    """Until the run is under way."""
    until, metrics = time.monotonic() + 60, folder / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < until, "it does not begin"
        time.sleep(0.02)


def alike(total: int, **settings: object) -> Result:
    """The same run without torchrun, on the virtual clock."""
    config = dppo.Config(progress=False, total_env_steps=total, **{**QUICK, **settings})
    with VirtualRuntime(1, Cluster(nodes=(Node(cores=8),), costs=dppo.COSTS)) as runtime:
        return dppo.train(replace(config, runtime="virtual"), runtime)


def test_ranks_make_the_same_updates_as_a_run_without_torchrun(tmp_path):
    """Once in the run folder, once on the screen; continued by torchrun, too."""
    settings = {"normalize_observations": True}
    words = ["--normalize-observations"]
    code, out, err = train(*words, "--total-env-steps", 3_000, "--run-dir", "a", folder=tmp_path)
    assert (code, err) == (0, "") and out.count("total_env_steps") == 1 == out.count("kept in")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    mine, same = Result.load(tmp_path / "a"), alike(3_000, **settings)
    assert same_parameters(mine, same) and mine.config.num_workers == 2
    assert mine.env_steps == same.env_steps and mine.learner_steps == same.learner_steps > 40
    who = {span.who for span in mine.kept_spans()}
    assert who == {"Worker 0", "Worker 1", "driver"}

    code, _, err = train("--resume", "a", "--total-env-steps", 4_000, folder=tmp_path)
    assert (code, err) == (0, "")
    assert same_parameters(Result.load(tmp_path / "a"), alike(4_000, **settings))


@pytest.mark.slow
def test_three_ranks_on_two_hosts_hurry_and_balance(tmp_path):
    """The README's commands for two computers, here of two ranks and of one."""
    words = [*FLAGS, "--preempt", "--balance", "--total-env-steps", 4_000, "--run-dir", "a"]
    with free_port() as port:
        here = {"HOST": "127.0.0.1", "29500": str(port), "cuda": "auto"}
    shown = re.findall(r"^torchrun (--nnodes .*)$", (ROOT / "README.md").read_text(), re.M)
    hosts = []
    for ranks_here, line in zip("21", shown, strict=True):
        hosts.append([(here | {"4": ranks_here}).get(word, word) for word in line.split()])
    with started(*words, how=hosts[0], folder=tmp_path) as one:
        with started(*words, how=hosts[1], folder=tmp_path) as other:
            assert [ended(other)[0], ended(one)[0]] == [0, 0]
    result = Result.load(tmp_path / "a")
    assert result.env_steps >= 4_000 and result.config.num_workers == 3
    lengths = result.curves["unroll_length_mean"]
    assert min(lengths) < QUICK["unroll_length"] or max(lengths) > QUICK["unroll_length"]


@contextmanager
def free_port() -> Iterator[int]:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as door:
        yield door.getsockname()[1]


@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_rank_ends_the_run_with_torchruns_report(who, tmp_path):
    words = ["-m", "rlbook", "train", "dppo", *FLAGS, "--total-env-steps", 10**9, "--run-dir", "a"]
    with started(*words, folder=tmp_path) as run:
        wait_for_rows(tmp_path / "a", run)
        family = ranks(run)
        family[who].kill()
        code, _, err = ended(run)
        assert code != 0 and psutil.wait_procs(family, timeout=1)[1] == []
        cause = err[err.index("Root Cause") :]
        assert re.search(rf"rank +: {who} ", cause) and "SIGKILL" in cause


@pytest.mark.slow
def test_ctrl_c_ends_the_run_in_good_order(tmp_path):
    words = ["-m", "rlbook", "train", "dppo", *FLAGS, "--total-env-steps", 10**9, "--run-dir", "a"]
    with started(*words, folder=tmp_path) as run:
        wait_for_rows(tmp_path / "a", run)
        family = ranks(run)
        run.send_signal(signal.SIGINT)
        ended(run)
        assert psutil.wait_procs(family, timeout=1)[1] == []
    result = Result.load(tmp_path / "a")
    assert result.stopped_because == "interrupted" and result.env_steps > 0


PROGRAM = """
from rlbook.plumbing.lockstep import Lockstep
from tests.plumbing.test_torchrun import Failing, Settings
with Lockstep(Failing, Settings) as team:
    while True:
        team.turn()
"""


class Settings:
    """What `Lockstep` reads."""

    num_workers = 2
    preempt = False
    sync_fraction = short_rollout = 0.5


class Failing:
    """A worker that fails in the third round, in place 1; the other waits for it in a sum."""

    def __init__(self, config, index, born, metered, board) -> None:
        self.index, self.rounds, self.updates = index, 0, 0

    def join(self, meeting, rank, size):
        from rlbook.plumbing.group import Group

        self.group = Group(meeting, rank, size)

    def round(self):
        import torch

        self.rounds += 1
        if self.rounds == 3 and self.index == 1:
            raise KeyError("on purpose")
        try:
            self.group.add(torch.ones(3))
        except RuntimeError:
            return None
        return SimpleNamespace(updates=self.rounds)


@pytest.mark.slow
def test_an_error_in_a_rank_ends_the_run_with_its_traceback(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    with started("program.py", folder=tmp_path) as run:
        code, _, err = ended(run)
    assert code != 0 and err.count("KeyError: 'on purpose'") >= 1
    cause = err[err.index("Root Cause") :]
    assert re.search(r"rank +: 1 ", cause) and "KeyError: 'on purpose'" in cause


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "dppo", "--num-workers", "3"],
            "num_workers: torchrun started 2 ranks, but .* 3",
        ),
        (["train", "dppo", "--wiring", "parameter_server"], "wiring: torchrun"),
        (["train", "dppo", "--runtime", "virtual"], "runtime: torchrun"),
        (["train", "dppo", "--clip", "0"], "clip: must be larger than 0"),
        (["train", "ppo"], "torchrun starts `rlbook train dppo ...` and nothing else"),
        (["train", "dppo", "--help"], "torchrun starts `rlbook train dppo ...` and nothing else"),
        (["--version"], "torchrun starts `rlbook train dppo ...` and nothing else"),
        (["record", "a", "dppo"], "torchrun starts `rlbook train dppo ...` and nothing else"),
    ],
)
def test_bad_settings_are_refused_by_rank_0_alone(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in (("RANK", 0), ("WORLD_SIZE", 2), ("MASTER_PORT", 1), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, str(value))
    assert cli.main(words) == 2 and list(tmp_path.iterdir()) == []
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(rf"rlbook: {message}[^\n]*\n", err)


def test_other_ranks_read_no_command(monkeypatch):
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("MASTER_PORT", 1), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torchrun, "serve", lambda: 7)
    assert cli.main(["no", "command"]) == 7


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")
def test_who_lost_the_others_lets_the_first_to_die_be_found(monkeypatch, capsys):
    for name, value in (("RANK", 1), ("WORLD_SIZE", 2), ("MASTER_PORT", 1), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, str(value))
    ours, theirs = Pipe()
    theirs.close()
    slept = []
    monkeypatch.setattr(torchrun, "_driver", lambda launch: ours)
    monkeypatch.setattr(time, "sleep", slept.append)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert torchrun.serve() == 1 and slept == [torchrun.GRACE_S] and slept[0] >= 1
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == "rlbook: rank 1: rank 0 is gone\n"
    with pytest.raises(CrewError, match="rank 1 of 2 is gone: resume from the last checkpoint"):
        RankCrew._replace(SimpleNamespace(size=2), 1)
    assert slept == [torchrun.GRACE_S] * 2


@pytest.mark.slow
def test_one_message_is_seen(tmp_path):
    code, out, err = train("--num-workers", 3, folder=tmp_path)
    assert code != 0 and err.count("rlbook: num_workers") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_who_is_launched_and_how(monkeypatch):
    variables = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name in (*variables, "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    for name, value in variables.items():
        assert launched() is None
        monkeypatch.setenv(name, value)
    assert launched() == Launch(3, 4, 3, False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert launched() == Launch(3, 4, 1, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert launched() == Launch(3, 4, 1, True)


def test_a_board_in_the_store_is_one_in_memory(monkeypatch):
    store = distributed.HashStore()
    monkeypatch.setattr(torchrun, "store", lambda: store)
    for board in (StoreBoard(3), SharedBoard(3)):
        assert [board.finished(rounds) for rounds in (0, 1)] == [3, 0]
        board.put(2, 1)
        board.put(0, 2)
        assert [board.finished(rounds) for rounds in (1, 2, 3)] == [2, 1, 0]
    assert pickle.loads(pickle.dumps(StoreBoard(3))).finished(0) == 3


def test_a_rank_takes_the_device_of_its_number_on_its_host(monkeypatch):
    asked = []

    def noting(config, index):
        asked.append(index)
        return torch.device("cpu")

    monkeypatch.setattr(group, "device_here", noting)
    config = dppo.Config(num_workers=4, num_envs=2)
    dppo.Worker(config, 3)
    for name, value in (("RANK", 3), ("WORLD_SIZE", 4), ("MASTER_PORT", 1), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_RANK", "1")
    dppo.Worker(config, 3)
    assert asked == [3, 1]


STUCK = """
from rlbook.plumbing import torchrun
from tests.plumbing.test_torchrun import Stuck
torchrun.PATIENCE_S = 1.0
if torchrun.launched().rank:
    raise SystemExit(torchrun.serve())
with torchrun.RankCrew(Stuck, lambda index, born: (), 2) as crew:
    crew.each("wait")
"""


class Stuck:
    """Waits for ever, as in a sum of ranks that have not found each other."""

    def wait(self) -> None:
        print("stuck", flush=True)
        time.sleep(10**6)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_that_is_stuck_ends_when_a_rank_on_another_host_dies(who, tmp_path):
    (tmp_path / "program.py").write_text(STUCK)
    with free_port() as port:
        where = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    hosts = [["--node-rank", str(n), "--nproc-per-node", "1", *where] for n in range(2)]
    with started("program.py", how=hosts[0], folder=tmp_path) as one:
        with started("program.py", how=hosts[1], folder=tmp_path) as other:
            for process in (one, other):
                assert process.stdout.readline() == "stuck\n"
            (victim,) = ranks((one, other)[who])
            victim.kill()
            code, _, err = ended((other, one)[who])
            assert code != 0 and "rlbook: " in err and "is gone" in err


@pytest.mark.slow
@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
def test_ranks_on_hosts_of_their_own_find_each_other():
    """Two network namespaces; then one host dies, and the other does not wait for it."""
    with Hosts(2) as hosts:
        folder, master = hosts.folder, ["--master-addr", hosts.addresses[0]]
        for total, code in ((3_000, 0), (10**9, 1)):
            run_dir = folder / str(total)
            words = [*FLAGS, "--total-env-steps", str(total), "--run-dir", str(run_dir)]
            processes = []
            for n in range(2):
                how = ["--nnodes", "2", "--node-rank", str(n), *master, "--master-port", "29500"]
                command = [*TORCHRUN, *how, "-m", "rlbook", "train", "dppo", *words]
                processes.append(hosts.start(n, *command))
            if code:
                wait_for_rows(run_dir, processes[0])
                hosts.end(hosts.hosts[1])
            said, _ = processes[0].communicate(timeout=120)
            assert (processes[0].returncode != 0) == bool(code), said
            processes[1].communicate(timeout=120)
        assert same_parameters(Result.load(folder / "3000"), alike(3_000))


def test_the_interface_is_the_one_that_leads_there():
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    assert interface_to("127.0.0.1") == interface_to("localhost") == loopback
    assert interface_to("no host of this name.") is None


@pytest.mark.slow
def test_one_rank_is_a_run_too(tmp_path):
    how = ["--standalone", "--nproc-per-node", "1"]
    code, _, err = train("--total-env-steps", 1_000, "--run-dir", "a", folder=tmp_path, how=how)
    assert (code, err) == (0, "")
    assert Result.load(tmp_path / "a").config.num_workers == 1
