"""Workers that compute gradients for a parameter server, as their driver holds them.

    start(i, weights)  ──► worker i: gradient ──► (report, pieces)      in_flight: report ──► who
    may_start(i)           the rule: so many at once, nobody too far ahead of the slowest
    first()            ◄── whoever is first; a dead one is replaced, a dead shard revived
    combine(gradients) ──► local servers add up the gradients of a group

A worker is a plain class with ``gradient(*weights) -> (report, *pieces)``, ``alive()``,
``state_dict()`` and ``load_state_dict()``. Actors without a gradient make a team too: `method`
names what they are asked for, and `pieces` in how many parts it comes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlbook.plumbing.param_server import Alive, ParameterServer, alive
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime, Reference, Runtime
from rlbook.plumbing.shard import Aggregator


class Answer(NamedTuple):
    """What a worker has finished."""

    worker: int
    report: Any
    pieces: list[Reference]
    """Of its gradient, one for each shard; the driver hands them on unopened."""


class Team:
    """Who is asked for what, and who has finished how much.

    Args:
        runtime: where they live.
        make_worker: (index, how many died in this place) → a new worker's handle.
        server: where the gradients go.
        size: N.
        calls_in_flight: gradients asked of one worker at a time; with 2 it has its next task while
            its last answer travels, at the price of one more version of staleness.
        bound: rounds that a worker may be ahead of the slowest (stale synchronous parallel, Ho et
            al., 2013); None sets no bound.
        clients: pull by name, so that parameters come as differences.
        groups: local servers between workers and shards; 0 for none.
        codec: of what local servers send on.
        method: what a worker is asked for.
        pieces: parts of its answer besides the report; by default one for each shard.
    """

    def __init__(
        self,
        runtime: Runtime,
        make_worker: Callable[[int, int], Any],
        server: ParameterServer,
        *,
        size: int,
        calls_in_flight: int = 1,
        bound: int | None = None,
        clients: bool = False,
        groups: int = 0,
        codec: str = "none",
        method: str = "gradient",
        pieces: int | None = None,
    ) -> None:
        self.method, self.pieces = method, len(server.shards) if pieces is None else pieces
        self.runtime, self.server, self._make_worker = runtime, server, make_worker
        self.calls_in_flight, self.bound, self.clients = calls_in_flight, bound, clients
        self.workers = [make_worker(index, 0) for index in range(size)]
        self.locals = [
            runtime.remote(Aggregator).remote(len(server.shards), codec) for _ in range(groups)
        ]
        self.born = [0] * size
        self.rounds = [0] * size
        """Gradients that each worker has finished."""
        self.asked = [0] * size
        """Of each worker: what it was asked for and has not answered."""
        self.failures = self._in_a_row = 0
        self.in_flight: dict[Reference, tuple[int, list[Reference]]] = {}
        """Report → (who, pieces of the gradient)."""

    def client(self, index: int) -> str | None:
        """The name by which a worker pulls. After a failure nobody knows what arrived: then all
        pull under new names, and are sent everything.
        """
        return f"{index}, {self.failures} failures" if self.clients else None

    def start(
        self,
        index: int,
        arguments: Sequence[Any],
        method: str | None = None,
        pieces: int | None = None,
    ) -> None:
        """Hands a worker its arguments (references to weights, …) and asks it for its work, or for
        another `method`, whose answer has so many `pieces` (1 or more) besides the report.
        """
        count = self.pieces if pieces is None else pieces
        ask = getattr(self.workers[index], method or self.method).options(num_returns=1 + count)
        report, *parts = ask.remote(*arguments)
        self.in_flight[report] = (index, parts)
        self.asked[index] += 1

    def may_start(self, index: int) -> bool:
        """Whether the rule lets a worker begin another round."""
        if self.asked[index] >= self.calls_in_flight:
            return False
        if self.bound is None:
            return True
        return self.rounds[index] + self.asked[index] - min(self.rounds) <= self.bound

    def first(self) -> Answer | None:
        """Waits for the first report; None if a process died: a new one is then in its place.

        Only what the dead worker had in hand is lost. ActorDiedError if nobody lives long enough
        to answer.
        """
        (reference,), _ = self.runtime.wait(self.in_flight)
        index, pieces = self.in_flight.pop(reference)
        self.asked[index] -= 1
        try:
            report = self.runtime.get(reference)
        except ActorDiedError:
            self.failures += 1
            self._in_a_row += 1
            if self._in_a_row > 10 * len(self.workers):
                raise  # nothing but failures: something else is wrong
            self.server.revive()
            self._replace_if_dead(index)
            return None
        self.rounds[index] += 1
        self._in_a_row = 0
        return Answer(index, report, pieces)

    def next(self) -> list[Answer]:
        """The first report as a list, which is empty if a process died instead."""
        return [] if (answer := self.first()) is None else [answer]

    def rest(self) -> list[Answer]:
        """Waits for all that is in flight: the answers in the order of workers."""
        answers = []
        while self.in_flight:
            if (answer := self.first()) is not None:
                answers.append(answer)
        return sorted(answers, key=lambda answer: answer.worker)

    def settle(self) -> None:
        """Waits until all workers and shards are there and have done what they were told."""
        for index in range(len(self.workers)):
            self._replace_if_dead(index)
        self.server.settle()

    def combine(self, gradients: list[list[Reference]]) -> list[list[Reference]]:
        """One gradient from each local server; without any, the gradients as they are."""
        if not self.locals:
            return gradients
        shards, combined = len(self.server.shards), []
        groups = np.array_split(np.arange(len(gradients)), len(self.locals))
        for local, group in zip(self.locals, groups, strict=True):
            if len(group):
                pieces = [piece for index in group for piece in gradients[index]]
                answer = local.combine.options(num_returns=shards).remote(*pieces)
                combined.append(answer if shards > 1 else [answer])
        return combined

    def state_dict(self) -> dict[str, Any]:
        """The state of every worker and local server."""
        with self.runtime.off_the_clock():
            calls = [actor.state_dict.remote() for actor in [*self.workers, *self.locals]]
            states = self.runtime.get(calls)
        return {"actors": states, "rounds": list(self.rounds), "failures": self.failures}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        pairs = zip([*self.workers, *self.locals], state["actors"], strict=True)
        with self.runtime.off_the_clock():
            self.runtime.get([actor.load_state_dict.remote(kept) for actor, kept in pairs])
        self.rounds, self.failures = list(state["rounds"]), state["failures"]

    def _replace_if_dead(self, index: int) -> None:
        if not alive(self.runtime, self.workers[index]):
            self.born[index] += 1
            self.workers[index] = self._make_worker(index, self.born[index])


def place_seed(seed: int, index: int, born: int) -> int:
    """The seed of who is the `born`-th in place `index`: 0, 0 gives the run's own."""
    return seed + 1_000 * index + 1_000_000 * born


def remote_team(
    runtime: Runtime,
    kind: type[Alive],
    config: Any,
    server: ParameterServer,
    size: int,
    *,
    method: str = "gradient",
    costs: Mapping[str, float],
    returns: tuple[Any, ...],
    **rules: Any,
) -> Team:
    """A team of `size` processes `kind(config, index, born, metered)`.

    Args:
        runtime: where they live; on real processes they measure where their time goes.
        kind: the class.
        config: of the system, with `calls_in_flight`.
        server: where gradients go.
        size: N.
        method: what they are asked for.
        costs: units of work of one answer, for the virtual clock.
        returns: what stands for an answer in a hollow run: a report, and the parts.
        rules: see `Team`.
    """
    remote = runtime.remote(kind, costs={method: costs}, returns={method: returns}, spread=True)
    metered = isinstance(runtime, RayRuntime)
    return Team(
        runtime,
        lambda index, born: remote.remote(config, index, born, metered),
        server,
        size=size,
        calls_in_flight=config.calls_in_flight,
        method=method,
        pieces=len(returns) - 1,
        **rules,
    )
