"""What workers need that learn together without a server: sums over all, a pace, a rule for haste.

    Group    all_reduce and all_gather of torch.distributed, between processes
    Board    who has finished the rollout, in memory that all processes of a computer see
    Adder    the same sum by an object, for a cluster that a driver conducts
    Pace     how fast each worker is, and how many steps it shall take next
    Haste    when a rollout is cut short, because most others have finished theirs
    Member   what a worker of a group knows of the others, and what all have in common

A sum over a group blocks until all are there. If one dies, the others get `GroupBroken` and must
meet anew.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, from_numpy, optim

from rlbook.parts.meter import Meter
from rlbook.parts.on_device import on_host
from rlbook.plumbing.devices import device_here
from rlbook.plumbing.param_server import Alive
from rlbook.plumbing.runtime import ActorDiedError
from rlbook.plumbing.shared import SharedArrays
from rlbook.plumbing.together import AWAKE_S, Together, broken_if_it_fails
from rlbook.plumbing.together import GroupBroken as GroupBroken
from rlbook.plumbing.torchrun import interface_to, launched, store

Held = TypeVar("Held")

LOOPBACK = "127.0.0.1"

SMOOTHING = 0.5
"""Weight of the newest measurement of a worker's speed."""


def _finish(work: Any) -> None:
    """Waits, awake at first. Sums of microseconds are too short to sleep: where all cores are
    busy, who sleeps wakes up milliseconds late (here 1.7 ms on average, 0.5 awake).
    """
    try:
        until = time.monotonic() + AWAKE_S
        while not work.is_completed() and time.monotonic() < until:
            os.sched_yield()
        work.wait()
    finally:
        del work  # it holds the group's connections: the traceback of an error must not


class Group:
    """This process's place among `size` processes; made by all at once.

    Args:
        meeting: path of a file that does not exist yet, the same for all; they meet there. If
            torchrun started them, a word that is new: they meet in its store.
        rank: 0 … size − 1.
        size: N; with 1 every sum is what went in.
        device: where the vectors are that are added up; the CPU by default.
        backend: "nccl", "gloo" or "auto", as `Together` has it.
        timeout_s: who waits longer for the others gives up; of a death it learns at once.

    Raises:
        GroupBroken: the others did not come.
        ValueError: "nccl", but not everybody has a GPU of its own.
    """

    def __init__(
        self,
        meeting: str,
        rank: int,
        size: int,
        device: torch.device | None = None,
        backend: str = "auto",
        timeout_s: float = 300.0,
    ) -> None:
        self.rank, self.size = rank, size
        self.sent = 0.0
        """Bytes that left this process in sums (as in a ring, 2 (N − 1)/N of each) and gathers."""
        self._together: Together | None = None
        if size == 1:
            return
        launch = launched()
        apart = launch is not None and not launch.alone
        address = os.environ["MASTER_ADDR"] if apart else LOOPBACK
        if (name := interface_to(address)) is not None:
            # By itself gloo takes the one that the computer's name leads to, be it the loopback.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
        with broken_if_it_fails():
            place: Any = (
                distributed.FileStore(meeting, size)
                if launch is None
                else distributed.PrefixStore(meeting, store())
            )
        self._together = Together(place, rank, size, device, backend, address, timeout_s)

    def add(self, vector: Tensor) -> None:
        """Puts the sum of all workers' vectors in the place of each, the same bits everywhere."""
        if self._together is not None:
            self.sent += 2 * (self.size - 1) / self.size * vector.nbytes
            self._together.add(vector)

    def gather(self, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Everybody's arrays, by rank; all give the same shapes. Travels as float64."""
        if self.size == 1:
            return [list(arrays)]
        mine = from_numpy(np.concatenate([np.ravel(array) for array in arrays]).astype(np.float64))
        rows = [mine.new_empty(mine.shape) for _ in range(self.size)]
        self.sent += (self.size - 1) * mine.nbytes
        with broken_if_it_fails():
            _finish(distributed.all_gather(rows, mine, async_op=True))
        edges = np.cumsum([array.size for array in arrays])[:-1]
        return [
            [
                part.reshape(array.shape)
                for part, array in zip(np.split(row.numpy(), edges), arrays, strict=True)
            ]
            for row in rows
        ]

    def close(self) -> None:
        """Leaves the group: who still waits for this process learns that it is gone."""
        if self._together is not None:
            self._together.leave()


class Adder(Alive):
    """An `all_reduce` as an object: adds up in the order of workers, so always alike."""

    def add(self, *vectors: np.ndarray) -> np.ndarray:
        """Σ of vectors `[P]`; of one, its very bits."""
        total = vectors[0].copy()
        for vector in vectors[1:]:
            total += vector
        return total


class Pace:
    """Steps of each worker's next rollout: alike, or in proportion to measured speeds.

    Args:
        size: N.
        length: T; the N rollouts together have N · T steps, but for rounding.
        balanced: deal them out by speed, so that all finish at about the same time.
    """

    def __init__(self, size: int, length: int, balanced: bool) -> None:
        self.size, self.length, self.balanced = size, length, balanced
        self.lengths = [length] * size
        self.speeds = [0.0] * size
        """Steps a second; 0 where nothing is known."""

    @classmethod
    def of(cls, config: Any) -> "Pace":
        """As a system's configuration says."""
        return cls(config.num_workers, config.unroll_length, config.balance)

    def hear(self, everybody: Sequence[np.ndarray]) -> None:
        """(steps, seconds) of each worker: sets `lengths` for the next rollouts."""
        for index, one in enumerate(everybody):
            self.note(index, *one)
        self.deal()

    def note(self, index: int, steps: float, seconds: float) -> None:
        """A worker took so many steps in so many seconds."""
        new, old = steps / max(seconds, 1e-9), self.speeds[index]
        self.speeds[index] = new if old == 0 else old + SMOOTHING * (new - old)

    def forget(self, index: int) -> None:
        """Somebody else is in this place now."""
        self.speeds[index] = 0.0

    def deal(self) -> None:
        """Sets `lengths` for the next rollouts: at least 1 each."""
        known = [speed for speed in self.speeds if speed > 0]
        if not self.balanced or not known:
            return
        speeds = [speed or float(np.mean(known)) for speed in self.speeds]
        share = self.size * self.length / sum(speeds)
        self.lengths = [max(1, round(speed * share)) for speed in speeds]

    def state_dict(self) -> dict[str, Any]:
        """Speeds and lengths."""
        return {"lengths": list(self.lengths), "speeds": list(self.speeds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.lengths = [int(length) for length in state["lengths"]]
        self.speeds = [float(speed) for speed in state["speeds"]]


class Haste(NamedTuple):
    """Straggler preemption (Wijmans et al., 2020, "DD-PPO", section 3.2)."""

    on: bool = True
    sync_fraction: float = 0.6
    """Part of the others that must have finished their rollouts …"""
    short_rollout: float = 0.25
    """… and part of its own steps that a worker must have taken, for its rollout to be cut."""

    @classmethod
    def of(cls, config: Any) -> "Haste":
        """As a system's configuration says."""
        on = config.preempt and config.num_workers > 1
        return cls(on, config.sync_fraction, config.short_rollout)

    def cuts(self, steps: int, length: int, finished: int, others: int) -> bool:
        """Whether a rollout of `length` ends after `steps`, with so many of the `others` ready."""
        enough = steps >= self.short_rollout * length
        return self.on and enough and 0 < finished >= self.sync_fraction * others


def held(what: Held | None) -> Held:
    """What a worker has in hand; ActorDiedError if it lost it, because it was born anew."""
    if what is None:
        raise ActorDiedError("it was born anew, and knows of no rollout")
    return what


class Board(Protocol):
    """Where workers note which round's rollout they have finished."""

    def put(self, index: int, rounds: int) -> None:
        """Worker `index` has finished this round's."""

    def finished(self, rounds: int) -> int:
        """How many have finished this round's."""


class SharedBoard:
    """In memory that all processes see which inherit `memory.descriptor`.

    Args:
        size: workers.
    """

    def __init__(self, size: int) -> None:
        self.memory = SharedArrays({"finished": ((size,), np.int64)})

    def put(self, index: int, rounds: int) -> None:
        """Worker `index` has finished this round's."""
        self.memory["finished"][index] = rounds

    def finished(self, rounds: int) -> int:
        """How many have finished this round's."""
        return int((self.memory["finished"] >= rounds).sum())


class Member(Alive):
    """A worker of a group, whose system gives it its parts (`network`, `optimizer`, `rng`, …) and
    `collect(steps, cut)`, `statistics()`, `agree(*statistics)`.

    Args:
        config: of the system.
        index: its rank.
        board: where all note who has finished the rollout; or None.
    """

    network: Any
    optimizer: optim.Optimizer
    rng: np.random.Generator
    meter: Meter
    group: Group
    steps: int

    def __init__(self, config: Any, index: int, board: Board | None) -> None:
        self.config, self.index, self.board = config, index, board
        launch = launched()
        self.device = device_here(config, index if launch is None else launch.local_rank)
        self.pace, self.haste = Pace.of(config), Haste.of(config)
        self.rounds = self.updates = 0
        self.collected: Any = None
        """The rollout so far."""
        self.minibatches: Any = None

    def join(self, meeting: str, rank: int, size: int) -> None:
        """Meets the others, in place of those it met before."""
        self.close()
        self.group = Group(meeting, rank, size, self.device, self.config.learner_backend)
        self.meter.watch(self.group, "add", "waiting")
        self.meter.watch(self.group, "gather", "waiting")

    def close(self) -> None:
        """Leaves the others."""
        if hasattr(self, "group"):
            self.group.close()

    def is_ready(self) -> None:
        """Lets the others know that this round's rollout is finished."""
        if self.board is not None:
            self.board.put(self.index, self.rounds)

    def is_late(self, steps: int) -> bool:
        """Whether to leave a rollout at so many steps, because of those who have finished."""
        length, size = self.pace.lengths[self.index], self.pace.size
        if self.board is None or not self.haste.cuts(steps, length, size, size):
            return False
        return self.haste.cuts(steps, length, self.board.finished(self.rounds), size - 1)

    def collect(self, steps: int, cut: Callable[[int], bool] | None = None) -> None:
        """So many steps of all copies, or fewer if `cut` says so."""
        raise NotImplementedError

    def statistics(self) -> Any:
        """Ends the rollout: a tuple of arrays that all must know, `pace` among them."""
        raise NotImplementedError

    def agree(self, *statistics: Any) -> None:
        """Takes in everybody's."""
        raise NotImplementedError

    def play(self) -> None:
        """A round's rollout, and everybody's statistics of theirs."""
        self.rounds, self.collected, began = self.rounds + 1, None, time.perf_counter()
        self.collect(self.pace.lengths[self.index], self.is_late if self.haste.on else None)
        spent = time.perf_counter() - began
        self.is_ready()
        mine = self.statistics()
        mine = mine._replace(pace=np.array([self.steps, spent]))
        everybody = [type(mine)(*arrays) for arrays in self.group.gather(mine)]
        self.agree(*everybody)
        self.pace.hear([one.pace for one in everybody])

    def observe(self, *statistics: Any) -> None:
        """Notes what was observed, for the normaliser."""
        if self.config.normalize_observations:
            self.network.normalizer.note([one.observations for one in statistics])

    def finish(self, k: int) -> None:
        """Waits until a GPU has done what it was told for the k-th minibatch: what comes then can
        be timed. Alone, with nobody to meet between minibatches, behind the last one only.
        """
        last = k == self.config.minibatches - 1
        if self.device.type == "cuda" and (last or self.pace.size > 1):
            torch.cuda.synchronize(self.device)

    def traffic(self, env_steps: int) -> dict[str, float]:
        """What was sent to the others since this was last asked, for so many steps of its own."""
        group = getattr(self, "group", None)
        if group is None or not env_steps:
            return {}
        sent, group.sent = group.sent, 0.0
        return {"bytes_per_env_step": sent / env_steps}

    def policy(self) -> dict[str, Any]:
        """The network's state."""
        return on_host(self.network.state_dict())

    def knowledge(self) -> dict[str, Any]:
        """What all have in common after a round."""
        common = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**on_host(common), "rounds": self.rounds, "updates": self.updates}

    def learn_from(self, knowledge: dict[str, Any]) -> None:
        """Becomes one of them; what this worker has collected is dropped."""
        self.network.load_state_dict(knowledge["network"])
        self.optimizer.load_state_dict(knowledge["optimizer"])
        self.rounds, self.updates = knowledge["rounds"], knowledge["updates"]
        self.collected = self.minibatches = None

    def state_dict(self) -> dict[str, Any]:
        """Between two rounds: what is common, environments, random generators, pace."""
        own = {name: getattr(self, name).state_dict() for name in ("envs", "sampler", "pace")}
        return {**self.knowledge(), **own, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.learn_from(state)
        for name in ("envs", "sampler", "pace"):
            getattr(self, name).load_state_dict(state[name])
        self.rng.bit_generator.state = state["rng"]
