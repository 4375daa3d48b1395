"""Which gradients a server takes: finite ones, not too stale, not far larger than usual.

    staleness, magnitude ──► Gate.judge ──► "" (take it), "stale", "outlier" or "not finite"

Two ways in which such rules fail are excluded. A server that only ever refused would wait for ever:
a refusal moves no version, so the next gradient computed from the newest parameters is never stale.
Statistics that leave refused magnitudes out would freeze at the level of yesterday: here a refused
outlier counts as the largest magnitude that would have been taken, so a lasting change is accepted
after a dozen or so, while a single one moves the statistics little.
"""

import math
from typing import Any


class Gate:
    """Judges gradients by staleness and by magnitude.

    Staleness as in Gorila (Nair et al., 2015, which drops gradients older than a threshold, and
    those whose loss lies beyond the running mean by several standard deviations).

    Args:
        max_staleness: take up to so many versions; None takes all.
        max_sigmas: take magnitudes up to so many standard deviations above their running mean;
            None takes all.
        warm_up: take so many before magnitudes are judged.
        decay: of the running mean and variance.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        max_staleness: int | None = None,
        max_sigmas: float | None = None,
        warm_up: int = 20,
        decay: float = 0.98,
    ) -> None:
        if max_staleness is not None and max_staleness < 0:
            raise ValueError(f"max_staleness: must be 0 or more, or None; got {max_staleness}")
        if max_sigmas is not None and not max_sigmas > 0:
            raise ValueError(f"max_sigmas: must be above 0, or None; got {max_sigmas}")
        if not 0 < decay < 1:
            raise ValueError(f"decay: must be between 0 and 1, got {decay}")
        self.max_staleness, self.max_sigmas = max_staleness, max_sigmas
        self.warm_up, self.decay = warm_up, decay
        self.seen, self.mean, self.variance = 0, 0.0, 0.0

    @property
    def limit(self) -> float:
        """The largest magnitude that is taken now."""
        if self.max_sigmas is None or self.seen < self.warm_up:
            return math.inf
        # A floor for the spread: magnitudes that were all alike must not refuse the first other.
        spread = max(math.sqrt(self.variance), 0.1 * self.mean)
        return self.mean + self.max_sigmas * spread

    def judge(self, staleness: int, magnitude: float) -> str:
        """Why a gradient is refused, or "" if it is taken.

        Args:
            staleness: versions between the parameters it was computed from and now.
            magnitude: its norm, or its loss; what outliers are judged by.
        """
        if not math.isfinite(magnitude):
            return "not finite"
        if self.max_staleness is not None and staleness > self.max_staleness:
            return "stale"
        limit = self.limit
        self._notice(min(magnitude, limit))
        return "outlier" if magnitude > limit else ""

    def _notice(self, magnitude: float) -> None:
        """Running mean and variance; plain averages until `1 − decay` takes over."""
        self.seen += 1
        weight = max(1.0 / self.seen, 1.0 - self.decay)
        difference = magnitude - self.mean
        self.mean += weight * difference
        self.variance = (1.0 - weight) * (self.variance + weight * difference**2)

    def state_dict(self) -> dict[str, Any]:
        """The statistics."""
        return {"seen": self.seen, "mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.seen, self.mean = state["seen"], state["mean"]
        self.variance = state["variance"]
