"""Where a system's replay memory is: in shards of its own, or on a Redis server.

with opened(runtime, config, settings, example) as replay:   a `Replay`, for the driver
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rlbook.data import tree_nbytes
from rlbook.parts.frame_ring import stored_bytes
from rlbook.plumbing.memory_shard import MemorySettings
from rlbook.plumbing.replay_server import Replay, ShardedReplay
from rlbook.plumbing.runtime import Runtime


@contextmanager
def opened(
    runtime: Runtime, config: Any, settings: MemorySettings, example: Any, memory: Any = None
) -> Iterator[Replay]:
    """The replay memory that a config asks for, as long as the `with` lasts.

    Args:
        runtime: where shards live.
        config: of the system, with `replay` ("shards" or "redis"), `num_replays`, `batch_size` and
            `seed`.
        settings: of all shards together.
        example: one item, a NamedTuple of arrays `[...]`.
        memory: a client of a memory on a server that runs already; by default "redis" starts a
            server of its own on this computer, which ends with the run.

    Raises:
        ValueError: a memory that is not what the config asks for.
    """
    exponent = settings.priority_exponent if settings.prioritized else 0.0
    if memory is not None:
        _require_same(config.replay, memory, settings.capacity, exponent)
    if config.replay == "shards":
        sizes = {"batch": config.batch_size, "row_bytes": tree_nbytes(example)}
        sizes["stored_bytes"] = stored_bytes(example, settings.frames)
        capacity = -(-settings.capacity // config.num_replays)  # together at least what is asked
        each = settings._replace(capacity=capacity, example=example)
        yield ShardedReplay(runtime, each, config.num_replays, seed=config.seed, **sizes)
        return
    from rlbook.plumbing.redis_replay import RedisMemory, RedisReplay
    from rlbook.plumbing.redis_server import RedisServer

    with nullcontext() if memory is not None else RedisServer() as server:
        if server is not None:
            size, seed = settings.capacity, config.seed
            name = f"run of seed {seed}"
            memory = RedisMemory(server.settings, name, size, example, exponent, seed=seed)
        yield RedisReplay(memory)


def _require_same(replay: str, memory: Any, capacity: int, exponent: float) -> None:
    """ValueError for a memory that draws otherwise than a config says."""
    if replay != "redis":
        raise ValueError(f"memory: a client of a server goes with replay 'redis', not {replay!r}")
    if memory.capacity != capacity:
        raise ValueError(f"replay_capacity: is {capacity:,}, but {memory.capacity:,} in the memory")
    if memory.priority_exponent != exponent:
        raise ValueError(
            f"priority_exponent: is {exponent:g} (0 draws uniformly), but"
            f" {memory.priority_exponent:g} in the memory"
        )
