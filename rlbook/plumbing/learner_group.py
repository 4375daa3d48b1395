"""k learners that make every update together: each has its share of a batch, all make one step.

                 share 0 ──► learner 0: gradient ─┐                 ┌─► the same step
    a batch ──┬─ share 1 ──► learner 1: gradient ─┼── all-reduce ───┼─► the same step
              └─ …                                ┘   (a mean)      └─► …

On real processes the learners meet in `torch.distributed` and reduce among themselves, on their
GPUs by NCCL or through the host by gloo (see :mod:`rlbook.plumbing.together`); the driver calls
each of them once for an update. On the virtual clock one thread plays all, and nobody can wait for
another inside a call: there each learner's gradient is handed on to every learner, which takes the
mean. All have the same parameters, always: whoever asks, asks learner 0.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from rlbook.parts.flat import Flat
from rlbook.parts.on_device import numbers, there
from rlbook.plumbing.devices import HostCopy
from rlbook.plumbing.joining import interface_of
from rlbook.plumbing.param_server import Alive
from rlbook.plumbing.runtime import RayRuntime, Reference, Runtime
from rlbook.plumbing.together import GroupBroken, Together


class Vector(NamedTuple):
    """All parameters on their way to the actors."""

    version: int
    """Updates that made them."""
    values: np.ndarray
    """`[P]`."""


class Share(NamedTuple):
    """The gradient of one learner's share of a batch."""

    gradient: np.ndarray
    """`[P]`; a view of the learner's own until it travels."""
    weight: float
    """In the mean: rows, where the loss is a mean over rows; 1 where it is a sum."""
    metrics: dict[str, float]


def combined(shares: Sequence[Share], average: bool) -> np.ndarray:
    """The gradient `[P]` of the whole batch: Σ w g, divided by Σ w if it is an average; 0 where no
    row of the batch counts.
    """
    if average and len(shares) == 1:  # x·w/w is not always x
        return shares[0].gradient
    total = np.sum([share.weight * share.gradient for share in shares], axis=0)
    return total / max(1.0, sum(share.weight for share in shares)) if average else total


class Ranked(Alive):
    """A learner that may be one of several: how they meet, and add up what each has.

    Args:
        flat: the parameters and gradients.
        config: of the system.
        average: the loss is a mean over rows, so that gradients count by their rows.
        metered: report how long it had no work (of the wall, so never on a virtual clock).
    """

    def __init__(
        self, flat: Flat, config: Any, average: bool = True, metered: bool = False
    ) -> None:
        self.flat, self.config, self.average, self.metered = flat, config, average, metered
        self.rank, self.size = 0, 1
        self.together: Together | None = None
        self._store: Any = None
        self._ended_at = time.perf_counter()

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.flat.vector.device

    def address(self) -> str:
        """This computer's, where others reach it."""
        import ray

        return ray.util.get_node_ip_address()

    def host(self, address: str) -> int:
        """Opens a meeting place at `address` (this computer's); its port."""
        from torch.distributed import TCPStore

        self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        return self._store.port

    def meet(self, address: str, port: int, rank: int, size: int) -> None:
        """Joins `size` learners as number `rank`; all must be called at once."""
        from torch import distributed

        own = address if address == "127.0.0.1" else self.address()
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(own)
        if own != "127.0.0.1":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface_of(own))
        store = self._store or distributed.TCPStore(address, port)
        backend = getattr(self.config, "learner_backend", "auto")
        self.together = Together(store, rank, size, self.device, backend, address)
        self.rank, self.size = rank, size

    def reduce(self, weight: float) -> None:
        """Makes the gradient of the whole batch of those of all shares, in its place; alone there
        is nothing to do.

        Args:
            weight: of the own gradient: its rows, where the loss is a mean over rows; else 1.
        """
        if self.together is None:
            return
        gradients, counts = self.flat.gradients, self.flat.weighted[-1:]
        gradients.mul_(weight)
        counts.fill_(weight)
        self.together.add(self.flat.weighted)
        if self.average:
            gradients.div_(counts.clamp(min=1))

    def lowest(self, numbers: np.ndarray) -> np.ndarray:
        """The least that any learner has of each of these numbers; they travel as float64."""
        if self.together is None:
            return numbers
        found = torch.from_numpy(numbers.astype(np.float64))
        self.together.lowest(found)
        return found.numpy()

    def leave(self) -> None:
        """Who waits for this one learns at once that it does not come."""
        if self.together is not None:
            self.together.leave()

    def idle(self, began: float) -> dict[str, float]:
        """Of the time since the update before ended, the part until this one `began`: nothing was
        there to do. Nothing to say if it is not metered.
        """
        if not self.metered:
            return {}
        before, self._ended_at = self._ended_at, time.perf_counter()
        return {"learner_idle_fraction": (began - before) / (self._ended_at - before)}


class Peer(Ranked):
    """A learner, alone or one of several. A system says how it finds a gradient, and makes a step.

    Args:
        flat: the parameters and gradients.
        config: of the system, with `loss_reduction` ("mean" over rows, or "sum"), `policy_delay`
            (updates by which parameters for the actors are held back) and `broadcast_period`
            (updates between two of them).
        metered: report how long it had no work (of the wall, so never on a virtual clock).
    """

    def __init__(self, flat: Flat, config: Any, metered: bool = False) -> None:
        super().__init__(flat, config, config.loss_reduction == "mean", metered)
        self.version = 0
        self.history = deque([self.newest()], maxlen=config.policy_delay + 1)

    def backward(self, *unrolls: Any) -> tuple[float, dict[str, Any]]:
        """Leaves the gradient of the loss on these unrolls in `flat.gradients`: its weight (see
        `reduce`), and metrics, numbers or tensors of one.
        """
        raise NotImplementedError

    def step(self, *arguments: Any) -> dict[str, Any]:
        """Moves the parameters along `flat.gradients`; metrics, likewise."""
        raise NotImplementedError

    def gradient(self, *unrolls: Any) -> Share:
        """What `backward` leaves, to be handed on to all learners."""
        weight, metrics = self.backward(*unrolls)
        return Share(self.flat.gradients.cpu().numpy(), weight, numbers(metrics))

    def update(
        self, arguments: Sequence[Any], *unrolls: Any
    ) -> tuple[dict[str, float], Vector | None]:
        """One step on these unrolls, and on the others' if they have met: metrics, and parameters
        for the actors if it is time.
        """
        began = time.perf_counter()
        try:
            weight, metrics = self.backward(*unrolls)
            self.reduce(weight)
            found, weights = self._moved(arguments, metrics)
        except Exception:
            self.leave()
            raise
        return found | self.idle(began), weights

    def apply(
        self, arguments: Sequence[Any], *shares: Share
    ) -> tuple[dict[str, float], Vector | None]:
        """One step along the gradient of all shares; losses are of the first share."""
        self.flat.gradients.copy_(there(combined(shares, self.average), self.device))
        return self._moved(arguments, shares[0].metrics)

    def newest(self) -> Vector:
        """The parameters after all updates so far."""
        return Vector(self.version, HostCopy(self.flat).take())

    def weights(self) -> Vector:
        """The parameters that actors get now."""
        return self.history[0]

    def state_dict(self) -> dict[str, Any]:
        """Parameters with their history, and the version."""
        history = [tuple(vector) for vector in self.history]
        return {"parameters": self.newest().values, "version": self.version, "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        HostCopy(self.flat).put(state["parameters"])
        self.version = state["version"]
        self.history.clear()
        self.history.extend(Vector(*kept) for kept in state["history"])

    def _moved(
        self, arguments: Sequence[Any], metrics: dict[str, Any]
    ) -> tuple[dict[str, float], Vector | None]:
        """One step along `flat.gradients`."""
        metrics = {**metrics, **self.step(*arguments)}
        self.version += 1
        arrived = HostCopy(self.flat).begin()  # parameters and metrics travel at once
        found = numbers(metrics)
        self.history.append(Vector(self.version, arrived()))
        return found, None if self.version % self.config.broadcast_period else self.weights()


class LearnerGroup:
    """k learners behind one name.

    Args:
        runtime: where they live.
        make_learner: rank → a new learner's handle (a `Peer`).
        size: k.
    """

    def __init__(self, runtime: Runtime, make_learner: Callable[[int], Any], size: int) -> None:
        self.runtime = runtime
        self.learners = [make_learner(rank) for rank in range(size)]
        self._answers: dict[Reference, list[Reference]] = {}
        """Metrics of an update by learner 0 → what all learners answer to it."""
        self._unasked: Sequence[Reference] = []
        self._seen: set[Reference] = set()
        """Metrics of others than learner 0 that are there, and no errors."""
        self._meets = size > 1 and isinstance(runtime, RayRuntime)
        if self._meets:
            self._introduce()

    def update(self, arguments: Sequence[Any], batch: Sequence[Reference]) -> list[Reference]:
        """One update of all, with their shares of a batch: references to metrics and weights.

        Args:
            arguments: of every learner's step.
            batch: references to unrolls, at least one for each learner.
        """
        size = len(self.learners)
        shares = [batch[rank::size] for rank in range(size)]
        pairs = list(zip(self.learners, shares, strict=True))
        if size == 1 or self._meets:
            calls = [
                learner.update.options(num_returns=2).remote(arguments, *share)
                for learner, share in pairs
            ]
        else:
            gradients = [learner.gradient.remote(*share) for learner, share in pairs]
            calls = [
                learner.apply.options(num_returns=2).remote(arguments, *gradients)
                for learner in self.learners
            ]
        metrics, weights = calls[0]
        self._answers[metrics] = [reference for call in calls for reference in call]
        return [metrics, weights]

    def answer(self, metrics: Reference) -> dict[str, float]:
        """The metrics of an update. An error of any learner is raised here."""
        answers = self._answers.pop(metrics, [metrics])
        first = self._metrics(answers) if self._meets else [metrics]
        self._seen.difference_update(first)
        try:  # they have added up, so that all are there at about the same time
            found, *_ = self.runtime.get(first)
        except Exception:
            raise self._cause(answers) from None
        return found

    def wait(
        self, references: Collection[Reference], timeout: float | None = None
    ) -> Reference | None:
        """The first of these that is there, metrics of updates among them; None: nothing in time.

        Meanwhile an error of any learner is raised here: the others would wait for it in vain, and
        those whose call never began (what it was to learn from is lost) have no way to tell them.
        """
        if not self._meets:  # as they are: what is waited for again is not searched
            ready, _ = self.runtime.wait(references, timeout=timeout)
            return ready[0] if ready else None
        while True:
            others = [ref for all_ in self._answers.values() for ref in self._metrics(all_)[1:]]
            watched = [ref for ref in others if ref not in self._seen]
            ready, _ = self.runtime.wait([*references, *watched], timeout=timeout)
            if not ready:
                return None
            if ready[0] in references:
                return ready[0]
            self._seen.add(ready[0])
            try:
                self.runtime.get(ready[0])
            except GroupBroken:
                answers = next(all_ for all_ in self._answers.values() if ready[0] in all_)
                raise self._cause(answers) from None

    def weights(self) -> Reference:
        """The parameters that actors get now."""
        return self.learners[0].weights.remote()

    def parameters(self) -> np.ndarray:
        """`[P]`, after all updates so far."""
        return self.runtime.get(self.learners[0].newest.remote()).values

    def settle(self) -> None:
        """Waits until all are there and have done what they were told."""
        self.runtime.get([learner.alive.remote() for learner in self.learners])

    def state_dict(self) -> dict[str, Any]:
        """The state of every learner; nothing may be in flight."""
        with self.runtime.off_the_clock():
            calls = [learner.state_dict.remote() for learner in self.learners]
            return {"learners": self.runtime.get(calls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        pairs = zip(self.learners, state["learners"], strict=True)
        with self.runtime.off_the_clock():
            self.runtime.get([learner.load_state_dict.remote(kept) for learner, kept in pairs])

    def _metrics(self, answers: Sequence[Reference]) -> Sequence[Reference]:
        """Of an update, those of each learner."""
        return answers[:: max(1, len(answers) // len(self.learners))]

    def _cause(self, answers: Sequence[Reference]) -> Exception:
        """Why an update failed: what one of them died of or raised. Who waited for the others in
        vain is not to blame, and who still does is not waited for.
        """
        in_vain, left = [], list(answers)
        while left:
            (reference,), left = self.runtime.wait(left)  # type: ignore[assignment]
            if (error := self._error(reference)) is None:
                continue
            if not isinstance(error, GroupBroken):
                # Ray prints errors that nobody has asked for: those that are there soon are asked
                # for, and the promise of the others is kept.
                self._unasked = left
                for one in self._soon(left):
                    self._error(one)
                return error
            in_vain.append(error)
        return in_vain[0]

    def _soon(self, references: Sequence[Reference]) -> Sequence[Reference]:
        """Those that are there within a second."""
        count = len(references)
        return self.runtime.wait(references, num_returns=count, timeout=1.0)[0] if count else []

    def _error(self, reference: Reference) -> Exception | None:
        """What a call of a learner raised; waits for it."""
        try:
            self.runtime.get(reference)
        except Exception as error:
            return error
        return None

    def _introduce(self) -> None:
        """The learners meet, at the first one's place."""
        learners, get = self.learners, self.runtime.get
        addresses = get([learner.address.remote() for learner in learners])
        address = addresses[0] if len(set(addresses)) > 1 else "127.0.0.1"
        port = get(learners[0].host.remote(address))
        get([one.meet.remote(address, port, r, len(learners)) for r, one in enumerate(learners)])
