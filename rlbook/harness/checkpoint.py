"""Checkpoints: one .npz file of arrays beside a JSON tree; nothing in it is ever unpickled.

Written aside and then renamed: a crash or a full disk leaves the last good checkpoint as it was.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

FORMAT = "rlbook-checkpoint-1"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a tree of dicts, lists, tuples, arrays, tensors and plain values.

    Raises:
        OSError: it could not be written (a full disk); the file at `path` is as before.
        TypeError: a leaf of another type.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = json.dumps({"format": FORMAT, "state": _encode(state, arrays)})
    arrays["tree"] = np.frombuffer(tree.encode(), dtype=np.uint8)
    aside = path.with_name(path.name + ".part")
    try:
        with open(aside, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        kept = "the last good one stays" if path.exists() else "there is none yet"
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"{path}: checkpoint not written ({reason}); {kept}") from error


def load_checkpoint(path: Path, system: str | None = None) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote; with `system`, only if that system wrote it.

    Raises:
        ValueError: there is no such file, or it is damaged, or it is no checkpoint of this book, or
            it is one of another system.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no checkpoint")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        document = json.loads(arrays["tree"].tobytes())
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}")
        state = _decode(document["state"], arrays)
        if not isinstance(state, dict):
            raise ValueError("no tree")
    except Exception as error:  # whatever a foreign file makes zipfile, numpy or json say
        raise ValueError(
            f"{path}: damaged, or no checkpoint of rlbook ({type(error).__name__});"
            " nothing was loaded"
        ) from error
    if system is not None and state.get("system") != system:
        raise ValueError(f"{path}: a checkpoint of {state.get('system')}, not of {system}")
    return state


def _encode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, torch.Tensor):
        return {"$tensor": _store(value.detach().cpu().numpy(), arrays)}
    if isinstance(value, np.ndarray):
        return {"$array": _store(value, arrays)}
    if isinstance(value, dict):
        return {"$dict": [[_encode(k, arrays), _encode(v, arrays)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(item, arrays) for item in value]}
    if isinstance(value, list):
        return [_encode(item, arrays) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds arrays and plain values, not {type(value).__name__}")


def _store(array: np.ndarray, arrays: dict[str, np.ndarray]) -> str:
    if array.dtype == object:
        raise TypeError("a checkpoint cannot hold an array of objects")
    name = f"a{len(arrays)}"
    arrays[name] = array
    return name


def _decode(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_decode(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return torch.from_numpy(arrays[content].copy())
    if kind == "$array":
        return arrays[content]
    if kind == "$tuple":
        return tuple(_decode(item, arrays) for item in content)
    if kind == "$dict":
        return {_decode(k, arrays): _decode(v, arrays) for k, v in content}
    raise ValueError(f"unknown mark {kind!r}")
