"""How the processes of a run spent their time, kind by kind: arithmetic on a timeline."""

import math
import re
from typing import Any, NamedTuple

import numpy as np

from rlbook.parts.timeline import DRIVER, Timeline

SLOW = 1.5
"""A straggler's calls take at least so many times as long as its peers' median."""
TOGETHER = 0.25
"""Calls that begin within so many mean calls of each other begin together."""


class Shares(NamedTuple):
    """How the processes of one kind spent their time: parts that add up to 1."""

    work: float
    waiting: float
    """Idle until the slowest of those peers that were at work was through."""
    others: float
    """Idle while another kind worked."""
    wire: float
    """Idle while nobody that it could wait for worked: messages, and the driver's own work."""
    busiest: float
    """Work of the busiest process."""
    union: float
    """Part of the time in which any of them worked."""
    processes: int


def shares(timeline: Timeline) -> dict[str, Shares]:
    """Kind (`Worker 3` is a `Worker`) → how its processes spent their time."""
    who, _, starts, ends = timeline.columns()
    kinds = np.array([kind_of(timeline.names[int(number)]) for number in who])
    working = kinds != DRIVER
    if not working.any():
        return {}
    edges = float(starts[working].min()), float(ends[working].max())
    found = {}
    for kind in sorted(set(kinds[working])):
        mine, others = kinds == kind, working & (kinds != kind)
        found[str(kind)] = _shares(
            who[mine], starts[mine], ends[mine], _busy_until(starts[others], ends[others]), edges
        )
    return found


def _shares(
    who: np.ndarray, starts: np.ndarray, ends: np.ndarray, others: Any, edges: tuple[float, float]
) -> Shares:
    """Shares of one kind's spans `[n]`; `others(t)`: seconds before t in which others worked."""
    first, last = edges
    processes = np.unique(who)
    whole = max((last - first) * len(processes), 1e-12)
    work = [float((ends - starts)[who == one].sum()) for one in processes]
    ended, until, resumed = _pauses(who, starts, ends, last)
    before = [float(others(starts[who == one].min()) - others(first)) for one in processes]
    mine = min(1.0, sum(work) / whole)
    waiting = float((until - ended).sum()) / whole
    other = (float((others(resumed) - others(until)).sum()) + sum(before)) / whole
    wire = max(0.0, 1.0 - mine - waiting - other)
    busiest = min(1.0, max(work) / (last - first)) if last > first else 0.0
    union = float(_busy_until(starts, ends)(last)) / max(last - first, 1e-12)
    return Shares(mine, waiting, other, wire, busiest, union, len(processes))


def _pauses(
    who: np.ndarray, starts: np.ndarray, ends: np.ndarray, last: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """After each call `[n]`: when it ended, until when slower peers were waited for, when its
    process resumed work.

    Peers wait for each other where they go on together; elsewhere `until` is the call's end.
    """
    order = np.argsort(starts, kind="stable")
    begins, latest = starts[order], np.maximum.accumulate(ends[order])
    together = TOGETHER * float((ends - starts).mean())
    processes = np.unique(who)
    pauses = []
    for one in processes:
        calls = order[who[order] == one]
        own, ended = starts[calls], np.maximum.accumulate(ends[calls])
        resumed = np.maximum(np.append(own[1:], last), ended)
        peers = _count(begins, resumed, together) - _count(own, resumed, together)
        barrier = (2 * peers >= len(processes) - 1) & (resumed < last)
        earlier = np.searchsorted(begins, resumed - together)
        slowest = np.minimum(latest[np.maximum(earlier, 1) - 1], resumed)
        pauses.append((ended, np.maximum(slowest, ended), resumed, barrier))
    ended, until, resumed, barrier = (np.concatenate(c) for c in zip(*pauses, strict=True))
    idle = resumed - ended
    if 2.0 * idle[barrier].sum() < idle.sum():
        return ended, ended, resumed  # most go on alone: that some begin together is chance
    return ended, np.where(barrier, until, ended), resumed


def _count(times: np.ndarray, at: np.ndarray, within: float) -> np.ndarray:
    """How many of the sorted times are at most `within` away from each of `at`."""
    right = np.searchsorted(times, at + within, side="right")
    return right - np.searchsorted(times, at - within, side="left")


def _busy_until(starts: np.ndarray, ends: np.ndarray) -> Any:
    """The function t → seconds before t in which at least one of the spans lasts."""
    if not len(starts):
        return np.zeros_like
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    new = np.append(True, starts[1:] > ends[:-1])
    begins, finals = starts[new], ends[np.append(new[1:], True)]
    times = np.stack([begins, finals], axis=1).ravel()
    lengths = np.cumsum(finals - begins)
    busy = np.stack([np.append(0.0, lengths[:-1]), lengths], axis=1).ravel()
    return lambda t: np.interp(t, times, busy)


def stragglers(timeline: Timeline) -> dict[str, float]:
    """Who takes at least 1.5 times as long as the median of its peers → how many times as long.

    What counts is the usual call, the median of each method: uneven work makes nobody slow.
    """
    who, what, starts, ends = timeline.columns()
    usual: dict[str, dict[str, float]] = {}
    for number in np.unique(who):
        name = timeline.names[int(number)]
        if name != DRIVER:
            mine = [(who == number) & (what == method) for method in np.unique(what[who == number])]
            medians = [float(np.median((ends - starts)[calls])) for calls in mine]
            usual.setdefault(kind_of(name), {})[name] = math.fsum(medians)
    found = {}
    for peers in usual.values():
        for name, seconds in peers.items():
            others = [other for peer, other in peers.items() if peer != name]
            if others and seconds >= SLOW * (median := float(np.median(others))) > 0:
                found[name] = seconds / median
    return found


def driver_waits(timeline: Timeline) -> float:
    """Part of the time, from the first call's start to the last one's end, that it waited."""
    spans = [span for span in timeline if not span.waiting]
    first, last = min(s.start for s in spans), max(s.end for s in spans)
    waits = [(max(s.start, first), min(s.end, last)) for s in timeline if s.waiting]
    return math.fsum(max(0.0, b - a) for a, b in waits) / max(last - first, 1e-12)


def kind_of(who: str) -> str:
    """`Worker` for `Worker 3`."""
    return re.sub(r" \d+$", "", who)
