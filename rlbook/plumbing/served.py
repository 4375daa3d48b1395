"""Workers that send gradients to a parameter server whenever they have one: the driver's turns.

    served = Served(runtime, server, team)
    reports, receipts = served.turn()      whoever is first: its gradient is applied, it goes on
    reports, receipts = served.drain()     waits for all that is in flight

The wiring of chapter 06 with the rule "async", for other systems whose workers have
``gradient(*weights) -> (report, *pieces)``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from rlbook.plumbing.deeds import StandIn
from rlbook.plumbing.param_server import ParameterServer, server_units
from rlbook.plumbing.runtime import Runtime
from rlbook.plumbing.shard import Receipt, ServerSettings
from rlbook.plumbing.team import Team
from rlbook.plumbing.timeline import Timeline


class Served:
    """A team and its server, as a run conducts them.

    Args:
        runtime: where they live.
        server: applies gradients.
        team: workers; at the end of the constructor all of them are there.
    """

    def __init__(self, runtime: Runtime, server: ParameterServer, team: Team) -> None:
        self.runtime, self.server, self.team = runtime, server, team
        self._idle = set(range(len(team.workers)))
        """Who may have nothing to do; of thousands of workers not all are looked at each time."""
        team.settle()

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"server": self.server, "team": self.team, "runtime": self.runtime}

    @property
    def now(self) -> float:
        """The runtime's clock."""
        return self.runtime.now

    def pull(self, vector: np.ndarray) -> None:
        """Copies the newest parameters to `vector` `[P]`."""
        np.copyto(vector, self.server.weights())

    def turn(self) -> tuple[list[Any], list[Receipt]]:
        """Waits for the first gradient and hands it on; its worker goes on from what that gave."""
        team, server = self.team, self.server
        for index in sorted(self._idle):
            while team.may_start(index):
                team.start(index, server.pull(team.client(index)))
        self._idle.clear()
        if (answer := team.first()) is None:
            self._idle.update(range(len(team.workers)))
            return [], []
        self._idle.add(answer.worker)
        server.push(answer.pieces)
        # The newest receipts may still be on their way: nobody waits for them.
        return [answer.report], server.receipts(newest=4 * (1 + len(team.in_flight)))

    def drain(self) -> tuple[list[Any], list[Receipt]]:
        """Waits for all that is in flight and applies it."""
        answers = self.team.rest()
        self._idle.update(range(len(self.team.workers)))
        for answer in answers:
            self.server.push(answer.pieces)
        self.server.settle()
        return [answer.report for answer in answers], self.server.receipts()

    def timeline(self) -> Timeline:
        """Who worked on what."""
        return self.runtime.timeline()


def make_team(
    runtime: Runtime,
    kind: type,
    arguments: Callable[[int, int], tuple[Any, ...]],
    server: ParameterServer,
    *,
    size: int,
    calls_in_flight: int,
    steps: int,
    report: Any,
) -> Team:
    """Workers; on a virtual cluster a gradient costs `steps` times `env_step` and `inference`, and
    `learn` once.

    Args:
        runtime: where they live.
        kind: their class.
        arguments: (index, how many died in this place) → what it is made with.
        server: where the gradients go.
        size: N.
        calls_in_flight: gradients asked of a worker at once.
        steps: T.
        report: what stands in for a worker's report in a hollow run.
    """
    pieces = [StandIn(4 * (end - start)) for start, end in server.bounds]
    costs = {"gradient": {"env_step": steps, "inference": steps, "learn": 1}}
    returns = {"gradient": (report, *pieces)}
    remote = runtime.remote(kind, costs=costs, returns=returns, spread=True)

    def make_worker(index: int, born: int) -> Any:
        return remote.remote(*arguments(index, born))

    return Team(runtime, make_worker, server, size=size, calls_in_flight=calls_in_flight)


def units_of_worker(worker: Any, settings: ServerSettings) -> dict[str, Callable[[], object]]:
    """What `Cluster.measure` times, so that a virtual cluster is made of this computer's parts.

    Args:
        worker: has `envs`, `flat`, `act`, `unroll` and `differentiate`.
        settings: of the shards.
    """
    actions, unroll = np.zeros(worker.envs.num_envs, np.int64), worker.unroll()
    return server_units(worker.flat.vector.numpy(), settings) | {
        "env_step": lambda: worker.envs.step(actions),
        "inference": lambda: worker.act(worker.envs.env_output.observation),
        "learn": lambda: worker.differentiate(unroll),
    }
