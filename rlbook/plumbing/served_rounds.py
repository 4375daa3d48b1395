"""Workers that collect once and send many gradients to a parameter server: the driver's turns.

    synchronous    rollouts of all · agree · for each minibatch: gradients of all ──► one update
    asynchronous   whoever comes first: its gradient is applied, and it goes on

A worker is a plain class with ``rollout(steps, *weights) -> (report, statistics)``,
``agree(*statistics)``, ``observe(*statistics)`` and ``gradient(k, *weights) -> (report, *pieces)``.
Statistics go from worker to worker as references: the driver does not open them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rlbook.parts.flat import Flat
from rlbook.plumbing.codecs import Identity
from rlbook.plumbing.deeds import StandIn
from rlbook.plumbing.devices import placed
from rlbook.plumbing.group import Pace
from rlbook.plumbing.lockstep import rollout_costs
from rlbook.plumbing.param_server import ParameterServer, shard_bounds
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime, Reference, Runtime
from rlbook.plumbing.shard import Gradient, Receipt, Weights
from rlbook.plumbing.team import Answer, Team
from rlbook.plumbing.timeline import Timeline

ROLLOUT = -1
"""What a worker is asked for before minibatch 0."""

Turn = tuple[list[Any], list[Receipt]]
"""What a turn brings: reports, and what became of earlier gradients."""


class ServedRounds:
    """A team and its server, as a run conducts them.

    Args:
        runtime: where they live.
        kind: the workers' class, made with (config, index, how many died in this place, metered).
        config: of the system: with `update_rule` "sync" each update waits for all gradients, of
            which each worker computes `minibatches` between two rollouts; with
            `normalize_observations` workers tell each other what they observed.
        report: what stands for a report on so many steps, in a hollow run.
        server: applies gradients.
    """

    def __init__(
        self,
        runtime: Runtime,
        kind: type,
        config: Any,
        report: Callable[[int], Any],
        server: ParameterServer,
    ) -> None:
        self.runtime, self.config, self.server, self.pace = runtime, config, server, Pace.of(config)
        self.minibatches, self.observing = config.minibatches, config.normalize_observations
        self._kind, self._report = kind, report
        self.stage = [ROLLOUT] * self.pace.size
        """Asynchronous: what each is asked for next."""
        self.team = Team(runtime, self._make, server, size=self.pace.size)
        self.team.settle()

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        parts = {"server": self.server, "team": self.team, "pace": self.pace}
        return parts | {"runtime": self.runtime}

    @property
    def now(self) -> float:
        """The runtime's clock."""
        return self.runtime.now

    def pull(self, network: torch.nn.Module, flat: Flat) -> None:
        """Brings the newest parameters to `flat`, and to `network` what else it needs."""
        if self.observing:
            self.settle()
            state = self.runtime.get(self.team.workers[0].policy.remote())
            if state is not None:  # in a hollow run nobody has observed anything
                network.load_state_dict(state)
        np.copyto(flat.vector.numpy(), self.server.weights())

    def turn(self) -> Turn:
        """A round of all, or one answer."""
        return self.synchronous() if self.config.update_rule == "sync" else self.asynchronous()

    def synchronous(self) -> Turn:
        """All collect; for each minibatch the mean of all gradients is one update."""
        team, server = self.team, self.server
        played = self.rollouts()
        who, learnt = [answer.worker for answer in played], played
        for index in who:
            team.workers[index].agree.remote(*[answer.pieces[0] for answer in played])
        for k in range(self.minibatches):
            weights = server.pull()
            for index in who:
                team.start(index, [k, *weights])
            learnt = team.rest()  # by worker: floats are added in the same order every time
            who = [answer.worker for answer in learnt]
            if learnt:
                server.push_together([answer.pieces for answer in learnt])
        self.welcome(set(range(self.pace.size)).difference(who))
        return [answer.report for answer in played + learnt], server.receipts()

    def rollouts(self) -> list[Answer]:
        """Of all workers with the same parameters; answers in the workers' order."""
        self.pace.deal()
        begun, weights, answers = self.now, self.server.pull(), []
        for index, length in enumerate(self.pace.lengths):
            self.team.start(index, [length, *weights], "rollout", 1)
        while self.team.in_flight:
            for answer in self.team.next():
                answers.append(answer)
                self.pace.note(answer.worker, self.pace.lengths[answer.worker], self.now - begun)
        return sorted(answers, key=lambda answer: answer.worker)

    def asynchronous(self, rollouts: bool = True) -> Turn:
        """Whoever comes first: its gradient is applied, and it goes on from what that gave."""
        team, server = self.team, self.server
        for index, k in enumerate(self.stage):
            if team.may_start(index) and k != ROLLOUT:
                team.start(index, [k, *server.pull()])
            elif team.may_start(index) and rollouts:
                team.start(index, [self.pace.length, *server.pull()], "rollout", 1)
        busy = {index for index, _ in team.in_flight.values()}
        if (answer := team.first()) is None:
            self.welcome(busy - {index for index, _ in team.in_flight.values()})
            return [], []
        k = self.stage[answer.worker]
        if k == ROLLOUT:
            self.tell(answer)
        else:
            server.push(answer.pieces)
        self.stage[answer.worker] = k + 1 if k + 1 < self.minibatches else ROLLOUT
        # The newest receipts may still be on their way: nobody waits for them.
        return [answer.report], server.receipts(newest=4 * (1 + len(team.in_flight)))

    def tell(self, answer: Answer) -> None:
        """Who collected goes by its own statistics; the others hear what it observed."""
        for index, worker in enumerate(self.team.workers):
            if index == answer.worker:
                worker.agree.remote(answer.pieces[0])
            elif self.observing:
                worker.observe.remote(answer.pieces[0])

    def drain(self) -> Turn:
        """Lets everybody finish its minibatches."""
        reports: list[Any] = []
        receipts: list[Receipt] = []
        while self.team.in_flight or any(k != ROLLOUT for k in self.stage):
            more, fates = self.asynchronous(rollouts=False)
            reports, receipts = reports + more, receipts + fates
        self.server.settle()
        self.settle()
        return reports, receipts + self.server.receipts()

    def settle(self) -> None:
        """Waits until all have done what they were told; welcomes those who are new by then."""
        try:
            self.runtime.get([worker.alive.remote() for worker in self.team.workers])
        except ActorDiedError:
            born = list(self.team.born)
            self.team.settle()
            self.welcome({i for i, before in enumerate(born) if self.team.born[i] != before})
            self.runtime.get([worker.alive.remote() for worker in self.team.workers])

    def welcome(self, new: set[int]) -> None:
        """Those who are new in a dead one's place begin with a rollout; an older one tells them
        what has been observed.

        ActorDiedError if nobody is left who knows that.
        """
        for index in new:
            self.stage[index] = ROLLOUT
            self.pace.forget(index)
        if new and self.observing:
            known = self.knowledge([i for i in range(self.pace.size) if i not in new])
            for index in new:
                self.team.workers[index].learn_from.remote(known)

    def knowledge(self, old: Sequence[int]) -> Reference:
        """Of the first of these who lives."""
        for index in old:
            known = self.team.workers[index].knowledge.remote()
            try:
                self.runtime.get(known)
            except ActorDiedError:
                continue
            return known
        raise ActorDiedError("all workers died: resume from the last checkpoint")

    def timeline(self) -> Timeline:
        """Who worked on what."""
        return self.runtime.timeline()

    def _make(self, index: int, born: int) -> Any:
        """A worker, with what its work costs and what stands in for it."""
        costs = rollout_costs(self.pace, index)
        pieces = [StandIn(4 * (end - start)) for start, end in self.server.bounds]

        def rollout(steps: int, *_: Weights) -> tuple[Any, StandIn]:
            return self._report(steps), StandIn(24 * self.minibatches)

        remote = self.runtime.remote(
            self._kind,
            costs={name: costs[name] for name in ("rollout", "gradient")},
            returns={"rollout": rollout, "gradient": (self._report(0), *pieces)},
            spread=True,
            **placed(self.config, self.pace.size),
        )
        return remote.remote(self.config, index, born, isinstance(self.runtime, RayRuntime))


def in_pieces(gradient: np.ndarray, weights: Sequence[Weights], samples: int) -> list[Gradient]:
    """A gradient `[P]`, mean over so many `samples`, computed from all of `weights`: a piece for
    each shard that gave them.
    """
    bounds = shard_bounds(len(gradient), len(weights))
    return [
        Gradient(Identity().encode(gradient[start:end]), piece.version, samples, 0.0)
        for piece, (start, end) in zip(weights, bounds, strict=True)
    ]
