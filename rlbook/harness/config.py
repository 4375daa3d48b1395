"""What every run is told: a frozen dataclass for each system, and the fields that all share."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from rlbook.parts.stored import reading

C = TypeVar("C", bound="BaseConfig")

RUN_FIELDS = frozenset(
    {"run_dir", "resume", "stop_at_return", "progress", "checkpoint_every_s", "log_every_env_steps"}
    | {"device", "compile", "learner_backend", "gpus_per_learner", "inference_devices"}
    | {"ray_address"}
)
"""Fields that may differ between a run and its continuation (with the length of the run): what is
kept of it, and where it is computed."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What even a tabular system is told."""

    env_id: str = "CartPole-v1"
    """Gymnasium id of the environment."""
    seed: int = 1
    """Seeds the environments, the networks and every random draw."""
    run_dir: str | None = None
    """Folder to keep the run in; must not exist. None keeps nothing on disk."""
    resume: str | None = None
    """Run folder to continue from its checkpoint."""
    progress: bool = True
    """Show a progress line (never where there is no terminal or notebook)."""

    def __post_init__(self) -> None:
        """Refuses bad values: ValueError names the field, what is wrong and what is allowed."""
        for field in dataclasses.fields(self):
            _check_type(field.name, field.type, getattr(self, field.name))
        if self.seed < 0:
            raise ValueError(f"seed: must be 0 or larger, got {self.seed}")
        if self.run_dir is not None and self.resume is not None:
            raise ValueError("run_dir: leave it out with resume, which continues in its own folder")


@dataclass(frozen=True, kw_only=True)
class RunConfig(BaseConfig):
    """What every system that learns from environment steps is told."""

    num_envs: int = 32
    """Copies of the environment that step together (B)."""
    total_env_steps: int = 500_000
    """Stop after so many environment steps (agent decisions)."""
    stop_at_return: float | None = None
    """Stop when solved: the training mean reaches this return and 100 fresh episodes confirm it."""
    log_every_env_steps: int = 5_000
    """One row of metrics for so many environment steps."""
    checkpoint_every_s: float = 60.0
    """Seconds of training between checkpoints (with a run folder); one more at the end."""
    torch_threads: int = 1
    """Threads of PyTorch in this process; small networks are fastest with 1."""

    def __post_init__(self) -> None:
        """Refuses bad values."""
        super().__post_init__()
        at_least(self, 1, "num_envs", "total_env_steps", "log_every_env_steps", "torch_threads")
        at_least(self, 0, "checkpoint_every_s")
        if getattr(self, "max_gradient_norm", None) == 0:
            raise ValueError(
                "max_gradient_norm: 0 would scale every gradient to nothing, and nothing would be"
                " learnt; inf leaves all as they are"
            )


def _check_type(field: str, kind: Any, value: Any) -> None:
    """ValueError if a number is none, a size (a tuple's items) no integer >= 1, a word no text or
    none of those that a Literal allows.
    """
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ValueError(f"{field}: must be one of {', '.join(get_args(kind))}; got {value!r}")
    if kind in (int, float, int | None, float | None):
        whole = kind in (int, int | None)
        allowed = int | None if whole else int | float | None
        missing = value is None and kind in (int, float)
        if missing or isinstance(value, bool) or not isinstance(value, allowed):
            text = "a whole number" if whole else "a number"
            raise ValueError(f"{field}: must be {text}, got {value!r}")
        if value is not None and value != value:
            raise ValueError(f"{field}: must be a number, got {value}")
    if kind == tuple[int, ...]:
        sizes = value if isinstance(value, tuple) else (None,)
        if not all(type(size) is int and size >= 1 for size in sizes):
            raise ValueError(f"{field}: must be whole numbers of at least 1, got {value!r}")
    if kind == tuple[str, ...]:
        words = value if isinstance(value, tuple) else (None,)
        if not all(isinstance(word, str) for word in words):
            raise ValueError(f"{field}: must be a tuple of words, got {value!r}")


def at_least(config: Any, minimum: float, *fields: str) -> None:
    """ValueError for the first of `fields` that is below `minimum` (or no number)."""
    for field in fields:
        value = getattr(config, field)
        if not value >= minimum:
            raise ValueError(f"{field}: must be at least {minimum}, got {value}")


def above(config: Any, limit: float, *fields: str) -> None:
    """ValueError for the first of `fields` that is not larger than `limit`."""
    for field in fields:
        value = getattr(config, field)
        if not value > limit:
            raise ValueError(f"{field}: must be larger than {limit}, got {value}")


def within(config: Any, low: float, high: float, *fields: str) -> None:
    """ValueError for the first of `fields` outside [low, high]."""
    for field in fields:
        value = getattr(config, field)
        if not low <= value <= high:
            raise ValueError(f"{field}: must be between {low} and {high}, got {value}")


def at_most(config: Any, field: str, limit: str) -> None:
    """ValueError if a field is larger than another one, its limit."""
    value, most = getattr(config, field), getattr(config, limit)
    if value > most:
        raise ValueError(f"{field}: must be at most {limit}, which is {most}, got {value}")


def one_of(config: Any, field: str, allowed: tuple[str, ...]) -> None:
    """ValueError if a field is none of the allowed words."""
    value = getattr(config, field)
    if value not in allowed:
        raise ValueError(f"{field}: must be one of {', '.join(allowed)}; got {value!r}")


def accepted(config: Any, make: Callable[[Any], object], *fields: str) -> None:
    """ValueError, with the field's name before its words, where `make(value)` raises one."""
    for field in fields:
        try:
            make(getattr(config, field))
        except ValueError as error:
            raise ValueError(f"{field}: {error}") from error


def config_to_json(config: BaseConfig) -> dict[str, Any]:
    """The fields as plain values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def config_from_json(config_type: type[C], values: dict[str, Any], source: Path) -> C:
    """A config from `config_to_json`; ValueError if the fields are not those of `config_type`."""
    names = {field.name for field in dataclasses.fields(config_type)}
    unknown = sorted(set(values) - names)
    if unknown:
        raise ValueError(f"{source}: fields that {config_type.__module__} does not know: {unknown}")
    fitted = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    try:
        with reading():
            return config_type(**fitted)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def refuse_changes(stored: BaseConfig, config: BaseConfig) -> None:
    """ValueError if a continued run changes anything but its length, its bookkeeping and
    its place.
    """
    allowed = RUN_FIELDS | {"total_env_steps"}
    fields = [field.name for field in dataclasses.fields(config) if field.name not in allowed]
    changed = [name for name in fields if getattr(stored, name) != getattr(config, name)]
    if changed:
        was = ", ".join(f"{name} was {getattr(stored, name)!r}" for name in changed)
        raise ValueError(f"resume: a continued run keeps its settings, but {was}")
