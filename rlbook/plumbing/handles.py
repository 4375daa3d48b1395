"""What a driver on the virtual clock holds in its hands: remote classes, actors and methods.

runtime.remote(Worker, costs=…) ──► VirtualTarget ──.remote(…)──► VirtualActor
actor.work ──► VirtualMethod ──.remote(…)──► VirtualReference
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from rlbook.plumbing.cast import Actor, Method
from rlbook.plumbing.cluster import Cluster, Work
from rlbook.plumbing.deeds import NOTHING, as_message
from rlbook.plumbing.wire import VirtualReference, pack

if TYPE_CHECKING:
    from rlbook.plumbing.virtual import VirtualRuntime

Cost = Work | Callable[..., Work]
"""What a call takes: work, or a function of the call's arguments that says how much work."""


class VirtualTarget:
    """A class or a function whose calls run elsewhere."""

    def __init__(
        self, runtime: VirtualRuntime, target: Any, costs: Any, returns: Any, node: int | None
    ) -> None:
        nodes = len(runtime.cluster.nodes)
        if node is not None and not 0 <= node < nodes:
            raise ValueError(f"node: must be below {nodes}, the number of nodes, got {node}")
        self._runtime, self.target, self.node = runtime, target, node
        self.is_class = inspect.isclass(target)
        self.name = getattr(target, "__name__", type(target).__name__)
        self._costs = self._table("costs", costs)
        returns = self._table("returns", returns)
        self._stand_ins = {
            name: value if callable(value) else as_message(value) for name, value in returns.items()
        }
        for cost in self._costs.values():
            if not callable(cost):
                runtime.cluster.seconds(cost)

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Of a class: a new actor, at once; its constructor runs there. Of a function: a call."""
        return self._runtime._made_remote(self, args, kwargs)

    def method(self, actor: Actor, name: str, word: int, cluster: Cluster) -> Method:
        """Method ``name`` of ``actor`` with its price and its stand-in."""
        method = Method(actor, name, word)
        cost, pace = self._costs.get(name, 0.0), actor.pace
        if callable(cost):
            method.price = lambda *args, **kwargs: pace * cluster.seconds(cost(*args, **kwargs))
        else:
            method.seconds = pace * cluster.seconds(cost)
        method.stand_in = self._stand_ins.get(name, NOTHING)
        return method

    def _table(self, what: str, given: Any) -> Mapping[str, Any]:
        """By method; a function has but one."""
        if given is None:
            return {}
        if not self.is_class:
            return {"__call__": given}
        if unknown := sorted(name for name in given if not hasattr(self.target, name)):
            raise ValueError(f"{what}: {self.name} has no method {', '.join(unknown)}")
        return dict(given)


class VirtualActor:
    """The driver's handle of an actor: ``actor.method.remote(…)`` calls it."""

    def __init__(self, runtime: VirtualRuntime, actor: Actor, target: VirtualTarget) -> None:
        self._runtime, self._actor, self._target = runtime, actor, target

    def __getattr__(self, name: str) -> VirtualMethod:
        if name.startswith("__") or not callable(getattr(self._target.target, name, None)):
            raise AttributeError(f"{self._target.name} has no method {name}")
        made = VirtualMethod(self._runtime, self._runtime._method(self._actor, self._target, name))
        self.__dict__[name] = made  # found without this detour the next time
        return made

    def __repr__(self) -> str:
        return f"VirtualActor({self._actor.name})"

    def __reduce__(self) -> NoReturn:
        raise RuntimeError("an actor's handle stays with the driver: only the driver makes calls")


class VirtualMethod:
    """A method of an actor, to be called with ``.remote(…)``."""

    __slots__ = ("_method", "_runtime")

    def __init__(self, runtime: VirtualRuntime, method: Method) -> None:
        self._runtime, self._method = runtime, method

    def remote(self, *args: Any, **kwargs: Any) -> VirtualReference:
        """Calls it; returns at once."""
        return self._runtime._call(self._method, args, kwargs)

    def options(self, *, num_returns: int = 1, **_: Any) -> VirtualMethod | VirtualMethods:
        """The method, of ``num_returns`` results: of more than one, a call returns a list of so
        many references. The method must return so many values; else each gets a ``ValueError``.
        Ray's other options are accepted and mean nothing here.
        """
        if num_returns < 1:
            raise ValueError(f"num_returns: must be at least 1, got {num_returns}")
        if num_returns == 1:
            return self
        return VirtualMethods(self._runtime, self._method, num_returns)


class VirtualMethods:
    """A method of several results."""

    __slots__ = ("_method", "_num_returns", "_runtime")

    def __init__(self, runtime: VirtualRuntime, method: Method, num_returns: int) -> None:
        self._runtime, self._method, self._num_returns = runtime, method, num_returns

    def remote(self, *args: Any, **kwargs: Any) -> list[VirtualReference]:
        """Calls it; returns a reference to each result, at once."""
        return self._runtime._call_many(self._method, self._num_returns, args, kwargs)


class Pending(Sequence[VirtualReference]):
    """Those of a collection that :meth:`VirtualRuntime.wait` has not returned: a live view, made
    when you look.
    """

    def __init__(self, references: Collection[VirtualReference], found: list[Any]) -> None:
        self._references, self._found = references, found

    def _list(self) -> list[VirtualReference]:
        found = set(self._found)
        return [reference for reference in self._references if reference not in found]

    def __getitem__(self, index: Any) -> Any:
        return self._list()[index]

    def __iter__(self) -> Iterator[VirtualReference]:
        return iter(self._list())

    def __len__(self) -> int:
        return len(self._list())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list | Pending) and self._list() == list(other)


def split(references: Sequence[Any], found: list[Any]) -> tuple[list[Any], list[Any]]:
    """(found, the rest), both in the order of ``references``."""
    if len(found) == 1:
        rest = list(references)
        rest.remove(found[0])
        return found, rest
    chosen = set(found)
    found = [reference for reference in references if reference in chosen]
    return found, [reference for reference in references if reference not in chosen]


def as_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """(what travels, the references whose values the call needs); see ``Call.arguments``."""
    if not args and not kwargs:
        return None, ()
    everything = (*args, *kwargs.values())
    needs = tuple(argument for argument in everything if type(argument) is VirtualReference)
    if len(needs) == len(everything):
        return (args, kwargs), needs
    return pack((args, kwargs)), needs
