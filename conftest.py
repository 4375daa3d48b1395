"""Holds the whole test session, notebooks included, to leaving no Ray process behind."""

import os
import signal
import time

import psutil
import pytest

RAY = ("raylet", "gcs_server")


def ray_pids() -> set[int]:
    """The ids of Ray's two central processes on this machine."""
    found = set()
    for process in psutil.process_iter(["name", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and process.info["name"] in RAY:
            found.add(process.pid)
    return found


BEFORE = ray_pids()


def pytest_configure() -> None:
    """Ctrl-C reaches the tests of it also where the shell runs us in the background, deaf to it.

    And a GPU multiplies in float32: by itself it takes TF32 for convolutions and LSTMs, whose 11
    bits would not agree with the CPU's 24. (By the environment, for subprocesses too.)
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as `cuda` what is skipped without a GPU, so that `pytest -m cuda` runs just that."""
    for item in items:
        reasons = [str(mark.kwargs.get("reason", "")) for mark in item.iter_markers("skipif")]
        if any("GPU" in reason for reason in reasons):
            item.add_marker("cuda")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if Ray processes are left that descend from it or whose parent is gone."""
    end = time.monotonic() + 10
    while left := {pid for pid in ray_pids() - BEFORE if _ours(pid)}:
        if time.monotonic() > end:
            print(f"\nERROR: the tests left Ray processes behind: {sorted(left)}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        time.sleep(0.2)


def _ours(pid: int) -> bool:
    try:
        ancestors = {parent.pid for parent in psutil.Process(pid).parents()}
    except psutil.Error:
        return False
    return psutil.Process().pid in ancestors or ancestors <= {0, 1}
