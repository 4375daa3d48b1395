"""Who answers the calls of :mod:`rlbook.plumbing.central_flow`, and how they come to be.

called(runtime, EnvWorker, Server, Learner, config, …) ──► CentralFlow of remote processes
"""

from typing import Any

import numpy as np

from rlbook.data import EnvOutput, Unroll, tree_nbytes
from rlbook.plumbing.central import Report, Stepped, report_of
from rlbook.plumbing.central_flow import CentralFlow
from rlbook.plumbing.deeds import StandIn
from rlbook.plumbing.devices import placed
from rlbook.plumbing.fleet import Fleet
from rlbook.plumbing.inference import Inference, Who
from rlbook.plumbing.learner_group import LearnerGroup, Vector
from rlbook.plumbing.runtime import RayRuntime, Runtime


class CentralServer(Inference):
    """`Inference` behind calls."""

    def finish(self, who: Who, row: EnvOutput) -> tuple[Report, Unroll]:
        """Takes in the row that ends an unroll."""
        unroll = self.observe(who, row)
        assert unroll is not None, "driver and server count the same rows"
        return report_of(unroll, [], tree_nbytes(row)), unroll

    def answer(
        self, weights: Vector | None, whose: list[Who], *rows: EnvOutput | None
    ) -> tuple[Any, ...]:
        """Acts upon rows (None: upon the last, which it has): a note, then each one's actions.

        With `weights` it acts with them from now on.
        """
        if weights is not None:
            self.load(weights)
        for who, row in zip(whose, rows, strict=True):
            if row is not None:
                self.observe(who, row)
        return None, *self.act([who.place for who in whose])


def called(
    runtime: Runtime,
    worker: type,
    server: type[CentralServer],
    learner: type,
    config: Any,
    parameters: np.ndarray,
    row_bytes: tuple[int, int],
) -> CentralFlow:
    """Workers, server and learners on a runtime, and the flow between them.

    On a virtual cluster a step costs a worker an "env_step"; a batch costs the server a "batch" and
    an "inference" for each worker in it; an update costs each learner a "learn" for each unroll of
    its share, and an "apply".

    Args:
        runtime: where they live; on real processes learners measure how long they idle.
        worker: class with `here()` and `step(actions)`, each → (`Stepped`, rows).
        server: acts; there are `num_inference` of them.
        learner: a `Peer`.
        config: of the system; see `CentralFlow`.
        parameters: `[P]`, to begin with.
        row_bytes: of one copy's row, as it comes and in an unroll, in a hollow run.
    """
    metered, rows = isinstance(runtime, RayRuntime), StandIn(row_bytes[0] * config.num_envs)
    said = (Stepped(None, []), rows)
    workers = runtime.remote(
        worker, costs={"step": {"env_step": 1}}, returns={"step": said, "here": said}, spread=True
    )
    steps, action = config.unroll_length * config.num_envs, StandIn(8 * config.num_envs)
    serving = runtime.remote(
        server,
        costs={"answer": lambda weights, whose, *rows: {"batch": 1, "inference": len(whose)}},
        returns={
            "answer": lambda weights, whose, *rows: (
                None,
                *[action] * len(whose),
            ),
            "finish": (Report(steps, [], {}), StandIn(row_bytes[1] * steps)),
        },
    )
    acting = [serving.remote(config, index) for index in range(config.num_inference)]
    learning = _learning(runtime, learner, config, parameters)

    def make_worker(place: int, born: int) -> Any:
        return workers.remote(config, place, born)

    def make_learner(rank: int) -> Any:
        return learning.remote(config, rank, metered)

    fleet = Fleet(runtime, make_worker, config.num_workers, "step")
    group = LearnerGroup(runtime, make_learner, config.num_learners)
    return CentralFlow(runtime, fleet, acting, group, config)


def _learning(runtime: Runtime, learner: type, config: Any, parameters: np.ndarray) -> Any:
    """Learners to be made, with what they cost."""
    share = {"learn": config.unrolls_per_batch / config.num_learners}
    vector = Vector(0, parameters)
    made: tuple[Any, ...] = ({}, StandIn(parameters.nbytes))
    return runtime.remote(
        learner,
        costs={"update": {**share, "apply": 1}, "gradient": share, "apply": {"apply": 1}},
        returns={"update": made, "apply": made}
        | {"gradient": vector, "weights": vector, "newest": vector},
        **placed(config),
    )
