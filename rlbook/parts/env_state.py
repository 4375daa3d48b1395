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
    if isinstance(value, FIXED):
        return {"fixed": True}
    if isinstance(value, PLAIN):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.copy()
    if isinstance(value, np.random.Generator):
        return {"generator": value.bit_generator.state}
    if id(value) in seen:
        return {"fixed": True}
    seen.add(id(value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _save(item, seen) for key, item in value.items()}}
    if isinstance(value, list | tuple | deque):
        return {"list": [_save(item, seen) for item in value]}
    if isinstance(value, gym.Env | gym.vector.VectorEnv):
        return {"object": {key: _save(item, seen) for key, item in vars(value).items()}}
    raise UnsavableError(type(value).__name__)


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
    if "dict" in state:
        old = value if isinstance(value, dict) else {}
        return {key: _load(old.get(key), item) for key, item in state["dict"].items()}
    if "list" in state:
        olds = list(value) if value is not None and len(value) == len(state["list"]) else None
        items = [_load(olds[i] if olds else None, s) for i, s in enumerate(state["list"])]
        if isinstance(value, deque):
            return deque(items, maxlen=value.maxlen)
        return tuple(items) if isinstance(value, tuple) else items
    for key, item in state["object"].items():
        loaded = _load(getattr(value, key, None), item)
        if loaded is not getattr(value, key, None):
            setattr(value, key, loaded)
    return value
