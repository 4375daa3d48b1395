"""One place that refuses wrong shapes: a mistake names its argument instead of broadcasting.

Broadcasting is how most bugs in returns hide: `[T, B]` rewards plus `[T]` values "work" whenever
T = B. Every function of `rlbook.maths` therefore calls one of these checks first.
"""

import math

import torch
from torch import Tensor

_FLOATS = (torch.float32, torch.float64)


def check_floats(**tensors: Tensor) -> None:
    """All `tensors` are float32 or float64 tensors of one shape, one dtype and one device.

    Raises:
        ValueError: naming the first argument that differs, and what was expected.
    """
    reference_name, reference = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} must be float32 or float64, not {tensor.dtype}")
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but it must have the shape "
                f"{tuple(reference.shape)} of {reference_name}"
            )
        if tensor.dtype != reference.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype}, but it must be {reference.dtype} as {reference_name} is"
            )
        if tensor.device != reference.device:
            raise ValueError(
                f"{name} is on {tensor.device}, but it must be on {reference.device} as "
                f"{reference_name} is"
            )


def check_valid(valid: Tensor | None, *, like: Tensor) -> None:
    """`valid` is None, or a bool tensor with the shape and device of `like`."""
    if valid is None:
        return
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        found = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise ValueError(f"valid must be None or a bool tensor, not {found}")
    _check_companion("valid", valid, like)


def check_time_major(
    *, bootstrap_value: Tensor, valid: Tensor | None = None, **tensors: Tensor
) -> None:
    """`tensors` are `[T, ...]`, T >= 1; `bootstrap_value` is `[...]`; `valid` bool `[T, ...]`."""
    check_floats(**tensors)
    name, reference = next(iter(tensors.items()))
    if reference.ndim == 0 or reference.shape[0] == 0:
        raise ValueError(
            f"{name} must be time-major [T, ...] with T >= 1, not {tuple(reference.shape)}"
        )
    check_floats(**{f"a row of {name}": reference[0], "bootstrap_value": bootstrap_value})
    check_valid(valid, like=reference)


def check_actions(name: str, actions: Tensor, *, values: Tensor, values_name: str) -> None:
    """`actions` are integers with the shape of `values` less its last axis (the actions' axis)."""
    if not isinstance(actions, Tensor) or actions.dtype not in (torch.int64, torch.int32):
        found = actions.dtype if isinstance(actions, Tensor) else type(actions).__name__
        raise ValueError(f"{name} must be an int64 or int32 tensor, not {found}")
    if values.ndim == 0 or actions.shape != values.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(actions.shape)}, but it must have the shape of {values_name} "
            f"less its last axis, of {tuple(values.shape)}"
        )


def check_number(
    name: str, value: float, *, least: float, most: float = math.inf, open_left: bool = False
) -> None:
    """`least <= value <= most` (or `least < value` if `open_left`); NaN is refused."""
    if not least <= value <= most or (open_left and value == least):
        left = "greater than" if open_left else "at least"
        right = "" if most == math.inf else f" and at most {most}"
        raise ValueError(f"{name} must be {left} {least}{right}, not {value}")


def _check_companion(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device}, but it must be "
            f"{tuple(like.shape)} on {like.device}"
        )
