"""Bytes given to collectives: by hand for each way to split a small network."""

from collections.abc import Iterator
from itertools import pairwise
from operator import add

import pytest
import torch
from torch import nn

from rlbook.maths.losses import policy_gradient_loss
from rlbook.plumbing import model_parallel
from rlbook.plumbing.ranks import Ranks
from rlbook.plumbing.traffic import Sent, counted

ROWS, INPUTS, HIDDEN, ACTIONS = 24, 4, 8, 2
NUMBERS = (INPUTS + 1) * HIDDEN + (HIDDEN + 1) * ACTIONS


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def sent_by(ranks: Ranks, split: str, hidden_layers: int = 1) -> list[dict[str, Sent]]:
    sizes = [INPUTS, *[HIDDEN] * hidden_layers, ACTIONS]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    network = nn.Sequential(*layers[:-1])
    targets = {
        "actions": torch.zeros(ROWS, dtype=torch.int64),
        "advantages": torch.ones(ROWS, dtype=torch.float64),
    }
    problem = network.double(), policy_gradient_loss, torch.ones(ROWS, INPUTS).double(), targets
    answers = ranks.run(counted, getattr(model_parallel, split), *problem)
    return [traffic for _, traffic in answers]


def test_rows_cost_every_gradient_once(two: Ranks) -> None:
    for traffic in sent_by(two, "data_parallel"):
        assert traffic["all_reduce"] == (4, 8 * NUMBERS)  # two layers' weights and biases


def test_slices_cost_activations(two: Ranks) -> None:
    for traffic in sent_by(two, "tensor_parallel"):
        assert traffic["all_reduce"] == (1, 8 * ROWS * ACTIONS)  # inputs need no gradient


def test_slices_of_four_layers_also_cost_gradients_of_activations(two: Ranks) -> None:
    for traffic in sent_by(two, "tensor_parallel", hidden_layers=3):
        assert traffic["all_reduce"] == (3, 8 * ROWS * (HIDDEN + ACTIONS + HIDDEN))


def test_stages_send_one_activation_each_way(two: Ranks) -> None:
    for traffic in sent_by(two, "pipeline_parallel"):
        bare = 8 * ROWS * HIDDEN
        assert bare <= traffic["send"].nbytes <= bare + 512  # and once, what shape to expect


def test_the_answer_is_handed_on_and_what_talks_to_nobody_sends_nothing() -> None:
    assert counted(add, 1, 2) == (3, {})
