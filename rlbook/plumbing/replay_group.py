"""k learners with replay behind one name: each draw of theirs is dealt to them, and they answer.

    Draw: parts for learner 0 ──► learner 0 ─┐ k · U gradients, U means,  ┌─► metrics, weights
          parts for learner 1 ──► learner 1 ─┤ U equal steps of each      ├─► priorities of its rows
          …                                  ┘                            └─► …

On real processes each learner is called once for a draw, and they reduce among themselves. On the
virtual clock nobody can wait for another inside a call: there every gradient is handed on to every
learner, which takes the mean. All have the same parameters, the same optimiser and the same lots,
always: what learner 0 says of itself is true of all.
"""

from collections.abc import Callable, Sequence
from typing import Any

from rlbook.plumbing.learner_group import LearnerGroup
from rlbook.plumbing.memory_shard import ONE_LEARNER, Deal
from rlbook.plumbing.param_server import alive
from rlbook.plumbing.replay_server import Draw
from rlbook.plumbing.runtime import ActorDiedError, Reference, Runtime
from rlbook.plumbing.together import GroupBroken


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
        self._answers[metrics] = [call[0] for call in calls]
        return metrics, weights, [back for call in calls for back in call[2:]]

    def answer(self, metrics: Reference) -> dict[str, float] | None:
        """The metrics of a draw; None if a part of it was lost with its shard, or if there was
        nothing to draw. An error of any learner is raised here.
        """
        answers = self._answers.pop(metrics)
        try:  # they have added up, so that all are there at about the same time
            return self.runtime.get(answers if self._meets else answers[:1])[0]
        except Exception:
            errors = [error for answer in answers if (error := self._error(answer)) is not None]
        deaths = [error for error in errors if isinstance(error, ActorDiedError)]
        if len(deaths) == len(errors) and self._all_alive():
            return None
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

    def _error(self, answer: Reference) -> Exception | None:
        """What a call of a learner raised; waits for it."""
        try:
            self.runtime.get(answer)
        except Exception as error:
            return error
        return None

    def _all_alive(self) -> bool:
        return all(alive(self.runtime, learner) for learner in self.learners)
