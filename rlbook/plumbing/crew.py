"""N processes on this computer, each with one plain object that a driver asks to work: no Ray.

    with Crew(Worker, lambda index, born: (config, index), size=2) as crew:
        crew.ask(0, "rounds", 4)              its object's rounds(4); returns at once
        who, answer = crew.first()            of whoever answers first

Requests to one process are answered in order. A process that dies is replaced by a new one, with
`born` one higher; what it was asked is lost. An exception in a process is raised here, with its
traceback. When the driver leaves the `with`, or vanishes, all processes end.

For what Ray cannot do: processes that meet in shared memory (see :mod:`rlbook.plumbing.shared`). A
request and its answer take about a tenth of a millisecond, on a pipe.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

from rlbook.plumbing.children import Child, pipe_of
from rlbook.plumbing.timeline import DRIVER, Timeline


class CrewError(RuntimeError):
    """A process raised an exception, or none lives long enough: the message has its last words."""


class Crew:
    """`size` processes with one object each.

    Args:
        kind: an importable class (of a package or module, not of a notebook's cell).
        arguments: (index, how many died in this place) → what `kind` is made with, picklable.
        size: N, at least 1.
        inherit: file descriptors that the processes shall have.

    Raises:
        ValueError: `kind` cannot be imported by others, or `size` is below 1.
    """

    def __init__(
        self,
        kind: type,
        arguments: Callable[[int, int], tuple[Any, ...]],
        size: int,
        inherit: Sequence[int] = (),
    ) -> None:
        if size < 1:
            raise ValueError(f"size: must be at least 1, got {size}")
        if kind.__module__ == "__main__":
            raise ValueError(
                f"{kind.__qualname__}: must be importable by other processes; move it from the"
                " notebook or script into a module"
            )
        self.kind, self.size, self.inherit = kind, size, tuple(inherit)
        self._arguments = arguments
        self.born = [0] * size
        """How many processes died in each place."""
        self._in_a_row = self._made = 0
        self._children: list[Child] = []
        self._asked: list[deque[str]] = [deque() for _ in range(size)]
        """What each was asked and has not answered."""
        self._kept: deque[tuple[int, Any]] = deque()
        """Answers that came while others were waited for."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._began = time.monotonic()
        self._timeline = Timeline()
        self._names = [""] * size

    def __enter__(self) -> Self:
        """Starts the processes and waits until each has made its object."""
        self._folder = tempfile.TemporaryDirectory(prefix="crew-")
        self._began = time.monotonic()
        try:
            for index in range(self.size):
                self._children.append(self._start(index))
            while any("__init__" in asked for asked in self._asked):
                self._next()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def now(self) -> float:
        """Seconds since the `with` was entered."""
        return time.monotonic() - self._began

    @property
    def pids(self) -> list[int]:
        """Process numbers, by index."""
        return [child.process.pid for child in self._children]

    def name(self, index: int) -> str:
        """What the process in this place is called in the timeline; its successor has another."""
        return self._names[index]

    def ask(self, index: int, method: str, *arguments: Any) -> None:
        """Asks process `index` for `method(*arguments)` of its object. Returns at once."""
        self._asked[index].append(method)
        try:
            self._children[index].pipe.send_bytes(pickle.dumps((method, arguments)))
        except OSError:
            pass  # it died: found when its answer is waited for

    def in_flight(self, index: int | None = None) -> int:
        """Requests whose answers have not been taken: of one process, or of all."""
        if index is None:
            return len(self._kept) + sum(len(asked) for asked in self._asked)
        return len(self._asked[index]) + sum(who == index for who, _ in self._kept)

    def first(self) -> tuple[int, Any] | None:
        """Waits for the first answer: (who, answer).

        None if a process died: a new one is begun in its place, and what the dead one was asked is
        lost. None once more when the new one is ready.

        Raises:
            CrewError: a process raised an exception, or processes die faster than they answer.
            ValueError: nothing is in flight.
        """
        if self._kept:
            return self._kept.popleft()
        who, method, answer = self._next()
        return None if method is None or method == "__init__" else (who, answer)

    def rest(self) -> list[tuple[int, Any]]:
        """Waits for all that is in flight: (who, answer) as they come."""
        answers = []
        while self.in_flight():
            if (answer := self.first()) is not None:
                answers.append(answer)
        return answers

    def each(self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        """Asks all for `method` and waits: the answers by index. Other answers that come meanwhile
        are kept for `first`; a process that replaces a dead one is asked too.
        """
        arguments = [()] * self.size if arguments is None else arguments
        answers: dict[int, Any] = {}
        for index in range(self.size):
            self.ask(index, method, *arguments[index])
        while len(answers) < self.size:
            who, what, answer = self._next()
            if what is None:
                if who not in answers:
                    self.ask(who, method, *arguments[who])
            elif what == method:
                answers[who] = answer
            elif what != "__init__":
                self._kept.append((who, answer))
        return [answers[index] for index in range(self.size)]

    def timeline(self) -> Timeline:
        """Who worked on what, and when the driver waited."""
        return Timeline.of(self._timeline)

    def state_dict(self) -> dict[str, Any]:
        """The state of every object (which must have `state_dict`)."""
        return {"members": self.each("state_dict")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.each("load_state_dict", [(kept,) for kept in state["members"]])

    def close(self) -> None:
        """Ends the processes. Calling it again does nothing."""
        for child in self._children:
            child.close()
        self._children = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self, index: int) -> Child:
        assert self._folder is not None
        log = Path(self._folder.name) / f"{self._made}.log"
        child = Child("rlbook.plumbing.crew", log, self.inherit)
        self._names[index] = f"{self.kind.__name__} {self._made}"
        self._made += 1
        self._asked[index] = deque(["__init__"])
        try:
            task = (self.kind, self._arguments(index, self.born[index]))
            child.pipe.send_bytes(pickle.dumps(task))
        except OSError:
            pass  # found when it is waited for
        return child

    def _next(self) -> tuple[int, str | None, Any]:
        """The next answer (who, method, answer); method None where a process died."""
        pipes = {
            child.pipe: index for index, child in enumerate(self._children) if self._asked[index]
        }
        if not pipes:
            raise ValueError("first: nothing is in flight")
        began = self.now
        ready = wait(list(pipes))[0]
        self._note(DRIVER, "wait", began, self.now)
        assert isinstance(ready, Connection)
        index = pipes[ready]
        try:
            failure, answer, start, end = pickle.loads(ready.recv_bytes())
        except (EOFError, OSError):
            self._replace(index)
            return index, None, None
        method = self._asked[index].popleft()
        if failure is not None:
            raise CrewError(f"{self._names[index]} failed in {method}:\n{failure}")
        self._note(self._names[index], method, start - self._began, end - self._began)
        self._in_a_row = 0 if method != "__init__" else self._in_a_row
        return index, method, answer

    def _replace(self, index: int) -> None:
        words = self._children[index].last_words()
        self._in_a_row += 1
        if self._in_a_row > 10 * self.size:
            raise CrewError(f"{self._names[index]} {words}")
        self._children[index].close()
        self.born[index] += 1
        self._children[index] = self._start(index)

    def _note(self, who: str, what: str, start: float, end: float) -> None:
        line = self._timeline
        line.add(line.number(who), line.number(what), start, end)


def _serve(pipe: Connection) -> None:
    """A process's life: make the object, then answer. Ends with the driver."""
    made: Any = None
    while True:
        try:
            task = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        start, answer, failure = time.monotonic(), None, None
        try:
            method, arguments = pickle.loads(task)
            if made is None:
                made = method(*arguments)
            else:
                answer = getattr(made, method)(*arguments)
        except Exception:
            failure = traceback.format_exc()
        try:
            pipe.send_bytes(pickle.dumps((failure, answer, start, time.monotonic())))
        except OSError:
            return


if __name__ == "__main__":
    _serve(pipe_of(sys.argv))
