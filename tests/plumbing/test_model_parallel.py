"""Split in four ways, a policy gives the whole one's outputs and gradients."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from rlbook.maths.losses import policy_gradient_loss
from rlbook.plumbing import model_parallel
from rlbook.plumbing.model_parallel import (
    Outcome,
    data_parallel,
    hybrid_parallel,
    pipeline_parallel,
    shard_rows,
    stage_layers,
    tensor_parallel,
    whole,
)
from rlbook.plumbing.ranks import RankError, Ranks

ROWS, ACTIONS = 24, 3


def policy(layers: int = 4, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(layers)
    sizes = [5, *[8] * (layers - 1), ACTIONS]
    parts: list[nn.Module] = []
    for size_in, size_out in zip(sizes[:-1], sizes[1:], strict=True):
        parts += [nn.Linear(size_in, size_out), nn.Tanh()]
    return nn.Sequential(*parts[:-1]).to(dtype)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    actions, advantages = torch.randint(ACTIONS, (ROWS,)), torch.randn(ROWS)
    inputs = torch.randn(ROWS, 5, dtype=dtype)
    return inputs, {"actions": actions, "advantages": advantages.to(dtype)}


def difference(mine: Outcome, other: Outcome) -> float:
    assert mine.outputs.shape == other.outputs.shape
    assert list(mine.gradients) == list(other.gradients)
    gaps = [(mine.outputs - other.outputs).abs().max()]
    gaps += [(mine.gradients[k] - other.gradients[k]).abs().max() for k in mine.gradients]
    return float(max(gaps))


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


SPLITS = (data_parallel, tensor_parallel, pipeline_parallel, hybrid_parallel)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.__name__)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_split_is_whole(
    four: Ranks, split: Callable[..., Outcome], size: int, dtype: torch.dtype, tolerance: float
) -> None:
    network, (inputs, targets) = policy(dtype=dtype), batch(dtype)
    expected = whole(network, policy_gradient_loss, inputs, targets)
    assert max(float(g.abs().max()) for g in expected.gradients.values()) > 1e-3
    outcomes = four.run(split, network, policy_gradient_loss, inputs, targets, size=size)
    assert len(outcomes) == size
    for outcome in outcomes:
        assert difference(outcome, expected) <= tolerance
    assert all(parameter.grad is None for parameter in network.parameters())


def test_each_rank_holds_only_its_part(four: Ranks) -> None:
    network, (inputs, targets) = policy(), batch()
    arguments = (network, policy_gradient_loss, inputs, targets)
    own = {s: [o.own_parameters for o in four.run(s, *arguments)] for s in SPLITS}
    total = whole(*arguments).own_parameters
    assert own[data_parallel] == [total] * 4
    assert sum(own[pipeline_parallel]) == total and max(own[pipeline_parallel]) < total
    # Slices of the matrices; the biases after a sum over ranks are everybody's.
    everybodys = 8 + ACTIONS
    assert own[tensor_parallel] == [(total - everybodys) // 4 + everybodys] * 4
    assert own[hybrid_parallel] == [(total - everybodys) // 2 + everybodys] * 4


def test_each_rank_keeps_only_its_part_for_the_way_back(four: Ranks) -> None:
    network, (inputs, targets) = policy(layers=8), batch()
    arguments = (network, policy_gradient_loss, inputs, targets)
    own = {s: [o.own_activations for o in four.run(s, *arguments)] for s in SPLITS}
    alone = whole(*arguments).own_activations
    # Inputs, what each of 7 tanh gave, and four of the loss: log π twice, chosen, advantages.
    assert alone >= ROWS * (5 + 7 * 8 + ACTIONS)
    assert own[data_parallel] == [alone // 4] * 4
    assert sum(own[pipeline_parallel]) < 2 * alone and max(own[pipeline_parallel]) < alone / 2
    # Of the layers' outputs every other one is in slices.
    assert alone / 2 < own[tensor_parallel][0] < 0.7 * alone
    assert own[hybrid_parallel][0] < own[tensor_parallel][0]


def test_three_layers_gather_the_last_ones_columns(four: Ranks) -> None:
    arguments = (policy(layers=3), policy_gradient_loss, *batch())
    for size in (2, 4):  # 3 actions: unequal slices, and an empty one
        for outcome in four.run(tensor_parallel, *arguments, size=size):
            assert difference(outcome, whole(*arguments)) <= 1e-12


def test_unequal_shards_are_weighted_by_rows_that_count(four: Ranks) -> None:
    network, (inputs, targets) = policy(), batch()
    targets["valid"] = torch.arange(ROWS) % 5 > 1
    arguments = (network, policy_gradient_loss, inputs, targets)
    for cuts in ([2], [7], [0]):
        outcome = four.run(data_parallel, *arguments, cuts, size=2)[1]
        assert difference(outcome, whole(*arguments)) <= 1e-12


def test_planted_plain_mean_over_unequal_shards_is_found(four: Ranks) -> None:
    """What weighting by rows guards against: every shard counted alike."""
    network, (inputs, targets) = policy(), batch()
    arguments = (network, policy_gradient_loss, inputs, targets)
    outcome = four.run(data_parallel, *arguments, [2], size=2)[0]
    parts = []
    for part in shard_rows(ROWS, 2, [2]):
        rows = {name: value[part] for name, value in targets.items()}
        parts.append(whole(network, policy_gradient_loss, inputs[part], rows).gradients)
    plain = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    wrong = outcome._replace(gradients=plain)
    assert difference(wrong, whole(*arguments)) > 1e-3
    weighted = {name: (2 * parts[0][name] + 22 * parts[1][name]) / 24 for name in parts[0]}
    assert difference(outcome._replace(gradients=weighted), whole(*arguments)) <= 1e-12


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 3"):
        stage_layers(policy(layers=3), 4)
    for cuts in ([5, 3], [30, 3], [1]):
        with pytest.raises(ValueError, match="cuts"):
            shard_rows(10, 3, cuts)
    assert shard_rows(10, 4) == [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)]


def test_a_refusal_reaches_the_driver() -> None:
    with Ranks(1) as ranks, pytest.raises(RankError, match="even number of ranks, got 1"):
        ranks.run(hybrid_parallel, policy(), policy_gradient_loss, *batch())


def test_every_layer_lies_in_one_stage() -> None:
    network = policy(layers=5)
    for stages in range(1, 6):
        parts = stage_layers(network, stages)
        assert [layer for part in parts for layer in part] == list(network)
        assert all(isinstance(part[0], nn.Linear) for part in parts)
    names = [name for part in stage_layers(network, 3) for name, _ in part.named_parameters()]
    assert names == [name for name, _ in network.named_parameters()]


def test_the_pipeline_refuses_microbatches_of_unequal_weight() -> None:
    inputs, targets = batch()
    with pytest.raises(ValueError, match="no multiple of 5"):
        pipeline_parallel(policy(), policy_gradient_loss, inputs, targets, microbatches=5)
    targets["valid"] = torch.ones(ROWS, dtype=torch.bool)
    with pytest.raises(ValueError, match="every row must count"):
        pipeline_parallel(policy(), policy_gradient_loss, inputs, targets)


def test_rows_that_count() -> None:
    assert model_parallel.rows_that_count({}, 7) == 7
    valid = torch.tensor([True, False, True])
    assert model_parallel.rows_that_count({"valid": valid}, 3) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("split", SPLITS, ids=lambda split: split.__name__)
def test_on_gpus_too_split_is_whole(split: Callable[..., Outcome]) -> None:
    """Ranks on GPUs of their own by NCCL; where there is one GPU, one rank."""
    size = 2 if torch.cuda.device_count() > 1 else 1
    if size == 1 and split is hybrid_parallel:
        pytest.skip("a mesh of two axes needs two GPUs")
    network, (inputs, targets) = policy(), batch()
    expected = whole(network, policy_gradient_loss, inputs, targets)
    with Ranks(size, "cuda") as ranks:
        assert ranks.backend == "nccl"
        outcomes = ranks.run(split, network, policy_gradient_loss, inputs, targets)
    for outcome in outcomes:
        assert difference(outcome, expected) <= 1e-10 and outcome.outputs.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_two_ranks_share_a_gpu_by_gloo() -> None:
    network, (inputs, targets) = policy(), batch()
    expected = whole(network, policy_gradient_loss, inputs, targets)
    with Ranks(2, "cuda:0") as ranks:
        assert ranks.backend == "gloo"
        for outcome in ranks.run(data_parallel, network, policy_gradient_loss, inputs, targets):
            assert difference(outcome, expected) <= 1e-10
