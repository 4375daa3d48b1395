"""Checkpoints: everything comes back; nothing foreign is ever run; a full disk spoils nothing."""

import io
import pickle
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint

STATE = {
    "system": "test",
    "tensor": torch.arange(6, dtype=torch.float64).reshape(2, 3),
    "scalar": torch.tensor(3),
    "array": np.array([[True, False]]),
    "empty": np.zeros((0, 4), np.uint8),
    "tree": {1: [1, (2, "three", None)], "x": {"y": 1.5, "big": 2**127, "nan": float("nan")}},
    "rng": np.random.default_rng(3).bit_generator.state,
}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a)


def test_everything_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path / "c.npz", STATE)
    assert same(STATE, load_checkpoint(tmp_path / "c.npz", "test"))
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]


def test_loaded_tensors_can_be_written_to(tmp_path):
    save_checkpoint(tmp_path / "c.npz", STATE)
    load_checkpoint(tmp_path / "c.npz")["tensor"].add_(1)


@pytest.mark.parametrize("leaf", [object(), {1, 2}, np.array([object()]), b"bytes"])
def test_other_leaves_are_refused_and_leave_nothing(leaf, tmp_path):
    with pytest.raises(TypeError, match="a checkpoint"):
        save_checkpoint(tmp_path / "c.npz", {"leaf": leaf})
    assert list(tmp_path.iterdir()) == []


def refused(path: Path) -> str:
    with pytest.raises(ValueError) as refusal:
        load_checkpoint(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_missing_file(tmp_path):
    assert "there is no checkpoint" in refused(tmp_path / "none.npz")


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(part, tmp_path):
    path = tmp_path / "c.npz"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    assert "damaged" in refused(path)


def test_a_flipped_byte_anywhere_in_the_arrays_is_seen_or_harmless(tmp_path):
    path = tmp_path / "c.npz"
    save_checkpoint(path, STATE)
    whole = path.read_bytes()
    seen = 0
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            assert same(STATE, load_checkpoint(path))
        except ValueError as error:
            seen += "damaged" in str(error)
    assert seen > 5


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY", b"PK\x03\x04 no zip", b"[]"])
def test_foreign_bytes(content, tmp_path):
    path = tmp_path / "c.npz"
    path.write_bytes(content)
    assert "damaged" in refused(path)


@pytest.mark.parametrize(
    "tree", ["[]", "{}", "null", '{"format": "other", "state": {}}', "[" * 9999]
)
def test_foreign_trees(tree, tmp_path):
    path = tmp_path / "c.npz"
    np.savez(path, tree=np.frombuffer(tree.encode(), dtype=np.uint8))
    assert "damaged" in refused(path)


def test_a_plain_array_and_a_foreign_archive(tmp_path):
    np.save(tmp_path / "c.npy", np.arange(3))
    assert "damaged" in refused(tmp_path / "c.npy")
    np.savez(tmp_path / "d.npz", weights=np.arange(3))
    assert "damaged" in refused(tmp_path / "d.npz")


def test_a_checkpoint_of_another_system(tmp_path):
    save_checkpoint(tmp_path / "c.npz", STATE)
    with pytest.raises(ValueError, match="of test, not of ppo"):
        load_checkpoint(tmp_path / "c.npz", "ppo")


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("disguise", ["plain", "array", "member", "torch"])
def test_pickles_are_never_unpickled(disguise, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "c.npz"
    bomb = Bomb(marker)
    if disguise == "plain":
        path.write_bytes(pickle.dumps(bomb))
    elif disguise == "array":
        np.savez(path, tree=np.array([bomb], dtype=object))
    elif disguise == "member":
        buffer = io.BytesIO()
        np.save(buffer, np.array([bomb], dtype=object))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("tree.npy", buffer.getvalue())
            archive.writestr("a0", pickle.dumps(bomb))
    else:
        torch.save({"state": bomb}, path)
    assert "damaged" in refused(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(bomb))
    assert marker.exists(), "the bomb would have worked"


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    """A real limit on the size of files, in a process of its own."""
    program = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        import numpy as np
        from rlbook.harness.checkpoint import save_checkpoint
        path = Path(sys.argv[1])
        save_checkpoint(path, {"good": np.arange(100)})
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_checkpoint(path, {"large": np.zeros(100_000)})
        except OSError as error:
            print(error)
    """)
    path = tmp_path / "c.npz"
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert "checkpoint not written" in run.stdout and "the last good one stays" in run.stdout
    assert load_checkpoint(path)["good"].tolist() == list(range(100))
    assert [p.name for p in tmp_path.iterdir()] == ["c.npz"]
