"""Streams of gRPC: one server's loop in a thread, and a worker's end of its stream.

    worker                                   server (one thread, one event loop)
    play(target, …)                          StreamServer(central, schema)
      write Hello, Rows of each group  ───►    read · decode · central.rows(…)
      read Actions · step · write Rows ◄───    reply, whenever central says so

Over TCP or a unix socket, with TLS or without. The server listens on the loopback interface alone
unless told otherwise. Nobody waits for ever: a worker that owes rows and is silent is cut off with
DEADLINE_EXCEEDED; while the server cannot act yet it says so (`hold`), and a worker that hears
nothing at all for as long gives up. Dead connections are found by keepalive. What is malformed or
too large ends its own stream, with a status, and nothing else.
"""

import asyncio
import ipaddress
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from rlbook.plumbing import seed_pb2 as pb
from rlbook.plumbing import transport
from rlbook.plumbing.central import Central
from rlbook.plumbing.transport import Refused, Schema

SERVICE = "rlbook.seed.Seed"
GRACE_S = 0.2
"""What open streams have left when a server stops."""


class Tls(NamedTuple):
    """Files (PEM) for encrypted streams."""

    certificate: str
    """Of the server; workers trust it, or who signed it."""
    key: str | None = None
    """The server's secret; workers need none."""
    name: str | None = None
    """Whom the certificate names, where that is not the host of the address."""


@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What both ends of a stream must know."""

    silence_s: float = 30.0
    """Who owes a message and sends none for so long is given up."""
    connect_s: float = 30.0
    """Deadline of a worker's way to the server, and of every unary call."""
    max_message_bytes: int = 4 << 20
    """Larger messages are refused with RESOURCE_EXHAUSTED."""
    token: bytes = b""
    """What workers must know."""
    tls: Tls | None = None
    allow_remote: bool = False
    """Listen on interfaces other than the loopback."""

    def channel_options(self) -> list[tuple[str, int]]:
        """Limits and keepalive, for gRPC."""
        pause = max(1, round(self.silence_s * 1000 / 3))
        return [
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.keepalive_time_ms", pause),
            ("grpc.keepalive_timeout_ms", pause),
            ("grpc.http2.min_ping_interval_without_data_ms", min(pause, 10_000)),
            ("grpc.enable_http_proxy", 0),  # a proxy of the environment is not for these
            ("grpc.so_reuseport", 0),
        ]


@dataclass(frozen=True, kw_only=True)
class StreamFields:
    """What a config tells of streams."""

    address: str = "127.0.0.1:0"
    """With "tcp": where the server listens; port 0 takes a free one."""
    allow_remote: bool = False
    """Let other computers reach the server."""
    tls_certificate: str | None = None
    """Of the server, a PEM file; with `tls_key` the streams are encrypted."""
    tls_key: str | None = None
    """The server's secret, a PEM file."""
    tls_name: str | None = None
    """Whom the certificate names, where that is not the host of the address."""
    silence_s: float = 30.0
    """A worker, or a server, that owes a message and is silent for so long is given up."""

    def check_streams(self) -> None:
        """ValueError for an address that is not this computer's, or half of what TLS needs."""
        check_address(self.address, self.allow_remote)
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_key: encrypted streams need tls_certificate and tls_key, both")

    def stream_settings(self, schema: Schema) -> StreamSettings:
        """For rows of this kind."""
        certificate = self.tls_certificate
        return StreamSettings(
            silence_s=self.silence_s,
            max_message_bytes=2 * schema.nbytes + (1 << 20),
            tls=None if certificate is None else Tls(certificate, self.tls_key, self.tls_name),
            allow_remote=self.allow_remote,
        )


def check_address(address: str, allow_remote: bool) -> None:
    """ValueError unless an address (`unix:PATH`, `HOST:PORT`) is this computer's own."""
    if address.startswith("unix:") or allow_remote:
        return
    host = address.rpartition(":")[0].strip("[]")
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(
            f"address: must be unix:PATH or of the loopback interface, got {address!r}; to listen"
            " for other computers set allow_remote, and think of TLS"
        )


class Line:
    """The server's end of one stream."""

    def __init__(self, context: Any) -> None:
        self.context, self.task = context, asyncio.current_task()
        self.outbox: deque[bytes] = deque()
        self.heard = time.monotonic()
        self.silent = False
        self.inline = False
        """Its own handler is at work and sends what is in the outbox."""
        self.peer: Any = None
        self._writing = False
        self._beside: set[asyncio.Task[None]] = set()
        """They send what others than the handler had sent."""

    def reply(self, group: int, action: np.ndarray | None) -> None:
        """Sends a group its actions, or to rest."""
        if action is None:
            self.send(pb.ToWorker(rest=pb.Rest(group=group)).SerializeToString())
        else:
            self.send(transport.actions(group, action))

    def send(self, message: bytes) -> None:
        """Has a message sent."""
        self.heard = time.monotonic()
        self.outbox.append(message)
        if not self.inline and not self._writing:
            task = asyncio.get_running_loop().create_task(self.flush())
            self._beside.add(task)
            task.add_done_callback(self._beside.discard)

    async def flush(self) -> None:
        """Sends what is in the outbox, in order, unless somebody is at it: he sends all."""
        if self._writing:
            return
        self._writing = True
        try:
            while self.outbox:
                await self.context.write(self.outbox.popleft())
        except (grpc.RpcError, RuntimeError):
            self.outbox.clear()  # it is gone, as its own handler finds
        finally:
            self._writing = False

    async def quieten(self) -> None:
        """Sends nothing any more; what is being sent is sent. Before a status, which is the last
        message of a stream.
        """
        self.inline = True
        self.outbox.clear()
        if self._beside:
            await asyncio.wait(self._beside)


class StreamServer:
    """Listens, in a thread of its own, from `with` on.

    Args:
        central: what is served.
        schema: of workers' rows.
        address: `unix:PATH`, or `HOST:PORT` (port 0: any free one).
        settings: limits and secrets.

    Raises:
        ValueError: an address that others could reach, without `allow_remote`.
        OSError: nobody can listen there.
    """

    def __init__(
        self, central: Central, schema: Schema, address: str, settings: StreamSettings
    ) -> None:
        check_address(address, settings.allow_remote)
        self.central, self.schema, self.settings = central, schema, settings
        central.row_bytes = schema.sent.nbytes
        self.target = address
        """Where workers find it."""
        self.lines: set[Line] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)

    def __enter__(self) -> "StreamServer":
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise OSError(f"cannot listen at {self.target}: {self._failure}") from self._failure
        return self

    def __exit__(self, *_: object) -> None:
        """Cuts all streams off."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10 * GRACE_S + 5)

    def soon(self, call: Callable[[], None]) -> None:
        """Has something done in the loop's thread."""

        def then() -> None:
            call()
            self._serve_due()

        self._loop.call_soon_threadsafe(then)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
        self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(options=self.settings.channel_options())
        handlers = {
            "Play": grpc.stream_stream_rpc_method_handler(self._play),
            "Status": grpc.unary_unary_rpc_method_handler(
                self._status,
                request_deserializer=pb.StatusRequest.FromString,
                response_serializer=pb.StatusReply.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self._listen(server)
        await server.start()
        self.central.soon = self.soon
        self._ready.set()
        watch = asyncio.create_task(self._watch())
        await self._stop.wait()
        watch.cancel()
        await server.stop(GRACE_S)

    def _listen(self, server: Any) -> None:
        tls = self.settings.tls
        if tls is None:
            port = server.add_insecure_port(self.target)
        else:
            assert tls.key is not None, "a server needs its key"
            pair = Path(tls.key).read_bytes(), Path(tls.certificate).read_bytes()
            port = server.add_secure_port(self.target, grpc.ssl_server_credentials([pair]))
        if not self.target.startswith("unix:"):
            self.target = f"{self.target.rpartition(':')[0]}:{port}"

    async def _status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        central = self.central
        return pb.StatusReply(
            protocol=transport.PROTOCOL,
            workers=sorted(central.peers),
            version=central.inference.version,
        )

    async def _play(self, unused: Any, context: Any) -> None:
        line = Line(context)
        self.lines.add(line)
        status, reason = "OK", ""
        try:
            await self._talk(line)
        except Refused as refusal:
            status, reason = refusal.status, refusal.message
        except asyncio.CancelledError:
            if not line.silent:
                raise
            status, reason = "DEADLINE_EXCEEDED", f"silent for {self.settings.silence_s:g} s"
        finally:
            self.lines.discard(line)
            if line.peer is not None:
                self.central.leave(line.peer)
                self._serve_due()
        await line.quieten()
        if status != "OK":
            await context.abort(grpc.StatusCode[status], reason)

    async def _talk(self, line: Line) -> None:
        context, schema, central = line.context, self.schema, self.central
        first = await context.read()
        if first is grpc.aio.EOF:
            return
        said = transport.introduced(transport.opened(first), schema, self.settings.token)
        peer, track = central.join(said, line.reply), transport.Track(schema)
        line.peer = peer
        await context.write(pb.ToWorker(welcome=pb.Welcome()).SerializeToString())
        while (data := await context.read()) is not grpc.aio.EOF:
            line.heard = time.monotonic()
            message = transport.opened(data)
            if message.WhichOneof("kind") != "rows":
                transport.invalid("after its hello a worker sends rows")
            told = message.rows
            row = track.decode(told.group, told.data)
            episodes = transport.episodes_of(told, schema.copies)
            line.inline = True
            try:
                env_s = transport.env_s_of(told)
                self._wake_in(central.rows(peer, told.group, row, episodes, env_s))
            finally:
                line.inline = False
            if line.outbox:
                await line.flush()
            central.settle()

    def _serve_due(self) -> None:
        """Acts for all who have waited long enough, or are enough."""
        self._wake_in(self.central.serve(time.monotonic()))

    def _wake_in(self, seconds: float | None) -> None:
        """Looks again then: the oldest request will have waited long enough."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            self._timer = self._loop.call_later(seconds, self._serve_due)

    async def _watch(self) -> None:
        """Comforts those who wait for us, and gives up those who let us wait."""
        while True:
            await asyncio.sleep(self.settings.silence_s / 4)
            now = time.monotonic()
            for line in list(self.lines):
                if line.peer is not None and line.peer.owed:
                    line.send(pb.ToWorker(hold=pb.Hold()).SerializeToString())
                elif now - line.heard > self.settings.silence_s:
                    line.silent = True
                    assert line.task is not None
                    line.task.cancel()
