"""Bytes that a process hands to collectives: what a split of a network costs on the wire.

    answer, traffic = counted(function, *arguments)      on every rank
    traffic["all_reduce"]                                 Sent(calls, nbytes)

It stands between PyTorch and `torch.distributed` while the function runs (also backwards), and
writes down every collective and every message with the bytes that this rank puts in. What travels
is another question: a ring, for example, sends 2 (k - 1)/k of what an all-reduce is given.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "send": "send",
}
"""How PyTorch's names of its operators begin → kind."""


class Sent(NamedTuple):
    """What one kind of collective was given."""

    calls: int
    nbytes: int


def counted(
    function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Any, dict[str, Sent]]:
    """`function(*arguments, **options)`, and what it put into collectives, by kind."""
    with _Ledger() as ledger:
        answer = function(*arguments, **options)
    return answer, ledger.sent


class _Ledger(TorchDispatchMode):
    """Sees every operator before it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, Sent] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        space, _, name = function.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            self._enter(name, args)
        return function(*args, **kwargs or {})

    def _enter(self, name: str, arguments: Any) -> None:
        kinds = [kind for start, kind in KINDS.items() if name.startswith(start)]
        if not kinds:
            return
        given = arguments[1] if name.startswith("allgather") else arguments[0]
        calls, nbytes = self.sent.get(kinds[0], (0, 0))
        self.sent[kinds[0]] = Sent(calls + 1, nbytes + _nbytes(given))


def _nbytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    return sum(map(_nbytes, tree)) if isinstance(tree, list | tuple) else 0
