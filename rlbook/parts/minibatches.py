"""The minibatches of a rollout that N workers share: each has some rows of every one.

    worker 0: rows of minibatch 0 │ 1 │ 2 …      own order, drawn anew for each epoch
    worker 1: rows of minibatch 0 │ 1 │ 2 …
              └─ together one minibatch: its advantages get one mean and one deviation, and each
                 worker's mean gradient counts by its share of the rows

All workers cut their rows into the same number of parts, however many rows they have. What must be
said between them is small: rows, mean and squares of the advantages of each part.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch

from rlbook.maths.moments import Moments, merge_moments, moments
from rlbook.parts.on_device import there
from rlbook.parts.surrogate import Batch

EPSILON = 1e-8
"""Added to the deviation, as `normalize_advantages` does."""


class Minibatches:
    """One worker's rows of the minibatches of a round.

    Args:
        batch: the N valid rows of its rollout.
        epochs: passes over them.
        parts: minibatches of a pass.
        rng: shuffles.
        normalized: bring advantages to mean 0 and deviation 1.
        device: where the rows are learnt from; they go there at once.
    """

    def __init__(
        self,
        batch: Batch,
        epochs: int,
        parts: int,
        rng: np.random.Generator,
        normalized: bool,
        device: torch.device | None = None,
    ) -> None:
        self.batch, self.normalized = batch, normalized
        self.rows = [
            torch.from_numpy(part)
            for _ in range(epochs)
            for part in np.array_split(rng.permutation(len(batch.action)), parts)
        ]
        found = [moments(batch.advantage[rows]) for rows in self.rows]
        self.moments = np.array([[float(part) for part in one] for one in found]).T
        """`[3, epochs × parts]` float64: rows, mean and squares of the advantages of each."""
        if device is not None and device.type != "cpu":
            self.batch = Batch(*(there(column, device) for column in batch))
            self.rows = [there(rows, device) for rows in self.rows]

    def agree(self, everybody: Sequence[np.ndarray]) -> None:
        """Takes in the `moments` of all workers; all do so in the same order."""
        found = [Moments(*torch.from_numpy(np.array(one))) for one in everybody]
        whole, dtype = reduce(merge_moments, found), self.batch.advantage.dtype
        self.mean, self.deviation = whole.mean.to(dtype), whole.variance.to(dtype).sqrt()
        self.shares = (self.moments[0] / np.maximum(whole.rows.numpy(), 1)).tolist()
        """Of this worker, in the rows of each minibatch: 0 to 1."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> Batch:
        """This worker's rows of the k-th; there may be none."""
        minibatch = Batch(*(column[self.rows[k]] for column in self.batch))
        if not self.normalized:
            return minibatch
        centred = minibatch.advantage - self.mean[k]
        return minibatch._replace(advantage=centred / (self.deviation[k] + EPSILON))
