"""A learner with replay behind a server that acts: whole unrolls in, parameters out.

    unrolls [T+1, B] ──► cut into sequences ──► replay memory, by p ──► fit(sample) ──► priorities
                         one cutter a place      (here, in this process)   │   as often as is owed
                                                                           └──► newest parameters

The server that acts puts the unrolls together, with the recurrent state before every row, so that
nobody else need know of sequences. An update answers when all is learnt that the unrolls brought:
whoever waits for it has acting and learning in step.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rlbook.data import Unroll
from rlbook.parts.central_acting import QOutput, ladder
from rlbook.parts.envs import Episode
from rlbook.parts.flat import Flat
from rlbook.parts.on_device import means, on_host
from rlbook.parts.replay import PrioritizedReplay, Sample
from rlbook.parts.sequence_loss import priority, sequence_loss, td_errors
from rlbook.parts.sequences import Rows, SequenceCutter, as_tensors
from rlbook.plumbing.central import Finished
from rlbook.plumbing.devices import HostCopy, autocast
from rlbook.plumbing.learner_group import Peer
from rlbook.plumbing.rate_limiter import RateLimiter


@dataclass(frozen=True, kw_only=True)
class SequenceFields:
    """What a config tells a learner with replay."""

    sequence_length: int = 10
    """m, steps of a sequence to learn from (80 in R2D2's paper)."""
    sequence_overlap: int = 5
    """Steps that neighbours share (40 there)."""
    burn_in_length: int = 5
    """l, steps before them that only warm up the state (40 there)."""
    state_init: Literal["stored", "zero"] = "stored"
    """Recurrent state before the burn-in: the server's, or zeros."""
    n_step: int = 5
    """n, steps of reward before the bootstrap (5 there)."""
    double: bool = True
    """Choose the next action by the online network, value it by the target network."""
    rescaling_epsilon: float | None = 1e-3
    """ε of h, with h(Q) learnt instead of Q (1e-3 there); None learns Q."""
    priority_mix: float = 0.9
    """η: how much of a sequence's priority is its largest |δ| (0.9 there)."""
    priority_exponent: float = 0.9
    """α (0.9 there)."""
    importance_exponent: float = 0.6
    """β (0.6 there)."""
    epsilon_base: float = 0.4
    """ε of the most exploring copy (0.4 there)."""
    epsilon_alpha: float = 7.0
    """The least exploring one has base^(1 + this) (7 there)."""
    scored_fraction: float = 0.25
    """Part of the copies, those that explore least, whose episodes are the score."""
    batch_size: int = 32
    """Sequences of one update (64 there)."""
    samples_per_insert: float = 8.0
    """Steps drawn to learn from, for each that a worker takes (about 1.5 there)."""
    replay_capacity: int = 10_000
    """Sequences in the replay memory (100 000 there)."""
    learning_starts: int = 100
    """Sequences in the replay memory before the first update."""
    target_period: int = 100
    """Updates between copies to the target network (2500 there)."""
    adam_epsilon: float = 1e-5
    """ε of Adam (1e-3 there)."""
    dueling: bool = True
    """Separate heads for the value and the advantages."""

    def check_sequences(self: Any) -> None:
        """ValueError, with the field's name, for the first value that is out of range."""
        least = {"sequence_length": 1, "n_step": 1, "batch_size": 1, "learning_starts": 1}
        least |= {"target_period": 1, "replay_capacity": self.learning_starts}
        least |= dict.fromkeys(("sequence_overlap", "burn_in_length", "epsilon_alpha"), 0)
        least |= dict.fromkeys(("priority_exponent", "importance_exponent"), 0)
        for name, minimum in least.items():
            if not (value := getattr(self, name)) >= minimum:
                raise ValueError(f"{name}: must be at least {minimum}, got {value}")
        for name in ("priority_mix", "epsilon_base"):
            if not 0.0 <= (value := getattr(self, name)) <= 1.0:
                raise ValueError(f"{name}: must be between 0.0 and 1.0, got {value}")
        for name in ("samples_per_insert", "adam_epsilon", "rescaling_epsilon"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}: must be larger than 0, got {value}")
        if self.sequence_overlap >= (m := self.sequence_length):
            got = f"which is {m}, got {self.sequence_overlap}"
            raise ValueError(f"sequence_overlap: must be less than sequence_length, {got}")
        if self.update_rule != "sync" and self.unrolls_per_batch > 1:
            raise ValueError(
                "unrolls_per_batch: must be 1 with replay, for sequences run on from one unroll to"
                " the next, and those that fill no batch are dropped"
            )
        if self.state_init not in ("stored", "zero"):
            raise ValueError(f"state_init: must be one of stored, zero; got {self.state_init!r}")

    @property
    def epsilons(self: Any) -> np.ndarray:
        """ε of every copy, `[places, B]`."""
        places = self.all_envs // self.num_envs
        return ladder(places, self.num_envs, self.epsilon_base, self.epsilon_alpha)


def scored(config: Any, came: Finished) -> list[Episode]:
    """The episodes that are the score: with `learner` "r2d2" of the copies that explore least."""
    if config.learner != "r2d2":
        return came.report.episodes
    found, most = config.epsilons, max(1, round(config.scored_fraction * config.all_envs))
    limit, mine = np.sort(found, None)[most - 1], found[came.place]
    return [one for one in came.report.episodes if mine[one.env] <= limit]


class SequencePeer(Peer):
    """Keeps what it is given as sequences, and fits a network to draws of them.

    Args:
        online: network that is learnt, of those that `sequence_loss` knows.
        target: of an equal shape; begins as a copy.
        config: of the system, with `SequenceFields`, `learning_rate` and `max_gradient_norm`.
        metered: report how long it had no work.
    """

    def __init__(
        self, online: nn.Module, target: nn.Module, config: Any, metered: bool = False
    ) -> None:
        super().__init__(Flat(online), config, metered)
        self.network, self.target, self.flat_target = online, target, Flat(target)
        self.flat_target.vector.copy_(self.flat.vector)
        rate, epsilon = config.learning_rate, config.adam_epsilon
        self.optimizer = torch.optim.Adam([self.flat.vector], lr=rate, eps=epsilon)
        exponents = config.priority_exponent, config.importance_exponent
        self.memory: PrioritizedReplay[Any] = PrioritizedReplay(
            config.replay_capacity, *exponents, config.seed
        )
        self.limiter = RateLimiter(config.samples_per_insert, config.learning_starts, 0.0)
        self.cutters: dict[int, SequenceCutter] = {}
        """By place."""
        self.updates = 0

    def fit(self, sample: Sample[Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """One step of the optimiser: (the sequences' new priorities `[N]`, metrics). Of a GPU the
        priorities alone are waited for, without which nothing can be drawn.
        """
        with autocast(self.config, self.device):
            loss, priorities, found = sequence_loss(self.network, self.target, sample, self.config)
        self.flat.gradients.zero_()
        loss.backward()
        norm = self.flat.clipped(self.config.max_gradient_norm)
        self.optimizer.step()
        self.updates += 1
        if self.updates % self.config.target_period == 0:
            self.flat_target.vector.copy_(self.flat.vector)
        return priorities.cpu().numpy(), {**found, "gradient_norm": norm}

    def backward(self, *unrolls: Unroll) -> tuple[float, dict[str, Any]]:
        """Keeps the unrolls and learns as often as is owed for them: no gradient is left, but means
        of the metrics, and "learner_steps", how often.
        """
        found, rows = [], self.config.batch_size
        for unroll in unrolls:
            self.keep(unroll)
        while self.limiter.may_draw(rows, len(self.memory)):
            self.limiter.draw(rows)
            sample = self.memory.sample(rows)
            priorities, metrics = self.fit(sample)
            self.memory.update_priorities(sample.keys, priorities)
            found.append(metrics)
        counts = {"learner_steps": len(found), "replay_size": float(len(self.memory))}
        return 1.0, means(found) | counts

    def step(self, env_steps: int) -> dict[str, float]:
        """Nothing: all steps are made."""
        return {}

    def keep(self, unroll: Unroll) -> None:
        """Cuts an unroll into sequences; priorities by the action values of acting."""
        rows = rows_of(unroll)
        found = self._cutter(unroll).push(rows)
        if found is not None:
            sequences, q = found
            batch, values = as_tensors(sequences), torch.from_numpy(q)
            errors = td_errors(values, values, batch, self.config)
            self.memory.add(sequences, priority(errors, batch, self.config).numpy())
        self.limiter.insert(rows.action.size / self.config.sequence_length, len(self.memory))

    def state_dict(self) -> dict[str, Any]:
        """Both networks, the optimiser, the replay memory, what is not yet cut, and counts."""
        cutters = [[place, cutter.state_dict()] for place, cutter in sorted(self.cutters.items())]
        return {
            **super().state_dict(),
            "target": HostCopy(self.flat_target).take(),
            "optimizer": on_host(self.optimizer.state_dict()),
            "memory": self.memory.state_dict(),
            "limiter": self.limiter.state_dict(),
            "cutters": cutters,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        super().load_state_dict(state)
        HostCopy(self.flat_target).put(state["target"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory.load_state_dict(state["memory"])
        self.limiter.load_state_dict(state["limiter"])
        self.updates, self.cutters = state["updates"], {}
        for place, kept in state["cutters"]:
            self.cutters[place] = self._new_cutter(len(kept["begins"]))
            self.cutters[place].load_state_dict(kept)

    def _cutter(self, unroll: Unroll) -> SequenceCutter:
        """Of the unroll's place; what is not yet cut there is forgotten if the unroll does not
        follow from it: its worker died, or its episodes were begun anew after a rest.
        """
        first = unroll.env_outputs.first[0]
        cutter = self.cutters.get(unroll.actor)
        if cutter is None:
            cutter = self.cutters[unroll.actor] = self._new_cutter(len(first))
        elif unroll.begins or (first & cutter.rows.valid[-1]).any():  # type: ignore[union-attr]
            cutter.clear()
        return cutter

    def _new_cutter(self, copies: int) -> SequenceCutter:
        config = self.config
        return SequenceCutter(
            copies,
            burn_in=config.burn_in_length,
            length=config.sequence_length,
            overlap=config.sequence_overlap,
            tail=config.n_step,
        )


def rows_of(unroll: Unroll) -> Rows:
    """What a server's unroll of a Q-network holds, as rows to be cut: arrays `[T, B, ...]`."""
    seen, said = unroll.env_outputs, unroll.agent_outputs
    assert isinstance(said, QOutput)
    after = seen.reward[1:], seen.discount[1:], unroll.valid
    return Rows(seen.observation[:-1], said.action, *after, said.q, said.hidden, said.cell)
