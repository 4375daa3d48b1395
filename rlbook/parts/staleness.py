"""How much a stored recurrent state is worth to parameters that did not make it (R2D2, 2019).

    truth      x_0 ──────────────────────────────► x_t ─── … ───► x_{t+m−1}    the whole episode
    replayed             state ─► x_{t−l} ─ burn-in ► x_t ─── … ───► x_{t+m−1}    a sequence
                                                       ΔQ first       ΔQ last

What a learner reads from a sequence begins with a state that older parameters made, or with zeros.
A burn-in mends part of that. ΔQ says how far the action values still are from those that the same
parameters would give if they had read the episode from its beginning (Kapturowski et al., 2019,
"Recurrent experience replay in distributed reinforcement learning", section 3).
"""

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.parts.recurrent_q import q_values
from rlbook.parts.sequences import Rows


@torch.no_grad()
def state_staleness(
    network: nn.Module,
    rows: Rows,
    *,
    length: int,
    burn_in: int,
    stored: bool,
    since: int | None = None,
) -> np.ndarray:
    """ΔQ = ‖q(ĥ) − q(h)‖₂ / |max q(ĥ)| at the first and the last step, `[2, N]`.

    ĥ is the state in a sequence, h the state after the whole episode so far; the maximum is over
    the actions and the m steps of the sequence.

    Args:
        network: with the parameters of today.
        rows: `[T, B, ...]` by an actor with parameters of some time ago, from where every copy's
            episode begins.
        length: m, at least 1.
        burn_in: l; sequences that begin earlier in their episode than that are left out.
        stored: begin the burn-in with the state that the actor had, or with zeros.
        since: step of an episode at which its first sequence begins, at least l, which it is by
            default; give the same for several l, and all are compared on the same sequences.

    Raises:
        ValueError: no sequence of l + m steps lies within one episode, or `since` is below l.
    """
    since = burn_in if since is None else since
    if since < burn_in:
        raise ValueError(f"since: must be at least burn_in, which is {burn_in}, got {since}")
    starts, copies = _windows(rows.valid, since, length)
    if not len(starts):
        raise ValueError(f"no {since} + {length} steps lie within one episode of these rows")
    begins = np.ones_like(rows.valid)
    begins[1:] = ~rows.valid[:-1]
    whole = _read(network, rows.observation, begins, None)
    index = starts + np.arange(-burn_in, length)[:, None]
    state = rows.hidden[index[0], copies], rows.cell[index[0], copies]
    if not stored:
        state = np.zeros_like(state[0]), np.zeros_like(state[1])
    none = np.zeros(index.shape, bool)
    q = _read(network, rows.observation[index, copies], none, state)[burn_in:]
    truth = whole[torch.from_numpy(index[burn_in:]), torch.from_numpy(copies)]
    size = q.amax(dim=(0, 2)).abs()
    ends = torch.stack([q[0] - truth[0], q[-1] - truth[-1]])
    return (torch.linalg.vector_norm(ends, dim=-1) / size).numpy()


def _windows(valid: np.ndarray, since: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and copies at which a sequence's steps may begin: every m steps of each episode."""
    found = []
    for copy in range(valid.shape[1]):
        ends = [*np.flatnonzero(~valid[:, copy]).tolist(), len(valid)]
        begin = 0
        for end in ends:
            found += [(at, copy) for at in range(begin + since, end - length + 1, length)]
            begin = end + 1
    pairs = np.array(found, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _read(
    network: nn.Module,
    observation: np.ndarray,
    first: np.ndarray,
    state: tuple[np.ndarray, np.ndarray] | None,
) -> Tensor:
    """q of rows `[T, N, ...]`, from a state or from none."""
    copies = observation.shape[1]
    before = (torch.zeros(copies, 0),) * 2
    if state is not None:
        before = torch.from_numpy(state[0]), torch.from_numpy(state[1])
    elif hasattr(network, "initial_state"):
        before = network.initial_state(copies)  # type: ignore[operator]
    return q_values(network, torch.from_numpy(observation), torch.from_numpy(first), before)[0]
