"""Where a system's replay memory is: in shards of its own, or on a Redis server.

with opened(runtime, config, settings, example, row_bytes) as replay:   a `Replay`, for the driver
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rlbook.data import tree_nbytes
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
    """
    if config.replay == "shards":
        sizes = {"batch": config.batch_size, "row_bytes": tree_nbytes(example)}
        each = settings._replace(capacity=settings.capacity // config.num_replays, example=example)
        yield ShardedReplay(runtime, each, config.num_replays, seed=config.seed, **sizes)
        return
    from rlbook.plumbing.redis_replay import RedisMemory, RedisReplay
    from rlbook.plumbing.redis_server import RedisServer

    with nullcontext() if memory is not None else RedisServer() as server:
        if server is not None:
            exponent = settings.priority_exponent if settings.prioritized else 0.0
            name, capacity = f"run of seed {config.seed}", settings.capacity
            memory = RedisMemory(
                server.settings, name, capacity, example, exponent, seed=config.seed
            )
        yield RedisReplay(memory)
