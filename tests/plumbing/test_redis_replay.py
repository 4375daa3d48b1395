"""Replay on a real Redis server: against the memory in this process, and through SIGKILLs."""

import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest

from rlbook.data import Transition
from rlbook.parts.replay import PrioritizedReplay
from rlbook.plumbing import redis_server
from rlbook.plumbing.redis_replay import RedisMemory, RedisReplay
from rlbook.plumbing.redis_server import RedisServer, RedisSettings, free_port
from tests.parts.test_replay import LIMIT_9, assert_whole, chi_square, transitions

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason=redis_server.HOW_TO_INSTALL
)
EXAMPLE = Transition(*(field[0] for field in transitions([0])))


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with RedisServer(persistence="none") as made:
        yield made


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.name


def memory(server: RedisServer, name: str, capacity: int, *more: Any) -> RedisMemory[Transition]:
    return RedisMemory(server.settings, name, capacity, EXAMPLE, *more)


# ---------------------------------------------------------------- what a memory must do


@pytest.mark.parametrize("capacity", [7, 500, 70_000])  # 70,000: two levels of sums
def test_it_draws_what_a_memory_in_this_process_draws(
    server: RedisServer, name: str, capacity: int
) -> None:
    there, here = (
        memory(server, name, capacity, 0.7, 0.5, 3),
        PrioritizedReplay(capacity, 0.7, 0.5, 3),
    )
    rng, added, base = np.random.default_rng(0), 0, there.life
    assert base % capacity == 0
    for size in (3, 1, 4, 300, 0, 90, 250):
        size = min(size, capacity) * (1 if capacity < 70_000 else 150)
        items, priorities = transitions(np.arange(added, added + size)), rng.random(size) ** 8
        new = priorities if added % 3 else None
        assert (there.add(items, new) - base).tolist() == here.add(items, new).tolist()
        added += size
        for _ in range(2):
            a, b = there.sample(64), here.sample(64)
            assert (a.keys - base).tolist() == b.keys.tolist()
            assert_whole(a.items)
            assert a.items.a_tm1.tolist() == b.keys.tolist()
            np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-12)
            np.testing.assert_allclose(a.weights, b.weights, rtol=1e-6)
            assert a.weights.dtype == np.float32
            back = np.concatenate((b.keys, rng.integers(0, added, 40)))  # equal ones, gone ones
            values = rng.random(len(back)) * 3 * (rng.random(len(back)) > 0.1)
            alive = there.update_priorities(base + back, values)
            assert alive == here.update_priorities(back, values)
        assert len(there) == len(here)
        assert there.total_priority == pytest.approx(here.total_priority, rel=1e-12)
        assert there.smallest_priority == here.smallest_priority
    part = there.part(8, finds_smallest=True)
    assert part.size == len(here) and part.smallest <= part.sample.probabilities.min()


def test_draws_are_in_proportion_to_priority(server: RedisServer, name: str) -> None:
    there = memory(server, name, 10, 1.0)
    there.add(transitions(np.arange(10)), np.arange(10.0))
    counts = np.zeros(10, dtype=int)
    for _ in range(4_000):  # batches of one: independent, as χ² assumes
        counts[there.sample(1).items.a_tm1[0]] += 1
    assert chi_square(counts, np.arange(10) / 45) < LIMIT_9
    assert chi_square(counts, np.arange(10) ** 0.8 / (np.arange(10) ** 0.8).sum()) > LIMIT_9


def test_nothing_of_priority_0_is_drawn_and_if_all_are_0_all_are(
    server: RedisServer, name: str
) -> None:
    there = memory(server, name, 100, 0.0)  # α = 0: alike, but 0 stays 0
    rng = np.random.default_rng(0)
    priorities = (rng.random(100) < 0.2) * rng.random(100)
    there.add(transitions(np.arange(100)), priorities)
    batch = there.sample(2_000)
    assert set(batch.items.a_tm1) == set(np.flatnonzero(priorities))
    assert (batch.probabilities == 1 / np.count_nonzero(priorities)).all()
    there.update_priorities(there.life + np.arange(100), np.zeros(100))
    batch = there.sample(3_000)
    assert set(batch.items.a_tm1) == set(range(100)) and (batch.probabilities == 0.01).all()
    assert there.smallest_priority == 0.0


def test_priorities_of_very_unequal_size_lead_to_no_empty_slot(
    server: RedisServer, name: str
) -> None:
    there, rng = memory(server, name, 3_000, 1.0), np.random.default_rng(1)
    keys = there.add(transitions(np.arange(3_000)), np.zeros(3_000))
    for scale in (1e-300, 1.0, 1e200):
        few = rng.choice(keys, 50)
        there.update_priorities(few, scale * rng.random(50) ** 20)
        batch = there.sample(500)
        assert (batch.probabilities > 0).all()


def test_a_draw_that_rounding_puts_beyond_the_last_priority_finds_it(
    server: RedisServer, name: str
) -> None:
    there = memory(server, name, 64, 1.0)
    priorities = np.zeros(64)
    priorities[[0, 40]] = 2.0**53, 3.0  # their sum is rounded up, to 2^53 + 4
    there.add(transitions(np.arange(64)), priorities)
    there._rng = Always(1.0)  # type: ignore[assignment]
    assert there.sample(1).items.a_tm1.tolist() == [40]


class Always:
    """A generator of one number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self, size: int) -> np.ndarray:
        return np.full(size, self.number)


class Frames(NamedTuple):
    frame: Any
    time: Any


def test_large_items_and_more_than_fit_at_once(server: RedisServer, name: str) -> None:
    example = Frames(np.zeros((64, 84, 84), np.uint8), np.float64(0))
    there = RedisMemory(server.settings, name, 5, example)
    assert there.nbytes >= 5 * (64 * 84 * 84 + 8)
    frames = np.arange(80, dtype=np.uint8)[:, None, None, None] * np.ones((64, 84, 84), np.uint8)
    keys = there.add(Frames(frames, np.arange(80.0)))  # 36 MB: several pieces
    assert (keys - there.life).tolist() == list(range(80)) and len(there) == 5
    batch = there.sample(20)
    numbers = batch.keys - there.life
    assert set(numbers) == {75, 76, 77, 78, 79}
    assert (batch.items.frame == numbers[:, None, None, None]).all()
    assert (batch.items.time == numbers).all()


# ---------------------------------------------------------------- what it refuses


def test_bad_items_and_priorities_are_refused_and_nothing_changes(
    server: RedisServer, name: str
) -> None:
    there = memory(server, name, 4, 1.0)
    with pytest.raises(ValueError, match="empty"):
        there.sample(1)
    there.add(transitions([0, 1]), [1.0, 2.0])
    good = transitions([2, 3])
    for match, items in (
        ("one N", good._replace(r_t=good.r_t[:1])),
        ("r_t must be float32", good._replace(r_t=good.r_t.astype(np.float64))),
        ("obs_t must be float32", good._replace(obs_t=good.obs_t[:, :1])),
        ("must have fields", Frames(good.obs_t, good.a_tm1)),
        ("must have fields", (good.obs_t, good.a_tm1)),
    ):
        with pytest.raises(ValueError, match=match):
            there.add(items)  # type: ignore[arg-type]
    for bad in ([1.0, np.nan], [1.0, -1.0], [1.0, np.inf], [1.0], [1.0, 1e308]):
        with pytest.raises(ValueError, match="priorities"):
            there.add(good, bad)
        with pytest.raises(ValueError, match="priorities"):
            there.update_priorities([there.life, there.life + 1], bad)
    with pytest.raises(ValueError, match="keys"):
        there.update_priorities([0.5], [1.0])
    nobodys = [there.life + 7, there.life - 1, 0, -1]  # were never given out
    assert there.update_priorities(nobodys, [9.0] * 4) == 0
    for size in (0, -1, 1.5):
        with pytest.raises(ValueError, match="batch_size"):
            there.sample(size)  # type: ignore[arg-type]
    assert len(there) == 2 and there.total_priority == 3.0
    for arguments in ((0,), (4, -0.1), (4, 0.6, np.nan)):
        with pytest.raises(ValueError):
            memory(server, "never", *arguments)
    with pytest.raises(ValueError, match="example"):
        RedisMemory(server.settings, "never", 4, (1, 2))


def test_another_runs_memory_under_the_same_name_is_refused(server: RedisServer, name: str) -> None:
    memory(server, name, 4)
    memory(server, name, 4, 0.6, 0.1, 9)  # joins: β and the seed are each client's own
    for other in (
        lambda: memory(server, name, 5),
        lambda: memory(server, name, 4, 0.5),
        lambda: RedisMemory(server.settings, name, 4, EXAMPLE._replace(r_t=np.float64(0))),
    ):
        with pytest.raises(ValueError, match="Choose another name"):
            other()


def test_what_does_not_fit_is_refused_before_the_start(name: str) -> None:
    with RedisServer(persistence="none", memory_bytes=8 << 20) as small:
        with pytest.raises(ValueError, match=r"need 0\.\d+ GiB, redis at .* has room for 0\.0"):
            memory(small, name, 1_000_000)
        there = memory(small, name, 1_000)
        rest = RedisMemory(small.settings, "rest", 100, Frames(np.zeros(50_000, np.uint8), 0.0))
        with pytest.raises(RuntimeError, match="is full"):
            rest.add(Frames(np.zeros((100, 50_000), np.uint8), np.zeros(100)))
            there.redis.set("else", bytes(8 << 20))
            there.add(transitions([1]))


def test_nobody_there_and_wrong_passwords_get_one_clear_message(server: RedisServer) -> None:
    nobody = RedisSettings(port=free_port(), patience_s=0.1)
    with pytest.raises(RuntimeError, match="has not answered for 0.1 s .*Is it running"):
        RedisMemory(nobody, "m", 4, EXAMPLE)
    for password, match in (("wrong", "refuses the password"), (None, "password")):
        begun = time.monotonic()
        settings = RedisSettings(port=server.settings.port, password=password)
        with pytest.raises(RuntimeError, match=match):
            RedisMemory(settings, "m", 4, EXAMPLE)
        assert time.monotonic() - begun < 20  # at once, not after 30 s of patience
    assert str(server.settings.password) not in repr(server.settings)


def test_without_redis_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="apt-get install redis-server"):
        RedisServer()


# ---------------------------------------------------------------- the server itself


def test_it_is_on_loopback_with_a_password_that_nobody_sees(server: RedisServer) -> None:
    process = psutil.Process(server.pid)
    listening = {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    assert len(str(server.settings.password)) >= 24
    assert not any(str(server.settings.password) in word for word in process.cmdline())
    assert stat.S_IMODE((server.folder / "redis.conf").stat().st_mode) == 0o600


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from rlbook.plumbing.redis_server import RedisServer\n"
        f"server = RedisServer(Path({str(tmp_path)!r})); server.start()\n"
        "print(server.pid, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment()
    )
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    child.kill()
    child.wait()
    gone, _ = psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], 10)
    assert not psutil.pid_exists(pid) or gone


def test_a_socket_file_serves_too(name: str, tmp_path: Path) -> None:
    path = f"{tempfile.gettempdir()}/rlbook-{os.getpid()}.sock"  # such paths must be short
    with RedisServer(tmp_path, persistence="none", config={"unixsocket": path}) as made:
        settings = RedisSettings(unix_socket=path, password=made.settings.password)
        there = RedisMemory(settings, name, 4, EXAMPLE)
        there.add(transitions([5]))
        assert there.sample(1).items.a_tm1.tolist() == [5]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_tls_options_are_passed_through(name: str, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*make, *subject, *files], check=True, capture_output=True)
    port = free_port()
    config = {"tls-port": str(port), "tls-cert-file": str(certificate), "tls-key-file": str(key)}
    config |= {"tls-ca-cert-file": str(certificate), "tls-auth-clients": "no"}
    with RedisServer(tmp_path / "data", persistence="none", config=config) as made:
        password = made.settings.password
        options = {"ssl": True, "ssl_ca_certs": str(certificate)}
        settings = RedisSettings(port=port, password=password, options=options)
        there = RedisMemory(settings, name, 4, EXAMPLE)
        there.add(transitions([5]))
        assert there.sample(1).items.a_tm1.tolist() == [5]
        plain = RedisSettings(port=port, password=password, patience_s=0.1)
        with pytest.raises(RuntimeError):
            RedisMemory(plain, name, 4, EXAMPLE)


# ---------------------------------------------------------------- several clients, and their deaths


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


WRITER = """
import pickle, sys
import numpy as np
memory = pickle.loads(bytes.fromhex(sys.argv[1]))
items = pickle.loads(bytes.fromhex(sys.argv[3]))
number, writer = 0, int(sys.argv[2]) * 1_000_000
while True:
    names = np.arange(writer + number, writer + number + 7)
    memory.add(items._replace(a_tm1=names), np.ones(7))
    number += 7
    print(number, flush=True)  # acknowledged
"""


class Writer:
    """A process that adds items without end, and what it was told is stored."""

    def __init__(self, there: RedisMemory[Transition], number: int) -> None:
        sent = [pickle.dumps(what).hex() for what in (there, transitions(np.arange(7)))]
        words = [sys.executable, "-c", WRITER, sent[0], str(number), sent[1]]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, env=environment())
        self.number, self.acknowledged = number, 0
        self.told: list[tuple[float, int]] = []
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.acknowledged = int(line)
            self.told.append((time.monotonic(), self.acknowledged))

    def wait(self, more: int) -> None:
        """Until so many more are acknowledged."""
        goal, end = self.acknowledged + more, time.monotonic() + 60
        while self.acknowledged < goal:
            assert self.process.poll() is None and time.monotonic() < end
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.thread.join()

    def stored(self, contents: np.ndarray) -> list[int]:
        """Its numbers among all that is stored."""
        mine = contents[contents // 1_000_000 == self.number] - self.number * 1_000_000
        return sorted(mine.tolist())

    def acknowledged_at(self, moment: float) -> int:
        """How many were acknowledged by then."""
        return max((number for when, number in self.told if when <= moment), default=0)


def contents(there: RedisMemory[Transition]) -> np.ndarray:
    """The number of every item held, by slot."""
    rows = there.state_dict()["rows"]
    return np.frombuffer(rows.tobytes(), there._rows.dtype)["a_tm1"]


def test_clients_die_in_the_middle_and_the_memory_stays_whole(
    server: RedisServer, name: str
) -> None:
    there = memory(server, name, 100_000)
    writers = [Writer(there, 1), Writer(there, 2)]
    for writer in writers:
        writer.wait(70)
    writers[0].kill()
    writers[1].wait(70)
    writers[1].kill()
    assert len(there) % 7 == 0  # an add is stored as a whole or not at all
    for writer in writers:
        stored = writer.stored(contents(there))
        assert stored == list(range(len(stored)))
        assert len(stored) - writer.acknowledged in (0, 7)
    assert there.total_priority == len(there)
    there.sample(500)


def test_an_answer_that_got_lost_does_not_count_twice(server: RedisServer, name: str) -> None:
    there = memory(server, name, 50)
    first = there.add(transitions([1, 2, 3]))
    there._calls -= 1  # so that the next add says that it is the same call, repeated
    assert there.add(transitions([1, 2, 3])).tolist() == first.tolist()
    assert len(there) == 3
    assert there.add(transitions([4])).tolist() == [first[2] + 1]


def test_scripts_that_are_forgotten_are_sent_again(server: RedisServer, name: str) -> None:
    there = memory(server, name, 50)
    keys = there.add(transitions([1, 2, 3]))
    there.redis.script_flush()
    assert there.add(transitions([4])).tolist() == [
        keys[2] + 1
    ]  # the server is the same: keys run on
    there.clear()
    assert len(there) == 0


@pytest.mark.parametrize("persistence", ["everysec", "always"])
def test_the_server_is_killed_and_no_more_is_lost_than_was_promised(
    persistence: Any, name: str, tmp_path: Path
) -> None:
    with RedisServer(tmp_path, persistence=persistence) as made:
        there = memory(made, name, 70_000, 1.0)
        base, kills = there.life, []
        writers = [Writer(there, 1), Writer(there, 2)]
        for writer in writers:
            writer.wait(70)
        with Learning(there) as learner:
            for _ in range(2):
                for writer in writers:
                    writer.wait(140)
                kills.append(time.monotonic())
                made.kill()
                time.sleep(0.1)  # everybody tries in vain
                made.start()
            for writer in writers:
                writer.wait(70)
            learner.wait(3)
        for writer in writers:
            writer.kill()
        state, stored = there.state_dict(), contents(there)
        while len(state["leaves"]) != len(stored):  # the last words of those who died come late
            state, stored = there.state_dict(), contents(there)
        for writer in writers:
            found = writer.stored(stored)
            assert len(set(found)) == len(found)  # nothing twice, though calls were repeated
            lost = set(range(max(found[-1] + 1, writer.acknowledged))) - set(found)
            allowed = [] if persistence == "always" else kills
            for kill in allowed:  # what it was told in the last seconds before
                span = range(writer.acknowledged_at(kill - 2.5), writer.acknowledged_at(kill))
                lost -= set(span)
            assert lost == set()
        assert state["base"] > base and state["base"] % 70_000 == 0
        changed = state["leaves"] != 1.0
        assert changed.any()
        np.testing.assert_array_equal(state["leaves"][changed], 1.0 + stored[changed] % 5)
        assert there.total_priority == pytest.approx(state["leaves"].sum(), rel=1e-12)
        assert there.sample(50).keys.min() >= state["base"]


class Learning:
    """A thread that draws and corrects priorities without end."""

    def __init__(self, there: RedisMemory[Transition]) -> None:
        self.there, self.batches, self.goes_on = there, 0, True
        self.thread = threading.Thread(target=self._learn)

    def _learn(self) -> None:
        while self.goes_on:
            batch = self.there.sample(32)
            self.there.update_priorities(batch.keys, 1.0 + batch.items.a_tm1 % 5)
            self.batches += 1

    def wait(self, more: int) -> None:
        """Until so many more were learnt from."""
        goal = self.batches + more
        while self.batches < goal:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def __enter__(self) -> "Learning":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.goes_on = False
        self.thread.join()


def test_without_persistence_a_new_life_begins_and_old_keys_are_nobodys(name: str) -> None:
    with RedisServer(persistence="none") as made:
        there, other = memory(made, name, 20, 1.0), memory(made, name, 20, 1.0)
        driver = RedisReplay(there)
        old = there.add(transitions(np.arange(30)), np.ones(30))
        driver.add(None, 30)  # type: ignore[arg-type]
        made.kill()
        made.start()
        new = other.add(transitions(np.arange(25)), np.ones(25))  # which has seen none of the old
        assert not set(new) & set(old)
        assert there.update_priorities(old, np.full(30, 9.0)) == 0
        assert len(there) == there.total_priority == 20
        assert driver.mend() == 1 and len(driver) == 20
        assert driver.mend() == 0


# ---------------------------------------------------------------- states, and the driver's view


def test_a_state_continues_with_the_same_draws(server: RedisServer, name: str) -> None:
    original = memory(server, name, 40, 0.6, 0.4, 5)
    original.add(transitions(np.arange(60)), np.arange(60) / 7)
    original.sample(9)
    state = original.state_dict()
    other = memory(server, name + "2", 40, 0.6, 0.4, 99)
    other.add(transitions(np.arange(500, 530)))
    other.load_state_dict(state)
    for _ in range(3):
        a, b = original.sample(16), other.sample(16)
        assert a.keys.tolist() == b.keys.tolist()
        np.testing.assert_array_equal(a.items.obs_t, b.items.obs_t)
        np.testing.assert_array_equal(a.probabilities, b.probabilities)
        for one in (original, other):
            one.update_priorities(a.keys, a.keys * 0.1)
            one.add(transitions(a.keys[:3] + 100))  # the largest so far
    with pytest.raises(ValueError, match="the state is of"):
        memory(server, name + "3", 41).load_state_dict(state)


def test_the_driver_counts_and_never_sees_an_item(server: RedisServer, name: str) -> None:
    there = memory(server, name, 6, 1.0)
    driver = RedisReplay(there)
    assert driver.sample(4) is None and len(driver) == 0 and driver.parts == 0
    there.add(transitions(np.arange(4)), np.ones(4))  # an actor, elsewhere
    driver.add(None, 4)  # type: ignore[arg-type]
    draw = driver.sample(4)
    assert draw is not None and draw.parts == [] and draw.rows == 4
    driver.update_priorities(draw, [])
    assert len(driver) == 4 and driver.total == 4.0 and driver.nbytes == there.nbytes
    there.add(transitions(np.arange(4)), np.ones(4))  # and died before it could tell
    assert driver.mend() == 0 and len(driver) == 6
    state = driver.state_dict()
    there.clear()
    driver.load_state_dict(state)
    assert len(driver) == 6 and len(there) == 6
