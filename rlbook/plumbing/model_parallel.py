"""One policy on several processes: split the rows, the layers' columns, or the layers.

    data parallel      every rank has the whole network and some of the rows
    tensor parallel    every rank has all rows and a slice of each layer's matrix
    pipeline parallel  every rank has some of the layers; microbatches flow through them
    hybrid             a 2 × 2 mesh: rows over one axis, slices over the other

Each function here runs on every rank of :class:`~rlbook.plumbing.ranks.Ranks` and returns the
:class:`Outcome` of the *whole* network on the *whole* batch, put together again, so that it can be
held against one process's. In earnest nobody gathers gradients: each rank keeps and updates its
own.

The network is an ``nn.Sequential`` of linear layers and activations; ``loss`` takes its output as
``logits`` and ``targets`` (tensors ``[N, ...]``) by keyword, and is a mean over the rows that
count: those where ``targets["valid"]`` is True, all if there is no such target. PyTorch does the
splitting: DTensor (``torch.distributed.tensor``) and ``torch.distributed.pipelining``.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

Loss = Callable[..., Tensor]
Targets = Mapping[str, Tensor]
Slices = list[slice]


class Outcome(NamedTuple):
    """What one pass forwards and backwards gives."""

    outputs: Tensor
    """``[N, A]``, no gradient attached."""
    gradients: dict[str, Tensor]
    """Parameter → gradient of the mean loss over all rows, shape of the parameter."""
    own_parameters: int = 0
    """Numbers of the network that this rank held."""


def whole(network: nn.Module, loss: Loss, inputs: Tensor, targets: Targets) -> Outcome:
    """One process, all rows, all layers: what the others must equal."""
    network = copy.deepcopy(network)
    outputs = network(inputs)
    loss(logits=outputs, **targets).backward()
    return Outcome(outputs.detach(), _gradients(network), _count(network))


def data_parallel(
    network: nn.Module, loss: Loss, inputs: Tensor, targets: Targets, cuts: list[int] | None = None
) -> Outcome:
    """Each rank takes its rows; the gradients are summed over ranks, weighted by rows that count.

    ``cuts``: where the rows are cut, one number fewer than ranks; equal parts by default.
    """
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    shards = shard_rows(len(inputs), ranks, cuts)
    network = copy.deepcopy(network)
    outputs = _backward_on_shard(network, loss, inputs, targets, shards[rank])
    for parameter in network.parameters():
        distributed.all_reduce(parameter.grad)
    parts: list[Any] = [None] * ranks
    distributed.all_gather_object(parts, outputs)
    return Outcome(torch.cat(parts), _gradients(network), _count(network))


def tensor_parallel(
    network: nn.Sequential, loss: Loss, inputs: Tensor, targets: Targets
) -> Outcome:
    """Each rank has a slice of every linear layer: columns of one, rows of the next (Shoeybi et
    al., 2019, section 3). A pair of layers needs one all-reduce forwards and one backwards.
    """
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    network = split_layers(copy.deepcopy(network), mesh)
    outputs = network(inputs)
    loss(logits=outputs, **targets).backward()
    return Outcome(outputs.detach(), _gradients(network), _count(network))


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
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    network = split_layers(copy.deepcopy(network), mesh["tensor"])
    shards = shard_rows(len(inputs), 2)
    mine = shards[mesh.get_local_rank("data")]
    outputs = _backward_on_shard(network, loss, inputs, targets, mine)
    data = mesh.get_group("data")
    for parameter in network.parameters():  # each slice with its twins of the other rows
        distributed.all_reduce(_local(parameter.grad), group=data)
    parts: list[Any] = [None, None]
    distributed.all_gather_object(parts, outputs, group=data)
    return Outcome(torch.cat(parts), _gradients(network), _count(network))


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
    network = copy.deepcopy(network)
    own = stage_layers(network, ranks)[rank]

    def loss_of_microbatch(outputs: Tensor, rows: Tensor) -> Tensor:
        return loss(logits=outputs, **{name: value[rows] for name, value in targets.items()})

    stage = PipelineStage(own, rank, ranks, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, microbatches, loss_fn=loss_of_microbatch)
    first, last = rank == 0, rank == ranks - 1
    rows = torch.arange(len(inputs))
    arguments = (inputs,) if first else ()
    outputs = schedule.step(*arguments, target=rows if last else None)
    held: list[Any] = [None] * ranks
    distributed.all_gather_object(held, (_gradients(network), outputs.detach() if last else None))
    gradients = {name: value for part, _ in held for name, value in part.items()}
    ordered = {name: gradients[name] for name, _ in network.named_parameters()}
    return Outcome(held[-1][1], ordered, _count(own))


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


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _gradients(network: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def _count(network: nn.Module) -> int:
    return sum(_local(parameter).numel() for parameter in network.parameters())
