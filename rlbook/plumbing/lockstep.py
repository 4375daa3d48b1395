"""Workers that learn in lockstep, without a server: real ones that meet, and virtual ones.

    Lockstep    a crew of processes, or the ranks that torchrun started: one request is a whole
                round; sums go from worker to worker
    Conducted   the same round on a runtime, call by call: an `Adder` sums, a driver conducts

    round: collect · statistics ──► agree (everybody's) · for each minibatch: share ──► Σ ──► apply

A worker is a plain class with the methods above and `round()`, `report()` (which has `updates`),
`policy()`, `knowledge()`, `learn_from(knowledge)`, `join(meeting, rank, size)`.

All workers hold the same parameters, optimiser and statistics after every round. So when one dies,
a new one in its place learns them from whoever has made the most updates, what was collected in
this round is dropped, and the others go on.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from rlbook.parts.flat import Flat
from rlbook.plumbing.crew import Crew, CrewError
from rlbook.plumbing.deeds import StandIn
from rlbook.plumbing.group import Adder, Haste, Pace, SharedBoard
from rlbook.plumbing.param_server import alive
from rlbook.plumbing.runtime import ActorDiedError, Reference, Runtime
from rlbook.plumbing.timeline import Timeline
from rlbook.plumbing.torchrun import RankCrew, StoreBoard, launched, serve

PIECES = 8
"""A rollout that may be cut is asked for in so many pieces."""

Turn = tuple[list[Any], tuple[()]]
"""Reports by worker; none from a round that was lost with a worker."""


class Lockstep:
    """Processes that meet through `torch.distributed`: new ones on this computer, or, if torchrun
    started this one, it and the other ranks.

    Args:
        kind: the workers' class, made with (config, index, died in this place, True, board).
        config: of the system, with `num_workers`.
    """

    def __init__(self, kind: type, config: Any) -> None:
        self.crew = make_crew(kind, config)
        self.meetings = self.updates = self.mended = 0
        """Groups so far; updates in all rounds that were completed; rounds that were lost."""
        self._met = list(self.crew.born)
        """How many had died in each place when all met."""
        self._in_vain = 0
        """Rounds in a row that were lost though nobody had died."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="lockstep-")
        try:
            self.crew.__enter__()
        except BaseException:
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.crew.__exit__(*error)
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"workers": self}

    @property
    def now(self) -> float:
        """The wall's clock."""
        return self.crew.now

    def pull(self, network: torch.nn.Module, _: Flat) -> None:
        """Brings the newest parameters, and what else the policy needs, to `network`."""
        while True:
            self.crew.ask(0, "policy")
            if (answer := self.crew.first()) is not None:
                network.load_state_dict(answer[1])
                return
            self.mend()

    def turn(self) -> Turn:
        """One round of all."""
        self.agree()
        born, reports = list(self.crew.born), {}
        for index in range(self.crew.size):
            self.crew.ask(index, "round")
        waiting = set(range(self.crew.size))
        while waiting:
            if (answer := self.crew.first()) is not None:
                reports[answer[0]] = answer[1]
                waiting.discard(answer[0])
            waiting -= {index for index in waiting if self.crew.born[index] != born[index]}
        found: list[Any] = [reports.get(index) for index in range(self.crew.size)]
        if None in found or len({report.updates for report in found}) > 1:
            self.mend()
            return [], ()
        self.updates, self._in_vain = found[0].updates, 0
        return found, ()

    def drain(self) -> Turn:
        """Nothing is in flight between two rounds."""
        return [], ()

    def agree(self) -> None:
        """Sees to it that all have met, and that nobody is new among them."""
        while self.crew.born != self._met:
            self.mend()
        if not self.meetings:
            self.meet()

    def mend(self) -> None:
        """Everybody learns what the most advanced knows, and all meet anew.

        CrewError if nobody is left who knows what was learnt, or if it is in vain.
        """
        self.mended += 1
        best = max(self.crew.each("knowledge"), key=lambda known: known["updates"])
        self._in_vain += self.crew.born == self._met
        if self._in_vain > 3:
            raise CrewError("nobody dies, but rounds fail: does one take minutes for a rollout?")
        if best["updates"] < self.updates:
            raise CrewError("all workers died: resume from the last checkpoint")
        self.crew.each("learn_from", [(best,)] * self.crew.size)
        self.meet()

    def meet(self) -> None:
        """A new group of all."""
        assert self._folder is not None
        self.meetings, self._met = self.meetings + 1, list(self.crew.born)
        meeting = str(Path(self._folder.name) / f"meeting-{self.meetings}")
        size = self.crew.size
        self.crew.each("join", [(meeting, rank, size) for rank in range(size)])

    def timeline(self) -> Timeline:
        """Who worked on what."""
        return self.crew.timeline()

    def state_dict(self) -> dict[str, Any]:
        """The state of every worker; who died since the last round is replaced before."""
        while True:
            self.agree()
            state = self.crew.state_dict()
            if self.crew.born == self._met:
                return {**state, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.crew.load_state_dict(state)
        self.updates = state["updates"]


def make_crew(kind: type, config: Any) -> Crew:
    """Workers in new processes, or in the ranks that torchrun started.

    SystemExit in a rank other than 0, which has served until rank 0 let it go.
    """
    size = config.num_workers
    if (launch := launched()) is not None:
        if launch.rank:
            raise SystemExit(serve())
        board = StoreBoard(size) if Haste.of(config).on else None
        return RankCrew(kind, lambda index, born: (config, index, born, True, board), size)
    shared = SharedBoard(size)
    inherit = [shared.memory.descriptor]
    return Crew(kind, lambda index, born: (config, index, born, True, shared), size, inherit)


class Conducted:
    """The same rounds on a runtime, seeded and repeatable on a virtual one.

    Args:
        runtime: where the workers live.
        kind: their class, made with (config, index, how many died in this place).
        config: of the system, with `num_workers`, `minibatches` and what `Pace` and `Haste` need.
        report: what stands for a report on so many steps, in a hollow run.
        nbytes: of a gradient, there.
    """

    def __init__(
        self,
        runtime: Runtime,
        kind: type,
        config: Any,
        report: Callable[[int], Any],
        *,
        nbytes: int,
    ) -> None:
        self.runtime, self.config, self.minibatches = runtime, config, config.minibatches
        self.pace, self.haste = Pace.of(config), Haste.of(config)
        self._kind, self._report, self.nbytes = kind, report, nbytes
        self.born = [0] * self.pace.size
        self.workers = [self._make(index) for index in range(self.pace.size)]
        self.adder = self._make_adder()
        self.updates = self.mended = 0
        runtime.get([worker.alive.remote() for worker in [*self.workers, self.adder]])

    @property
    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"workers": self, "runtime": self.runtime}

    @property
    def now(self) -> float:
        """The runtime's clock."""
        return self.runtime.now

    def pull(self, network: torch.nn.Module, _: Flat) -> None:
        """Brings the newest parameters, and what else the policy needs, to `network`."""
        while True:
            try:
                state = self.runtime.get(self.workers[0].policy.remote())
            except ActorDiedError:
                self.mend()
                continue
            if state is not None:  # in a hollow run nobody has learnt anything
                network.load_state_dict(state)
            return

    def turn(self) -> Turn:
        """One round of all."""
        try:
            self.collect()
            reports = self.learn()
        except ActorDiedError:
            reports = []
        if not reports or len({report.updates for report in reports}) > 1:
            self.mend()
            return [], ()
        self.updates = reports[0].updates
        return reports, ()

    def drain(self) -> Turn:
        """Nothing is in flight between two rounds; who died since the last one is replaced."""
        try:
            self.runtime.get([one.alive.remote() for one in [*self.workers, self.adder]])
        except ActorDiedError:
            self.mend()
        return [], ()

    def collect(self) -> None:
        """Rollouts of all; who is slow is cut short, if the rule says so."""
        pace, begun, finished = self.pace, self.now, 0
        taken, asked = [0] * pace.size, {}
        pieces = PIECES if self.haste.on else 1

        def ask(index: int) -> Reference:
            length = pace.lengths[index]
            piece = min(-(-length // pieces), length - taken[index])
            taken[index] += piece
            return self.workers[index].collect.remote(piece)

        for index in range(pace.size):
            asked[ask(index)] = index
        while asked:
            (first,), _ = self.runtime.wait(asked)
            index = asked.pop(first)
            self.runtime.get(first)
            steps, length = taken[index], pace.lengths[index]
            if steps < length and not self.haste.cuts(steps, length, finished, pace.size - 1):
                asked[ask(index)] = index
            else:
                finished += 1
                pace.note(index, steps, self.now - begun)
                pace.lengths[index] = steps

    def learn(self) -> list[Any]:
        """Everybody's statistics, then one update with the sum of all for each minibatch."""
        workers = self.workers
        statistics = [worker.statistics.remote() for worker in workers]
        calls = [worker.agree.remote(*statistics) for worker in workers]
        for k in range(self.minibatches):
            total = self.adder.add.remote(*[worker.share.remote(k) for worker in workers])
            calls += [worker.apply.remote(total) for worker in workers]
        calls += [worker.report.remote() for worker in workers]
        reports = self.runtime.get(calls)[-len(workers) :]
        self.pace.lengths = [self.pace.length] * self.pace.size
        self.pace.deal()
        return reports

    def mend(self) -> None:
        """Puts new workers in the places of dead ones; they learn what the most advanced knows.

        ActorDiedError if nobody is left who knows what was learnt.
        """
        self.mended += 1
        if not alive(self.runtime, self.adder):
            self.adder = self._make_adder()
        for index in range(self.pace.size):
            if not alive(self.runtime, self.workers[index]):
                self.born[index] += 1
                self.workers[index] = self._make(index)
                self.pace.forget(index)
        known = [worker.knowledge.remote() for worker in self.workers]
        updates = [knowledge["updates"] for knowledge in self.runtime.get(known)]
        if max(updates) < self.updates:
            raise ActorDiedError("all workers died: resume from the last checkpoint")
        best = known[int(np.argmax(updates))]
        self.runtime.get([worker.learn_from.remote(best) for worker in self.workers])
        self.pace.lengths = [self.pace.length] * self.pace.size
        self.pace.deal()

    def timeline(self) -> Timeline:
        """Who worked on what."""
        return self.runtime.timeline()

    def state_dict(self) -> dict[str, Any]:
        """The state of every worker, and their pace."""
        with self.runtime.off_the_clock():
            states = self.runtime.get([worker.state_dict.remote() for worker in self.workers])
        return {"members": states, "pace": self.pace.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        pairs = zip(self.workers, state["members"], strict=True)
        with self.runtime.off_the_clock():
            self.runtime.get([worker.load_state_dict.remote(kept) for worker, kept in pairs])
        self.pace.load_state_dict(state["pace"])
        self.updates = state["updates"]

    def _make(self, index: int) -> Any:
        costs = rollout_costs(self.pace, index)
        returns = {
            "statistics": StandIn(24 * self.minibatches),
            # As much as each sends where all add up slices: 2 (N − 1) / N of it, there and back.
            "share": StandIn(self.nbytes // self.pace.size),
            "report": lambda: self._report(self.pace.lengths[index]),
            "knowledge": {"updates": 0},
        }
        chosen = {name: costs[name] for name in ("collect", "share")}
        remote = self.runtime.remote(self._kind, costs=chosen, returns=returns, spread=True)
        return remote.remote(self.config, index, self.born[index])

    def _make_adder(self) -> Any:
        returns = {"add": StandIn(self.nbytes)}
        return self.runtime.remote(Adder, costs={"add": {"add": 1}}, returns=returns).remote()


def rollout_costs(pace: Pace, index: int) -> dict[str, Any]:
    """What a worker's calls cost on a virtual cluster: "env_step" and "inference" for each step, a
    whole "learn" for a minibatch out of a rollout of T steps, a part for one out of fewer.
    """

    def collect(steps: int, *_: Any) -> dict[str, float]:
        return {"env_step": steps, "inference": steps}

    def learn(*_: Any) -> dict[str, float]:
        return {"learn": pace.lengths[index] / pace.length}

    return {"collect": collect, "rollout": collect, "share": learn, "gradient": learn}
