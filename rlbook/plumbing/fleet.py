"""Actors that do one thing over and over for a conducting driver; the dead are replaced.

    report, unroll = fleet.ask(3, weights)     actor 3 begins; two references at once
    fleet.answer(3, report)                    the report, or None: it died, a new one is there

Who is asked, and what for, is the driver's to decide: a fleet only knows who lives in which place.
An actor is a plain class with the method, ``alive()``, ``state_dict()`` and ``load_state_dict()``.
"""

from collections.abc import Callable
from typing import Any

from rlbook.plumbing.param_server import alive
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime, Reference, Runtime


class Fleet:
    """N actors by their place.

    Args:
        runtime: where they live.
        make_actor: (place, how many died there) → a new actor's handle.
        size: N.
        method: what they are asked for.
        results: of one call, the report first.
    """

    def __init__(
        self,
        runtime: Runtime,
        make_actor: Callable[[int, int], Any],
        size: int,
        method: str,
        results: int = 2,
    ) -> None:
        self.runtime, self.method, self.results = runtime, method, results
        self._make_actor = make_actor
        self.actors = [make_actor(place, 0) for place in range(size)]
        self.born = [0] * size
        """How many died in each place."""
        self.replaced: list[int] = []
        """The places where one died, in the order in which new ones were made."""
        self._in_a_row = 0

    def __len__(self) -> int:
        return len(self.actors)

    def ask(self, place: int, *arguments: Any) -> list[Reference]:
        """Calls the method of the actor in `place`: a reference to each result, at once."""
        call = getattr(self.actors[place], self.method).options(num_returns=self.results)
        return call.remote(*arguments)

    def answer(self, place: int, report: Reference) -> Any | None:
        """The report behind a reference; None if who should give it died: what it had in hand is
        lost, and a new actor is in its place.

        ActorDiedError if nobody lives long enough to answer.
        """
        try:
            answer = self.runtime.get(report)
        except ActorDiedError:
            self._in_a_row += 1
            if self._in_a_row > 10 * len(self.actors):
                raise  # nothing but failures: something else is wrong
            self.replace_if_dead(place)
            return None
        self._in_a_row = 0
        return answer

    def replace_if_dead(self, place: int) -> None:
        """A new actor where the old one answers no more."""
        if not alive(self.runtime, self.actors[place]):
            self.replace(place)

    def replace(self, place: int) -> None:
        """A new actor."""
        self.born[place] += 1
        self.replaced.append(place)
        self.actors[place] = self._make_actor(place, self.born[place])

    def settle(self) -> None:
        """Waits until all are there and have done what they were asked; replaces the dead."""
        try:
            self.runtime.get([actor.alive.remote() for actor in self.actors])
        except ActorDiedError:
            for place in range(len(self.actors)):
                self.replace_if_dead(place)

    def state_dict(self) -> dict[str, Any]:
        """The state of every actor; nothing may be in flight."""
        with self.runtime.off_the_clock():
            calls = [actor.state_dict.remote() for actor in self.actors]
            return {"actors": self.runtime.get(calls), "replaced": list(self.replaced)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`. Where the clock is virtual, those who died are replaced once
        more: it goes on with the same actors, or not at all.
        """
        for place in state["replaced"]:
            if isinstance(self.runtime, RayRuntime):
                self.born[place] += 1
                self.replaced.append(place)
            else:
                self.replace(place)
        pairs = zip(self.actors, state["actors"], strict=True)
        with self.runtime.off_the_clock():
            self.runtime.get([actor.load_state_dict.remote(kept) for actor, kept in pairs])
