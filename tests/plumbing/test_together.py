"""Sums between real processes, on the host and from GPUs; who dies in the middle is noticed."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import distributed

from rlbook.plumbing.crew import Crew, CrewError
from rlbook.plumbing.together import GroupBroken, Lifeline, Together

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Rank:
    """A process of a group; for tests."""

    def __init__(self, index: int) -> None:
        self.index = index

    def meet(self, path: str, size: int, device: str, backend: str = "auto") -> str:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store, self.device = distributed.FileStore(path, size), torch.device(device)
        self.together = Together(store, self.index, size, self.device, backend, timeout_s=30.0)
        return self.together.backend

    def add(self) -> list[float]:
        vector = torch.full((3,), 10.0**self.index, device=self.device)
        self.together.add(vector)
        least = torch.tensor([float(self.index), -float(self.index)])
        self.together.lowest(least)
        return [*vector.tolist(), *least.tolist()]

    def wait(self) -> str:
        try:
            self.together.add(torch.zeros(3, device=self.device))
        except GroupBroken as error:
            self.kept = error  # whoever holds it, with its traceback
            self.together.leave()
            return "broken"
        return "whole"

    def watch(self) -> float:
        """Seconds until the lifeline breaks, as one does who waits for a GPU."""
        begun = time.monotonic()
        while time.monotonic() - begun < 20:
            try:
                self.together.lifeline.check()
            except GroupBroken:
                self.together.leave()
                return time.monotonic() - begun
            time.sleep(0.01)
        return float("inf")

    def leave(self) -> str:
        self.together.leave()
        self.together.leave()
        return self.wait()

    def die(self, after_s: float = 0.5) -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)


def crew(size: int) -> Crew:
    return Crew(Rank, lambda index, born: (index,), size)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_have_the_same_sum(size, tmp_path):
    with crew(size) as ranks:
        assert ranks.each("meet", [(str(tmp_path / "a"), size, "cpu")] * size) == ["gloo"] * size
        expected = [sum(10.0**i for i in range(size))] * 3 + [0.0, 1.0 - size]
        assert ranks.each("add") == [expected] * size


@pytest.mark.parametrize("deed", ["watch", "wait"])
@pytest.mark.parametrize("end", ["die", "leave"])
def test_all_learn_at_once_that_one_is_gone(deed, end, tmp_path):
    """Of those who wait for a sum, and of those who look at the lifeline alone."""
    with crew(4) as ranks:  # of four, one is no neighbour of the one that goes
        ranks.each("meet", [(str(tmp_path / "a"), 4, "cpu")] * 4)
        ranks.each("add")
        begun = time.monotonic()
        for index, does in ((0, deed), (2, deed), (3, deed), (1, end)):
            ranks.ask(index, does)
        answers = dict(ranks.rest())
        assert time.monotonic() - begun < 15
        assert answers.pop(1, None) == ("broken" if end == "leave" else None)
        assert sorted(answers) == [0, 2, 3]
        assert all(said == "broken" or said < 10 for said in answers.values()), answers


def test_nccl_without_gpus_is_refused_by_all(tmp_path):
    with crew(2) as ranks, pytest.raises(CrewError, match="nccl needs a GPU for each process"):
        ranks.each("meet", [(str(tmp_path / "a"), 2, "cpu", "nccl")] * 2)


def test_a_lifeline_of_one_never_breaks():
    line = Lifeline(distributed.HashStore(), 0, 1, "127.0.0.1", 1.0)
    line.check()


@pytest.mark.parametrize("address", ["127.0.0.1", "a-name-that-leads-nowhere"])
def test_a_stranger_is_no_rank(address):
    """Who connects without the word is turned away, and the rank that comes after it let in."""
    store = distributed.HashStore()
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(Lifeline, store, 0, 2, address, 10.0)
        port = int(store.get("lifeline").decode().split()[0])
        for words in (b"", b"let me in 1", b"1"):
            stranger = socket.create_connection(("127.0.0.1", port))
            stranger.sendall(words)
            stranger.close()
        own = Lifeline(store, 1, 2, "127.0.0.1" if "." in address else "localhost", 10.0)
        theirs = opened.result(timeout=10)
    own.check()
    theirs.check()
    own.cut()
    with pytest.raises(GroupBroken, match="gone"):
        theirs.check()
    with pytest.raises(GroupBroken, match="gone"):
        own.check()


@on_gpu
def test_two_ranks_on_one_gpu_add_up_through_the_host(tmp_path):
    with crew(2) as ranks:
        assert ranks.each("meet", [(str(tmp_path / "a"), 2, "cuda:0")] * 2) == ["gloo"] * 2
        for _ in range(50):
            assert ranks.each("add") == [[11.0] * 3 + [0.0, -1.0]] * 2


@on_gpu
def test_one_rank_adds_up_by_nccl(tmp_path):
    with crew(1) as ranks:
        assert ranks.each("meet", [(str(tmp_path / "a"), 1, "cuda:0")]) == ["nccl"]
        assert ranks.each("add") == [[1.0] * 3 + [0.0, 0.0]]
        ranks.each("leave")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("end", ["die", "leave"])
def test_nccl_between_gpus_and_who_waits_for_a_dead_one(end, tmp_path):
    with crew(2) as ranks:
        devices = [(str(tmp_path / "a"), 2, f"cuda:{index}") for index in range(2)]
        assert ranks.each("meet", devices) == ["nccl"] * 2
        assert ranks.each("add") == [[11.0] * 3 + [0.0, -1.0]] * 2
        begun = time.monotonic()
        ranks.ask(0, "wait")
        ranks.ask(1, end)
        answers = dict(ranks.rest())
        assert answers[0] == "broken" and time.monotonic() - begun < 15
