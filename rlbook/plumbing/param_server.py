"""A sharded, versioned parameter server, as its driver holds it.

                     ┌─ Shard 0: parameters [0, P/k), optimiser state, version
    ParameterServer ─┼─ Shard 1: parameters [P/k, 2P/k) …
     (in the driver) └─ Shard k−1
       pull()  ──► k references to weights, handed on to a worker
       push()  ◄── k references to the pieces of its gradient

The driver is the only one who calls, so every shard sees the same order of pulls and pushes: what
is pulled from k shards is one consistent state, and k shards do what one does (Li et al., 2014,
"Scaling distributed machine learning with the parameter server"; the shards: Dean et al., 2012).

Faults: the driver keeps a snapshot of each shard and references to all pushes since. When a shard
dies, a new one starts from the snapshot and gets the same pushes again in the same order: nothing
that was pushed is lost, and the parameters are the same as if nothing had happened, bit for bit.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlbook.plumbing.codecs import Identity, decode
from rlbook.plumbing.deeds import StandIn
from rlbook.plumbing.runtime import ActorDiedError, Reference, Runtime
from rlbook.plumbing.shard import Gradient, Receipt, ServerSettings, Shard, Weights


def shard_bounds(size: int, shards: int) -> list[tuple[int, int]]:
    """[start, end) of each shard's slice; sizes differ by at most 1.

    Raises:
        ValueError: there are more shards than parameters, or less than one.
    """
    if not 1 <= shards <= size:
        raise ValueError(f"shards: must be 1 to {size} (the number of parameters), got {shards}")
    edges = [size * i // shards for i in range(shards + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


class ParameterServer:
    """k shards behind one name.

    Args:
        runtime: where they live.
        parameters: `[P]`, to start from.
        shards: k.
        settings: optimiser and gate, the same for each.
        snapshot_every: pushes between two snapshots; so many may have to be made again.
        costs, returns: of `Shard`, for the virtual clock.
    """

    def __init__(
        self,
        runtime: Runtime,
        parameters: np.ndarray,
        shards: int = 1,
        settings: ServerSettings | None = None,
        *,
        snapshot_every: int = 100,
        costs: Any = None,
        returns: Any = None,
    ) -> None:
        self.runtime, self.settings = runtime, settings or ServerSettings()
        self.bounds = shard_bounds(len(parameters), shards)
        self.snapshot_every = snapshot_every
        self._start = [parameters[start:end] for start, end in self.bounds]
        self._remote = runtime.remote(Shard, costs=costs, returns=returns)
        self.shards = [self._remote.remote(p, self.settings) for p in self._start]
        self._snapshots: list[dict[str, Any] | None] = [None] * shards
        self._log: list[list[list[Reference]]] = []
        """Pushes since the snapshots: for each push and shard, the pieces that it was given."""
        self._receipts: deque[Reference] = deque()
        """From the first shard, of the newest pushes of the log."""
        self.nbytes = parameters.nbytes
        self.revived = 0
        """Shards that died and were made anew."""

    def pull(self, client: str | None = None) -> list[Reference]:
        """References to the newest weights of each shard, in the order of calls so far.

        Args:
            client: a name; then what comes is the difference to what this client pulled last.
        """
        if client is None:
            return [shard.pull.remote() for shard in self.shards]
        return [shard.pull.remote(client) for shard in self.shards]

    def push(self, pieces: Sequence[Reference]) -> None:
        """Sends one gradient, a piece for each shard. Returns at once."""
        self.push_together([pieces])

    def push_together(self, gradients: Sequence[Sequence[Reference]]) -> None:
        """Sends several gradients, of which each shard applies the mean. Returns at once."""
        columns = [list(column) for column in zip(*gradients, strict=True)]
        self._log.append(columns)
        answers = [self._send(i, column) for i, column in enumerate(columns)]
        self._receipts.append(answers[0])
        if len(self._log) >= self.snapshot_every:
            self.snapshot()

    def receipts(self, newest: int = 0) -> list[Receipt]:
        """What became of the pushes whose receipts have not been taken yet, but for the `newest`
        so many: those may still be on their way, and taking them would wait for them.
        """
        count = max(0, len(self._receipts) - newest)
        while True:
            try:
                found = self.runtime.get([self._receipts[i] for i in range(count)])
            except ActorDiedError:
                self._must_revive()
                continue
            for _ in range(count):
                self._receipts.popleft()
            return [receipt for receipt in found if receipt is not None]

    def weights(self) -> np.ndarray:
        """The newest parameters `[P]`; waits for all pushes before."""
        while True:
            try:
                pulled = self.runtime.get(self.pull())
                if not pulled[0].blob:  # a hollow run: nobody has learnt anything
                    return np.concatenate(self._start)
                return np.concatenate([decode(weights.blob) for weights in pulled])
            except ActorDiedError:
                self._must_revive()

    def snapshot(self) -> None:
        """Brings the state of every shard to the driver; older pushes need not be kept."""
        while True:
            try:
                states = [shard.state_dict.remote() for shard in self.shards]
                self._snapshots = self.runtime.get(states)
            except ActorDiedError:
                self._must_revive()
                continue
            self._log.clear()
            return

    def revive(self) -> bool:
        """Makes dead shards anew, and tells whether there were any.

        Raises:
            ActorDiedError: a new one died at once too, so that another would not help.
        """
        dead = [i for i, shard in enumerate(self.shards) if not alive(self.runtime, shard)]
        for i in dead:
            kept = self._snapshots[i]
            state = None if kept is None else {**kept, "clients": {}}
            self.shards[i] = self._remote.remote(self._start[i], self.settings, state)
            self.runtime.get(self.shards[i].alive.remote())
            answers = [self._send(i, columns[i]) for columns in self._log]
            if i == 0 and (again := min(len(self._receipts), len(answers))):
                kept_receipts = list(self._receipts)[:-again]  # from before the snapshot: answered
                self._receipts = deque(kept_receipts + answers[-again:])
        self.revived += len(dead)
        return bool(dead)

    def settle(self) -> None:
        """Waits until every shard has done what it was told."""
        while self.revive():
            pass

    def state_dict(self) -> dict[str, Any]:
        """The state of every shard, after all pushes; when settled."""
        with self.runtime.off_the_clock():
            self.snapshot()
        return {"shards": self._snapshots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self._snapshots = list(state["shards"])
        pairs = zip(self.shards, self._snapshots, strict=True)
        with self.runtime.off_the_clock():
            self.runtime.get([shard.load_state_dict.remote(kept) for shard, kept in pairs])

    def _send(self, index: int, pieces: list[Reference]) -> Reference:
        shard = self.shards[index]
        return (
            shard.push.remote(*pieces) if len(pieces) == 1 else shard.push_together.remote(*pieces)
        )

    def _must_revive(self) -> None:
        if not self.revive():
            raise RuntimeError("parameter server: a call failed, but every shard is alive")


SERVER_COSTS = {"apply": 0.1e-3, "copy": 0.02e-3}
"""Seconds of one update and of one copy of some thousand parameters, where none are measured."""


def priced_server(
    runtime: Runtime, parameters: np.ndarray, shards: int, settings: ServerSettings
) -> ParameterServer:
    """A server whose shards take, on a virtual cluster, their share of "apply" and "copy", and
    whose parameters have their true size in a hollow run.
    """
    share = 1 / shards
    costs = {"push": {"apply": share}, "push_together": {"apply": share}, "pull": {"copy": share}}
    returns = {"pull": StandIn(int(parameters.nbytes * share), Weights(0, b""))}
    return ParameterServer(runtime, parameters, shards, settings, costs=costs, returns=returns)


def server_units(
    parameters: np.ndarray, settings: ServerSettings
) -> dict[str, Callable[[], object]]:
    """What "apply" and "copy" are, done by a shard with all of `parameters`; to be measured."""
    shard = Shard(parameters, settings)
    gradient = Gradient(Identity().encode(parameters), 0, 1, 1.0)
    return {"apply": lambda: shard.push(gradient), "copy": shard.pull}


def stored_parameters(state: Mapping[str, Any]) -> np.ndarray:
    """The parameters `[P]` in what a server's `state_dict` gave."""
    return np.concatenate([shard["parameters"] for shard in state["shards"]])


class Alive:
    """What a driver must be able to ask of any process."""

    def alive(self) -> bool:
        """True; a call that only a living process answers."""
        return True


class Bundle(Alive):
    """A process made of parts that each keep their own state."""

    parts: tuple[str, ...] = ()
    """Names of the attributes."""

    def state_dict(self) -> dict[str, Any]:
        """Of every part."""
        return {name: getattr(self, name).state_dict() for name in self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        for name in self.parts:
            getattr(self, name).load_state_dict(state[name])


def alive(runtime: Runtime, actor: Any) -> bool:
    """Whether an actor answers to `alive()`; waits for what it was told before."""
    try:
        runtime.get(actor.alive.remote())
    except ActorDiedError:
        return False
    return True
