"""Work dealt out to workers, and the two ways to wait for it.

              parameters (put once)            synchronous: wait for all, one update a round
    driver ──────────────────────────► ShardWorker 0 … k−1: rows of a batch, or steps of envs
       ▲                                   │
       └────────── gradients ──────────────┘   asynchronous: wait for one, update, hand on

:func:`synchronous` and :func:`asynchronous` are the two loops that the systems of this book are
made of. Both run on any :class:`~rlbook.plumbing.runtime.Runtime`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rlbook.parts.envs import make_envs
from rlbook.plumbing.model_parallel import Loss, rows_that_count, shard_rows
from rlbook.plumbing.runtime import Runtime

Vector = np.ndarray
"""All parameters of a network, or their gradient, one after the other: ``[P]``."""


class Answer(NamedTuple):
    """What a worker sends back."""

    gradient: Vector
    rows: int
    """Rows whose mean it is."""
    version: int
    """Of the parameters that it was computed from."""


class Update(NamedTuple):
    """One step of the parameters."""

    at_s: float
    """On the runtime's clock."""
    parameters: Vector
    ages: tuple[int, ...]
    """Of each gradient that entered: updates made since its parameters were handed out."""
    workers: tuple[int, ...]
    """Whose they were."""


class ShardWorker:
    """Holds some rows of a batch and gives their gradient for whatever parameters it is sent.

    ``network``, ``loss`` and ``targets`` as in :mod:`rlbook.plumbing.model_parallel`.
    """

    def __init__(
        self, network: nn.Module, loss: Loss, inputs: Tensor, targets: Mapping[str, Tensor]
    ) -> None:
        torch.set_num_threads(1)
        self.network, self.loss = network, loss
        self.inputs, self.targets = inputs, targets

    def gradient(self, parameters: Vector, version: int) -> Answer:
        """∇ of the mean loss over this worker's rows."""
        weights = list(self.network.parameters())
        vector_to_parameters(torch.tensor(parameters), weights)
        loss = self.loss(logits=self.network(self.inputs), **self.targets)
        gradient = parameters_to_vector(torch.autograd.grad(loss, weights))
        return Answer(gradient.numpy(), rows_that_count(self.targets, len(self.inputs)), version)


def make_workers(
    runtime: Runtime,
    count: int,
    network: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Mapping[str, Tensor],
    **options: Any,
) -> list[Any]:
    """``count`` :class:`ShardWorker` actors with equal parts of the batch; ``options`` as for
    ``runtime.remote``.
    """
    remote = runtime.remote(ShardWorker, **options)
    parts = shard_rows(len(inputs), count)
    return [
        remote.remote(network, loss, inputs[part], {k: v[part] for k, v in targets.items()})
        for part in parts
    ]


def synchronous(
    runtime: Runtime, workers: Sequence[Any], parameters: Vector, step_size: float, updates: int
) -> Iterator[Update]:
    """Gradient descent with the gradients of all workers, averaged by rows, in every update."""
    everybody = tuple(range(len(workers)))
    for version in range(updates):
        shared = runtime.put(parameters)
        answers = runtime.get([worker.gradient.remote(shared, version) for worker in workers])
        parameters = parameters - step_size * mean_gradient(answers)
        yield Update(runtime.now, parameters, (0,) * len(answers), everybody)


def asynchronous(
    runtime: Runtime, workers: Sequence[Any], parameters: Vector, step_size: float, updates: int
) -> Iterator[Update]:
    """Gradient descent with one gradient in each update: whichever comes first, however old."""
    in_flight = {worker.gradient.remote(parameters, 0): i for i, worker in enumerate(workers)}
    for version in range(updates):
        (first,), _ = runtime.wait(in_flight)
        index, answer = in_flight.pop(first), runtime.get(first)
        parameters = parameters - step_size * answer.gradient
        in_flight[workers[index].gradient.remote(parameters, version + 1)] = index
        yield Update(runtime.now, parameters, (version - answer.version,), (index,))


def mean_gradient(answers: Sequence[Answer]) -> Vector:
    """The gradient of the mean over all rows: means of shards, weighted by their rows."""
    rows = sum(answer.rows for answer in answers)
    return np.sum([(answer.rows / rows) * answer.gradient for answer in answers], axis=0)


class Stepper:
    """Steps copies of an environment with random actions: a unit of work as an actor has it."""

    def __init__(self, env_id: str, num_envs: int, seed: int) -> None:
        self.envs = make_envs(env_id, num_envs, seed)
        self.rng = np.random.default_rng(seed)

    def step(self, count: int) -> int:
        """``count`` steps of every copy; returns valid env steps."""
        valid, actions = 0, self.envs.action_space.n  # type: ignore[attr-defined]
        for _ in range(count):
            row = self.envs.step(self.rng.integers(actions, size=self.envs.num_envs))
            valid += int((~row.first).sum())
        return valid


class Round(NamedTuple):
    """Times of one round: all workers act, then the driver learns."""

    workers: int
    steps: int
    """Of all workers together, in vector steps."""
    acting_s: float
    learning_s: float

    @property
    def seconds(self) -> float:
        """The whole round."""
        return self.acting_s + self.learning_s


def measure_rounds(
    runtime: Runtime,
    workers: Sequence[Any],
    steps: int,
    learn: Callable[[], object],
    rounds: int = 7,
) -> Round:
    """Rounds in which ``steps`` are dealt out to :class:`Stepper` actors, and ``learn()`` follows
    here when all have answered. The fastest of ``rounds`` counts, for each of the two: other
    programs only ever add to it. One round more, to warm up, does not.
    """
    parts = [part.stop - part.start for part in shard_rows(steps, len(workers))]
    acting, learning = [], []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        calls = zip(workers, parts, strict=True)
        runtime.get([worker.step.remote(part) for worker, part in calls])
        between = time.perf_counter()
        learn()
        acting.append(between - begun)
        learning.append(time.perf_counter() - between)
    return Round(len(workers), steps, min(acting[1:]), min(learning[1:]))
