"""Minibatches of several workers: rows, shares, and one mean and deviation for all."""

import numpy as np
import torch

from rlbook.maths.losses import normalize_advantages
from rlbook.parts.minibatches import Minibatches
from rlbook.parts.surrogate import Batch


def batch_of(size: int, start: int = 0) -> Batch:
    """Rows that are numbered, so that any mix-up shows."""
    numbers = torch.arange(start, start + size, dtype=torch.float64)
    return Batch(numbers, numbers.long(), numbers, numbers, numbers**2, numbers)


def made(sizes: list[int], parts: int = 3, normalized: bool = True) -> list[Minibatches]:
    starts = np.cumsum([0, *sizes])
    workers = [
        Minibatches(batch_of(n, start), 2, parts, np.random.default_rng(i), normalized)
        for i, (n, start) in enumerate(zip(sizes, starts[:-1], strict=True))
    ]
    for worker in workers:
        worker.agree([other.moments for other in workers])
    return workers


def test_each_row_is_in_one_minibatch_of_each_epoch():
    for worker in made([10, 25]):
        assert len(worker) == 6
        for epoch in (0, 3):
            rows = torch.cat([worker[k].action for k in range(epoch, epoch + 3)])
            assert sorted(rows.tolist()) == worker.batch.action.tolist() != rows.tolist()
        assert torch.equal(worker[1].target, worker[1].action.double()), "columns stay together"


def test_together_they_are_normalised_as_one():
    workers = made([10, 25, 4])
    for k in range(6):
        together = torch.cat([worker.batch.advantage[worker.rows[k]] for worker in workers])
        expected = normalize_advantages(together)
        found = torch.cat([worker[k].advantage for worker in workers])
        assert torch.allclose(found, expected, atol=1e-12)
        shares = [worker.shares[k] for worker in workers]
        assert shares == [len(worker.rows[k]) / len(together) for worker in workers]


def test_a_worker_without_rows_has_no_share():
    none, some = made([0, 7])
    assert none.shares == [0.0] * 6 and some.shares == [1.0] * 6
    assert len(none[0].action) == 0
    (alone,) = made([0])
    assert alone.shares == [0.0] * 6


def test_advantages_stay_as_they_are_on_request():
    (worker,) = made([9], normalized=False)
    assert torch.equal(worker[0].advantage, worker[0].action.double() ** 2)
