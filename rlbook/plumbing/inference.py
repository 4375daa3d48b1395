"""A server that acts for workers without a network, and puts their unrolls together.

    rows of slot 3 ──► observe ──► the slot's rows: … x_{T-1} x_T   ─ T + 1 of them ─► Unroll
                          │                                 └ row 0 of the next
                          ▼
    Waiting: until there are enough rows, or the oldest has waited long enough
                          │
                          ▼
    act(slots) ── one forward pass ──► actions, one array for each slot

A slot is one group of copies that step together. Kept for it: rows, what was said to them and with
which version of the parameters (it may change within an unroll), the recurrent state, a generator.
A new `run_id` in a place (its worker was begun again) starts from nothing. Parameters never leave;
what comes and goes is observations and actions. How they travel is not known here.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np

from rlbook.data import EnvOutput, Unroll
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.param_server import Alive


class Agent(Protocol):
    """What a network is asked by a server: see `parts.central_acting`."""

    said: Any
    """Type of what it says, a NamedTuple of arrays `[N, ...]`; one of them is `action`."""

    def initial_state(self, copies: int) -> Any:
        """Before a worker's first row: a tuple of arrays `[B, ...]`, or None."""

    def act(self, observation: Any, first: Any, state: Any, draws: Any) -> tuple[Any, Any]:
        """What it says to N rows, and the state after them."""

    def refresh(self) -> None:
        """Its parameters have changed."""


class Who(NamedTuple):
    """Whose rows."""

    place: int
    run_id: int


class Request(NamedTuple):
    """Rows that wait to be acted upon."""

    who: Who
    rows: int
    since: float
    """When they came. Seconds."""
    carried: Any = None
    """Whatever its owner wants back."""


class Waiting:
    """Requests, first in, first out, until there are enough for a batch.

    Args:
        most: rows of a batch, at least 1: it is due when there are so many, and takes no more
            (but one request at least, which is never split).
        timeout_s: a smaller batch is due when its oldest request has waited so long; None: never.
    """

    def __init__(self, most: int, timeout_s: float | None) -> None:
        self.most, self.timeout_s = most, timeout_s
        self.requests: deque[Request] = deque()
        self.rows = 0

    def add(self, request: Request) -> None:
        """Queues it."""
        self.requests.append(request)
        self.rows += request.rows

    def due_in(self, now: float) -> float | None:
        """Seconds until there is a batch: 0 if it is due; None if only more rows would make one."""
        if not self.requests or self.rows < self.most and self.timeout_s is None:
            return None
        if self.rows >= self.most:
            return 0.0
        assert self.timeout_s is not None
        return max(0.0, self.requests[0].since + self.timeout_s - now)

    def take(self) -> list[Request]:
        """The oldest requests that make a batch."""
        batch = [self.requests.popleft()]
        size = batch[0].rows
        while self.requests and size + self.requests[0].rows <= self.most:
            batch.append(self.requests.popleft())
            size += batch[-1].rows
        self.rows -= size
        return batch

    def drop(self, unwanted: Callable[[Request], bool]) -> list[Request]:
        """Takes out requests that nobody waits for any more."""
        gone = [request for request in self.requests if unwanted(request)]
        if gone:
            self.requests = deque(one for one in self.requests if not unwanted(one))
            self.rows = sum(request.rows for request in self.requests)
        return gone


class Slot:
    """What is known of one group of copies."""

    def __init__(self, run_id: int, rng: np.random.Generator, state: Any, said: Any) -> None:
        self.run_id, self.rng, self.state = run_id, rng, state
        self._said = said
        self.begun_with = state
        """The state before row 0."""
        self.rows: list[EnvOutput] = []
        self.said: list[Any] = []
        self.versions: list[int] = []
        """Of the parameters that said it."""
        self.begins = True
        """No unroll of this slot is finished yet."""

    @property
    def answered(self) -> bool:
        """Whether all its rows were acted upon."""
        return len(self.said) == len(self.rows)

    def observe(self, row: EnvOutput, unroll_length: int) -> Callable[[], Unroll] | None:
        """Adds a row; what puts the unroll together, if it ends with this row."""
        if not self.answered:  # said again, after a rest
            self.rows[-1] = row
            return None
        self.rows.append(row)
        if len(self.rows) <= unroll_length:
            return None
        ended = self.rows, self.said, self.begun_with, self.versions, self.begins
        self.rows, self.said, self.versions, self.begun_with = [row], [], [], self.state
        self.begins = False
        return partial(self._unroll, *ended)

    def _unroll(self, rows: Any, said: Any, state: Any, versions: Any, begins: bool) -> Unroll:
        return Unroll(
            EnvOutput(*(np.stack(column) for column in zip(*rows, strict=True))),
            self._said(*(np.stack(column) for column in zip(*said, strict=True))),
            state,
            version=np.array(versions),  # type: ignore[arg-type]
            begins=begins,
        )

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values and arrays."""
        return {
            "run_id": self.run_id,
            "rng": self.rng.bit_generator.state,
            "states": [self.state, self.begun_with],
            "rows": [tuple(row) for row in self.rows],
            "said": [tuple(one) for one in self.said],
            "versions": list(self.versions),
            "begins": self.begins,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.run_id = state["run_id"]
        self.rng.bit_generator.state = state["rng"]
        self.state, self.begun_with = (
            None if kept is None else tuple(map(np.asarray, kept)) for kept in state["states"]
        )
        self.rows = [EnvOutput(*row) for row in state["rows"]]
        self.said = [self._said(*one) for one in state["said"]]
        self.versions, self.begins = list(state["versions"]), state["begins"]


class Inference(Alive):
    """Slots, and the agent that acts for them. Not for several threads at once.

    Args:
        agent: acts with the parameters in `vector`.
        vector: `[P]`, the memory of the agent's parameters; copied to from new weights.
        unroll_length: T.
        seed: (place, run_id) → of a slot's draws.
    """

    def __init__(
        self,
        agent: Agent,
        vector: np.ndarray,
        unroll_length: int,
        seed: Callable[[int, int], int],
    ) -> None:
        self.agent, self.vector, self.unroll_length, self.seed = agent, vector, unroll_length, seed
        self.slots: dict[int, Slot] = {}
        """By place."""
        self.version = 0
        """Updates that made the parameters."""

    def load(self, weights: Vector) -> None:
        """Acts with these parameters from now on."""
        np.copyto(self.vector, weights.values)
        self.agent.refresh()
        self.version = weights.version

    def observe(self, who: Who, row: EnvOutput) -> Unroll | None:
        """Takes in a row `[B]`; the slot's unroll, if it ends with it.

        A row that was not acted upon may be said again. With a new `run_id` it is the first.
        """
        later = self.observe_first(who, row)
        return None if later is None else later()

    def observe_first(self, who: Who, row: EnvOutput) -> Callable[[], Unroll] | None:
        """The same, for who answers first and puts the unroll together after that."""
        slot = self.slots.get(who.place)
        if slot is None or slot.run_id != who.run_id:
            rng = np.random.default_rng([self.seed(who.place, who.run_id), 1])
            state = self.agent.initial_state(len(row.first))
            slot = Slot(who.run_id, rng, state, self.agent.said)
            self.slots[who.place] = slot
        later = slot.observe(row, self.unroll_length)
        return None if later is None else lambda: later()._replace(actor=who.place)

    def act(self, places: Sequence[int]) -> list[np.ndarray]:
        """Acts upon the last rows of these places: actions `[B]` for each."""
        slots = [self.slots[place] for place in places]
        counts = [len(slot.rows[-1].first) for slot in slots]
        draws = list(zip([slot.rng for slot in slots], counts, places, strict=True))
        if len(slots) == 1:
            (slot,), row = slots, slots[0].rows[-1]
            output, slot.state = self.agent.act(row.observation, row.first, slot.state, draws)
            self._note(slot, output)
            return [output.action]
        seen = np.concatenate([slot.rows[-1].observation for slot in slots])
        first = np.concatenate([slot.rows[-1].first for slot in slots])
        output, state = self.agent.act(seen, first, _together([s.state for s in slots]), draws)
        end = 0
        for slot, count in zip(slots, counts, strict=True):
            mine = slice(end, end := end + count)
            if state is not None:
                slot.state = tuple(part[mine] for part in state)
            self._note(slot, self.agent.said(*(column[mine] for column in output)))
        return [slot.said[-1].action for slot in slots]

    def free(self, place: int) -> bool:
        """Forgets a place; whether rows of an unfinished unroll went with it."""
        slot = self.slots.pop(place, None)
        return slot is not None and bool(slot.said)

    def state_dict(self) -> dict[str, Any]:
        """Every slot, and the parameters."""
        slots = [[place, slot.state_dict()] for place, slot in sorted(self.slots.items())]
        return {"slots": slots, "version": self.version, "parameters": self.vector.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.load(Vector(state["version"], state["parameters"]))
        self.slots = {}
        for place, kept in state["slots"]:
            slot = self.slots[place] = Slot(0, np.random.default_rng(0), None, self.agent.said)
            slot.load_state_dict(kept)

    def _note(self, slot: Slot, output: Any) -> None:
        slot.said.append(output)
        slot.versions.append(self.version)


def _together(states: Sequence[Any]) -> Any:
    """One state of all rows; None if there is none."""
    if states[0] is None:
        return None
    return tuple(np.concatenate(parts) for parts in zip(*states, strict=True))
