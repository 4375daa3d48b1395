"""Ranks: answers in order; a failure ends all, with its traceback; nothing hangs or stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from torch import distributed

from rlbook.plumbing.ranks import RankError, Ranks, on_ranks, rank_device

ROOT = Path(__file__).parents[2]


def number(times: int = 1) -> tuple[int, int, int]:
    print("a rank's chatter", file=sys.stderr)
    return distributed.get_rank() * times, distributed.get_world_size(), os.getpid()


def summed(value: float) -> float:
    tensor = torch.tensor(value * (1 + distributed.get_rank()))
    distributed.all_reduce(tensor)
    return tensor.item()


def place() -> tuple[str, str]:
    return str(rank_device()), distributed.get_backend()


def one_fails(who: int) -> None:
    if distributed.get_rank() == who:
        raise KeyError("on purpose")
    distributed.barrier()  # would wait for ever


def one_is_killed(who: int) -> None:
    if distributed.get_rank() == who:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def one_sleeps(who: int) -> None:
    if distributed.get_rank() == who:
        time.sleep(1000)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    with Ranks(3) as ranks:
        yield ranks


def test_results_come_in_order_and_processes_stay(three: Ranks) -> None:
    first, second = three.run(number), three.run(number, times=10, size=2)
    assert [answer[:2] for answer in first] == [(0, 3), (1, 3), (2, 3)]
    assert [answer[:2] for answer in second] == [(0, 2), (10, 2)]
    pids = [pid for *_, pid in first]
    assert len({os.getpid(), *pids}) == 4
    assert [pid for *_, pid in second] == pids[:2]


def test_runs_of_ranks_that_do_not_talk_are_not_disturbed_by_the_quickest(three: Ranks) -> None:
    for turn in range(40):
        assert len(three.run(number, size=2 + turn % 2)) == 2 + turn % 2


def test_ranks_talk_to_each_other(three: Ranks) -> None:
    assert three.run(summed, 2.0) == [2.0 * (1 + 2 + 3)] * 3
    assert three.run(summed, 2.0, size=1) == [2.0]


def test_ranks_know_their_device(three: Ranks) -> None:
    assert three.backend == "gloo" and three.run(place) == [("cpu", "gloo")] * 3
    assert str(rank_device()) == "cpu"
    with pytest.raises(ValueError, match="nccl needs a GPU for each process"):
        Ranks(2, backend="nccl")
    if not torch.cuda.is_available():
        assert [str(device) for device in Ranks(2, "auto").devices] == ["cpu", "cpu"]
        with pytest.raises(ValueError, match="device: this computer has no 'cuda'"):
            Ranks(2, "cuda")


def test_what_cannot_work_is_refused_and_harms_nobody(three: Ranks) -> None:
    for size in (0, 4):
        with pytest.raises(ValueError, match="between 1 and 3"):
            three.run(number, size=size)

    def made_in_a_cell() -> None: ...

    made_in_a_cell.__module__ = "__main__"
    with pytest.raises(ValueError, match="made_in_a_cell: must be importable"):
        three.run(made_in_a_cell)
    with pytest.raises(ValueError, match="at least 1"):
        Ranks(0)
    with pytest.raises(RuntimeError, match="enter"):
        Ranks(1).run(number)
    assert len(three.run(number)) == 3


@pytest.mark.parametrize("who", [0, 1])
def test_one_failure_ends_all_with_its_traceback(who: int) -> None:
    before = children()
    with Ranks(2) as ranks:
        assert len(children() - before) == 2
        with pytest.raises(RankError, match=f"rank {who} of 2 failed(.|\n)*KeyError: 'on purpose'"):
            ranks.run(one_fails, who)
        assert children() == before
        with pytest.raises(RuntimeError, match="not running"):
            ranks.run(number)


def test_a_killed_rank_ends_all() -> None:
    before = children()
    with pytest.raises(RankError, match=r"rank 1 died \(exit code -9\)"):
        on_ranks(2, one_is_killed, 1)
    assert children() == before


def test_a_hang_ends_with_the_names_of_the_late() -> None:
    before = children()
    with Ranks(2) as ranks:
        ranks.run(number)
        with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
            ranks.run(one_sleeps, 1, timeout_s=1.0)
        assert children() == before


PROGRAM = """
from rlbook.plumbing.ranks import Ranks
from tests.plumbing.test_ranks import number, one_sleeps
with Ranks(2) as ranks:
    print(*[pid for *_, pid in ranks.run(number)], flush=True)
    ranks.run(one_sleeps, 0)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_nobody_outlives_the_driver_and_nobody_prints(how: signal.Signals) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    ranks = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
    assert len(ranks) == 2
    driver.send_signal(how)
    _, err = driver.communicate(timeout=30)
    assert "chatter" not in err
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
