"""Ray's four verbs, and a Ray that cleans up after itself.

    with RayRuntime(num_cpus=2) as runtime:
        worker = runtime.remote(Worker).remote(7)     a process of its own, at once
        reference = worker.work.remote(data)          returns before the work is done
        ready, pending = runtime.wait([reference])    which are done?
        result = runtime.get(reference)               fetch the value

A system's ``train()`` speaks to whatever has these verbs, so it does not know what carries its
calls: Ray, or :class:`~rlbook.plumbing.virtual.VirtualRuntime`. Ray starts when the ``with`` is
entered and is shut down when it is left: after the last line, an exception or Ctrl-C. It prints
nothing.
"""

from __future__ import annotations

import atexit
import logging
import subprocess
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

from rlbook.plumbing import watchdog
from rlbook.plumbing.joining import Places, refuse_stranger
from rlbook.plumbing.quiet import hush_deaths, is_death, quiet_ray
from rlbook.plumbing.ray_processes import end, ray_children, start_watchdog
from rlbook.plumbing.timeline import DRIVER, KEPT, Timeline, timed

if TYPE_CHECKING:
    from rlbook.plumbing.cluster import Cluster
    from rlbook.plumbing.virtual import VirtualRuntime

Reference = Any
"""A promise of a value that some process holds or will hold (Ray's ``ObjectRef``)."""


class ActorDiedError(RuntimeError):
    """The actor died before it answered: in its constructor, or later. What it knew is lost."""


class Runtime(Protocol):
    """What a conducting ``train()`` needs: Ray's verbs with Ray's meaning, and a clock."""

    @property
    def now(self) -> float:
        """Seconds since the runtime was entered, on its own clock."""

    def remote(
        self,
        target: Any,
        *,
        costs: Any = None,
        returns: Any = None,
        node: int | None = None,
        **options: Any,
    ) -> Any:
        """A class or function whose calls run elsewhere: call ``.remote(...)`` on what comes
        back. ``costs``, ``returns`` and ``node`` are for the virtual clock, ``options`` for Ray.
        """

    def put(self, value: Any) -> Reference:
        """Store ``value`` once, where every process can read it."""

    def get(self, references: Any, *, timeout: float | None = None) -> Any:
        """The value behind a reference, or the values behind a list of them. Blocks."""

    def wait(
        self,
        references: Collection[Reference],
        *,
        num_returns: int = 1,
        timeout: float | None = None,
    ) -> tuple[list[Reference], Sequence[Reference]]:
        """Block until ``num_returns`` of ``references`` are done. Returns (done, not done)."""

    def timeline(self) -> Timeline:
        """Who worked on what so far, and when the driver waited."""

    def state_dict(self) -> dict[str, Any]:
        """What of the runtime a checkpoint must keep, as plain values and arrays."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, once the same actors have been made again."""

    def off_the_clock(self) -> AbstractContextManager[None]:
        """A block of calls that save or restore what actors know; where time is made up they take
        none. All its calls must be waited for.
        """


def make_runtime(
    kind: str,
    *,
    seed: int,
    cluster: Cluster | None = None,
    num_cpus: int | None = None,
    address: str | None = None,
) -> RayRuntime | VirtualRuntime:
    """The runtime of a configuration: ``"ray"`` (which ``num_cpus``, None for all, and ``address``
    are for) or ``"virtual"`` (which ``seed`` and ``cluster`` are for).

    Raises ``ValueError`` for another kind.
    """
    if kind == "ray":
        return RayRuntime(num_cpus=num_cpus, address=address)
    if kind == "virtual":
        from rlbook.plumbing.virtual import VirtualRuntime

        return VirtualRuntime(seed, cluster)
    raise ValueError(f"runtime: must be 'ray' or 'virtual', got {kind!r}")


class RayRuntime:
    """The four verbs on real processes, on this computer or a cluster.

    ``num_cpus``: cores that Ray may hand out, 1 or more; all by default. ``object_store_mb``:
    shared memory for values in flight, in MB, at least 80 (Ray's own floor is a little below).
    ``address``: an existing cluster to join ("HOST:PORT" of its head, or "auto" on one of its
    hosts), whose cores and memory are its own affair; leaving the ``with`` disconnects from it and
    lets it run. ``trace``: actors and driver note what they do, for :meth:`timeline`; it costs
    about a microsecond a call.

    Raises ``ValueError`` for a bad size, ``RuntimeError`` when Ray already runs in this process,
    and ``ConnectionError`` within seconds for a cluster that is not there or lets us not in.
    """

    def __init__(
        self,
        *,
        num_cpus: int | None = None,
        object_store_mb: int = 256,
        address: str | None = None,
        trace: bool = True,
    ) -> None:
        if num_cpus is not None and num_cpus < 1:
            raise ValueError(f"num_cpus must be at least 1, got {num_cpus}")
        if object_store_mb < 80:
            raise ValueError(f"object_store_mb must be at least 80, got {object_store_mb}")
        self.num_cpus = num_cpus
        self.object_store_mb = object_store_mb
        self.address = address
        self.trace = trace
        self._running = False
        self._entered_at = time.time()
        self._timeline = Timeline()
        self._made: Counter[str] = Counter()
        self._actors: dict[str, weakref.ref[Any]] = {}
        self._watchdog: subprocess.Popen[bytes] | None = None
        self._unhush: Callable[[], None] = lambda: None
        self._places = Places()

    def __enter__(self) -> Self:
        ray = quiet_ray()
        if ray.is_initialized():
            raise RuntimeError(
                "Ray already runs in this process: leave its `with` (or call ray.shutdown()) first"
            )
        quiet: dict[str, Any] = {
            "log_to_driver": False,
            "logging_level": logging.ERROR,
            "configure_logging": True,
        }
        if self.address is None:
            quiet |= {
                "num_cpus": self.num_cpus,
                "object_store_memory": self.object_store_mb * 1024 * 1024,
                "include_dashboard": False,
            }
        else:
            refuse_stranger(self.address)
        atexit.register(self.shutdown)
        self._running, self._entered_at = True, time.time()
        self._unhush, before = hush_deaths(), set(ray_children())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(address=self.address or "local", **quiet)
            if self.address is None:
                self._watchdog = start_watchdog()
        except BaseException:
            self.shutdown()
            end(set(ray_children()) - before)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.timeline()  # the actors' notes go with them
        finally:
            self.shutdown()

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("the runtime stays with the driver: actor methods never get or wait")

    def shutdown(self) -> None:
        """Stop Ray and its processes. Calling it again does nothing."""
        if not self._running:
            return
        import ray

        self._running = False
        atexit.unregister(self.shutdown)
        try:
            ray.shutdown()
        finally:
            self._unhush()
        if self._watchdog is not None:
            self._watchdog.communicate(watchdog.ORDERLY)
            self._watchdog = None

    @property
    def now(self) -> float:
        """Seconds since the runtime was entered."""
        return time.time() - self._entered_at

    def remote(
        self,
        target: Any,
        *,
        costs: Any = None,
        returns: Any = None,
        node: int | None = None,
        **options: Any,
    ) -> Any:
        """``target`` (a class or function) with its calls run in other processes.

        ``options`` are Ray's: ``num_cpus``, ``num_gpus`` (fractions too), ``max_restarts``, …
        Without any, an actor asks for no core of its own beyond Ray's default. One more says where
        an actor lives on a cluster of several hosts: beside the driver, or, with ``spread=True``,
        where a core has fewest such (for those that may die: a fleet replaces them). ``costs``,
        ``returns`` and ``node`` are for the virtual clock: here work takes the time it takes.
        """
        import ray

        spread = options.pop("spread", False)
        if not isinstance(target, type):
            return ray.remote(**options)(target) if options else ray.remote(target)
        made = timed(target) if self.trace else target
        ray_class: Any = ray.remote(**options)(made) if options else ray.remote(made)
        place = partial(self._places.next, options, spread) if self.address else dict
        return _RayClass(self, target.__name__, ray_class, place)

    def put(self, value: Any) -> Reference:
        """Copy ``value`` into shared memory once; every process on the node then reads it without
        a copy of its own.
        """
        import ray

        return ray.put(value)

    def get(self, references: Any, *, timeout: float | None = None) -> Any:
        """The value behind a reference, or a list of values; an exception of the remote call is
        raised here, and :class:`ActorDiedError` if there was nobody to raise one.

        ``timeout`` in seconds; ``TimeoutError`` when it passes. Arrays come back read-only.
        """
        import ray

        begun = self.now
        try:
            return ray.get(references, timeout=timeout)
        except ray.exceptions.RayError as error:
            if is_death(error):
                raise ActorDiedError(str(error)) from error
            raise
        finally:
            self._waited("get", begun)

    def wait(
        self,
        references: Collection[Reference],
        *,
        num_returns: int = 1,
        timeout: float | None = None,
    ) -> tuple[list[Reference], list[Reference]]:
        """Block until ``num_returns`` references are done, or ``timeout`` seconds. Returns (done,
        not done). The values stay where they are.
        """
        import ray

        begun = self.now
        answers = ray.wait(
            list(references), num_returns=num_returns, timeout=timeout, fetch_local=False
        )
        self._waited("wait", begun)
        return answers

    def timeline(self) -> Timeline:
        """Who worked on what so far, and when the driver waited.

        Asks the actors that are alive, and waits a second for those that are busy. Calls of
        functions are not noted.
        """
        import ray

        if not (self._running and self.trace):
            return self._timeline
        asked = {}
        for name, handle in self._actors.items():
            if (actor := handle()) is not None:
                asked[actor.rlbook_spans.remote()] = name
        answered = ray.wait(list(asked), num_returns=len(asked), timeout=1.0)[0] if asked else []
        number = self._timeline.number
        for reference in answered:
            try:
                spans = ray.get(reference)
            except ray.exceptions.RayError:  # it died with its notes
                continue
            for what, *times in spans:
                start, end = (at - self._entered_at for at in times)
                self._timeline.add(number(asked[reference]), number(what), start, end)
        return self._timeline

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order of events on real processes is not kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing; takes the state of the virtual clock too."""

    def off_the_clock(self) -> AbstractContextManager[None]:
        """A block like any other."""
        return nullcontext()

    def _waited(self, verb: str, begun: float) -> None:
        if self.trace:
            timeline = self._timeline
            timeline.add(timeline.number(DRIVER), timeline.number(verb), begun, self.now)
            if len(timeline) > 10 * KEPT:
                timeline.forget(5 * KEPT)

    def _note_actor(self, kind: str, handle: Any) -> None:
        self._actors[f"{kind} {self._made[kind]}"] = weakref.ref(handle)
        self._made[kind] += 1


class _RayClass:
    """Ray's remote class, which tells its runtime of the actors that it makes."""

    def __init__(
        self, runtime: RayRuntime, name: str, ray_class: Any, place: Callable[[], dict[str, Any]]
    ) -> None:
        self._runtime, self._name, self._ray_class = runtime, name, ray_class
        self._place = place

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """A new actor; its constructor runs in a process of its own."""
        where = self._place()
        ray_class = self._ray_class.options(**where) if where else self._ray_class
        handle = ray_class.remote(*args, **kwargs)
        self._runtime._note_actor(self._name, handle)
        return handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ray_class, name)
