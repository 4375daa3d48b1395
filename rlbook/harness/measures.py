"""What a run measures of itself: seconds of training, and the last episodes."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from rlbook.parts.envs import Episode


class Stopwatch:
    """Seconds on some clock while it runs.

    Args:
        now: the clock: a function that returns seconds, of the wall or virtual.
        spent_s: what it shows at first.
    """

    def __init__(self, now: Callable[[], float], spent_s: float = 0.0) -> None:
        self.now = now
        self._spent_s = spent_s
        self._since: float | None = None

    def start(self) -> None:
        """Runs from here on; starting twice changes nothing."""
        if self._since is None:
            self._since = self.now()

    def stop(self) -> None:
        """Stands still from here on."""
        self._spent_s, self._since = self.seconds(), None

    def seconds(self) -> float:
        """What it shows."""
        return self._spent_s + (0.0 if self._since is None else self.now() - self._since)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stands still within the `with`, and runs on afterwards if it ran before."""
        ran = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if ran:
                self.start()


class Window:
    """Returns and lengths of the last `size` training episodes."""

    def __init__(self, size: int) -> None:
        self.returns: deque[float] = deque(maxlen=size)
        self.lengths: deque[int] = deque(maxlen=size)

    def add(self, episodes: Iterable[Episode]) -> None:
        """The oldest fall out."""
        for episode in episodes:
            self.returns.append(episode.episode_return)
            self.lengths.append(episode.length)

    def reaches(self, goal: float | None) -> bool:
        """True when it is full and its mean return is at least `goal`; None is never reached."""
        full = len(self.returns) == self.returns.maxlen
        return full and goal is not None and float(np.mean(self.returns)) >= goal

    def clear(self) -> None:
        """Forgets all."""
        self.returns.clear()
        self.lengths.clear()

    def means(self) -> dict[str, Any]:
        """`episode_return_mean` and `episode_length_mean`; None where there is none."""
        means = {"episode_return_mean": mean(self.returns)}
        return means | {"episode_length_mean": mean(self.lengths)}


def mean(values: Sequence[float]) -> float | None:
    """The mean, or None where there is none (nothing to average, or no finite number)."""
    found = float(np.mean(list(values))) if values else np.nan
    return found if np.isfinite(found) else None


def of_turns(name: str, values: Sequence[float]) -> float | None:
    """A metric of several turns: the mean, or the largest where the name ends in `_max`."""
    finite = [value for value in values if np.isfinite(value)]
    return max(finite, default=None) if name.endswith("_max") else mean(values)


def mean_metrics(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over those that have it, by name in order."""
    names = sorted({name for one in metrics for name in one})
    return {name: float(np.mean([one[name] for one in metrics if name in one])) for name in names}
