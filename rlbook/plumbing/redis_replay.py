"""A replay memory on a Redis server: many processes write and draw, and none of them holds it.

    actor 0 ─┐ rows of bytes, priorities                       keys, p^α, rows ┌─► learner
    actor 1 ─┼────── add ──────►  [ Redis: ring of rows, sums ]  ◄── sample ───┤
    …       ─┘                    [ of priorities, one script ]  ◄── update ───┘

    RedisMemory    one process's client: the `Memory` of `rlbook.plumbing.memory_shard`
    RedisReplay    what the driver conducts, the `Replay` of `rlbook.plumbing.replay_server`: it
                   counts; items go straight from actors to Redis and from there to the learner

Drawing, new priorities and making room happen inside the server (redis_replay.lua): each is one
round trip. The memory outlives every process that uses it, and, as far as the server's persistence
promises (`rlbook.plumbing.redis_server`), the server itself: clients go on trying while it is
restarted, and a call whose answer got lost is repeated without counting twice. One server, that is:
a cluster of Redis would have to know all keys of the script beforehand. A row holds an item whole,
stacks of frames too: to keep each frame once (`rlbook.parts.frame_ring`) takes shards of our own.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic

import numpy as np
import redis
from numpy.typing import ArrayLike

from rlbook.parts.replay import Sample
from rlbook.parts.ring import ItemsT
from rlbook.parts.rows import Rows, drawn, scaled_priorities
from rlbook.parts.sum_tree import Ints, integers, positive_int
from rlbook.plumbing.memory_shard import ONE_LEARNER, Deal, Part
from rlbook.plumbing.redis_server import RedisSettings
from rlbook.plumbing.replay_server import Draw
from rlbook.plumbing.runtime import Reference

SCRIPT = Path(__file__).with_suffix(".lua").read_text(encoding="utf-8")
SHA = hashlib.sha1(SCRIPT.encode()).hexdigest()
PIECE = 1 << 24
"""Bytes of rows in one call: others wait while the server is busy with it."""


class RedisMemory(Generic[ItemsT]):
    """A client of a prioritised replay memory on a Redis server.

    Every process makes one of its own, or is sent one: pickled, it is its arguments, and connects
    anew where it arrives. The first one makes the memory, those after it join.

    Args:
        settings: how to reach the server.
        name: of the memory; others on the same server have other names.
        capacity: items held; beyond it the oldest are overwritten.
        example: one item, a NamedTuple of arrays `[...]`.
        priority_exponent: α >= 0.
        importance_exponent: β >= 0, where `sample` is not given another.
        seed: of this client's draws.

    Raises:
        ValueError: a bad number or example, a memory of that name for other items, or one that is
            larger than the server's memory.
        RuntimeError: nobody answers, or the password is wrong.
    """

    def __init__(
        self,
        settings: RedisSettings,
        name: str,
        capacity: int,
        example: ItemsT,
        priority_exponent: float = 0.6,
        importance_exponent: float = 0.4,
        seed: int = 0,
    ) -> None:
        for what, value in (("priority", priority_exponent), ("importance", importance_exponent)):
            if not 0.0 <= value < np.inf:
                raise ValueError(f"{what}_exponent must be finite and at least 0, not {value}")
        self._arguments = (
            settings, name, capacity, example, priority_exponent, importance_exponent, seed
        )  # fmt: skip
        self.capacity = positive_int("capacity", capacity)
        self.settings, self.name, self._rows = settings, name, Rows(example)
        self.priority_exponent = float(priority_exponent)
        self.importance_exponent = float(importance_exponent)
        self._rng = np.random.default_rng(seed)
        self._record = np.dtype([("key", "<f8"), ("leaf", "<f8"), ("row", self._rows.dtype)])
        self._largest = float(np.finfo(np.float64).max) / (2 * self.capacity)
        self._per_key = max(1, min(1024, (1 << 20) // self._rows.nbytes))
        parts = ("meta", "leaves", "sums", "clients", "rows:")
        self._keys = [f"{{rlbook:{name}}}:{part}" for part in parts]
        self._client, self._calls = uuid.uuid4().hex, 0
        self.redis = settings.connect()
        self._patiently(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments

    def reseeded(self, seed: int) -> RedisMemory[ItemsT]:
        """Another client, which draws by lots of its own."""
        return type(self)(*self._arguments[:-1], seed)

    def __len__(self) -> int:
        """Items held."""
        return min(self._report()[0], self.capacity)

    @property
    def total_priority(self) -> float:
        """Σ p^α over all items."""
        return self._report()[2]

    @property
    def smallest_priority(self) -> float:
        """min p^α over the items that can be drawn, 0 if there is none: a look at all of them."""
        least = self._report("least")[4]
        return least if least < np.inf else 0.0

    @property
    def life(self) -> int:
        """The key of the first item ever; larger after each restart: keys of before are void."""
        return self._report()[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the server's memory when full, its own overhead not counted."""
        return self.capacity * (self._rows.nbytes + 8) + self.capacity // 8

    def add(self, items: ItemsT, priorities: ArrayLike | None = None) -> Ints:
        """Store `items`, a NamedTuple of arrays `[N, ...]`, and give their keys, int64 `[N]`.

        Without `priorities` `[N]` they get the largest seen so far (at first 1).

        Raises:
            ValueError: fields, shapes or dtypes other than the example's, or a priority that is
                negative, NaN or infinite; nothing is stored then.
            RuntimeError: nobody answers.
        """
        count, data = self._rows.pack(items)
        scaled = None if priorities is None else self._scaled(priorities, count)[0]
        step, found = max(1, PIECE // self._rows.nbytes), []
        for start in range(0, count, step):
            end = min(start + step, count)
            first = self._add(end - start, data[start * self._rows.nbytes :], scaled, start)
            found.append(np.arange(first, first + end - start))
        return np.concatenate(found) if found else np.empty(0, np.int64)

    def sample(self, batch_size: int, importance_exponent: float | None = None) -> Sample[ItemsT]:
        """Draw `batch_size` items by priority, one from each equal share of the total.

        Raises:
            ValueError: the memory is empty, or a number is out of range.
            RuntimeError: nobody answers.
        """
        return self._draw(batch_size, importance_exponent)[0]

    def part(self, rows: int, *, finds_smallest: bool = False) -> Part:
        """A draw of so many rows as a learner wants it; with the smallest P(i) of all, if asked."""
        sample, size, total = self._draw(rows, None)
        smallest = self.smallest_priority / (total or 1.0) if finds_smallest else 0.0
        return Part(sample, size, smallest)

    def update_priorities(self, keys: ArrayLike, priorities: ArrayLike) -> int:
        """Give items `keys` `[N]` the `priorities` `[N]`; of equal keys the last one counts.

        Keys of items that are gone are ignored, and so are all from before the server was started
        again. Returns how many were still there.

        Raises:
            ValueError: another length, or a priority that is negative, NaN or infinite; nothing is
                changed then.
            RuntimeError: nobody answers.
        """
        found = integers("keys", keys)
        scaled, _ = self._scaled(priorities, len(found))
        text = scaled.astype("<f8").tobytes()
        return int(self._call("update", found.astype("<f8").tobytes(), text)) if text else 0

    def clear(self) -> None:
        """Removes the memory with all that it holds; the next call makes an empty one."""
        last = -(-self.capacity // self._per_key)
        rows = [f"{self._keys[4]}{i}" for i in range(last)]
        self._patiently(lambda: self.redis.unlink(*self._keys[:4], *rows))

    def state_dict(self) -> dict[str, Any]:
        """Everything that future draws depend on: all items, priorities and counts."""
        added, base, _, largest, _ = self._report()
        held, size = min(added, self.capacity), self._rows.nbytes
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.getrange(self._keys[1], 0, 8 * held - 1)
            for start in range(0, held, self._per_key):
                count = min(self._per_key, held - start)
                pipe.getrange(f"{self._keys[4]}{start // self._per_key}", 0, count * size - 1)
            leaves, *rows = self._patiently(pipe.execute)
        return {
            "schema": self._schema,
            "added": added,
            "base": base,
            "largest": largest,
            "leaves": np.frombuffer(leaves if held else b"", "<f8").astype(np.float64),
            "rows": np.frombuffer(b"".join(rows) if held else b"", np.uint8).reshape(held, size),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`, in place of what is there. ValueError if it does not fit."""
        if state["schema"] != self._schema:
            raise ValueError(f"the state is of {state['schema']}, not of {self._schema}")
        self.clear()
        self._patiently(self._open)
        rows, leaves = np.asarray(state["rows"]), np.asarray(state["leaves"])
        counts = {name: repr(state[name]) for name in ("added", "base", "largest")}
        with self.redis.pipeline(transaction=False) as pipe:
            pipe.setrange(self._keys[1], 0, leaves.astype("<f8").tobytes())
            for start in range(0, len(rows), self._per_key):
                key = f"{self._keys[4]}{start // self._per_key}"
                pipe.setrange(key, 0, rows[start : start + self._per_key].tobytes())
            pipe.hset(self._keys[0], mapping=counts)  # type: ignore[arg-type]
            pipe.execute()
        self._call("rebuild")
        self._rng.bit_generator.state = state["rng"]

    @property
    def _schema(self) -> str:
        return f"{self._rows.schema} × {self.capacity:,}, α = {self.priority_exponent}"

    def _scaled(self, priorities: ArrayLike, size: int) -> tuple[Any, float]:
        exponent, most = self.priority_exponent, self._largest
        return scaled_priorities(priorities, size=size, exponent=exponent, most=most)

    def _draw(
        self, batch_size: int, importance_exponent: float | None
    ) -> tuple[Sample[ItemsT], int, float]:
        """A batch, the items there are and Σ p^α, all of one moment."""
        draws = self._rng.random(positive_int("batch_size", batch_size))
        exponent = self.importance_exponent if importance_exponent is None else importance_exponent
        size, number, data = self._call("sample", draws.astype("<f8").tobytes())
        if not size:
            raise ValueError("cannot sample: the replay is empty")
        records, total = np.frombuffer(data, self._record), _number(number)
        keys, leaves = records["key"].astype(np.int64), np.ascontiguousarray(records["leaf"])
        items = self._rows.unpack(records["row"])
        return drawn(items, keys, leaves, total=total, size=size, exponent=exponent), size, total

    def _add(self, count: int, data: memoryview, scaled: Any, start: int) -> int:
        """The first key of one piece."""
        self._calls += 1
        text, most = b"", 0.0
        if scaled is not None:
            mine = scaled[start : start + count]
            text, most = mine.astype("<f8").tobytes(), float(mine.max())
        rows = data[: count * self._rows.nbytes]
        return int(self._call("add", self._client, self._calls, count, rows, text, repr(most)))

    def _report(self, what: str = "") -> tuple[int, int, float, float, float]:
        added, base, *numbers = self._call("report", what)
        total, largest, least = (_number(number) for number in numbers)
        return int(added), int(base), total, largest, least

    def _call(self, operation: str, *arguments: Any) -> Any:
        """One call of the script. After a restart the server has forgotten it: see `open` there."""

        def call() -> Any:
            for _ in range(3):
                try:
                    return self.redis.evalsha(SHA, 5, *self._keys, operation, *arguments)
                except redis.exceptions.NoScriptError:
                    self._open()
                except redis.ResponseError as error:
                    if not str(error).startswith("MISSING"):
                        raise
                    self._open()
            raise redis.ConnectionError("the memory is removed as soon as it is made")

        return self._patiently(call)

    def _open(self) -> None:
        """Makes the memory, or joins it."""
        if not self.redis.exists(self._keys[0]):
            self._require_room()
        fields = (self.capacity, self._rows.nbytes, self._per_key, "1")
        found = self.redis.eval(SCRIPT, 5, *self._keys, "open", self._schema, *fields)
        if found.decode() != self._schema:
            raise ValueError(
                f"{self.settings.address} has a memory {self.name!r} of other items:\n"
                f"  there: {found.decode()}\n  here:  {self._schema}\n"
                "Choose another name, or remove that one."
            )

    def _require_room(self) -> None:
        """ValueError if the server can never hold so much."""
        known = self.redis.info("memory")
        most, used = known["maxmemory"], known["used_memory"]
        room = most - used if most else known["total_system_memory"]
        if self.nbytes > room:
            raise ValueError(
                f"capacity: {self.capacity:,} items of {self._rows.nbytes:,} bytes need "
                f"{self.nbytes / 2**30:.2f} GiB, redis at {self.settings.address} has room for "
                f"{room / 2**30:.2f} GiB"
            )

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """`call()`, again and again while nobody answers, as long as the patience lasts."""
        until, wait, where = (
            time.monotonic() + self.settings.patience_s,
            0.01,
            self.settings.address,
        )
        while True:
            try:
                return call()
            except (redis.AuthenticationError, redis.exceptions.AuthorizationError) as error:
                raise RuntimeError(f"redis at {where} refuses the password: {error}") from error
            except redis.exceptions.OutOfMemoryError as error:
                raise RuntimeError(f"redis at {where} is full: {error}") from error
            except (redis.ConnectionError, redis.TimeoutError, redis.ResponseError) as error:
                busy = str(error).startswith("BUSY")  # with another client's call
                if isinstance(error, redis.ResponseError) and not busy:
                    raise RuntimeError(f"redis at {where}: {error}") from error
                if time.monotonic() + wait > until:
                    raise RuntimeError(
                        f"redis at {where} has not answered for {self.settings.patience_s:g} s "
                        f"({error}). Is it running? `RedisServer` starts one."
                    ) from error
                time.sleep(wait)
                wait = min(2 * wait, 0.5)


class RedisReplay:
    """The same memory as the driver conducts it: it counts, and items go by.

    Actors add by themselves and make None; learners draw by themselves: a `Draw` has no parts, only
    how many rows to draw.

    Args:
        memory: a client of the driver's own; send one like it to each actor and learner.
    """

    parts = 0
    """Of each draw."""

    def __init__(self, memory: RedisMemory[Any]) -> None:
        self.memory = memory
        self.held = len(memory)
        """Items that the driver knows of."""
        self._life = memory.life

    @property
    def nbytes(self) -> int:
        """Of the memory, when full."""
        return self.memory.nbytes

    def __len__(self) -> int:
        return min(self.held, self.memory.capacity)

    @property
    def total(self) -> float:
        """Σ p^α; asks the server."""
        return self.memory.total_priority

    def add(self, made: Reference, count: int) -> None:
        """Counts items that an actor has stored by itself."""
        self.held += count

    def stored(self, added: Reference) -> None:
        """Nothing was handed on."""

    def sample(self, rows: int, deal: Deal = ONE_LEARNER) -> Draw | None:
        """What learners are to draw; None while there is nothing."""
        return Draw([], rows) if self.held else None

    def update_priorities(self, draw: Draw, priorities: Sequence[Reference]) -> None:
        """Nothing to hand on: the learner did it."""

    def mend(self) -> int:
        """Counts anew what the server holds: 1 if it was started again since, else 0."""
        self.held, before = len(self.memory), self._life
        self._life = self.memory.life
        return int(before != self._life)

    def state_dict(self) -> dict[str, Any]:
        """All that the server holds."""
        return self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`, in place of what the server holds."""
        self.memory.load_state_dict(state)
        self.held = len(self.memory)


def _number(text: bytes) -> float:
    return float(np.frombuffer(text, "<f8")[0])
