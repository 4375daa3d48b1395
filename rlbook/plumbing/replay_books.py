"""What actors and a learner with replay tell their driver, and how it enters a run's books."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from rlbook.parts.envs import Episode
from rlbook.plumbing.replay_flow import ReplayFlow, Turn, Update


class Report(NamedTuple):
    """What the driver learns of an actor's turn; what it made goes to the replay memory."""

    env_steps: int
    items: int
    """Made: transitions or sequences."""
    wire_bytes: int
    episodes: Sequence[Episode]
    """Of the copies that explore least."""
    metrics: dict[str, float]


def book(run: Any, turns: list[Turn], flow: ReplayFlow, item_bytes: int, item_steps: int) -> None:
    """Enters what turns brought into the books of a run.

    Args:
        run: a `Run`; its `extra` counts the steps drawn and the bytes.
        turns: of the flow.
        flow: with the size of a draw.
        item_bytes: of one item on its way to the learner.
        item_steps: environment steps that are learnt from in one item.
    """
    extra = run.extra
    for asked, metrics in turns:
        if isinstance(asked, Update) and metrics is not None:
            extra["samples"] = extra.get("samples", 0) + flow.rows * item_steps
            extra["wire_bytes"] = extra.get("wire_bytes", 0) + flow.rows * item_bytes
            metrics |= so_far(extra, run.env_steps)
            run.record(env_steps=0, learner_steps=flow.config.updates_per_call, metrics=metrics)
        elif not isinstance(asked, Update) and asked.report is not None:
            env_steps, _, wire, episodes, metrics = asked.report
            extra["wire_bytes"] = extra.get("wire_bytes", 0) + wire
            metrics = metrics | so_far(extra, run.env_steps + env_steps)
            run.record(env_steps=env_steps, episodes=episodes, metrics=metrics)


def so_far(extra: dict[str, Any], env_steps: int) -> dict[str, float]:
    """What was drawn and sent since the run began, for each of so many environment steps."""
    counts = {"replay_ratio": extra.get("samples", 0), "bytes_per_env_step": extra["wire_bytes"]}
    return {name: count / max(env_steps, 1) for name, count in counts.items()}
