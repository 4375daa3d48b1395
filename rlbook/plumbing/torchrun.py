"""A run that `torchrun` started: every rank is a worker, and rank 0 drives the run besides.

    torchrun --nproc-per-node 2 -m rlbook train dppo …        the same command on every rank

    rank 0   reads the command · run folder, progress, result · worker 0
      │ ▲
      │ └─ answers ─┐           a TCP connection to each; rank 0 works too before it listens
      └── requests ─┴─► ranks 1, 2, …   read no command · worker 1, 2, …

torchrun gives each process its number (RANK, LOCAL_RANK, WORLD_SIZE) and an address where all find
a store of keys and values (MASTER_ADDR, MASTER_PORT). Whatever sets these variables will do as
well. Ranks other than 0 do what they are asked, as the processes of a `Crew` do: so settings are
checked once, and nothing is written twice.

Nobody is replaced. When a rank dies the others are told at once, and wait a little, so that
torchrun, who ends them all, finds the one that died first; a run goes on from its last checkpoint.
torchrun sees its own computer only: so each rank also watches its connection, and ends where it
would wait for ever.

Requests are pickled, and only who has read the key from the store may send them; but whoever
reaches the store has it: use networks that you trust, as for all of `torch.distributed`.
"""

from __future__ import annotations

import os
import pickle
import secrets
import signal
import socket
import sys
import threading
import time
from collections import deque
from functools import cache
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, NamedTuple, NoReturn, cast

from rlbook.plumbing.crew import Crew, CrewError
from rlbook.plumbing.joining import interface_of

GRACE_S = 5.0
"""Who lost the others waits so long before it fails too: torchrun blames the first to fail."""

PATIENCE_S = 20.0
"""Who has not noticed by then that others are gone waits for them in vain, and is ended."""

LOOPBACK = "127.0.0.1"

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Launch(NamedTuple):
    """This process's place among those that were started together."""

    rank: int
    size: int
    local_rank: int
    """Among those on this computer."""
    alone: bool
    """Whether all are on this computer."""


def launched() -> Launch | None:
    """How torchrun started this process; None if it did not."""
    found = os.environ
    if not all(found.get(name) for name in VARIABLES):
        return None
    rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
    local_rank, here = found.get("LOCAL_RANK", rank), found.get("LOCAL_WORLD_SIZE", 0)
    return Launch(rank, size, int(local_rank), int(here) == size)


@cache
def store() -> Any:
    """Where all ranks leave values for each other: one for each start of all of them."""
    from torch.distributed.rendezvous import rendezvous

    return next(iter(rendezvous("env://")))[0]


class StoreBoard:
    """The last round of which each rank has finished the rollout: in the store, a round trip for
    each look (as in DD-PPO). Rank 0 makes it and gives it to all others.

    Args:
        size: ranks.
    """

    def __init__(self, size: int) -> None:
        self.names = [f"finished-{rank}" for rank in range(size)]
        for name in self.names:
            store().set(name, "0")

    def put(self, index: int, rounds: int) -> None:
        """Worker `index` has finished this round's."""
        store().set(self.names[index], str(rounds))

    def finished(self, rounds: int) -> int:
        """How many have finished this round's."""
        return sum(int(value) >= rounds for value in store().multi_get(self.names))


class _Rank:
    """Another rank, as rank 0 holds it: what `Crew` needs of a child."""

    def __init__(self, pipe: Connection | None) -> None:
        self.pipe = pipe

    def close(self) -> None:
        if self.pipe is not None:
            self.pipe.close()


class RankCrew(Crew):
    """The ranks as a crew, for rank 0: process i is rank i, and 0 is this process itself, which
    does what it is asked when an answer is waited for.

    Args as of `Crew`; `size` must be the number of ranks.

    Raises:
        ValueError: torchrun started more or fewer.
        CrewError: while it works: a rank is gone.
    """

    def __init__(self, kind: type, arguments: Any, size: int) -> None:
        launch = launched()
        assert launch is not None
        if size != launch.size:
            raise ValueError(
                f"num_workers: torchrun started {launch.size} ranks, but the settings say {size}"
            )
        super().__init__(kind, arguments, size)
        self._alone, self._made_here = launch.alone, None
        self._tasks: deque[tuple[Any, tuple[Any, ...]]] = deque()
        """What this process was asked itself."""
        self._pipes: dict[int, Connection] = {}
        self._over = threading.Event()

    def __enter__(self) -> RankCrew:
        key = secrets.token_bytes(32)
        with Listener((LOOPBACK if self._alone else "", 0), "AF_INET", self.size, key) as listener:
            port = cast(tuple[str, int], listener.address)[1]
            store().set("driver", pickle.dumps((port, key)))
            for _ in range(self.size - 1):
                pipe = listener.accept()
                _keep_alive(pipe)
                self._pipes[pipe.recv()] = pipe
        for pipe in self._pipes.values():  # clocks of several computers differ
            pipe.send(None)
            pipe.send(time.monotonic() - pipe.recv())
        _watch(list(self._pipes.values()), self._over, "rlbook: a rank is gone")
        super().__enter__()
        return self

    def ask(self, index: int, method: str, *arguments: Any) -> None:
        """Asks rank `index` for `method(*arguments)` of its object. Returns at once."""
        if index:
            super().ask(index, method, *arguments)
        else:
            self._asked[0].append(method)
            self._tasks.append((method, arguments))

    def close(self) -> None:
        """Lets the others go. Calling it again does nothing."""
        for pipe in self._pipes.values():
            try:
                pipe.send_bytes(b"")
            except OSError:
                pass  # it is gone already
        self._pipes = {}
        leave(self._made_here)
        self._over.set()
        super().close()

    def _start(self, index: int) -> Any:
        self._names[index] = f"{self.kind.__name__} {index}"
        self._asked[index] = deque(["__init__"])
        task = (self.kind, self._arguments(index, 0))
        if index == 0:
            self._tasks.append(task)
            return _Rank(None)
        self._pipes[index].send_bytes(pickle.dumps(task))
        return _Rank(self._pipes[index])

    def _next(self) -> tuple[int, str | None, Any]:
        if not self._tasks:
            return super()._next()
        began, (method, arguments), answer = self.now, self._tasks.popleft(), None
        if self._made_here is None:
            self._made_here = method(*arguments)
        else:
            answer = getattr(self._made_here, method)(*arguments)
        name = self._asked[0].popleft()
        self._note(self._names[0], name, began, self.now)
        return 0, name, answer

    def _replace(self, index: int) -> NoReturn:
        time.sleep(GRACE_S)
        raise CrewError(f"rank {index} of {self.size} is gone: resume from the last checkpoint")


def serve() -> int:
    """The life of a rank other than 0: makes the object that it is told to, and does what it is
    asked, until rank 0 lets it go. Returns the exit code; what goes wrong is raised here, and is
    in torchrun's report.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends the run in good order
    launch, over = launched(), threading.Event()
    assert launch is not None
    pipe, says = _driver(launch), f"rlbook: rank {launch.rank}: rank 0 is gone"
    _watch([pipe], over, says)
    found = record(_answer)(pipe)
    over.set()
    if found is None:
        time.sleep(GRACE_S)
        print(says, file=sys.stderr)
    return 1 if found is None else 0


def leave(made: Any) -> None:
    """The object's `close()`, if there is an object and it has one: it leaves its group."""
    if hasattr(made, "close"):
        made.close()


def _driver(launch: Launch) -> Connection:
    """The connection to rank 0."""
    port, key = pickle.loads(store().get("driver"))
    address = LOOPBACK if launch.alone else os.environ["MASTER_ADDR"]
    pipe = Client((address, port), authkey=key)
    _keep_alive(pipe)
    pipe.send(launch.rank)
    return pipe


def _answer(pipe: Connection) -> bool | None:
    """Works until rank 0 lets go (True), or is gone (None)."""
    made: Any = None
    try:
        pipe.recv()
        pipe.send(time.monotonic())
        behind = pipe.recv()
        while task := pipe.recv_bytes():
            start, answer = time.monotonic() + behind, None
            method, arguments = pickle.loads(task)
            if made is None:
                made = method(*arguments)
            else:
                answer = getattr(made, method)(*arguments)
            pipe.send_bytes(pickle.dumps((None, answer, start, time.monotonic() + behind)))
    except (EOFError, ConnectionError):
        return None
    leave(made)
    return True


def _watch(pipes: list[Connection], over: threading.Event, says: str) -> None:
    """Ends this process some time after one of these is gone, unless it is over by itself."""

    def look() -> None:
        while not over.wait(0.5):
            if any(map(_gone, pipes)):
                if not over.wait(PATIENCE_S):
                    print(says, file=sys.stderr, flush=True)
                    os._exit(1)  # out of a sum that nobody will ever complete
                return

    threading.Thread(target=look, daemon=True).start()


def _gone(pipe: Connection) -> bool:
    """Whether nothing more will come; what has come is left where it is."""
    try:
        with socket.socket(fileno=os.dup(pipe.fileno())) as line:
            return not line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def interface_to(address: str) -> str | None:
    """The network interface by which this computer reaches `address`; None where nobody knows, or
    it is the loopback though `address` is elsewhere, as where a computer's name means 127.0.1.1 to
    it.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # nothing is sent
            probe.connect((address, 9))
            own = probe.getsockname()[0]
        if own.startswith("127.") and not address.startswith("127.") and address != "localhost":
            return None
        return interface_of(own)
    except OSError:
        return None


def _keep_alive(pipe: Connection) -> None:
    """Lets the system find out, within a minute or so, that the other computer has vanished."""
    with socket.socket(fileno=os.dup(pipe.fileno())) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
