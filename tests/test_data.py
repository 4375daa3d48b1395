"""Trees of arrays, and which rows of an unroll are steps."""

import numpy as np
import pytest
import torch

from rlbook.data import AgentOutput, EnvOutput, Unroll, tree_map, tree_nbytes


def test_tree_map_keeps_the_structure_and_walks_trees_together():
    tree = {"a": (np.ones(2), [np.zeros(3), None]), "b": AgentOutput(1, 2, None)}
    doubled = tree_map(lambda x, y: x + y, tree, tree)
    assert doubled["a"][0].tolist() == [2, 2] and doubled["a"][1][1] is None
    assert isinstance(doubled["a"], tuple) and isinstance(doubled["a"][1], list)
    assert doubled["b"] == AgentOutput(2, 4, None)


def test_tree_map_refuses_trees_of_unequal_length():
    with pytest.raises(ValueError):
        tree_map(lambda x, y: x, [1, 2], [1])


def test_tree_nbytes_counts_arrays_and_tensors():
    tree = {"a": np.zeros((3, 5), np.float32), "b": [torch.zeros(7, dtype=torch.int64), "x", None]}
    assert tree_nbytes(tree) == 3 * 5 * 4 + 7 * 8


def test_a_row_is_valid_unless_it_leads_to_a_reset():
    first = np.array([[True, False], [False, False], [False, True], [True, False]])
    row = EnvOutput(np.zeros((4, 2)), np.zeros((4, 2)), np.ones((4, 2)), first)
    unroll = Unroll(row, AgentOutput(np.zeros((3, 2)), np.zeros((3, 2, 2)), np.zeros((3, 2))))
    assert unroll.valid.tolist() == [[True, True], [True, False], [False, True]]
