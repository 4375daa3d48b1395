"""Who may start: acting and learning in step with each other, at so many samples per insert.

    owed = samples_per_insert · rows inserted − rows drawn         since there were min_size

      learner may draw    while   owed − rows          ≥ −tolerance
      actors may begin    while   owed + what is begun ≤  tolerance, and until there are min_size

Nobody sleeps and nothing blocks: a conducting driver asks before it starts somebody. The idea is
Reverb's (Cassirer et al., 2021, arXiv:2102.04736, section 3.4), without which a fast learner would
overfit to what few data there are, and fast actors would overwrite data that nobody has seen.
"""

from typing import Any


class RateLimiter:
    """Counts what came in and what was drawn.

    Args:
        samples_per_insert: rows drawn for each row inserted; None sets no limit.
        min_size: items in the memory before anything is drawn. Until then nothing is owed.
        tolerance: rows by which drawing may be behind or ahead of that ratio. At least half of what
            is drawn at once, or both sides end up waiting for the other.
    """

    def __init__(self, samples_per_insert: float | None, min_size: int, tolerance: float) -> None:
        self.samples_per_insert, self.min_size = samples_per_insert, min_size
        self.tolerance = tolerance
        self.inserted = self.drawn = 0.0
        """Rows since the memory was filled, the insert that filled it included."""

    @property
    def owed(self) -> float:
        """Rows that should have been drawn by now and were not."""
        return (self.samples_per_insert or 0.0) * self.inserted - self.drawn

    def insert(self, rows: float, size: int) -> None:
        """`rows` came in, and now the memory has `size` items; nothing is owed while it is less
        than filled, be it at the start or after it lost what it had.
        """
        if size < self.min_size:
            self.inserted = self.drawn = 0.0
        else:
            self.inserted += rows

    def may_draw(self, rows: int, size: int) -> bool:
        """Whether `rows` may be drawn from a memory of `size` items."""
        if size < self.min_size:
            return False
        return self.samples_per_insert is None or self.owed - rows >= -self.tolerance

    def draw(self, rows: int) -> None:
        """`rows` are drawn."""
        self.drawn += rows

    def may_insert(self, begun: float, size: int) -> bool:
        """Whether somebody may begin to make more rows for a memory of `size` items, while `begun`
        rows are on their way.
        """
        if self.samples_per_insert is None or size < self.min_size:
            return True
        return self.owed + self.samples_per_insert * begun <= self.tolerance

    def state_dict(self) -> dict[str, Any]:
        """The counts."""
        return {"inserted": self.inserted, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.inserted, self.drawn = state["inserted"], state["drawn"]
