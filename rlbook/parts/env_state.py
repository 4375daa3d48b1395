"""Saves and restores the state of running environments, so that a resumed run goes on where it
stopped.

An environment is a Python object. `snapshot` walks its attributes (through wrappers and vectors)
and copies what is plain: numbers, text, arrays and numpy's random generators; `restore` puts them
back into a freshly made environment of the same kind. If anything else is found that could change
from step to step (a physics engine, an emulator), the answer is None: such a run resumes with fresh
episodes.
"""

from collections import deque
from types import FunctionType, MethodType
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode

PLAIN = bool | int | float | str | None | np.bool_ | np.integer | np.floating
FIXED = gym.Space | EnvSpec | AutoresetMode | type | FunctionType | MethodType
"""Attributes that are the same in every environment of one kind: not saved."""


class UnsavableError(Exception):
    """An attribute that can neither be copied nor be known to stay the same."""


def snapshot(env: Any) -> dict[str, Any] | None:
    """The plain state of an environment, or None if it holds anything that cannot be copied."""
    try:
        state = _save(env, set())
    except UnsavableError:
        return None
    return state


def restore(env: Any, state: dict[str, Any]) -> None:
    """Puts a `snapshot` back into an environment made in the same way."""
    _load(env, state)


def _save(value: Any, seen: set[int]) -> Any:
    """A copy of plain data; objects become {"object": {attribute: copy}}."""
    if isinstance(value, FIXED) or _is_constant(value):
        return {"fixed": True}
    if isinstance(value, PLAIN):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.copy()
    if isinstance(value, np.random.Generator):
        return {"generator": value.bit_generator.state}
    if id(value) in seen:
        return {"fixed": True}
    if type(value) is tuple:
        return {"tuple": [_save(item, seen) for item in value]}
    seen.add(id(value))
    if type(value) is dict and all(isinstance(key, PLAIN) for key in value):
        return {"dict": [[key, _save(item, seen)] for key, item in value.items()]}
    if type(value) is list or type(value) is deque:
        return {"list": [_save(item, seen) for item in value]}
    if isinstance(value, gym.Env | gym.vector.VectorEnv):
        return {"object": {key: _save(item, seen) for key, item in vars(value).items()}}
    raise UnsavableError(type(value).__name__)


def _is_constant(value: Any) -> bool:
    """Frozen dataclasses, and classes that say so by `constant = True`, never change."""
    frozen = getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False)
    return frozen or getattr(type(value), "constant", False) is True


def _load(value: Any, state: Any) -> Any:
    """`value` with `state` put back into it: in place where it can be, a new value otherwise."""
    if not isinstance(state, dict):
        if isinstance(state, np.ndarray) and isinstance(value, np.ndarray):
            if value.shape == state.shape and value.dtype == state.dtype:
                value[...] = state
                return value
        return state.copy() if isinstance(state, np.ndarray) else state
    if "fixed" in state:
        return value
    if "generator" in state:
        generator = np.random.Generator(getattr(np.random, state["generator"]["bit_generator"])())
        generator.bit_generator.state = state["generator"]
        return generator
    if "tuple" in state:
        return tuple(_load_items(value, state["tuple"]))
    if "list" in state:
        items = _load_items(value, state["list"])
        if not isinstance(value, list | deque):
            return items
        value.clear()
        value.extend(items)
        return value
    if "dict" in state:
        old = value if isinstance(value, dict) else {}
        pairs = [(key, _load(old.get(key), item)) for key, item in state["dict"]]
        old.clear()
        old.update(pairs)
        return old
    for key, item in state["object"].items():
        loaded = _load(getattr(value, key, None), item)
        if loaded is not getattr(value, key, None):
            setattr(value, key, loaded)
    return value


def _load_items(value: Any, states: list[Any]) -> list[Any]:
    fits = isinstance(value, list | tuple | deque) and len(value) == len(states)
    olds = list(value) if fits else [None] * len(states)
    return [_load(old, state) for old, state in zip(olds, states, strict=True)]
