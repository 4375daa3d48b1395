"""Round trips between a worker and a server, by each road; what `benchmarks.seed_rl` measures.

ours    the book's streams, or its calls: all checks, slots and unrolls, nothing to think about
echo    the same messages: made, sent, opened, sent back whole, opened; nobody looks at them
half    bytes that nobody makes or opens, answered by 8 bytes: what the road itself takes
plain   gRPC's ordinary Python server (threads, no event loop) that sends back what it got
"""

import asyncio
import queue
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np

from benchmarks.common import Row, note
from rlbook.data import AgentOutput, EnvOutput
from rlbook.plumbing import transport
from rlbook.plumbing.central import Central
from rlbook.plumbing.central_calls import CentralServer
from rlbook.plumbing.crew import Crew
from rlbook.plumbing.inference import Inference, Who
from rlbook.plumbing.runtime import RayRuntime
from rlbook.plumbing.stream_worker import open_channel
from rlbook.plumbing.streamed import StreamWorker
from rlbook.plumbing.streams import StreamServer, StreamSettings
from rlbook.plumbing.transport import Schema

SHAPE = (84, 84, 4)
ROADS = ("unix", "tcp", "ray")
ROUNDS = 5
SETTINGS = StreamSettings()
ECHO = "/rlbook.benchmark.Echo/Play"
HALF = bytes(8)


class Frames:
    """One copy of an environment that shows the same frame for ever."""

    def __init__(self) -> None:
        frame = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), np.uint8)
        zeros = np.zeros(1, np.float32)
        self.env_output = EnvOutput(frame, zeros, zeros + 1, zeros > 0)

    def step(self, action: np.ndarray) -> EnvOutput:
        return self.env_output

    def episodes(self) -> list[Any]:
        return []


class Still:
    """An agent that thinks of nothing."""

    said = AgentOutput

    def __init__(self) -> None:
        self.acts = 0
        self._said = AgentOutput(np.zeros(1, np.int64), np.zeros((1, 6), "f4"), np.zeros(1, "f4"))

    def initial_state(self, copies: int) -> None:
        return None

    def refresh(self) -> None:
        pass

    def act(self, observation: Any, first: Any, state: Any, draws: Any) -> tuple[Any, Any]:
        self.acts += 1
        return self._said, None


class Nobody(queue.SimpleQueue[Any]):
    """Learns from no unroll, and keeps none."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        pass


def inference() -> Inference:
    """Unrolls of 20 steps, as for Atari."""
    return Inference(Still(), np.zeros(1), 20, lambda place, run_id: 0)


class FrameWorker(StreamWorker):
    """In a process of its own: plays, or shouts at an echo."""

    def __init__(self) -> None:
        super().__init__(0, [Frames()])  # type: ignore[list-item]

    def shout(self, place: str, size: int, opens: bool) -> int:
        """Until the echo ends; how often it answered."""
        return asyncio.run(shout(place, size, opens))

    def shout_plainly(self, place: str, size: int) -> int:
        """The same without an event loop."""
        sends: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        data, heard = bytes(size), 0
        with grpc.insecure_channel(place, options=SETTINGS.channel_options()) as channel:
            sends.put(data)
            for answer in channel.stream_stream(ECHO)(iter(sends.get, None)):
                sends.put(data if answer else None)
                heard += 1
        return heard

    def echo(self, frame: np.ndarray) -> np.ndarray:
        """Answers with what it got."""
        return frame

    def half(self, frame: np.ndarray) -> int:
        """Answers with little."""
        return int(frame[0, 0, 0, 0])


class Service(CentralServer):
    """With calls: a process that acts."""

    def __init__(self) -> None:
        vars(self).update(vars(inference()))


async def shout(place: str, size: int, opens: bool) -> int:
    data, heard, answer = bytes(size), 0, b"go on"
    async with open_channel(place, SETTINGS) as channel:
        call = channel.stream_stream(ECHO)()
        while answer:
            await call.write(transport.rows(0, data).SerializeToString() if opens else data)
            answer = await call.read()
            heard += len(transport.opened(answer).rows.data) > 0 if opens else 1
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
    return heard


class Echo:
    """A server in a thread, as ours is, that answers with the message itself, or with little."""

    def __init__(self, address: str, answer: bytes | None) -> None:
        self.target, self.acts, self._ready = address, 0, threading.Event()
        self.answer = answer
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> "Echo":
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = grpc.aio.server(options=SETTINGS.channel_options())
        service, _, name = ECHO[1:].rpartition("/")
        handlers = {name: grpc.stream_stream_rpc_method_handler(self._play)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        port = server.add_insecure_port(self.target)
        if not self.target.startswith("unix:"):
            self.target = f"127.0.0.1:{port}"
        await server.start()
        self._ready.set()
        await self._stop.wait()
        await server.stop(5)

    async def _play(self, unused: Any, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            answer = self.answer
            if answer is None:
                answer = transport.opened(message).SerializeToString()
            await context.write(b"" if self._stop.is_set() else answer)
            self.acts += 1


class PlainEcho:
    """As gRPC's own examples have it: a pool of threads, one for each stream."""

    def __init__(self, address: str) -> None:
        self.acts, self._stopping = 0, False
        self._server = grpc.server(ThreadPoolExecutor(1), options=SETTINGS.channel_options())
        service, _, name = ECHO[1:].rpartition("/")
        handlers = {name: grpc.stream_stream_rpc_method_handler(self._play)}
        handler = grpc.method_handlers_generic_handler(service, handlers)
        self._server.add_generic_rpc_handlers((handler,))
        port = self._server.add_insecure_port(address)
        self.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"

    def __enter__(self) -> "PlainEcho":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._server.stop(5).wait()

    def _play(self, messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
        for message in messages:
            yield b"" if self._stopping else message
            self.acts += 1


def counted(acts: Callable[[], int], seconds: float) -> float:
    """Acts a second, from a moment on in which there was one."""
    before = acts()
    while acts() == before:
        time.sleep(0.01)
    start, begun = acts(), time.perf_counter()
    time.sleep(seconds)
    return (acts() - start) / (time.perf_counter() - begun)


def ours(crew: Crew, address: str, seconds: float) -> float:
    """Round trips a second of the book's streams."""
    limits = {"inference_batch": 1, "inference_timeout_s": None, "unrolls_in_flight": 1e9}
    config, service = SimpleNamespace(num_workers=1, groups=1, **limits), inference()
    central = Central(service, config, Nobody())
    schema = Schema.of(Frames().env_output)
    agent: Any = service.agent
    with StreamServer(central, schema, address, SETTINGS) as server:
        crew.ask(0, "play", server.target, 0, SETTINGS)
        rate = counted(lambda: agent.acts, seconds)
        server.soon(central.rest)
        crew.rest()
    return rate


def bare(crew: Crew, address: str, seconds: float, answer: bytes | None) -> float:
    """Messages of the same length that an echo answers."""
    with Echo(address, answer) as echo:
        size = Schema.of(Frames().env_output).nbytes
        crew.ask(0, "shout", echo.target, size, answer is None)
        rate = counted(lambda: echo.acts, seconds)
    crew.rest()
    return rate


def plain(crew: Crew, address: str, seconds: float) -> float:
    """Messages of the same length that gRPC's ordinary server sends back."""
    with PlainEcho(address) as echo:
        crew.ask(0, "shout_plainly", echo.target, Schema.of(Frames().env_output).nbytes)
        rate = counted(lambda: echo.acts, seconds)
    crew.rest()
    return rate


def by_streams(road: str, crew: Crew, seconds: float) -> Row:
    """Ours, echo, half and plain in turns."""
    measures = (ours, partial(bare, answer=None), partial(bare, answer=HALF), plain)
    found: list[list[float]] = [[] for _ in measures]
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(ROUNDS):
            for kind, measure in enumerate(measures):
                unix = f"unix:{Path(folder) / f'{kind}-{turn}'}"
                address = unix if road == "unix" else "127.0.0.1:0"
                found[kind].append(measure(crew, address, seconds))
    return line(road, *found)


def by_calls(runtime: RayRuntime, seconds: float) -> Row:
    """Ours: a call of the worker and one of the server; echo, half: one call with a frame."""
    worker = runtime.remote(FrameWorker).remote()
    server = runtime.remote(Service).remote()
    reports, rows = worker.here.options(num_returns=2).remote()
    runtime.get(reports)
    frame = Frames().env_output.observation

    def trip() -> None:
        nonlocal rows
        answer = server.answer.options(num_returns=2)
        _, action = answer.remote(None, [Who(0, 0)], rows)
        report, rows = worker.step.options(num_returns=2).remote(action)
        runtime.get(report)

    measures: tuple[Callable[[], object], ...] = (
        trip,
        lambda: runtime.get(worker.echo.remote(frame)),
        lambda: runtime.get(worker.half.remote(frame)),
    )
    found: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):
        for kind, measure in enumerate(measures):
            count, begun = 0, time.perf_counter()
            while time.perf_counter() < begun + seconds:
                measure()
                count += 1
            found[kind].append(count / (time.perf_counter() - begun))
    return line("ray", *found)


def line(
    road: str,
    mine: Sequence[float],
    echoes: Sequence[float],
    halves: Sequence[float],
    plains: Sequence[float] = (),
) -> Row:
    """One road of the table, in medians."""

    def share(others: Sequence[float]) -> float:
        return statistics.median(a / b for a, b in zip(mine, others, strict=True))

    return {
        "road": road,
        "what": "round trips",
        "bytes": Schema.of(Frames().env_output).nbytes,
        "ours/s": statistics.median(mine),
        "echo/s": statistics.median(echoes),
        "of echo": share(echoes),
        "half/s": statistics.median(halves),
        "of half": share(halves),
        "plain/s": statistics.median(plains) if plains else None,
        "of plain": share(plains) if plains else None,
        "microseconds": 1e6 / statistics.median(mine),
    }


def trips(seconds: float) -> list[Row]:
    """All roads, each of its three ways for about `seconds` a round."""
    rows = []
    with Crew(FrameWorker, lambda index, born: (), 1) as crew:
        for road in ROADS[:2]:
            note(f"round trips by {road}")
            rows.append(by_streams(road, crew, seconds))
    note("round trips by calls of Ray")
    with RayRuntime(num_cpus=2) as runtime:
        rows.append(by_calls(runtime, seconds))
    return rows
