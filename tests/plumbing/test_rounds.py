"""The two loops: equal to one process where they must be, repeatable, and as old as they say."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

from rlbook.maths.losses import policy_gradient_loss
from rlbook.plumbing import rounds
from rlbook.plumbing.cluster import Cluster, Node
from rlbook.plumbing.runtime import Runtime
from rlbook.plumbing.virtual import VirtualRuntime
from tests.plumbing.test_model_parallel import ROWS, batch, policy

STEP, UPDATES = 0.1, 12


def run(runtime: Runtime, loop: Any, workers: int, valid: Any = None) -> list[rounds.Update]:
    network, (inputs, targets) = policy(), batch()
    if valid is not None:
        targets["valid"] = valid
    costs = {"gradient": 0.01}
    made = rounds.make_workers(
        runtime, workers, network, policy_gradient_loss, inputs, targets, costs=costs
    )
    runtime.get([worker.gradient.remote(start(), 0) for worker in made])  # all are there
    return list(loop(runtime, made, start(), STEP, UPDATES))


def start() -> np.ndarray:
    return parameters_to_vector(policy().parameters()).detach().numpy()


def virtual(seed: int = 1, **fields: Any) -> VirtualRuntime:
    return VirtualRuntime(seed, Cluster(nodes=(Node(cores=8),), **fields))


def alone(valid: Any = None) -> np.ndarray:
    """One process, the whole batch, PyTorch's own SGD."""
    network, (inputs, targets) = policy(), batch()
    optimizer = torch.optim.SGD(network.parameters(), lr=STEP)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        policy_gradient_loss(logits=network(inputs), **targets, valid=valid).backward()
        optimizer.step()
    return parameters_to_vector(network.parameters()).detach().numpy()


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_synchronous_workers_are_one_with_a_large_batch(workers: int) -> None:
    for valid in (None, torch.arange(ROWS) % 7 > 2):  # unequal shards
        updates = run(virtual(), rounds.synchronous, workers, valid)
        np.testing.assert_allclose(updates[-1].parameters, alone(valid), atol=1e-12, rtol=0)


def test_planted_unweighted_mean_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(answers: Any) -> np.ndarray:
        return np.mean([answer.gradient for answer in answers], axis=0)

    monkeypatch.setattr(rounds, "mean_gradient", plain)
    valid = torch.arange(ROWS) > ROWS // 3
    updates = run(virtual(), rounds.synchronous, 2, valid)
    assert abs(updates[-1].parameters - alone(valid)).max() > 1e-3


def test_one_asynchronous_worker_is_one_synchronous_worker() -> None:
    sync, other = (run(virtual(), loop, 1) for loop in (rounds.synchronous, rounds.asynchronous))
    for a, b in zip(sync, other, strict=True):
        assert (a.parameters == b.parameters).all()
        assert a.ages == b.ages == (0,)


def test_ages_count_the_updates_between() -> None:
    updates = run(virtual(), rounds.asynchronous, 3)
    last_given = {index: 0 for index in range(3)}
    for version, update in enumerate(updates):
        (index,) = update.workers
        assert update.ages == (version - last_given[index],)
        last_given[index] = version + 1
    assert max(age for update in updates for age in update.ages) >= 2


def test_the_same_seed_repeats_and_another_does_not() -> None:
    first, again, other = (run(virtual(seed), rounds.asynchronous, 4) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert (a.at_s, a.workers) == (b.at_s, b.workers) and (a.parameters == b.parameters).all()
    assert [u.workers for u in first] != [u.workers for u in other]


def test_a_straggler_holds_up_everybody_or_only_itself() -> None:
    slow: dict[str, Any] = {"stragglers": {"ShardWorker 2": 8.0}, "jitter": 0.0, "latency_s": 0.0}
    sync = run(virtual(**slow), rounds.synchronous, 3)
    gaps = np.diff([update.at_s for update in sync])
    np.testing.assert_allclose(gaps, 0.08, rtol=1e-3)
    free = run(virtual(**slow), rounds.asynchronous, 3)
    assert free[-1].at_s - 0.08 < 0.08  # the first 0.08 s are the roll call
    assert (2,) not in [update.workers for update in free]


class Clock:
    """A second passes with every look."""

    def __init__(self) -> None:
        self.ticks = itertools.count()

    def perf_counter(self) -> float:
        return float(next(self.ticks))


def test_rounds_deal_out_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    learnt = []
    with virtual() as runtime:
        remote = runtime.remote(rounds.Stepper)
        steppers = [remote.remote("CartPole-v1", 4, seed) for seed in range(3)]
        monkeypatch.setattr(rounds, "time", Clock())
        found = rounds.measure_rounds(runtime, steppers, 20, lambda: learnt.append(1), rounds=3)
    assert found == rounds.Round(3, 20, 1.0, 1.0) and found.seconds == 2.0
    assert len(learnt) == 4


def test_a_stepper_counts_valid_steps_only() -> None:
    stepper = rounds.Stepper("rlbook/Catch-v0", 3, seed=0)
    length = 9  # of every episode; the step after it is none
    assert stepper.step(length) == 3 * length
    assert stepper.step(1) == 0
    assert stepper.step(2 * (length + 1)) == 3 * 2 * length
