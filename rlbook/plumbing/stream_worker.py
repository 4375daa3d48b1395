"""A worker's end of its stream: rows out, actions in, until it shall rest or the server is gone.

    play(target, worker, run_id, groups, settings)      groups: objects with `here`, `step(action)`

The groups of copies are stepped in turn: while the server thinks about one, the other is stepped.
"""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from rlbook.parts.envs import Envs
from rlbook.plumbing import seed_pb2 as pb
from rlbook.plumbing import transport
from rlbook.plumbing.streams import SERVICE, StreamSettings
from rlbook.plumbing.transport import Schema, Track


class Lost(ConnectionError):
    """The server is gone, or refused this worker; `status` is gRPC's word for why."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status

    def __reduce__(self) -> Any:
        return Lost, (self.status, str(self).partition(": ")[2])


def open_channel(target: str, settings: StreamSettings) -> Any:
    """A channel of `grpc.aio`, secure if the settings say so."""
    options: list[tuple[str, Any]] = list(settings.channel_options())
    if settings.tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    if settings.tls.name is not None:
        options.append(("grpc.ssl_target_name_override", settings.tls.name))
    roots = Path(settings.tls.certificate).read_bytes()
    credentials = grpc.ssl_channel_credentials(roots)
    return grpc.aio.secure_channel(target, credentials, options=options)


def play(
    target: str, worker: int, run_id: int, groups: Sequence[Envs], settings: StreamSettings
) -> None:
    """Plays until the server says to rest.

    Raises:
        Lost: the stream broke.
    """
    asyncio.run(_play(target, worker, run_id, groups, settings))


def status(target: str, settings: StreamSettings) -> pb.StatusReply:
    """Who is connected to a server. `Lost` if there is no answer within `connect_s`."""

    async def ask() -> pb.StatusReply:
        async with open_channel(target, settings) as channel:
            call = channel.unary_unary(
                f"/{SERVICE}/Status",
                request_serializer=pb.StatusRequest.SerializeToString,
                response_deserializer=pb.StatusReply.FromString,
            )
            try:
                return await call(pb.StatusRequest(), timeout=settings.connect_s)
            except grpc.aio.AioRpcError as error:
                raise Lost(error.code().name, error.details() or "") from None

    return asyncio.run(ask())


async def _play(
    target: str, worker: int, run_id: int, groups: Sequence[Envs], settings: StreamSettings
) -> None:
    async with open_channel(target, settings) as channel:
        try:
            await asyncio.wait_for(channel.channel_ready(), settings.connect_s)
        except TimeoutError:
            raise Lost("UNAVAILABLE", f"no server at {target}") from None
        call = channel.stream_stream(f"/{SERVICE}/Play")()
        stream = Stream(call, settings.silence_s)
        watch = asyncio.create_task(stream.watch())
        try:
            await stream.run(worker, run_id, groups, settings.token)
        except grpc.aio.AioRpcError as error:
            raise Lost(error.code().name, error.details() or "") from error
        except asyncio.CancelledError as error:
            if not call.cancelled():
                raise
            raise Lost("DEADLINE_EXCEEDED", "the server is silent") from error
        except asyncio.InvalidStateError as error:  # it ended while we wrote
            raise Lost((await call.code()).name, await call.details() or "") from error
        finally:
            watch.cancel()
            call.cancel()


class Stream:
    """One open stream."""

    def __init__(self, call: Any, silence_s: float) -> None:
        self.call, self.silence_s = call, silence_s
        self.heard = time.monotonic()

    async def watch(self) -> None:
        """Gives up a server that has said nothing for too long."""
        while time.monotonic() - self.heard < self.silence_s:
            await asyncio.sleep(self.silence_s / 4)
        self.call.cancel()

    async def run(self, worker: int, run_id: int, groups: Sequence[Envs], token: bytes) -> None:
        """Says hello, then answers actions with rows until every group rests."""
        here = [envs.env_output for envs in groups]
        stacked = getattr(groups[0], "stacked", False)
        schema = Schema.of(here[0], stacked)
        track, hello = Track(schema), transport.hello(worker, run_id, here, token, stacked)
        await self.call.write(hello.SerializeToString())
        await self.next("welcome")
        for index, row in enumerate(here):
            said = transport.rows(index, track.encode(index, row))
            await self.call.write(said.SerializeToString())
        plays = len(groups)
        while plays:
            message = await self.next("actions", "rest")
            if message.WhichOneof("kind") == "rest":
                plays -= 1
                continue
            told = message.actions
            envs, action = groups[told.group], transport.actions_of(told, schema.copies)
            begun = time.monotonic()
            row = envs.step(action)
            taken = time.monotonic() - begun
            data = track.encode(told.group, row)
            said = transport.rows(told.group, data, envs.episodes(), taken)
            await self.call.write(said.SerializeToString())
            self.heard = time.monotonic()
        await self.call.done_writing()
        while await self.call.read() is not grpc.aio.EOF:  # so that it is the server who ends it
            pass

    async def next(self, *kinds: str) -> pb.ToWorker:
        """The next message of one of these kinds; others are but signs of life. `Lost` at the end
        of the stream.
        """
        while True:
            data = await self.call.read()
            self.heard = time.monotonic()
            if data is grpc.aio.EOF:
                raise Lost((await self.call.code()).name, await self.call.details() or "")
            message = pb.ToWorker.FromString(data)
            if message.WhichOneof("kind") in kinds:
                return message
