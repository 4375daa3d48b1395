"""A server that acts for workers without a network, and puts their unrolls together.

    row of slot 3 ──► observe ──► keep ──► the slot's rows: … x_{T-1} x_T  ─ T + 1 of them ─► Unroll
                         │      (later)                              └ row 0 of the next
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
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from rlbook.data import EnvOutput, Unroll
from rlbook.parts.frames import restacked
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
        if self.rows >= self.most:
            return 0.0
        if not self.requests or self.timeout_s is None:
            return None
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


class Page:
    """The rows of an unroll, as they are written down.

    Args:
        like: one of them, of any values, `[B]`.
        rows: how many there is room for.
        planes: k, where observations are stacks of frames and each is written once, as
            `parts.frames.packed` says; 1 where observations are written as they are.
    """

    def __init__(self, like: EnvOutput, rows: int, planes: int) -> None:
        self.older = planes - 1
        shapes = [(rows, *np.shape(column)) for column in like]
        if self.older:
            copies, _, *frame = np.shape(like.observation)
            shapes[0] = rows + self.older, copies, *frame
        kinds = [np.asarray(column).dtype for column in like]
        self.columns = EnvOutput(*map(np.empty, shapes, kinds))
        """`[rows, B, ...]`; observations with frames are `[rows + k − 1, B, H, W]`."""
        self._rows = self.columns._replace(observation=self.columns.observation[self.older :])

    def write(self, index: int, row: EnvOutput) -> None:
        """Row `index`; where it is 0, all its frames."""
        if self.older:
            if index == 0:
                self.columns.observation[: self.older] = row.observation[:, :-1].swapaxes(0, 1)
            row = row._replace(observation=row.observation[:, -1])
        for column, values in zip(self._rows, row, strict=True):
            column[index] = values

    def rows(self, count: int) -> list[np.ndarray]:
        """Copies of the columns up to a row, with whole observations."""
        found = [column[:count].copy() for column in self._rows]
        if self.older:
            frames = torch.from_numpy(self.columns.observation[: count + self.older])
            found[0] = restacked(frames, found[3]).numpy()
        return found


class Slot:
    """What is known of one group of copies.

    Args:
        who: of its worker's life.
        rng: of its draws.
        state: recurrent, before its first row; or None.
        said: type of what the agent says.
        unroll_length: T.
        planes: of `Page`.
    """

    def __init__(
        self,
        who: Who,
        rng: np.random.Generator,
        state: Any,
        said: Any,
        unroll_length: int,
        planes: int = 1,
    ) -> None:
        self.place, self.run_id = who
        self.rng, self.state = rng, state
        self._said, self._length, self._planes = said, unroll_length, planes
        self.begun_with = state
        """The state before row 0."""
        self.row: EnvOutput | None = None
        """The last one, to act upon."""
        self.count = 0
        """Rows of the unroll so far."""
        self.said: list[Any] = []
        self.versions: list[int] = []
        """Of the parameters that said it."""
        self.begins = True
        """No unroll of this slot is finished yet."""
        self._written: Page | None = None
        """The rows that are kept."""
        self._ended: Any = None

    @property
    def answered(self) -> bool:
        """Whether all its rows were acted upon."""
        return len(self.said) == self.count

    @property
    def ends(self) -> bool:
        """Whether an unroll ends with the last row, and that is not kept yet."""
        return self._ended is not None

    def observe(self, row: EnvOutput) -> None:
        """Takes in a row to act upon, instead of the last one if that was not acted upon: it is
        said again, after a rest.
        """
        if self.answered:
            self.count += 1
        self.row = row
        if self.count > self._length:
            self._ended = self.said, self.begun_with, self.versions, self.begins
            self.said, self.versions, self.begun_with = [], [], self.state
            self.begins, self.count = False, 1

    def keep(self) -> Unroll | None:
        """Writes the row down; the unroll that ends with it, if one does."""
        assert self.row is not None
        unroll, ended, self._ended = None, self._ended, None
        if ended is not None:
            assert self._written is not None
            self._written.write(self._length, self.row)
            said, state, versions, begins = ended
            unroll = Unroll(
                self._written.columns,
                self._said(*map(_stacked, zip(*said, strict=True))),
                state,
                actor=self.place,
                version=np.array(versions),  # type: ignore[arg-type]
                begins=begins,
            )
        if unroll is not None or self._written is None:
            self._written = Page(self.row, self._length + 1, self._planes)
        self._written.write(self.count - 1, self.row)
        return unroll

    def state_dict(self) -> dict[str, Any]:
        """All of it, as plain values and arrays."""
        return {
            "run_id": self.run_id,
            "rng": self.rng.bit_generator.state,
            "states": [self.state, self.begun_with],
            "rows": self._written.rows(self.count) if self._written is not None else [],
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
        self.count, self._written, self._ended = 0, None, None
        rows = [EnvOutput(*row) for row in zip(*state["rows"], strict=True)]
        for self.count, self.row in enumerate(rows, 1):
            self.keep()
        self.said = [self._said(*one) for one in state["said"]]
        self.versions, self.begins = list(state["versions"]), state["begins"]


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """What `np.stack` makes of equal arrays, in a fifth of its time where they are small."""
    return np.concatenate(arrays).reshape(len(arrays), *arrays[0].shape)


class Inference(Alive):
    """Slots, and the agent that acts for them. Not for several threads at once.

    Args:
        agent: acts with the parameters in `vector`.
        vector: `[P]`, the memory of the agent's parameters; copied to from new weights.
        unroll_length: T.
        seed: (place, run_id) → of a slot's draws.
        planes: of `Page`.
    """

    def __init__(
        self,
        agent: Agent,
        vector: np.ndarray,
        unroll_length: int,
        seed: Callable[[int, int], int],
        planes: int = 1,
    ) -> None:
        self.agent, self.vector, self.unroll_length, self.seed = agent, vector, unroll_length, seed
        self.planes = planes
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
        return self.observe_first(who, row).keep()

    def observe_first(self, who: Who, row: EnvOutput) -> Slot:
        """The same for who answers first, and has the slot keep the row after that."""
        slot = self.slots.get(who.place)
        if slot is None or slot.run_id != who.run_id:
            rng = np.random.default_rng([self.seed(who.place, who.run_id), 1])
            state, said = self.agent.initial_state(len(row.first)), self.agent.said
            kept = self.unroll_length, self.planes
            slot = self.slots[who.place] = Slot(who, rng, state, said, *kept)
        slot.observe(row)
        return slot

    def act(self, places: Sequence[int]) -> list[np.ndarray]:
        """Acts upon the last rows of these places: actions `[B]` for each."""
        slots = [self.slots[place] for place in places]
        if len(slots) == 1:
            (slot,), row = slots, slots[0].row
            assert row is not None
            draws = [(slot.rng, len(row.first), places[0])]
            output, slot.state = self.agent.act(row.observation, row.first, slot.state, draws)
            self._note(slot, output)
            return [output.action]
        rows: list[Any] = [slot.row for slot in slots]
        counts = [len(row.first) for row in rows]
        draws = list(zip([slot.rng for slot in slots], counts, places, strict=True))
        seen = np.concatenate([row.observation for row in rows])
        first = np.concatenate([row.first for row in rows])
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
            rng, said = np.random.default_rng(0), self.agent.said
            sizes = self.unroll_length, self.planes
            slot = self.slots[place] = Slot(Who(place, 0), rng, None, said, *sizes)
            slot.load_state_dict(kept)

    def _note(self, slot: Slot, output: Any) -> None:
        slot.said.append(output)
        slot.versions.append(self.version)


def _together(states: Sequence[Any]) -> Any:
    """One state of all rows; None if there is none."""
    if states[0] is None:
        return None
    return tuple(np.concatenate(parts) for parts in zip(*states, strict=True))
