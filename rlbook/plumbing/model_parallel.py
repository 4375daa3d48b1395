"""One policy on several processes: split the rows, the layers' columns, or the layers.

    data parallel      every rank has the whole network and some of the rows
    tensor parallel    every rank has all rows and a slice of each layer's matrix
    pipeline parallel  every rank has some of the layers; microbatches flow through them
    hybrid             a 2 × 2 mesh: rows over one axis, slices over the other

Each function here runs on every rank of :class:`~rlbook.plumbing.ranks.Ranks` and returns the
:class:`Outcome` of the *whole* network on the *whole* batch, put together again, so that it can be
held against one process's. In earnest nobody gathers gradients: each rank keeps and updates its
own. Each computes on its rank's device, and what it returns lies on the CPU. On GPUs all but data
parallelism needs NCCL, and so a GPU for each rank; that has not been run by the authors.

The network is an ``nn.Sequential`` of linear layers and activations; ``loss`` takes its output as
``logits`` and ``targets`` (tensors ``[N, ...]``) by keyword, and is a mean over the rows that
count: those where ``targets["valid"]`` is True, all if there is no such target. PyTorch does the
splitting: DTensor (``torch.distributed.tensor``) and ``torch.distributed.pipelining``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn

from rlbook.plumbing.ranks import rank_device

Loss = Callable[..., Tensor]
Targets = Mapping[str, Tensor]
Slices = list[slice]
N = TypeVar("N", bound=nn.Module)


class Outcome(NamedTuple):
    """What one pass forwards and backwards gives."""

    outputs: Tensor
    """``[N, A]``, no gradient attached."""
    gradients: dict[str, Tensor]
    """Parameter → gradient of the mean loss over all rows, shape of the parameter."""
    own_parameters: int = 0
    """Numbers of the network that this rank held. As many gradients come with them, and with Adam
    twice as many moments."""
    own_activations: int = 0
    """Numbers that this rank kept from the way forwards for the way back, its inputs among them."""


def whole(network: nn.Module, loss: Loss, inputs: Tensor, targets: Targets) -> Outcome:
    """One process, all rows, all layers: what the others must equal."""
    network = copy.deepcopy(network)
    with kept_for_later(network) as kept:
        outputs = network(inputs)
        loss(logits=outputs, **targets).backward()
    return _outcome(outputs, network, kept)


def data_parallel(
    network: nn.Module, loss: Loss, inputs: Tensor, targets: Targets, cuts: list[int] | None = None
) -> Outcome:
    """Each rank takes its rows; the gradients are summed over ranks, weighted by rows that count.

    ``cuts``: where the rows are cut, one number fewer than ranks; equal parts by default.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    shards = shard_rows(len(inputs), ranks, cuts)
    network, inputs, targets = brought(network, inputs, targets)
    with kept_for_later(network) as kept:
        outputs = _backward_on_shard(network, loss, inputs, targets, shards[rank])
    for parameter in network.parameters():
        distributed.all_reduce(parameter.grad)
    parts: list[Any] = [None] * ranks
    distributed.all_gather_object(parts, outputs.cpu())
    return _outcome(torch.cat(parts), network, kept)


def tensor_parallel(
    network: nn.Sequential, loss: Loss, inputs: Tensor, targets: Targets
) -> Outcome:
    """Each rank has a slice of every linear layer: columns of one, rows of the next (Shoeybi et
    al., 2019, section 3). A pair of layers needs one all-reduce forwards and one backwards.
    """
    from torch.distributed.device_mesh import init_device_mesh

    network, inputs, targets = brought(network, inputs, targets)
    mesh = init_device_mesh(inputs.device.type, (distributed.get_world_size(),))
    network = split_layers(network, mesh)
    with kept_for_later(network) as kept:
        outputs = network(inputs)
        loss(logits=outputs, **targets).backward()
    return _outcome(outputs, network, kept)


def hybrid_parallel(
    network: nn.Sequential, loss: Loss, inputs: Tensor, targets: Targets
) -> Outcome:
    """Rows over the mesh's first axis (two places), slices of layers over its second (the rest).

    Raises ``ValueError`` for an odd number of ranks.
    """
    from torch.distributed.device_mesh import init_device_mesh

    ranks = distributed.get_world_size()
    if ranks % 2:
        raise ValueError(f"a mesh of two axes needs an even number of ranks, got {ranks}")
    network, inputs, targets = brought(network, inputs, targets)
    places = (2, ranks // 2)
    mesh = init_device_mesh(inputs.device.type, places, mesh_dim_names=("data", "tensor"))
    network = split_layers(network, mesh["tensor"])
    shards = shard_rows(len(inputs), 2)
    mine = shards[mesh.get_local_rank("data")]
    with kept_for_later(network) as kept:
        outputs = _backward_on_shard(network, loss, inputs, targets, mine)
    data = mesh.get_group("data")
    for parameter in network.parameters():  # each slice with its twins of the other rows
        distributed.all_reduce(_local(parameter.grad), group=data)
    parts: list[Any] = [None, None]
    distributed.all_gather_object(parts, outputs.cpu(), group=data)
    return _outcome(torch.cat(parts), network, kept)


def pipeline_parallel(
    network: nn.Sequential, loss: Loss, inputs: Tensor, targets: Targets, microbatches: int = 4
) -> Outcome:
    """Each rank is a stage of some layers; microbatches follow each other through the stages, all
    forwards and then all backwards (GPipe, Huang et al., 2019). The batch must divide evenly.
    """
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    if len(inputs) % microbatches:
        raise ValueError(f"microbatches: {len(inputs)} rows are no multiple of {microbatches}")
    if "valid" in targets:
        raise ValueError("valid: microbatches are averaged as equals, so every row must count")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    network, inputs, targets = brought(network, inputs, targets)
    own = stage_layers(network, ranks)[rank]

    def loss_of_microbatch(outputs: Tensor, rows: Tensor) -> Tensor:
        return loss(logits=outputs, **{name: value[rows] for name, value in targets.items()})

    stage = PipelineStage(own, rank, ranks, inputs.device)
    schedule = ScheduleGPipe(stage, microbatches, loss_fn=loss_of_microbatch)
    first, last = rank == 0, rank == ranks - 1
    rows = torch.arange(len(inputs), device=inputs.device)
    arguments = (inputs,) if first else ()
    with kept_for_later(own) as kept:
        outputs = schedule.step(*arguments, target=rows if last else None)
    held: list[Any] = [None] * ranks
    mine = (_gradients(network), outputs.detach().cpu() if last else None)
    distributed.all_gather_object(held, mine)
    gradients = {name: value for part, _ in held for name, value in part.items()}
    ordered = {name: gradients[name] for name, _ in network.named_parameters()}
    return Outcome(held[-1][1], ordered, _count(own), sum(kept.values()))


def brought(network: N, inputs: Tensor, targets: Targets) -> tuple[N, Tensor, Targets]:
    """A copy of the network, and the batch, on this rank's device."""
    device = rank_device()
    there = {name: value.to(device) for name, value in targets.items()}
    return copy.deepcopy(network).to(device), inputs.to(device), there


@contextmanager
def kept_for_later(network: nn.Module) -> Iterator[dict[int, int]]:
    """Notes what autograd keeps for the way back, but for the parameters: place → numbers there."""
    owned = {_place(parameter) for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if (place := _place(tensor)) not in owned:
            kept[place] = max(kept.get(place, 0), _local(tensor).numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def shard_rows(rows: int, shards: int, cuts: list[int] | None = None) -> Slices:
    """``rows`` in ``shards`` consecutive parts, at ``cuts`` or as equal as can be."""
    cuts = [rows * i // shards for i in range(1, shards)] if cuts is None else cuts
    edges = [0, *cuts, rows]
    if len(edges) != shards + 1 or sorted(edges) != edges:
        raise ValueError(f"cuts: {shards} parts of {rows} rows need {shards - 1} rising numbers")
    return [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def split_layers(network: nn.Sequential, mesh: Any) -> nn.Sequential:
    """Slice the linear layers over a mesh: the 1st, 3rd, … by columns (each rank computes some of
    the outputs, which stay where they are), the 2nd, 4th, … by rows (each rank takes the inputs
    that it has; the results are summed). An odd last layer gathers its columns.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    linear = [name for name, layer in network.named_children() if isinstance(layer, nn.Linear)]
    plan: dict[str, Any] = {}
    for index, name in enumerate(linear):
        alone = index == len(linear) - 1
        columns = ColwiseParallel(output_layouts=Replicate()) if alone else ColwiseParallel()
        plan[name] = RowwiseParallel() if index % 2 else columns
    parallelize_module(network, mesh, plan)
    return network


def stage_layers(network: nn.Sequential, stages: int) -> list[nn.Sequential]:
    """The network's layers dealt out to ``stages``: an activation goes with the linear layer before
    it. The modules are the network's own. Raises ``ValueError`` for more stages than linear layers.
    """
    starts = [i for i, layer in enumerate(network) if isinstance(layer, nn.Linear)]
    if stages > len(starts):
        raise ValueError(f"stages: at most {len(starts)}, one for each linear layer, got {stages}")
    edges = [starts[len(starts) * i // stages] for i in range(stages)] + [len(network)]
    edges[0] = 0
    named = list(network.named_children())
    return [
        nn.Sequential(OrderedDict(named[a:b])) for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]


def _backward_on_shard(
    network: nn.Module, loss: Loss, inputs: Tensor, targets: Targets, mine: slice
) -> Tensor:
    """Leaves this shard's part of the whole batch's gradient; its outputs."""
    outputs = network(inputs[mine])
    part = {name: value[mine] for name, value in targets.items()}
    share = rows_that_count(part, len(inputs[mine])) / rows_that_count(targets, len(inputs))
    (share * loss(logits=outputs, **part)).backward()
    return outputs.detach()


def rows_that_count(targets: Targets, rows: int) -> int:
    """Rows that enter the mean."""
    return int(targets["valid"].sum()) if "valid" in targets else rows


def _outcome(outputs: Tensor, network: nn.Module, kept: Mapping[int, int]) -> Outcome:
    found = outputs.detach().cpu()
    return Outcome(found, _gradients(network), _count(network), sum(kept.values()))


def _place(tensor: Tensor) -> int:
    return _local(tensor).untyped_storage().data_ptr()


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).cpu()
    return found


def _count(network: nn.Module) -> int:
    return sum(_local(parameter).numel() for parameter in network.parameters())
