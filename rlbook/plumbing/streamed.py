"""A whole system on streams: workers in processes of their own, servers and one learner, here.

    Crew of workers ──rows──► StreamServer's thread: Central ──finished──► this thread: learner
                   ◄─actions─    acts with the newest ◄────── weights ─────┘

The driver's thread learns; each server's thread acts (of k servers, number i modulo k for worker
i). All share this process, so that parameters go from one to the other by a copy in memory. Another
thread sleeps on the workers' pipes: it sets them
to play, and again when one has died or lost its stream, under a new run_id.
"""

import secrets
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from rlbook.data import EnvOutput
from rlbook.parts.envs import Envs
from rlbook.plumbing.central import Central, Finished, Stepped, Turn, Update
from rlbook.plumbing.crew import Crew, CrewError
from rlbook.plumbing.inference import Inference
from rlbook.plumbing.learner_group import Peer, Vector
from rlbook.plumbing.stream_worker import Lost, play
from rlbook.plumbing.streams import StreamServer, StreamSettings
from rlbook.plumbing.timeline import DRIVER, KEPT, Timeline
from rlbook.plumbing.transport import Schema

LOOK_EVERY_S = 0.25
"""How often the driver, while it waits for unrolls, looks whether somebody failed."""


class StreamWorker:
    """Plays on a stream, in a process of a crew, or steps when it is called. A system says which
    environments.

    Args:
        index: of the worker.
        groups: copies that it steps in turn; with calls one.
    """

    def __init__(self, index: int, groups: Sequence[Envs]) -> None:
        self.index, self.groups, self.steps = index, groups, 0

    def play(self, target: str, run_id: int, settings: StreamSettings) -> str | None:
        """Until it shall rest: None, or why the stream broke."""
        try:
            play(target, self.index, run_id, self.groups, settings)
        except Lost as lost:
            return str(lost)
        return None

    def here(self) -> tuple[Stepped, EnvOutput]:
        """With calls: where the copies stand."""
        envs = self.groups[0]
        return Stepped(self.steps, envs.episodes()), envs.env_output

    def step(self, action: np.ndarray) -> tuple[Stepped, EnvOutput]:
        """With calls: one step of B copies."""
        self.steps += 1
        self.groups[0].step(action)
        return self.here()

    def alive(self) -> bool:
        """True; a call that only a living process answers."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """The environments, and the steps they took."""
        return {"groups": [envs.state_dict() for envs in self.groups], "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.steps = state["steps"]
        for envs, kept in zip(self.groups, state["groups"], strict=True):
            envs.load_state_dict(kept)


class Streamed:
    """Workers, servers and learner, as a run conducts them.

    Args:
        crew: entered; its objects are `StreamWorker`s.
        servers: entered; their services share a queue of finished unrolls.
        learner: alone, in this thread.
        config: of the system; see `Central`, and `unrolls_per_batch`.
    """

    def __init__(
        self, crew: Crew, servers: Sequence[StreamServer], learner: Peer, config: Any
    ) -> None:
        self.crew, self.servers, self.learner, self.config = crew, servers, learner, config
        self.centrals = [server.central for server in servers]
        self.finished = self.centrals[0].finished
        self.updates = 0
        self._queue: deque[Finished] = deque()
        self._before = 0
        """Unrolls dropped before the run was resumed."""
        self._timeline = Timeline()
        self._failure: BaseException | None = None
        self._lanes = [self._timeline.number(who) for who in (DRIVER, "Learner 0")]
        self._words = [self._timeline.number(what) for what in ("wait", "update")]
        self._runs, self._lost = [0] * crew.size, 0
        self._watcher: threading.Thread | None = None
        self._born = list(crew.born)
        self._load(learner.weights())
        for central in self.centrals:
            central.name_of = crew.name

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds, when all rest."""
        return {"streams": self, "crew": self.crew}

    @property
    def now(self) -> float:
        """The wall's clock."""
        return self.crew.now

    @property
    def dropped(self) -> int:
        """Unrolls that nobody learnt from."""
        return sum(central.dropped for central in self.centrals) + self._before

    def pull(self) -> Any:
        """The parameters `[P]` after all updates so far."""
        return self.learner.newest().values

    def turn(self, env_steps: int) -> list[Turn]:
        """Waits for a batch of unrolls and learns from it."""
        if self._watcher is None:
            self._play()
        begun = time.monotonic()
        while len(self._queue) < self.config.unrolls_per_batch:
            self._queue.append(self._take())
        self._note(0, begun)
        return self._learn(env_steps)

    def drain(self, env_steps: int) -> list[Turn]:
        """All workers rest. What they have finished waits to be learnt from when they play again,
        so that a run ends where it would have had they been slower.
        """
        if self._watcher is not None:
            for server in self.servers:
                server.soon(server.central.rest)
            self._watcher.join()
            self._watcher = None
            while not self.finished.empty():
                self._queue.append(self.finished.get())
        if self._failure is not None:
            raise self._failure
        return []

    def timeline(self) -> Timeline:
        """Who worked on what: learner and driver here, the server's acting, the workers' plays."""
        shift = self.crew.now - time.monotonic()
        spans = [*self._timeline, *(span for one in self.centrals for span in one.timeline)]
        moved = [(who, what, start + shift, end + shift) for who, what, start, end in spans]
        # A worker that plays mostly waits: its steps are known from what it sent.
        asked = [span for span in self.crew.timeline() if span.what != "play"]
        return Timeline.of([*moved, *(span for span in asked if span.who != DRIVER)])

    def state_dict(self) -> dict[str, Any]:
        """Counts, the learner, what every server knows, and which life each worker lives."""
        state = {"learner": self.learner.state_dict(), "updates": self.updates}
        state["inference"] = [central.inference.state_dict() for central in self.centrals]
        state["queue"] = [one.state_dict() for one in self._queue]
        return state | {"runs": list(self._runs), "dropped": self.dropped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.learner.load_state_dict(state["learner"])
        self.updates, self._runs = state["updates"], list(state["runs"])
        self._before += state["dropped"] - self.dropped
        said = self.centrals[0].inference.agent.said
        self._queue = deque(Finished.of(kept, said) for kept in state["queue"])
        for central, kept in zip(self.centrals, state["inference"], strict=True):
            central.inference.load_state_dict(kept)
        self._load(self.learner.weights())

    def _load(self, weights: Vector) -> None:
        for central in self.centrals:
            central.inference.load(weights)

    def _take(self) -> Finished:
        while True:
            if self._failure is not None:
                raise self._failure
            try:
                return self.finished.get(timeout=LOOK_EVERY_S)
            except Empty:
                pass

    def _learn(self, env_steps: int) -> list[Turn]:
        """One update on the oldest unrolls."""
        batch = [self._queue.popleft() for _ in range(self.config.unrolls_per_batch)]
        places, waits = [one.place for one in batch], self.config.update_rule == "sync"
        if waits:
            batch.sort(key=lambda one: one.place)
        else:
            self._release(places)
        begun = time.monotonic()
        taken = env_steps + sum(one.report.env_steps for one in batch)
        metrics, weights = self.learner.update((taken,), *[one.unroll for one in batch])
        self._note(1, begun)
        self._release(places if waits else [], weights)
        update = Update(batch, lags_of(batch, self.updates))
        self.updates += 1
        return [*(Turn(one) for one in batch), Turn(update, metrics)]

    def _release(self, places: list[int], weights: Vector | None = None) -> None:
        groups = self.config.groups
        for central in self.centrals:
            mine = [place for place in places if self._central(place // groups) is central]
            central.release(mine, weights)

    def _play(self) -> None:
        """All workers play, and a thread sees to it that they go on."""
        untaken = Counter(one.place for one in self._queue)
        for central in self.centrals:
            central.begin(untaken)
        for index in range(self.crew.size):
            self._ask(index)
        self._watcher = threading.Thread(target=self._see_to_workers, name="workers", daemon=True)
        self._watcher.start()

    def _ask(self, index: int) -> None:
        server = self.servers[index % len(self.servers)]
        self.crew.ask(index, "play", server.target, self._runs[index], server.settings)

    def _central(self, index: int) -> Central:
        return self.centrals[index % len(self.centrals)]

    def _see_to_workers(self) -> None:
        try:
            while self.crew.in_flight():
                answer = self.crew.first()
                if answer is not None and answer[1] is None:
                    continue  # it rests
                if answer is not None:  # it lives, but its stream broke
                    self._lost += 1
                    if self._lost > 10 * self.crew.size:
                        raise CrewError(f"worker {answer[0]} lost its stream: {answer[1]}")
                    self._runs[answer[0]] += 1
                for index, born in enumerate(self.crew.born):
                    if born != self._born[index]:
                        self._born[index] = born
                        self._runs[index] += 1
                    if not self.crew.in_flight(index) and not self._central(index).resting:
                        self._ask(index)
        except BaseException as error:
            self._failure = error

    def _note(self, which: int, begun: float) -> None:
        self._timeline.add(self._lanes[which], self._words[which], begun, time.monotonic())
        if len(self._timeline) > 10 * KEPT:
            self._timeline.forget(5 * KEPT)


def lags_of(batch: Sequence[Finished], updates: int) -> Counter[int]:
    """Updates between the parameters at each step and the update that learns from it → steps."""
    return Counter(int(updates - version) for one in batch for version in one.versions)


def streamed(
    stack: ExitStack,
    worker: type[StreamWorker],
    inferences: Sequence[Inference],
    schema: Schema,
    learner: Peer,
    config: Any,
    settings: StreamSettings,
) -> Streamed:
    """All of it, until the `stack` is closed.

    Args:
        stack: closes servers and workers.
        worker: class of the workers, made with (config, index, how many died in this place).
        inferences: act, one for each server.
        schema: of workers' rows.
        learner: learns.
        config: of the system, with `wiring`: "unix" for sockets in a folder of their own, else
            `address` is listened at (and the ports behind it, where there are several).
        settings: of the streams; a token is added.
    """
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="seed-"))
    settings = replace(settings, token=settings.token or secrets.token_bytes(16))
    servers, finished = [], SimpleQueue[Finished]()
    for index, inference in enumerate(inferences):
        host, _, port = config.address.rpartition(":")
        address = f"{host}:{int(port) + index if int(port) else 0}"
        if config.wiring == "unix":
            address = f"unix:{Path(folder) / str(index)}"
        central = Central(inference, config, finished, index)
        servers.append(stack.enter_context(StreamServer(central, schema, address, settings)))
    crew = Crew(worker, lambda index, born: (config, index, born), config.num_workers)
    return Streamed(stack.enter_context(crew), servers, learner, config)
