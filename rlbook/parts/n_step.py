"""n-step transitions of a whole stretch at once, with priorities from the Q-values of acting.

    steps   s_0  s_1  …  s_{m-1}            m steps of B copies, [B, ...] each
    q       q_0  q_1  …  q_{m-1}  q_m       what the actor's network said before each, and after all
            └──── m − n + 1 starts ────►    transitions, and |R + Π γ d · max q_{t+k} − q_t(a_t)|

The same transitions as `NStepWindow` gives one step after the other, made by n operations on arrays
`[T, B]` instead of n · T on `[B]`. An actor has looked at all observations when it acted, so their
values cost no second forward pass (Ape-X, Horgan et al., 2018, section 3); only the observation at
which a stretch ends has not been looked at yet.
"""

from typing import Any

import numpy as np

from rlbook.data import Transition
from rlbook.parts.envs import Step
from rlbook.parts.frame_ring import FramedTransitions, framed

Place = tuple[np.ndarray, np.ndarray]
"""(row, copy) of N observations."""
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]
"""a_tm1, r_t and discount_t of N transitions."""
COLUMNS = ("a_tm1", "r_t", "discount_t", "ended", "valid")


class Trail:
    """The last steps of B copies (NEXT_STEP autoreset), and what they are worth.

    Args:
        n_step: n.
        discount: γ.
        frames: observations are stacks of frames, and transitions tell each frame once.
    """

    def __init__(self, n_step: int, discount: float, frames: bool = False) -> None:
        self.n_step, self.discount, self.frames = n_step, np.float32(discount), frames
        self.steps: list[Step] = []
        self.q: list[np.ndarray] = []

    def push(self, step: Step, q: np.ndarray) -> None:
        """One step, and q `[B, A]` of the observations before it."""
        self.steps.append(step)
        self.q.append(q)

    def fold(
        self, q_end: np.ndarray | None = None
    ) -> tuple[Transition | FramedTransitions, np.ndarray | None] | None:
        """All transitions that are complete, in the order of time, and forgets their first steps.

        A transition that meets the end of an episode stops there, with the discount of the steps
        really taken. None until there are n steps.

        Args:
            q_end: `[B, A]`, of the observations after the last step; without it there are no
                priorities.

        Returns:
            Transitions `[N, ...]`, N ≤ starts · B, and priorities `[N]` or None.
        """
        starts = len(self.steps) - self.n_step + 1
        if starts < 1:
            return None
        action, reward, discount, ended, valid = (
            np.stack([getattr(step, name) for step in self.steps]) for name in COLUMNS
        )
        r_t, d_t = reward[:starts].copy(), self.discount * discount[:starts]
        ahead = np.ones(r_t.shape, np.int64)
        alive = valid[:starts] & ~ended[:starts]
        for k in range(1, self.n_step):
            rows = slice(k, k + starts)
            r_t += np.where(alive, d_t * reward[rows], np.float32(0))
            d_t = np.where(alive, d_t * self.discount * discount[rows], d_t)
            ahead += alive
            alive &= ~ended[rows]
        steps, valid = valid, valid[:starts]
        first, copy = np.nonzero(valid)
        last = first + ahead[valid]
        columns = action[:starts][valid], r_t[valid], d_t[valid]
        transitions = self._shown(steps, (first, copy), (last, copy), columns)
        priorities = None
        if q_end is not None:
            q = np.stack([*self.q, q_end])
            after, before = self.best(q)[last, copy], self.taken(q[first, copy], columns[0])
            priorities = np.abs(columns[1] + columns[2] * after - before)
        del self.steps[:starts], self.q[:starts]
        return transitions, priorities

    def _shown(
        self, valid: np.ndarray, before: Place, after: Place, columns: Columns
    ) -> Transition | FramedTransitions:
        """Transitions with what they show; `valid` `[steps, B]`, of all."""
        rows = [*(step.obs_tm1 for step in self.steps), self.steps[-1].obs_t]
        if self.frames:
            begins = np.concatenate([np.zeros_like(valid[:1]), ~valid])
            return framed(rows, begins, before, after, columns)
        seen = np.stack(rows)
        return Transition(seen[before], *columns, seen[after])

    def best(self, q: np.ndarray) -> np.ndarray:
        """What the policy that is learnt would get, `[...]`, of q `[..., A]`."""
        return q.max(-1)

    def taken(self, q: np.ndarray, action: np.ndarray) -> np.ndarray:
        """What the actions taken `[N]` are worth, of q `[N, A]`."""
        return q[np.arange(len(q)), action]

    def state_dict(self) -> dict[str, Any]:
        """The steps that begin no finished transition yet, and their values."""
        return {"steps": [step._asdict() for step in self.steps], "q": list(self.q)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.steps, self.q = [Step(**step) for step in state["steps"]], list(state["q"])
