"""A real Redis server: how to reach one, and one of our own to start, stop and kill.

    with RedisServer() as server:            a fresh `redis-server`, on loopback, with a password
        server.settings                      how to reach it; can be pickled and sent to any process
        server.kill(); server.start()        SIGKILL, and again with what its files hold

What survives depends on `persistence` alone:

    "none"      nothing: the memory is empty after a restart
    "everysec"  all but, at worst, the last two seconds. Redis writes its log before it answers and
                has it put on the disk once a second; what was written survives a killed server, but
                not a machine that loses power, and where the disk lags it writes later, too
    "always"    all that was answered: the log is on the disk before the answer

The program is that of the system's package `redis-server`; the tests run with version 7.0.
"""

from __future__ import annotations

import ctypes
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

Persistence = Literal["none", "everysec", "always"]
LIBC = ctypes.CDLL(None)
HOW_TO_INSTALL = (
    "there is no `redis-server`. On Debian or Ubuntu: apt-get install redis-server; "
    "on macOS: brew install redis"
)


@dataclass(frozen=True)
class RedisSettings:
    """How to reach a server. Plain values, so that every process can make its own connection."""

    host: str = "127.0.0.1"
    port: int = 6379
    unix_socket: str | None = None
    """Path of a socket file instead of host and port: quicker on one machine."""
    password: str | None = field(default=None, repr=False)
    patience_s: float = 30.0
    """How long a call goes on trying while nobody answers: a restart takes seconds."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of `redis.Redis`, as they are: `{"ssl": True, "ssl_ca_certs": …}`."""

    @property
    def address(self) -> str:
        """For messages."""
        return self.unix_socket or f"{self.host}:{self.port}"

    def connect(self) -> redis.Redis:
        """A connection of its own; made at the first call."""
        where: dict[str, Any] = {"host": self.host, "port": self.port}
        if self.unix_socket is not None:
            where = {"unix_socket_path": self.unix_socket}
        defaults = {"socket_timeout": max(self.patience_s, 1.0), "socket_connect_timeout": 5.0}
        retry = Retry(NoBackoff(), 0)  # who calls knows what may be repeated
        return redis.Redis(
            **{**defaults, **where, "password": self.password, "retry": retry, **self.options}
        )


class RedisServer:
    """A `redis-server` of one's own, as long as the `with` lasts.

    It listens on 127.0.0.1 alone, wants a password (by default one made at random) and ends with
    the process that started it.

    Args:
        folder: where its log and its data lie; by default a new one that goes at the end.
        persistence: what survives a restart, see above.
        memory_bytes: most it may hold; None sets no limit.
        password: None makes one.
        port: 0 takes a free one.
        config: further lines of its configuration, as redis.conf has them: `{"tls-port": "6380"}`.

    Raises:
        RuntimeError: there is no `redis-server`, or it does not start.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        persistence: Persistence = "everysec",
        memory_bytes: int | None = None,
        password: str | None = None,
        port: int = 0,
        config: Mapping[str, str] | None = None,
    ) -> None:
        if persistence not in ("none", "everysec", "always"):
            raise ValueError(
                f"persistence: must be 'none', 'everysec' or 'always', got {persistence!r}"
            )
        found = shutil.which("redis-server")
        if found is None:
            raise RuntimeError(HOW_TO_INSTALL)
        self._program = found
        self._own = tempfile.TemporaryDirectory(prefix="rlbook-redis-") if folder is None else None
        self.folder = Path(self._own.name if self._own else str(folder)).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.persistence, self.memory_bytes, self._config = persistence, memory_bytes, config or {}
        self._process: subprocess.Popen[bytes] | None = None
        self.settings = RedisSettings(
            port=port or free_port(), password=password or secrets.token_urlsafe(24)
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if self._own is not None:
            self._own.cleanup()

    @property
    def pid(self) -> int:
        """Process number; RuntimeError if it does not run."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("the redis server does not run: start() it")
        return self._process.pid

    def start(self, wait_s: float = 30.0) -> None:
        """Starts it with what its folder holds, and waits until it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        conf = self.folder / "redis.conf"
        conf.touch(mode=0o600)  # it holds the password, which a command line would show to all
        conf.write_text(self._configuration())
        with (self.folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, str(conf)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,  # Ctrl-C is for the driver
                preexec_fn=_end_with_parent if sys.platform.startswith("linux") else None,
            )
        self._wait(time.monotonic() + wait_s)

    def stop(self) -> None:
        """Ends it in order: what it holds is written, if it persists."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL: it ends in the middle of whatever it does."""
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(how)
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _configuration(self) -> str:
        lines = {
            "bind": "127.0.0.1",
            "port": str(self.settings.port),
            "protected-mode": "yes",
            "requirepass": str(self.settings.password),
            "dir": f'"{self.folder}"',
            "save": '""',  # the log is enough: no snapshots besides it
            "appendonly": "no" if self.persistence == "none" else "yes",
            "appendfsync": "everysec" if self.persistence == "none" else self.persistence,
            "maxmemory": str(self.memory_bytes or 0),
            "maxmemory-policy": "noeviction",  # a full server refuses; it never drops at random
        }
        return "".join(f"{name} {value}\n" for name, value in {**lines, **self._config}.items())

    def _wait(self, until: float) -> None:
        assert self._process is not None
        link = RedisSettings(
            port=self.settings.port, password=self.settings.password, patience_s=1.0
        ).connect()
        plain = self._config.get("port") != "0"
        while True:
            if self._process.poll() is not None:
                said = (self.folder / "redis.log").read_text(errors="replace")[-1000:]
                raise RuntimeError(f"redis-server ended at once:\n{said}")
            try:
                if plain:
                    link.ping()
                else:
                    socket.create_connection(("127.0.0.1", int(self._config["tls-port"]))).close()
                return
            except (redis.ConnectionError, redis.TimeoutError, OSError):
                if time.monotonic() > until:
                    raise RuntimeError("redis-server does not answer") from None
                time.sleep(0.02)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """In the new process: the system ends it when the thread that started it is gone."""
    LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
