"""Values on the wire: nothing shared, nothing lost, and every byte counted the same each time."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from rlbook.plumbing.wire import VirtualReference, pack, pack_error


def test_arrays_are_copied_out_of_the_pickle_and_read_only() -> None:
    array = np.arange(1000.0)
    message = pack({"array": array, "same": array})
    assert len(message.buffers) == 1 and len(message.buffers[0]) == 8 * 1000
    assert 8 * 1000 < message.nbytes < 8 * 1000 + 300
    array += 1
    opened = message.open()
    assert opened["array"] is opened["same"]
    assert np.array_equal(opened["array"], np.arange(1000.0))
    assert not opened["array"].flags.writeable
    assert message.open()["array"] is not opened["array"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t()[1:],
        torch.empty(0),
        torch.tensor(3),
        torch.tensor([True, False]),
        torch.ones(3, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.ones(2)),
        torch.ones(2, 2).to_sparse(),
    ],
    ids=["view", "empty", "scalar", "bool", "bf16", "parameter", "sparse"],
)
def test_tensors_of_every_kind(tensor: torch.Tensor) -> None:
    before = tensor.detach().clone()
    message = pack(tensor)
    with torch.no_grad():
        tensor.zero_()
    opened = message.open()
    assert type(opened) is type(tensor) and opened.dtype == tensor.dtype
    assert opened.requires_grad == tensor.requires_grad
    assert torch.equal(opened.detach().to_dense(), before.to_dense())
    with torch.no_grad():
        opened.zero_()  # it is writable
    assert torch.equal(message.open().detach().to_dense(), before.to_dense())


def test_references_stay_references() -> None:
    one, other = VirtualReference(1), VirtualReference(2)
    opened = pack([one, {"x": other}, (one, np.ones(2))]).open()
    assert opened[0] is one and opened[1]["x"] is other and opened[2][0] is one
    assert "pending" in repr(one) and one.nbytes == 0


def test_functions_and_local_classes_travel() -> None:
    class Local:
        x = 3

    assert pack(lambda: Local.x + 1).open()() == 4
    with pytest.raises(TypeError, match="lock"):
        pack(threading.Lock())


def test_errors_keep_their_type_and_gain_a_place() -> None:
    try:
        raise IndexError("on purpose")
    except IndexError as error:
        copy = pack_error(error, "Actor 0.unroll").open()
    assert type(copy) is IndexError and copy.args == ("on purpose",)
    assert "in Actor 0.unroll" in copy.__notes__[0] and "test_wire.py" in copy.__notes__[0]


PROGRAM = """
import sys
ballast = [object() for _ in range(int(sys.argv[1]))]
import torch
from rlbook.plumbing.wire import pack
torch.manual_seed(0)
net = torch.nn.LSTM(3, 5)
print(pack(net.state_dict()).nbytes)
print(pack(net.state_dict()).data.hex())
"""


def test_the_bytes_are_the_same_in_every_process() -> None:
    def run(ballast: int) -> str:
        root = Path(__file__).parents[2]
        return subprocess.run(
            [sys.executable, "-c", PROGRAM, str(ballast)],
            env={**os.environ, "PYTHONPATH": "."},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    assert run(0) == run(100_000)
