"""One shard of a parameter server, and a local server that adds gradients up before it.

    Shard:       a slice of the parameters · the optimiser's state for it · a version · a gate
      pull()             ──► Weights(version, blob)
      push(gradient)     ──► Receipt: one gradient, applied at once          (asynchronous)
      push_together(…)   ──► Receipt: their mean, weighted by samples        (synchronous)

    Aggregator: combine(gradients of a group) ──► one gradient for each shard

Both are plain classes; a driver makes them remote. All shards see the same pushes in the same
order, and each judges with statistics of its own: so they agree without a word between them.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from rlbook.parts.flat import clip_to_norm
from rlbook.parts.optim import RMSProp
from rlbook.plumbing.codecs import DeltaEncoder, ErrorFeedback, Identity, decode, make_codec
from rlbook.plumbing.gate import Gate

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "a3c_rmsprop": RMSProp,
    "dqn_rmsprop": partial(RMSProp, alpha=0.95, eps=0.01, centered=True),
    "adam": torch.optim.Adam,
    "adam_no_momentum": partial(torch.optim.Adam, betas=(0.0, 0.999)),
}
"""Name → optimiser. PyTorch's, and with ε inside the root RMSProp as in A3C (Mnih et al., 2016) and
centred as in DQN (Mnih et al., 2015, Methods: 0.95 and 0.01). Adam without momentum is RMSProp with
a mean corrected for its start at 0: stale gradients bring a momentum of their own (Mitliagkas et
al., 2016)."""


class Gradient(NamedTuple):
    """A gradient for one shard, with what the shard must know to judge it."""

    blob: bytes
    """The slice of the gradient, encoded (see :mod:`rlbook.plumbing.codecs`)."""
    version: int
    """Of the parameters from which it was computed."""
    samples: int
    """Valid rows that it is a mean over: its weight among others."""
    magnitude: float
    """What outliers are judged by: the norm of the whole gradient before clipping, or a loss."""


class Weights(NamedTuple):
    """Parameters of one shard on their way to a worker."""

    version: int
    blob: bytes
    """Whole, or as the difference to what this client has."""


class Receipt(NamedTuple):
    """What became of a push. Entries of the tuples belong to its gradients."""

    version: int
    """Updates that the shard has made."""
    staleness: tuple[int, ...]
    """Versions between pull and apply; 0 for parameters that were the newest."""
    refused: tuple[str, ...]
    """"" where the gradient was taken, else why not."""


class ServerSettings(NamedTuple):
    """How a shard updates and what it refuses."""

    optimizer: str = "adam"
    """One of `OPTIMIZERS`."""
    learning_rate: float = 1e-3
    options: tuple[tuple[str, float], ...] = ()
    """Further arguments of the optimiser, as (name, value)."""
    max_staleness: int | None = None
    max_sigmas: float | None = None
    max_mean_norm: float | None = None
    """The mean gradient's slice is scaled down to this Euclidean norm; None leaves it alone."""
    weights_codec: str = "none"
    """How differences of the parameters are sent to clients that pull by name."""

    @classmethod
    def of(cls, config: Any) -> "ServerSettings":
        """The fields that a system's config has; ValueError if one is out of range."""
        fields = {name: getattr(config, name) for name in cls._fields if hasattr(config, name)}
        settings = cls(**fields, weights_codec=getattr(config, "weights_compression", "none"))
        if settings.optimizer not in OPTIMIZERS:
            allowed = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer: must be one of {allowed}; got {settings.optimizer!r}")
        Gate(settings.max_staleness, settings.max_sigmas)
        return settings


class Shard:
    """A slice of the parameters, with the state of its optimiser.

    Args:
        parameters: `[P_i]`, float32 or float64.
        settings: optimiser and gate.
        state: what `state_dict` gave, to go on from there.

    Raises:
        ValueError: the optimiser is unknown, or a setting is out of range.
    """

    def __init__(
        self, parameters: np.ndarray, settings: ServerSettings, state: dict[str, Any] | None = None
    ) -> None:
        torch.set_num_threads(1)
        if settings.optimizer not in OPTIMIZERS:
            allowed = ", ".join(OPTIMIZERS)
            raise ValueError(f"optimizer: must be one of {allowed}; got {settings.optimizer!r}")
        self.settings = settings
        self.version = 0
        self.parameters = torch.from_numpy(parameters.copy())
        self.parameters.grad = torch.zeros_like(self.parameters)
        # One tensor, updated element by element: then k shards do what one does, bit for bit.
        self.optimizer = OPTIMIZERS[settings.optimizer](
            [self.parameters], lr=settings.learning_rate, foreach=False, **dict(settings.options)
        )
        self.gate = Gate(settings.max_staleness, settings.max_sigmas)
        self.clients: dict[str, DeltaEncoder] = {}
        """What each client that pulls by name has."""
        if state is not None:
            self.load_state_dict(state)

    def pull(self, client: str | None = None) -> Weights:
        """The parameters: whole, or for a named `client` as the difference to its last pull."""
        weights = self.parameters.numpy()
        if client is None:
            return Weights(self.version, Identity().encode(weights))
        if client not in self.clients:
            self.clients[client] = DeltaEncoder(make_codec(self.settings.weights_codec))
        return Weights(self.version, self.clients[client].encode(weights, self.version))

    def push(self, gradient: Gradient) -> Receipt:
        """Applies one gradient, unless the gate refuses it."""
        return self.push_together(gradient)

    def push_together(self, *gradients: Gradient) -> Receipt:
        """Applies the mean of the gradients that the gate takes, weighted by their samples."""
        staleness = tuple(self.version - gradient.version for gradient in gradients)
        refused = tuple(
            self.gate.judge(age, gradient.magnitude)
            for age, gradient in zip(staleness, gradients, strict=True)
        )
        taken = [g for g, reason in zip(gradients, refused, strict=True) if not reason]
        if taken:
            np.copyto(self.parameters.grad.numpy(), weighted_mean(taken))  # type: ignore[union-attr]
            if self.settings.max_mean_norm is not None:
                clip_to_norm(self.parameters.grad, self.settings.max_mean_norm)  # type: ignore[arg-type]
            self.optimizer.step()
            self.version += 1
        return Receipt(self.version, staleness, refused)

    def alive(self) -> bool:
        """True; a call that only a living process answers."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """Parameters, optimiser, version, statistics of the gate, and what each client has."""
        return {
            "parameters": self.parameters.numpy().copy(),
            "optimizer": self.optimizer.state_dict(),
            "version": self.version,
            "gate": self.gate.state_dict(),
            "clients": {name: encoder.state_dict() for name, encoder in self.clients.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        np.copyto(self.parameters.numpy(), state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.version = state["version"]
        self.gate.load_state_dict(state["gate"])
        self.clients = {}
        for name, kept in state["clients"].items():
            self.clients[name] = DeltaEncoder(make_codec(self.settings.weights_codec))
            self.clients[name].load_state_dict(kept)


class Aggregator:
    """A local server: adds up the gradients of its group, so that one goes on instead of many.

    Groups of workers under local servers under a root save bytes on the long wire and calls at the
    root (rows of hierarchical aggregation: Li et al., 2014, section 4; BytePS and others since).

    Args:
        shards: k, pieces of each gradient.
        codec: how what goes on is encoded, with an error feedback of its own.
    """

    def __init__(self, shards: int, codec: str = "none") -> None:
        self.shards = shards
        self.encoders = [ErrorFeedback(make_codec(codec)) for _ in range(shards)]

    def combine(self, *pieces: Gradient) -> tuple[Gradient, ...] | Gradient:
        """The mean of a group's gradients, weighted by samples, for each shard.

        Args:
            pieces: k pieces of the first gradient, then k of the second, …
        """
        columns = [pieces[i :: self.shards] for i in range(self.shards)]
        combined = tuple(map(self._one, self.encoders, columns))
        return combined if self.shards > 1 else combined[0]

    def state_dict(self) -> dict[str, Any]:
        """What compression still owes."""
        return {"encoders": [encoder.state_dict() for encoder in self.encoders]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from `state_dict`."""
        for encoder, kept in zip(self.encoders, state["encoders"], strict=True):
            encoder.load_state_dict(kept)

    def _one(self, encoder: ErrorFeedback, gradients: Sequence[Gradient]) -> Gradient:
        return Gradient(
            blob=encoder.encode(weighted_mean(gradients)),
            version=min(gradient.version for gradient in gradients),
            samples=sum(gradient.samples for gradient in gradients),
            magnitude=max(gradient.magnitude for gradient in gradients),
        )


def weighted_mean(gradients: Sequence[Gradient]) -> np.ndarray:
    """Σ n_i g_i / Σ n_i, `[P_i]`: with n_i rows each, the gradient of the mean over all rows."""
    if len(gradients) == 1:  # x·n/n is not always x
        return decode(gradients[0].blob)
    total = sum(gradient.samples for gradient in gradients) or 1
    parts = [(g.samples / total) * decode(g.blob) for g in gradients]
    return np.sum(parts, axis=0)


def put_weights(vector: np.ndarray, weights: Sequence[Weights]) -> None:
    """Fills `vector` `[P]` with the whole parameters of all shards, pulled without a name."""
    np.concatenate([decode(piece.blob) for piece in weights], out=vector)


def fates(counts: dict[str, Any], receipts: Sequence[Receipt]) -> dict[str, float]:
    """Adds up in `counts` how old gradients were and why some were refused; metrics of these ones.

    Args:
        counts: of a run; gets "staleness" (age → gradients) and "refused" (reason → gradients).
        receipts: new ones.
    """
    ages = [age for receipt in receipts for age in receipt.staleness]
    refused = [reason for receipt in receipts for reason in receipt.refused if reason]
    for name, values in (("staleness", ages), ("refused", refused)):
        counts[name] = dict(Counter(counts.get(name, {})) + Counter(values))
    if not ages:
        return {}
    rejected = len(refused) / len(ages)
    mean, largest = float(np.mean(ages)), float(max(ages))
    return {"staleness_mean": mean, "staleness_max": largest, "gradients_rejected": rejected}
