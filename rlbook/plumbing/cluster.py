"""A machine room on paper: nodes, the wire between them, what work costs, and what breaks.

    Cluster(
        nodes=(Node(cores=2), Node(cores=64, speed=1.4)),
        costs={"env_step": 3e-6, "inference": 40e-6},
        stragglers={"Actor 3": 5.0},
        crashes=(Crash("Actor 0", at_s=2.0, restart_s=1.0),),
    )

:class:`~rlbook.plumbing.virtual.VirtualRuntime` plays a system on it. Times are in seconds, sizes
in bytes; a cost is what one unit of work takes on a core of speed 1. Actors are called by their
class and a number: the first ``Actor`` that the driver makes is ``"Actor 0"``.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlbook.plumbing.runtime import RayRuntime, make_runtime

if TYPE_CHECKING:
    from rlbook.plumbing.virtual import VirtualRuntime

Work = float | Mapping[str, float]
"""How much there is to do: seconds, or an amount of each unit (``{"env_step": 1280}``)."""


def _positive(name: str, value: float) -> float:
    if not value > 0:
        raise ValueError(f"{name}: must be above 0, got {value}")
    return value


def _not_negative(name: str, value: float) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: must be 0 or more, and finite, got {value}")
    return value


def _actor_name(name: str, value: str) -> None:
    kind, _, number = str(value).rpartition(" ")
    if not kind.isidentifier() or not number.isdecimal():
        raise ValueError(f"{name}: must name an actor as in 'Actor 0', got {value!r}")


@dataclass(frozen=True)
class Node:
    """One computer."""

    cores: int = 2
    """Calls that run at the same time; others wait, first come, first served."""
    speed: float = 1.0
    """Work done in a second, relative to the computer on which the costs were measured."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        if self.cores < 1:
            raise ValueError(f"cores: must be at least 1, got {self.cores}")
        _positive("speed", self.speed)


@dataclass(frozen=True)
class Crash:
    """An actor dies: what it was told to do fails, and what it knew is gone."""

    actor: str
    """Who, as in ``"Actor 0"``."""
    at_s: float | None = None
    """When; None draws it uniformly from [0, ``before_s``)."""
    before_s: float = 1.0
    restart_s: float | None = None
    """It is made anew, from its constructor's arguments, so many seconds later; None: never."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        _actor_name("actor", self.actor)
        _positive("before_s", self.before_s)
        for name in ("at_s", "restart_s"):
            if (value := getattr(self, name)) is not None:
                _not_negative(name, value)


@dataclass(frozen=True)
class Cluster:
    """Nodes, wire, costs, noise and faults."""

    nodes: tuple[Node, ...] = (Node(),)
    """Node 0 is where the driver runs."""
    latency_s: float = 350e-6
    """One way of a message: half of a call of Ray and its answer."""
    bandwidth: float = 1e9
    """Bytes a second onto a node. A value comes to each node once; values for one node queue."""
    driver_call_s: float = 0.0
    """What each verb takes of the driver's own time."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """Seconds of one unit of each kind of work: env_step, inference, gradient, …"""
    jitter: float = 0.1
    """Standard deviation of the logarithm of a call's duration; declared costs are medians."""
    delay_s: float = 0.0
    """Mean of an exponential delay on top of each message's latency."""
    stragglers: Mapping[str, float] = field(default_factory=dict)
    """Actor → how many times longer everything takes it."""
    crashes: tuple[Crash, ...] = ()

    def __post_init__(self) -> None:
        """Refuses bad values."""
        if not self.nodes:
            raise ValueError("nodes: there must be at least one")
        for name in ("latency_s", "driver_call_s", "jitter", "delay_s"):
            _not_negative(name, getattr(self, name))
        _positive("bandwidth", self.bandwidth)
        for unit, seconds in self.costs.items():
            _not_negative(f"costs[{unit!r}]", seconds)
        for actor, factor in self.stragglers.items():
            _actor_name("stragglers", actor)
            _positive(f"stragglers[{actor!r}]", factor)

    def seconds(self, work: Work) -> float:
        """What ``work`` takes on a core of speed 1.

        Raises ``ValueError`` for a negative amount or a unit that ``costs`` does not have.
        """
        if not isinstance(work, Mapping):
            return _not_negative("seconds of a call", float(work))
        if unknown := sorted(set(work) - set(self.costs)):
            raise ValueError(f"costs: no price for {unknown}; there are {sorted(self.costs)}")
        amounts = [_not_negative(unit, amount) * self.costs[unit] for unit, amount in work.items()]
        return math.fsum(amounts)

    @classmethod
    def measure(
        cls,
        work: Mapping[str, Callable[[], object]],
        *,
        runtime: RayRuntime | None = None,
        cores: int | None = None,
        latency_s: float | None = None,
        bandwidth: float | None = None,
        driver_call_s: float | None = None,
        seconds: float = 0.2,
        **others: Any,
    ) -> Cluster:
        """The computer that runs this, as a cluster of one node.

        ``work``: for each unit of cost a function that does it once; its cost is the median
        time over ``seconds``. ``cores``, and what a message costs, are measured too where they
        are not given, on ``runtime`` or on a Ray of its own. ``others``: fields of the cluster.
        """
        costs = {unit: median_seconds(does, seconds) for unit, does in work.items()}
        given = Wire(latency_s, bandwidth, driver_call_s)
        if None in given:
            if runtime is None:
                with RayRuntime(num_cpus=1, trace=False) as own:
                    found = measure_wire(own)
            else:
                found = measure_wire(runtime)
            given = Wire(*[f if g is None else g for g, f in zip(given, found, strict=True)])
        nodes = (Node(cores=usable_cores() if cores is None else cores),)
        return cls(nodes=nodes, costs=costs, **given._asdict(), **others)


class Wire(NamedTuple):
    """What messages cost; fields as in :class:`Cluster`."""

    latency_s: float | None
    bandwidth: float | None
    driver_call_s: float | None


class _Echo:
    """Answers; once with nothing, once with many bytes."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.zeros(nbytes, np.uint8)

    def nothing(self) -> None:
        """An empty call."""

    def many(self) -> np.ndarray:
        """``nbytes`` of zeros."""
        return self.array


def measure_wire(runtime: RayRuntime, *, calls: int = 200, megabytes: int = 16) -> Wire:
    """Medians over ``calls`` empty calls, and over ten answers of ``megabytes`` MB each."""
    nbytes = megabytes * 1_000_000
    echo = runtime.remote(_Echo, num_cpus=0).remote(nbytes)
    runtime.get([echo.nothing.remote() for _ in range(20)])
    asking, there_and_back, carrying = [], [], []
    for _ in range(calls):
        begun = time.perf_counter()
        answer = echo.nothing.remote()
        asking.append(time.perf_counter() - begun)
        runtime.get(answer)
        there_and_back.append(time.perf_counter() - begun)
    for _ in range(10):
        begun = time.perf_counter()
        runtime.get(echo.many.remote())
        carrying.append(time.perf_counter() - begun)
    driver_call, empty = statistics.median(asking), statistics.median(there_and_back)
    # Two verbs and two messages; what is more than that for many bytes is the bytes.
    return Wire(
        latency_s=max(0.0, empty / 2 - driver_call),
        bandwidth=nbytes / max(statistics.median(carrying) - empty, 1e-9),
        driver_call_s=driver_call,
    )


def median_seconds(does: Callable[[], object], seconds: float) -> float:
    """Median time of ``does()``, called for about ``seconds`` and at least five times."""
    does()
    times: list[float] = []
    until = time.perf_counter() + _positive("seconds", seconds)
    while len(times) < 5 or time.perf_counter() < until:
        begun = time.perf_counter()
        does()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def own_runtime(config: Any, cores: int, costs: Mapping[str, float]) -> RayRuntime | VirtualRuntime:
    """The runtime that a system opens for itself where it is given none.

    Args:
        config: with `runtime`, `ray_address` and `seed`.
        cores: of the virtual cluster's one node.
        costs: of its units of work.
    """
    cluster = Cluster(nodes=(Node(cores=cores),), costs=costs)
    kind, address = config.runtime, config.ray_address
    return make_runtime(kind, seed=config.seed, cluster=cluster, address=address)
