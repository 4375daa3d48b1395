"""What travels on streams of SEED, and what must never hurt a server: a live one, fuzzed."""

import asyncio
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbook.data import AgentOutput, EnvOutput
from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.parts.envs import Episode, make_envs
from rlbook.plumbing import seed_pb2 as pb
from rlbook.plumbing import transport
from rlbook.plumbing.central import Finished
from rlbook.plumbing.stream_worker import Lost, open_channel, play, status
from rlbook.plumbing.streams import SERVICE, Line, StreamServer, StreamSettings, check_address
from rlbook.plumbing.transport import Refused, Schema, Track, hello, introduced
from tests.counters import register
from tests.seeds import QUICK, central, certificate, serving, stacks

ROOT = Path(__file__).resolve().parent.parent.parent
SCHEMA = Schema((3,), "f4", 3)


def counters(copies: int = 3, seed: int = 0):
    """Counter's copies, counted from 0 the first time."""
    if seed == 0:
        register()
    return make_envs("test/Counter-v0", copies, seed)


def row(copies: int = 3, **changes) -> EnvOutput:
    made = EnvOutput(
        np.arange(3 * copies, dtype=np.float32).reshape(copies, 3),
        np.arange(copies, dtype=np.float32),
        np.ones(copies, np.float32),
        np.zeros(copies, bool),
    )
    return made._replace(**changes)


# -- bytes -----------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from(["u1", "f4"]),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_a_row_is_what_its_bytes_are(shape, dtype, copies, seed):
    rng = np.random.default_rng(seed)
    made = EnvOutput(
        rng.integers(0, 255, (copies, *shape)).astype(dtype),
        rng.normal(size=copies).astype(np.float32),
        rng.integers(0, 2, copies).astype(np.float32),
        rng.random(copies) < 0.5,
    )
    schema = Schema.of(made)
    data = schema.encode(made)
    assert len(data) == schema.nbytes
    for a, b in zip(schema.decode(data), made, strict=True):
        assert np.array_equal(a, b) and a.dtype == b.dtype and a.shape == b.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"discount": np.full(3, 0.5)}, "discount"),
        ({"discount": np.full(3, np.nan)}, "discount"),
        ({"reward": np.array([0, np.inf, 0])}, "reward"),
        ({"observation": np.full((3, 3), np.nan)}, "observation"),
        ({"first": np.array([0, 2, 0], np.uint8).view(bool)}, "first"),
    ],
)
def test_values_that_no_environment_gives_are_refused(changes, message):
    data = bytearray(SCHEMA.encode(row(**{k: v for k, v in changes.items() if k != "first"})))
    if "first" in changes:
        data[-2] = 2
    with pytest.raises(Refused, match=message) as refusal:
        SCHEMA.decode(bytes(data))
    assert refusal.value.status == "INVALID_ARGUMENT"


def test_messages_come_out_as_they_went_in():
    said = transport.rows(1, SCHEMA.encode(row()), [Episode(2, 4.5, 7)])
    told = transport.opened(said.SerializeToString()).rows
    assert told.group == 1 and transport.episodes_of(told, 3) == [Episode(2, 4.5, 7)]
    answer = pb.ToWorker.FromString(transport.actions(1, np.array([3, 0, 1])))
    assert answer.actions.group == 1
    assert transport.actions_of(answer.actions, 3).tolist() == [3, 0, 1]
    with pytest.raises(Refused):
        transport.actions_of(answer.actions, 4)


HELLO = transport.hello(1, 7, [row()], b"secret").SerializeToString()


def test_a_hello_says_who_it_is():
    who = transport.introduced(transport.opened(HELLO), SCHEMA, b"secret")
    assert who == (1, 7, 1, 3)


@pytest.mark.parametrize(
    ("change", "status_code"),
    [
        (lambda hello: setattr(hello, "protocol", 9), "FAILED_PRECONDITION"),
        (lambda hello: setattr(hello, "token", b"guess"), "UNAUTHENTICATED"),
        (lambda hello: setattr(hello, "copies", 4), "INVALID_ARGUMENT"),
        (lambda hello: setattr(hello, "groups", 2**31), "INVALID_ARGUMENT"),
        (lambda hello: hello.fields.pop(), "INVALID_ARGUMENT"),
        (lambda hello: setattr(hello.fields[2], "dtype", "|O"), "INVALID_ARGUMENT"),
        (lambda hello: hello.fields[2].shape.append(2), "INVALID_ARGUMENT"),
    ],
)
def test_a_hello_that_does_not_fit_is_refused(change, status_code):
    message = transport.opened(HELLO)
    change(message.hello)
    with pytest.raises(Refused) as refusal:
        transport.introduced(message, SCHEMA, b"secret")
    assert refusal.value.status == status_code


# -- fuzz: ten thousand inputs ---------------------------------------------------------------------

ROWS = transport.rows(0, SCHEMA.encode(row()), [Episode(1, 2.0, 3)]).SerializeToString()


@st.composite
def mutated(draw):
    """A good message with a few bytes changed, or cut short, or with more behind."""
    data = bytearray(draw(st.sampled_from([HELLO, ROWS])))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    cut = draw(st.integers(0, len(data)))
    return bytes(data[:cut]) + draw(st.binary(max_size=8))


@st.composite
def well_formed(draw):
    """Messages of the schema that say anything."""
    message = pb.FromWorker()
    if draw(st.booleans()):
        message.hello.protocol = draw(st.sampled_from([0, 1, 2**32 - 1]))
        message.hello.groups = draw(st.sampled_from([0, 1, 2**32 - 1]))
        message.hello.copies = draw(st.sampled_from([0, 3, 2**32 - 1]))
        message.hello.worker = draw(st.integers(0, 2**32 - 1))
        for _ in range(draw(st.integers(0, 5))):
            shape = draw(st.lists(st.integers(0, 2**32 - 1), max_size=3))
            message.hello.fields.add(name="reward", dtype=draw(st.text(max_size=4)), shape=shape)
    else:
        message.rows.group = draw(st.sampled_from([0, 1, 2**32 - 1]))
        message.rows.data = draw(st.binary(min_size=SCHEMA.nbytes, max_size=SCHEMA.nbytes))
        for _ in range(draw(st.integers(0, 2))):
            value = draw(st.floats())
            message.rows.episodes.add(env=draw(st.integers(0, 9)), episode_return=value)
    return message.SerializeToString()


JUNK = st.one_of(st.binary(max_size=64), mutated(), well_formed())


@settings(max_examples=8_000, deadline=None, database=None)
@given(JUNK)
def test_whatever_comes_is_read_or_refused(data):
    try:
        message = transport.opened(data)
        if message.WhichOneof("kind") == "rows":
            found = SCHEMA.decode(message.rows.data)
            transport.episodes_of(message.rows, 3)
            assert np.isfinite(found.observation).all() and np.isfinite(found.reward).all()
        else:
            transport.introduced(message, SCHEMA, b"secret")
    except Refused as refusal:
        assert grpc.StatusCode[refusal.status] and refusal.message


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server, a loop and a channel to it; in the end it still serves."""
    secret = replace(QUICK, token=b"secret")
    with serving(tmp_path_factory.mktemp("live"), secret, num_workers=8) as server:
        loop = asyncio.new_event_loop()
        channel = loop.run_until_complete(_open(server.target, secret))
        yield server, loop, channel
        loop.run_until_complete(channel.close())
        loop.close()


async def _open(target: str, said: StreamSettings):
    return open_channel(target, said)


async def outcome(channel, messages) -> grpc.StatusCode:
    """How a stream of these messages ends."""
    call = channel.stream_stream(f"/{SERVICE}/Play")()
    try:
        for message in messages:
            await call.write(message)
        await call.done_writing()
        while await call.read() is not grpc.aio.EOF:
            pass
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    return await asyncio.wait_for(call.code(), 10)


@settings(max_examples=2_000, deadline=None, database=None)
@given(JUNK, st.booleans())
def test_a_live_server_outlives_whatever_comes(live, data, introduced):
    server, loop, channel = live
    told = outcome(channel, [HELLO, data] if introduced else [data])
    code = loop.run_until_complete(asyncio.wait_for(told, 20))
    assert code in {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.FAILED_PRECONDITION,
    }


def test_after_all_that_it_serves_as_before(live):
    server, loop, channel = live
    ok = transport.rows(0, SCHEMA.encode(row())).SerializeToString()
    assert loop.run_until_complete(outcome(channel, [HELLO, ok])) == grpc.StatusCode.OK
    assert not server.central.peers and not server.central.inference.slots


def test_what_is_too_large_is_refused(live):
    server, loop, channel = live
    large = pb.FromWorker(rows=pb.Rows(data=bytes(5 << 20))).SerializeToString()
    generous = replace(server.settings, max_message_bytes=64 << 20)

    async def send():
        async with open_channel(server.target, generous) as wide:
            return await outcome(wide, [HELLO, large])

    assert loop.run_until_complete(send()) == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_calls_that_are_not_in_the_schema_are_refused(live):
    server, loop, channel = live

    async def call(name: str, data: bytes):
        try:
            await channel.unary_unary(name)(data, timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    assert loop.run_until_complete(call(f"/{SERVICE}/Steal", b"")) == grpc.StatusCode.UNIMPLEMENTED
    assert loop.run_until_complete(call(f"/{SERVICE}/Status", b"")) == grpc.StatusCode.OK
    broken = loop.run_until_complete(call(f"/{SERVICE}/Status", b"\xff\xff"))
    assert broken not in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)


# -- a worker and its server -----------------------------------------------------------------------


class Player(threading.Thread):
    """`play` in a thread; `lost` says how it ended if not at rest."""

    def __init__(self, server, worker=0, run_id=0, groups=None, said=None) -> None:
        super().__init__(daemon=True)
        self.groups = groups or [counters(seed=worker)]
        self.arguments = server.target, worker, run_id, self.groups, said or server.settings
        self.lost: Lost | None = None
        self.start()

    def run(self) -> None:
        try:
            play(*self.arguments)
        except Lost as lost:
            self.lost = lost


def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def take(server, count: int) -> list:
    return [server.central.finished.get(timeout=10) for _ in range(count)]


def rest(server, *players: Player) -> None:
    server.soon(server.central.rest)
    for player in players:
        player.join(10)
        assert not player.is_alive() and player.lost is None


@pytest.mark.parametrize("road", ["unix", "tcp", "tls", "tls unix"])
def test_every_copy_gets_its_own_actions_back(tmp_path, road):
    said = replace(QUICK, tls=certificate(tmp_path)) if "tls" in road else QUICK
    address = "" if "unix" in road else "127.0.0.1:0"
    with serving(tmp_path, said, address, inference_batch=6, inference_timeout_s=0.01) as server:
        theirs = replace(said, tls=said.tls and said.tls._replace(key=None))
        players = [Player(server, worker, said=theirs) for worker in (0, 1)]
        for one in take(server, 6):
            outputs = one.unroll.env_outputs
            copies = outputs.observation[..., 0]
            assert (copies == 3 * one.place + np.arange(3)).all()
            assert np.array_equal(one.unroll.agent_outputs.action, copies[:-1])
            assert one.report.env_steps == one.unroll.valid.sum()
        assert list(status(server.target, theirs).workers) == [0, 1]
        rest(server, *players)
        for player in players:
            for env in player.groups[0].vector_env.envs:
                assert set(env.unwrapped.actions) == {env.unwrapped.copy}
        assert 6 in server.central.inference.agent.batches


def test_groups_of_a_worker_take_turns(tmp_path):
    with serving(tmp_path, num_workers=1, groups=2) as server:
        player = Player(server, groups=[counters(), counters(seed=1)])
        places = {one.place for one in take(server, 8)}
        rest(server, player)
    assert places == {0, 1}


class Slow:
    """A stream whose writes take their time, one after the other."""

    def __init__(self) -> None:
        self.sent, self.busy = [], False

    async def write(self, message):
        assert not self.busy, "two at once"
        self.busy = True
        await asyncio.sleep(0.01)
        self.busy = False
        self.sent.append(message)


def test_a_line_sends_one_message_at_a_time_and_falls_silent_after_it():
    async def talk():
        line = Line(stream := Slow())
        line.inline = True  # as its handler does
        line.send(b"1")
        line.inline = False
        mine = asyncio.create_task(line.flush())
        await asyncio.sleep(0)
        for message in (b"2", b"3"):  # and others, while it is at it
            line.send(message)
            await asyncio.sleep(0.002)
        await mine
        line.send(b"4")
        await asyncio.sleep(0.002)
        line.send(b"never")
        await line.quieten()
        assert not stream.busy
        line.send(b"never")
        await asyncio.sleep(0.02)
        return stream.sent

    assert asyncio.run(talk()) == [b"1", b"2", b"3", b"4"]


def test_the_timeline_has_the_steps_of_an_unroll_that_was_never_finished():
    made, answers = central(num_workers=1, groups=1), []
    peer = made.join(
        transport.Introduction(0, 0, 1, 3), lambda group, action: answers.append(action)
    )
    for _ in range(3):  # an unroll has four steps
        made.rows(peer, 0, row(), [], 0.25)
        made.settle()
    made.leave(peer)
    spans = [(span.who, span.what) for span in made.timeline]
    assert len(answers) == 3 and made.finished.empty()
    assert spans.count(("EnvWorker 0", "step")) == spans.count(("Inference 0", "act")) == 3
    assert made.batches.passes == 3


def test_episodes_come_with_the_unroll_in_which_they_ended(tmp_path):
    with serving(tmp_path) as server:
        player = Player(server)
        found = take(server, 6)
        rest(server, player)
    episodes = [episode for one in found for episode in one.report.episodes]
    assert [episode.length for episode in episodes[:6]] == [5] * 3 + [3] * 3
    assert episodes[0].episode_return == sum(range(1, 6)) and episodes[0].env == 0


def test_what_crosses_the_wire_is_counted(tmp_path):
    with serving(tmp_path) as server:
        player = Player(server)
        one = take(server, 1)[0]
        rest(server, player)
    a_step = (SCHEMA.nbytes + 3 * 4) / 3
    assert one.report.metrics["bytes_per_env_step"] == pytest.approx(a_step * 12 / 12)


def test_a_partial_batch_waits_for_its_time_out_and_a_full_one_for_nothing(tmp_path):
    with serving(tmp_path, inference_batch=6, inference_timeout_s=0.05) as server:
        player, begun = Player(server), time.monotonic()
        take(server, 1)
        alone = time.monotonic() - begun
        rest(server, player)
    assert alone > 4 * 0.05 and set(server.central.inference.agent.batches) == {3}


def test_a_batch_that_nobody_fills_waits_until_another_worker_comes(tmp_path):
    with serving(tmp_path, inference_batch=6) as server:
        one = Player(server)
        until(lambda: server.central.waiting.rows == 3)
        time.sleep(0.1)
        assert server.central.finished.empty() and not server.central.inference.agent.batches
        two = Player(server, 1)
        take(server, 2)
        rest(server, one, two)


def test_a_worker_that_goes_leaves_no_rows_in_the_batch(tmp_path):
    """Its slots are free, its partial unroll is counted, and the others go on."""
    with serving(tmp_path, inference_batch=6, inference_timeout_s=0.02) as server:
        loop = asyncio.new_event_loop()
        central = server.central

        async def come_and_go():
            async with open_channel(server.target, QUICK) as channel:
                call = channel.stream_stream(f"/{SERVICE}/Play")()
                await call.write(transport.hello(1, 0, [row()]).SerializeToString())
                said = transport.rows(0, SCHEMA.encode(row())).SerializeToString()
                await call.write(said)
                while pb.ToWorker.FromString(await call.read()).WhichOneof("kind") != "actions":
                    pass
                await call.write(said)

        loop.run_until_complete(come_and_go())
        loop.close()
        until(lambda: not central.peers)
        assert not central.inference.slots and central.waiting.rows == 0 and central.dropped == 1
        player = Player(server)
        assert {one.place for one in take(server, 3)} == {0}
        rest(server, player)


def test_a_new_life_replaces_the_old_one_and_an_old_one_is_refused(tmp_path):
    with serving(tmp_path) as server:
        old = Player(server, run_id=1)
        take(server, 2)
        new = Player(server, run_id=2, groups=[counters(seed=5)])
        old.join(10)
        assert old.lost is not None and old.lost.status == "ABORTED"
        while take(server, 1)[0].unroll.env_outputs.observation[0, 0, 0] < 3:
            pass  # the old one's
        again = Player(server, run_id=2, groups=[counters(seed=6)])
        again.join(10)
        assert again.lost is not None and again.lost.status == "ALREADY_EXISTS"
        older = Player(server, run_id=1, groups=[counters(seed=7)])
        older.join(10)
        assert older.lost is not None and older.lost.status == "FAILED_PRECONDITION"
        stranger = Player(server, worker=9, groups=[counters(seed=8)])
        stranger.join(10)
        assert stranger.lost is not None and stranger.lost.status == "INVALID_ARGUMENT"
        rest(server, new)


def test_who_rests_goes_on_where_it_was(tmp_path):
    """The unroll under way goes on after a rest; nothing is lost, and nothing comes twice."""
    with serving(tmp_path) as server:
        groups, seen = [counters()], []
        for _ in range(3):
            player = Player(server, groups=groups)
            seen += take(server, 2)
            rest(server, player)
            while not server.central.finished.empty():
                seen.append(server.central.finished.get())
            server.central.begin()
        assert server.central.dropped == 0
    rows = np.concatenate([one.unroll.env_outputs.observation[:-1, 0] for one in seen])
    register()
    envs = counters()
    for index, found in enumerate(rows):
        assert np.array_equal(found, envs.env_output.observation[0]), index
        envs.step(np.zeros(3, int))


def test_a_slot_whose_unrolls_nobody_takes_is_held(tmp_path):
    with serving(tmp_path, unrolls_in_flight=2) as server:
        player, central = Player(server), server.central
        until(lambda: central.finished.qsize() == 2)
        time.sleep(0.1)
        assert central.finished.qsize() == 2
        first = take(server, 1)[0]
        central.release([first.place])
        until(lambda: central.finished.qsize() == 2)
        time.sleep(0.1)
        assert central.finished.qsize() == 2
        rest(server, player)


def test_a_silent_worker_is_noticed(tmp_path):
    """It holds its stream open, and owes rows."""
    brief = replace(QUICK, silence_s=0.4)
    with serving(tmp_path, brief) as server:

        async def be_silent(messages):
            async with open_channel(server.target, QUICK) as channel:
                call = channel.stream_stream(f"/{SERVICE}/Play")()
                for message in messages:
                    await call.write(message)
                try:
                    while await call.read() is not grpc.aio.EOF:
                        pass
                except grpc.aio.AioRpcError:
                    pass
                return await call.code()

        hello = transport.hello(1, 0, [row()]).SerializeToString()
        for messages in ([], [hello]):
            found = asyncio.run(asyncio.wait_for(be_silent(messages), 10))
            assert found == grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: not server.central.peers and not server.lines)


def test_a_server_that_waits_says_so_and_one_that_hangs_is_given_up(tmp_path):
    brief = replace(QUICK, silence_s=0.4)
    with serving(tmp_path, brief, inference_batch=6) as server:
        player = Player(server)
        player.join(1.5)
        assert player.is_alive(), "it waits for a batch; the server says that it lives"
        hung = threading.Event()
        server.soon(lambda: hung.wait(5) and None)
        player.join(4)
        assert player.lost is not None and player.lost.status == "DEADLINE_EXCEEDED"
        hung.set()


def test_no_server_is_noticed_within_the_deadline(tmp_path):
    brief = replace(QUICK, connect_s=0.3)
    for ask in (
        lambda: play(f"unix:{tmp_path}/nobody", 0, 0, [counters()], brief),
        lambda: status(f"unix:{tmp_path}/nobody", brief),
    ):
        begun = time.monotonic()
        with pytest.raises(Lost, match="UNAVAILABLE|DEADLINE"):
            ask()
        assert time.monotonic() - begun < 5


def test_who_does_not_know_the_secret_or_the_certificate_stays_outside(tmp_path):
    said = replace(QUICK, token=b"secret", tls=certificate(tmp_path), connect_s=2.0)
    with serving(tmp_path, said, "127.0.0.1:0") as server:
        for theirs, status_code in (
            (replace(said, token=b"guess"), "UNAUTHENTICATED"),
            (replace(said, tls=None), "UNAVAILABLE"),
        ):
            player = Player(server, said=theirs)
            player.join(10)
            assert player.lost is not None and player.lost.status == status_code
        assert not server.central.peers


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:5000", "example.org:1"])
def test_other_computers_are_let_in_only_when_told(tmp_path, address):
    with pytest.raises(ValueError, match="allow_remote"):
        check_address(address, False)
    check_address(address, True)
    for own in ("127.0.0.1:0", "[::1]:0", "localhost:80", f"unix:{tmp_path}"):
        check_address(own, False)


def test_an_address_that_is_taken_is_an_error(tmp_path):
    with serving(tmp_path, address="127.0.0.1:0") as server:
        with pytest.raises(OSError, match="cannot listen"):
            with serving(tmp_path, address=server.target):
                pass


def test_the_generated_code_is_that_of_the_schema(tmp_path):
    """What `make proto` writes."""
    source = "rlbook/plumbing/seed.proto"
    words = [f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", source]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *words], check=True, cwd=ROOT
    )
    for name in ("seed_pb2.py", "seed_pb2.pyi"):
        made = (tmp_path / "rlbook/plumbing" / name).read_text()
        assert made == (ROOT / "rlbook/plumbing" / name).read_text(), f"run `make proto` ({name})"


def test_a_worker_that_never_reads_is_given_up_and_hurts_nobody(tmp_path):
    """What is written to it piles up until nothing more fits on the road."""
    copies = 1 << 14  # 64 KB of actions for a row: the road is full soon
    schema, brief = Schema((3,), "f4", copies), replace(QUICK, silence_s=0.5)
    hello = transport.hello(1, 0, [row(copies)]).SerializeToString()
    ok = transport.rows(0, schema.encode(row(copies))).SerializeToString()

    async def given_up(server):
        async with open_channel(server.target, QUICK) as channel:
            call = channel.stream_stream(f"/{SERVICE}/Play")()

            async def only_write():
                await call.write(hello)
                while True:
                    await call.write(ok)

            writes = asyncio.create_task(only_write())
            while not server.central.peers:
                await asyncio.sleep(0.01)
            while server.central.peers or server.lines:  # our end is open all the while
                await asyncio.sleep(0.01)
            writes.cancel()
            await asyncio.gather(writes, return_exceptions=True)

    with StreamServer(central(), schema, f"unix:{tmp_path}/s", brief) as server:
        asyncio.run(asyncio.wait_for(given_up(server), 20))
        assert not status(server.target, QUICK).workers


def test_seconds_that_cannot_be_are_refused(live):
    server, loop, channel = live
    for env_s in (-1.0, float("nan"), float("inf")):
        said = transport.rows(0, SCHEMA.encode(row()), env_s=env_s).SerializeToString()
        code = loop.run_until_complete(outcome(channel, [HELLO, said]))
        assert code == grpc.StatusCode.INVALID_ARGUMENT


def test_finished_unrolls_survive_a_checkpoint(tmp_path):
    with serving(tmp_path) as server:
        player = Player(server)
        found = take(server, 3)
        rest(server, player)
    save_checkpoint(tmp_path / "kept", {"queue": [one.state_dict() for one in found]})
    for one, kept in zip(found, load_checkpoint(tmp_path / "kept")["queue"], strict=True):
        again = Finished.of(kept, AgentOutput)
        assert again.place == one.place and again.report == one.report
        assert again.unroll.begins == one.unroll.begins
        assert np.array_equal(again.versions, one.versions)
        pairs = [*zip(again.unroll.env_outputs, one.unroll.env_outputs, strict=True)]
        pairs += zip(again.unroll.agent_outputs, one.unroll.agent_outputs, strict=True)
        for a, b in [*pairs, (again.unroll.agent_state[0], one.unroll.agent_state[0])]:
            assert np.array_equal(a, b)
    assert found[0].unroll.begins and not found[1].unroll.begins


def test_who_has_unrolls_that_wait_is_held_after_a_rest_too(tmp_path):
    with serving(tmp_path, unrolls_in_flight=2) as server:
        central = server.central
        central.begin(Counter({0: 2}))
        player = Player(server)
        until(lambda: central.peers)
        time.sleep(0.2)
        assert not central.inference.agent.batches
        central.release([0])
        take(server, 1)
        rest(server, player)


# -- stacks of frames ------------------------------------------------------------------------------


@pytest.mark.parametrize("planes", [1, 2, 4])
def test_of_a_stack_only_the_newest_frame_is_sent(planes):
    groups = [stacks(12, planes=planes, seed=seed) for seed in range(2)]
    schema = Schema.of(groups[0][0], stacked=True)
    there, here = Track(schema), Track(schema)
    sizes = []
    for step in range(12):
        for group, rows in enumerate(groups):
            data = there.encode(group, rows[step])
            found = here.decode(group, data)
            for a, b in zip(found, rows[step], strict=True):
                assert np.array_equal(a, b) and a.dtype == b.dtype
            sizes.append(len(data))
    frames = [(size - 2 * 9) / (2 * 15) for size in sizes]  # reward, discount and first besides
    assert frames == [planes] * 2 + [1] * 22
    assert schema.sent.nbytes == sizes[-1] and schema.nbytes == sizes[0]


def test_what_a_row_was_given_as_stays_what_it_is():
    rows = stacks(6)
    there, here = (Track(Schema.of(rows[0], stacked=True)) for _ in range(2))
    found = [here.decode(0, there.encode(0, row)) for row in rows]
    assert all(
        np.array_equal(a.observation, b.observation) for a, b in zip(found, rows, strict=True)
    )


def test_a_newest_frame_needs_a_stack_of_its_own_stream_and_group():
    rows = stacks(3)
    schema = Schema.of(rows[0], stacked=True)
    there, here = Track(schema), Track(schema)
    whole, newest = there.encode(0, rows[0]), there.encode(0, rows[1])
    with pytest.raises(Refused, match="the first of a group must have all its frames"):
        here.decode(0, newest)
    here.decode(0, whole)
    with pytest.raises(Refused, match="the first of a group must have all its frames"):
        here.decode(1, newest)
    assert np.array_equal(here.decode(0, newest).observation, rows[1].observation)
    with pytest.raises(Refused, match="rows: must be"):
        here.decode(0, newest[:-1])
    with pytest.raises(Refused, match="rows: must be"):
        Track(Schema.of(rows[0])).decode(0, newest)


@pytest.mark.parametrize("theirs", [False, True])
def test_both_ends_must_mean_the_same_by_a_row(theirs):
    rows = stacks(1)
    ours = Schema.of(rows[0], stacked=True)
    message = hello(0, 0, [rows[0]], stacked=theirs)
    if theirs:
        assert introduced(message, ours, b"").copies == 2
        return
    with pytest.raises(Refused, match="fields: must be .*newest"):
        introduced(message, ours, b"")
    with pytest.raises(Refused, match="fields: must be"):
        introduced(hello(0, 0, [rows[0]], stacked=True), Schema.of(rows[0]), b"")
