"""Cuts the streams of B environments into sequences with overlap that never cross an episode.

    an episode      x_0 x_1 x_2 x_3 x_4 x_5 x_6 x_7 x_8 x_9 x_10        x_10 is its end
    sequence 0   ·   · │x_0 x_1 x_2 x_3│x_4 x_5                         l = 2 rows of burn-in
    sequence 1          x_0 x_1│x_2 x_3 x_4 x_5│x_6 x_7                 m = 4 steps to learn from
    sequence 2              x_2 x_3│x_4 x_5 x_6 x_7│x_8 x_9             n = 2 rows to bootstrap from
    sequence 3                      x_4 x_5│x_6 x_7 x_8 x_9│x_10 ·      · is padding; overlap 2

A sequence is l + m + n rows. Its m steps are learnt from; the l rows before them, the *burn-in*,
only warm a recurrent state up; the n rows after them are there for n-step targets to bootstrap
from, so that every step has a full one. Where an episode begins there is nothing to warm up: the
state is known to be zero, and the rows of the burn-in are padding. So every step of an episode is
learnt from, its first ones too. Where it ends, what is missing is padding.

The recurrent state that is stored is the one before row 0: (h, c), as the actor had it. How a
network reads sequences again, with its burn-in, is here too.

Where observations are stacks of k frames (`rlbook.parts.frames`) a sequence holds each frame once:
the k − 1 older ones of row 0, then one a row. So it travels and lies in replay in about 1/k of the
bytes; who learns from it makes stacks of them where it computes (`unpacked`).
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlbook.parts.envs import Envs
from rlbook.parts.frames import restacked
from rlbook.parts.on_device import widened
from rlbook.parts.q_learning import epsilon_greedy
from rlbook.parts.recurrent_q import QActor, q_values


class Sequence(NamedTuple):
    """l + m + n rows of one episode: arrays `[N, ...]`, R = l + m + n. Padding is 0 and False.

    Row t is the step x_t → x_{t+1}, so that the last row has an observation alone.
    """

    observation: Any
    """`[N, R, ...]`; of stacks of k frames each once, `[N, R+k-1, H, W]`."""
    action: Any
    """int64 `[N, R-1]`."""
    reward: Any
    """`[N, R-1]`, for the action of the same row."""
    discount: Any
    """`[N, R-1]`: 0.0 where that action led to a terminal observation, else 1.0."""
    valid: Any
    """bool `[N, R-1]`: a step of the episode; False on padding and where the episode has ended."""
    hidden: Any
    """`[N, H]`: h before row 0; H = 0 without memory."""
    cell: Any
    """`[N, H]`: c likewise."""

    @classmethod
    def blank(
        cls, observation: np.ndarray, rows: int, lstm_size: int, planes: int = 1
    ) -> "Sequence":
        """One sequence `[R, ...]` of padding: the shapes and types that all have.

        Args:
            observation: one, of any values.
            rows: R.
            lstm_size: H.
            planes: k, where it is a stack of frames.
        """
        shape = observation.shape[planes > 1 :]
        seen = np.zeros((rows + planes - 1, *shape), observation.dtype)
        action, valid = np.zeros(rows - 1, np.int64), np.zeros(rows - 1, bool)
        zeros, state = np.zeros(rows - 1, np.float32), np.zeros(lstm_size, np.float32)
        return cls(seen, action, zeros, zeros, valid, state, state)


class Rows(NamedTuple):
    """What an actor saw, did and thought: arrays `[T, B, ...]`."""

    observation: Any
    """x_t; in a cutter that was told of planes, of each its newest."""
    action: Any
    reward: Any
    """For that action."""
    discount: Any
    """0.0 where it led to a terminal observation."""
    valid: Any
    """False where x_t is the last of an episode, so that the action led nowhere."""
    q: Any
    """Q(x_t, ·) as the actor had it, `[T, B, A]`."""
    hidden: Any
    """h before row t, `[T, B, H]`."""
    cell: Any
    """c likewise."""


def stacked(rows: list[Rows]) -> Rows:
    """Rows `[B, ...]` one after the other: `[T, B, ...]`."""
    return Rows(*(np.stack(column) for column in zip(*rows, strict=True)))


class SequenceCutter:
    """Holds what is not yet cut of B streams.

    Args:
        num_envs: B.
        burn_in: l.
        length: m, steps to learn from.
        overlap: steps that two neighbours share, less than m: they begin m − overlap apart.
        tail: n, rows after them.
        planes: k, where observations are stacks of frames: of each only the newest is kept.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        burn_in: int,
        length: int,
        overlap: int,
        tail: int,
        planes: int = 1,
    ) -> None:
        if not 0 <= overlap < length or burn_in < 0 or tail < 1:
            raise ValueError(
                f"sequences need 0 <= overlap < length, burn_in >= 0 and tail >= 1, got overlap"
                f" {overlap}, length {length}, burn_in {burn_in}, tail {tail}"
            )
        self.burn_in, self.length, self.overlap, self.tail = burn_in, length, overlap, tail
        self.older = planes - 1
        """Frames from before its first row that a sequence has."""
        self.rows: Rows | None = None
        """What may be needed again."""
        self.begins = np.zeros(num_envs, np.int64)
        """Row in which each copy's episode began, counted from the first of `rows`."""
        self.starts = np.zeros(num_envs, np.int64)
        """Row of the first step to learn from of each copy's next sequence."""

    def push(self, rows: Rows) -> tuple[Sequence, np.ndarray] | None:
        """The sequences that these rows `[T, B, ...]` complete; None if there are none.

        Returns:
            N sequences, and Q of their m + n last rows as the actor had it, `[m + n, N, A]`.
        """
        if self.older:
            rows = rows._replace(observation=rows.observation[:, :, -1])
        if self.rows is not None:
            pairs = zip(self.rows, rows, strict=True)
            rows = Rows(*(np.concatenate(pair) for pair in pairs))
        windows = [w for env in range(len(self.starts)) for w in self._windows(env, rows.valid)]
        found = self._gathered(rows, np.array(windows)) if windows else None
        unneeded = max(0, int(self.starts.min()) - self.burn_in - self.older)
        self.rows = Rows(*(column[unneeded:].copy() for column in rows))
        self.starts -= unneeded
        self.begins -= unneeded
        return found

    def _windows(self, env: int, valid: np.ndarray) -> list[tuple[int, int, int, int]]:
        """(copy, first row of the episode, first step to learn from, last row of the episode) of
        each sequence that is complete; an episode that goes on has no last row yet.
        """
        begin, start = int(self.begins[env]), int(self.starts[env])
        rows, found = len(valid), []
        ends = np.flatnonzero(~valid[start:, env]) + start
        for end in [*ends.tolist(), None]:
            last = rows if end is None else end
            while self._is_due(start, begin, end, rows):
                found.append((env, begin, start, last))
                start += self.length - self.overlap
            if end is not None:
                begin = start = end + 1
        self.begins[env], self.starts[env] = begin, start
        return found

    def _is_due(self, start: int, begin: int, end: int | None, rows: int) -> bool:
        """Whether a sequence that begins at `start` is complete, and has a step of its own."""
        if end is None:
            return start + self.length + self.tail <= rows
        return start == begin or start + self.overlap < end

    def _gathered(self, rows: Rows, windows: np.ndarray) -> tuple[Sequence, np.ndarray]:
        env, begin, start, last = (column[:, None] for column in windows.T)
        size = self.burn_in + self.length + self.tail
        index = start - self.burn_in + np.arange(-self.older, size)
        there = (index >= begin) & (index <= last)
        index = np.clip(index, 0, len(rows.valid) - 1)
        seen = _masked(rows.observation[index, env], there)
        index, there = index[:, self.older :], there[:, self.older :]
        steps, valid = index[:, :-1], there[:, :-1] & rows.valid[index[:, :-1], env]
        sequence = Sequence(
            seen,
            _masked(rows.action[steps, env], valid),
            _masked(rows.reward[steps, env], valid),
            _masked(rows.discount[steps, env], valid),
            valid,
            _masked(rows.hidden[index[:, 0], env[:, 0]], there[:, 0]),
            _masked(rows.cell[index[:, 0], env[:, 0]], there[:, 0]),
        )
        q = _masked(rows.q[index, env], there)[:, self.burn_in :]
        return sequence, q.swapaxes(0, 1)

    def state_dict(self) -> dict[str, Any]:
        """What is not yet cut."""
        rows = None if self.rows is None else self.rows._asdict()
        return {"rows": rows, "begins": self.begins.copy(), "starts": self.starts.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        self.rows = None if state["rows"] is None else Rows(**state["rows"])
        self.begins, self.starts = state["begins"].copy(), state["starts"].copy()

    def clear(self) -> None:
        """Forgets all: every copy begins an episode now."""
        self.rows = None
        self.begins[:] = self.starts[:] = 0


def _masked(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`values` `[N, ..., more]` with 0 where `mask` `[N, ...]` is False."""
    values[~mask] = 0
    return values


def as_tensors(sequences: Sequence) -> Sequence:
    """Arrays `[N, R, ...]` as tensors with time first, `[R, N, ...]`; states stay `[N, H]`."""
    # Arrays from another process are read-only, which PyTorch does not know.
    tensors = [torch.from_numpy(np.require(column, None, "W")) for column in sequences]
    return Sequence(*(column.transpose(0, 1) for column in tensors[:5]), *tensors[5:])


def unpacked(batch: Sequence, valid: np.ndarray) -> Sequence:
    """A batch with whole observations `[R, N, ...]`, where it has frames, each told once.

    Args:
        batch: as tensors, time first, anywhere.
        valid: that of the batch, `[R-1, N]`, on the host.
    """
    if len(batch.observation) == len(valid) + 1:
        return batch
    padding = np.ones((len(valid) + 1, *valid.shape[1:]), bool)
    padding[:-1] &= ~valid
    padding[1:] &= ~valid  # an episode's last row, from which no step begins
    return batch._replace(observation=restacked(batch.observation, padding))


def first_rows(valid: Tensor) -> Tensor:
    """Where an episode begins behind padding, `[R, N]` bool, from `valid` `[R-1, N]`.

    Never row 0: what comes before it is the stored state, which is zero at an episode's beginning.
    """
    begins = valid.new_zeros(len(valid) + 1, *valid.shape[1:], dtype=torch.bool)
    begins[1:-1] = valid[1:] & ~valid[:-1]
    return begins


def read_again(network: nn.Module, batch: Sequence, *, burn_in: int, stored: bool) -> Tensor:
    """q of the rows behind the burn-in, `[m + n, N, A]`.

    The burn-in is read without gradient; what the network makes of it is the state before the rest.

    Args:
        network: a `QNetwork` or a `RecurrentQNetwork`.
        batch: as tensors, time first.
        burn_in: l.
        stored: begin with the state that the actor had, or with zeros.
    """
    begins, state = first_rows(batch.valid), (batch.hidden, batch.cell)
    if not stored:
        state = torch.zeros_like(batch.hidden), torch.zeros_like(batch.cell)
    if burn_in:
        with torch.no_grad():
            _, state = q_values(network, batch.observation[:burn_in], begins[:burn_in], state)
    return widened(q_values(network, batch.observation[burn_in:], begins[burn_in:], state)[0])


class SequencePlayer:
    """B copies of an environment, played ε-greedily by one network: steps in, sequences out.

    Args:
        envs: the copies (NEXT_STEP autoreset).
        network: gives q, with or without memory; whoever owns it may change its parameters.
        epsilon: `[B]`, of each copy.
        seed: of the random actions.
        shape: of a sequence: `burn_in`, `length`, `overlap`, `tail` (see `SequenceCutter`).
    """

    def __init__(
        self,
        envs: Envs,
        network: nn.Module,
        epsilon: np.ndarray,
        seed: int,
        **shape: int,
    ) -> None:
        self.envs, self.epsilon = envs, epsilon
        self.cutter = SequenceCutter(envs.num_envs, **shape, planes=envs.planes)
        self.memory = QActor(network, envs.num_envs)
        self.rng = np.random.default_rng([seed, 1])

    def rows(self, steps: int) -> Rows:
        """So many steps of every copy: what it saw, did and thought, `[T, B, ...]`."""
        return stacked([self.step() for _ in range(steps)])

    def step(self) -> Rows:
        """One step of every copy, `[B, ...]`."""
        row = self.envs.env_output
        q, state = self.values(row.observation, row.first)
        action = epsilon_greedy(q, self.epsilon, self.rng)
        after = self.envs.step(action)
        return Rows(row.observation, action, after.reward, after.discount, ~after.first, q, *state)

    def values(
        self, observation: np.ndarray, first: np.ndarray
    ) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """See `QActor.values`."""
        return self.memory.values(observation, first)

    def state_dict(self) -> dict[str, Any]:
        """Environments, recurrent state, what is not yet cut, random generator."""
        parts = {name: getattr(self, name).state_dict() for name in ("envs", "memory", "cutter")}
        return parts | {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`; nothing is uncut if the episodes were begun anew."""
        for name in ("envs", "memory", "cutter"):
            getattr(self, name).load_state_dict(state[name])
        if self.envs.restarted:
            self.cutter.clear()
        self.rng.bit_generator.state = state["rng"]
