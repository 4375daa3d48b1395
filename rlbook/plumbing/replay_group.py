"""k learners with replay behind one name: each draw of theirs is dealt to them, and they answer.

    Draw: parts for learner 0 ──► learner 0 ─┐ k · U gradients, U means,  ┌─► metrics, weights
          parts for learner 1 ──► learner 1 ─┤ U equal steps of each      ├─► priorities of its rows
          …                                  ┘                            └─► …

On real processes each learner is called once for a draw, and they reduce among themselves. On the
virtual clock nobody can wait for another inside a call: there every gradient is handed on to every
learner, which takes the mean. All have the same parameters, the same optimiser and the same lots,
always: what learner 0 says of itself is true of all.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from rlbook.plumbing.learner_group import LearnerGroup
from rlbook.plumbing.memory_shard import ONE_LEARNER, Deal
from rlbook.plumbing.param_server import alive
from rlbook.plumbing.replay_server import Draw
from rlbook.plumbing.runtime import ActorDiedError, Reference, Runtime
from rlbook.plumbing.together import GroupBroken

PATIENCE_S = 10.0
"""How long the others are waited for, when a learner could not learn from a draw: if it was lost,
it was lost for all, and nobody began."""


class ReplayGroup(LearnerGroup):
    """k learners, which are `ReplayLearner`s.

    Args:
        runtime: where they live.
        make_learner: rank → a new learner's handle.
        size: k.
        updates: of each draw.
    """

    def __init__(
        self, runtime: Runtime, make_learner: Callable[[int], Any], size: int, updates: int
    ) -> None:
        super().__init__(runtime, make_learner, size)
        self.updates = updates
        self._failed: set[Reference] = set()
        """Metrics of draws that not all learners could learn from."""
        self.deal = Deal(size, updates) if size > 1 else ONE_LEARNER
        """How a draw is to be dealt to them."""

    def learn(self, draw: Draw) -> tuple[Reference, Reference, list[Reference]]:
        """All updates of a draw: references to metrics, to weights for the actors or None, and to
        the priorities for each part of the draw.
        """
        learners, each = self.learners, len(draw.parts) // len(self.learners)
        parts = [draw.parts[rank * each : (rank + 1) * each] for rank in range(len(learners))]
        if len(learners) == 1 or self._meets:
            calls = [
                learner.learn.options(num_returns=2 + each).remote(*mine)
                for learner, mine in zip(learners, parts, strict=True)
            ]
        else:
            calls = self._in_steps(parts)
        metrics, weights = calls[0][:2]
        self._answers[metrics] = [reference for call in calls for reference in call]
        return metrics, weights, [back for call in calls for back in call[2:]]

    def first(self, references: Collection[Reference]) -> Reference:
        """Waits for the first of these that is there, metrics of draws among them; or for those of
        a draw that another learner could not learn from: who waits for that one waits in vain.
        """
        while self._meets:
            others = {
                one: metrics
                for metrics, answers in self._answers.items()
                for one in self._metrics(answers)[1:]
                if one not in self._seen
            }
            (ready,), _ = self.runtime.wait([*references, *others])
            if ready in references:
                return ready
            self._seen.add(ready)
            if self._error(ready) is not None:
                self._failed.add(others[ready])
                return others[ready]
        (ready,), _ = self.runtime.wait(references)
        return ready

    def learnt(self, metrics: Reference) -> dict[str, float] | None:
        """The metrics of a draw; None if a part of it was lost with its shard, or if there was
        nothing to draw. An error of any learner is raised here.
        """
        answers = self._answers.pop(metrics)
        every = self._metrics(answers)
        self._seen.difference_update(every)
        try:  # they have added up, so that all are there at about the same time
            if metrics not in self._failed:
                return self.runtime.get(list(every if self._meets else every[:1]))[0]
            errors = self._errors(every)
        except Exception as error:
            errors = [error] if len(every) == 1 else self._errors(every)
        deaths = [error for error in errors if isinstance(error, ActorDiedError)]
        if len(deaths) == len(every) and self._all_alive():
            self._failed.discard(metrics)
            return None
        waiting = [one for answers in self._answers.values() for one in answers]
        self._errors([*answers, *waiting])  # what nobody has read Ray would print
        raised = [error for error in errors if not isinstance(error, GroupBroken)]
        raise (deaths or raised or errors)[0]  # who waited for others in vain is not to blame

    def weights(self) -> Reference:
        """The parameters that actors get now."""
        return self.learners[0].newest.remote()

    def state_dict(self) -> dict[str, Any]:
        """The state of every learner, which is the first one's; nothing may be in flight."""
        with self.runtime.off_the_clock():
            return self.runtime.get(self.learners[0].state_dict.remote())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`, with as many learners as there are now."""
        with self.runtime.off_the_clock():
            self.runtime.get([one.load_state_dict.remote(state) for one in self.learners])

    def _in_steps(self, parts: Sequence[Sequence[Reference]]) -> list[list[Reference]]:
        """The calls that do on a virtual clock what `learn` does."""
        learners = self.learners
        lowest = [one.begin.remote(*mine) for one, mine in zip(learners, parts, strict=True)]
        made: list[Any] = [None] * len(learners)
        for _ in range(self.updates):
            pairs = list(zip(learners, made, strict=True))
            gradients = [learner.share.remote(after, *lowest) for learner, after in pairs]
            made = [learner.apply.remote(*gradients) for learner in learners]
        ends = [learner.finish.options(num_returns=2 + len(parts[0])) for learner in learners]
        return [end.remote(after, *lowest) for end, after in zip(ends, made, strict=True)]

    def _errors(self, answers: Sequence[Reference]) -> list[Exception]:
        """What calls of learners raised, as far as they answer soon."""
        answers = list(dict.fromkeys(answers))
        there, _ = self.runtime.wait(answers, num_returns=len(answers), timeout=PATIENCE_S)
        return [error for answer in there if (error := self._error(answer)) is not None]

    def _error(self, answer: Reference) -> Exception | None:
        try:
            self.runtime.get(answer)
        except Exception as error:
            return error
        return None

    def _all_alive(self) -> bool:
        return all(alive(self.runtime, learner) for learner in self.learners)
