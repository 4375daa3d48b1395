"""Hosts made of network namespaces: each has an address of its own, and can be cut off.

    host 0 ── eth0 10.77.0.1 ─┐
    host 1 ── eth0 10.77.0.2 ─┼─ a bridge, in a namespace of its own
    host 2 ── eth0 10.77.0.3 ─┘

A host's processes see no other network. Needs Linux, root and iproute2.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

ROOT = Path(__file__).resolve().parent.parent
RAY_PORT = 6379


def ip(*words: str) -> str:
    """What `ip` prints; CalledProcessError if it complains."""
    return subprocess.run(
        ["ip", *words], check=True, capture_output=True, text=True, timeout=30
    ).stdout


def why_not() -> str:
    """Why no hosts can be made here; empty if they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "needs `ip` and `tc` (apt-get install iproute2)"
    name = f"rlbook-{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", "name", "one", "type", "veth", "peer", "name", "other")
        finally:
            ip("netns", "del", name)
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", "") or str(error)
        return f"may make no network namespaces: {said.strip()}"
    return ""


def wait_until(what: Callable[[], object], seconds: float, why: str) -> None:
    """AssertionError if it is not true within so many seconds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"{why}: not within {seconds} s"
        time.sleep(0.2)


class Hosts:
    """`count` hosts, with a Ray cluster's environment; all of it is gone when the `with` is left.

    Ray's heartbeats are quick here, so that a host that is cut off is noticed in about 5 s.
    """

    def __init__(self, count: int) -> None:
        self.name = f"rlbook-{os.getpid()}"
        self.hub = f"{self.name}-hub"
        self.hosts = [f"{self.name}-{i}" for i in range(count)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        self.folder = Path(tempfile.mkdtemp(prefix="rl"))  # short: Ray's sockets have long names
        quick = {"initial_delay_ms": 1000, "period_ms": 1000, "timeout_ms": 1000}
        self.environment = {
            **{k: v for k, v in os.environ.items() if "proxy" not in k.lower()},
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_health_check_failure_threshold": "3",
            **{f"RAY_health_check_{name}": str(value) for name, value in quick.items()},
        }

    def __enter__(self) -> Self:
        try:
            for name in (self.hub, *self.hosts):
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("-n", self.hub, "link", "add", "name", "hub", "type", "bridge")
            ip("-n", self.hub, "link", "set", "hub", "up")
            for i, (host, address) in enumerate(zip(self.hosts, self.addresses, strict=True)):
                plug = f"plug{i}"
                pair = ("type", "veth", "peer", "name", plug, "netns", self.hub)
                ip("-n", host, "link", "add", "name", "eth0", *pair)
                ip("-n", self.hub, "link", "set", plug, "master", "hub", "up")
                ip("-n", host, "addr", "add", f"{address}/24", "dev", "eth0")
                ip("-n", host, "link", "set", "eth0", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.hosts, self.hub):
            self.end(name)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self, host: str) -> list[int]:
        """Ids of what runs on a host: all of it was started from here."""
        return [int(pid) for pid in ip("netns", "pids", host).split()]

    def end(self, host: str) -> None:
        """Kills what runs on a host."""
        if not Path("/run/netns", host).exists():
            return
        for _ in range(50):
            if not (left := self.processes(host)):
                return
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.1)

    def start(self, host: int, *command: str, **environment: str) -> subprocess.Popen[str]:
        """A process on a host; its output is one text."""
        return subprocess.Popen(
            ["ip", "netns", "exec", self.hosts[host], *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**self.environment, **environment},
        )

    def run(self, host: int, *command: str, seconds: float = 60, **environment: str) -> str:
        """What a command on a host prints; AssertionError if it fails or takes too long."""
        process = self.start(host, *command, **environment)
        try:
            said, _ = process.communicate(timeout=seconds)
        finally:
            process.kill()
        assert process.returncode == 0, said
        return said

    def python(self, host: int, program: str, *arguments: str) -> str:
        """What a program on a host prints."""
        return self.run(host, sys.executable, "-c", program, *arguments)

    def slow(self, host: int, rate: str) -> None:
        """So much at most leaves a host in a second ("20mbit")."""
        limit = ("rate", rate, "burst", "32kbit", "latency", "400ms")
        wire = ("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)
        subprocess.run(["ip", "netns", "exec", self.hosts[host], *wire], check=True)

    def cut(self, host: int) -> None:
        """Nothing reaches this host any more, and nothing comes from it."""
        ip("-n", self.hosts[host], "link", "set", "eth0", "down")

    def mend(self, host: int) -> None:
        """The host is back, as after a restart: with nothing running, and a fast wire."""
        self.end(self.hosts[host])
        wire = ("tc", "qdisc", "del", "dev", "eth0", "root")
        subprocess.run(["ip", "netns", "exec", self.hosts[host], *wire], capture_output=True)
        ip("-n", self.hosts[host], "link", "set", "eth0", "up")

    @property
    def head(self) -> str:
        """Where the cluster's head is."""
        return f"{self.addresses[0]}:{RAY_PORT}"

    def start_ray(self, host: int, cores: int = 2) -> None:
        """Ray's own command, as docs/cluster.md has it, with less of everything; once more where it
        gives up, as it does on a machine that is very busy.
        """
        ray = str(Path(sys.executable).with_name("ray"))
        where = ("--address", self.head)
        if host == 0:
            where = ("--head", "--port", str(RAY_PORT), "--include-dashboard=false")
            where += ("--temp-dir", str(self.folder))
        small = ("--num-cpus", str(cores), "--object-store-memory", "100000000")
        mine = ("--node-ip-address", self.addresses[host])
        command = (ray, "start", *where, *mine, *small, "--disable-usage-stats")
        try:
            self.run(host, *command, seconds=60)
        except (AssertionError, subprocess.TimeoutExpired):
            self.end(self.hosts[host])
            self.run(host, *command, seconds=120)
