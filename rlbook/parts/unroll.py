"""Collects unrolls: T steps of B environments, with the row of overlap that bootstrapping needs."""

from collections.abc import Callable

import numpy as np

from rlbook.data import AgentOutput, EnvOutput, Unroll
from rlbook.parts.envs import Envs
from rlbook.parts.frames import packed


def collect_unroll(
    envs: Envs,
    act: Callable[[np.ndarray], AgentOutput],
    unroll_length: int,
    cut: Callable[[int], bool] | None = None,
    pack: bool = False,
) -> Unroll:
    """Steps the environments `unroll_length` times, from where they stand.

    Args:
        envs: B environments (NEXT_STEP autoreset).
        act: observation `[B, ...]` → `AgentOutput` `[B, ...]`.
        unroll_length: T.
        cut: steps taken so far → whether to leave it at that; asked after each step.
        pack: of stacks of frames take each frame once: `observation` is then what
            `frames.packed` says, `[T+k, B, H, W]`.

    Returns:
        An unroll of newly allocated numpy arrays; row 0 of `env_outputs` is where the last unroll
        ended.
    """
    row = envs.env_output
    env_rows, agent_rows = [row], []
    for step in range(1, unroll_length + 1):
        agent_output = act(row.observation)
        row = envs.step(agent_output.action)
        agent_rows.append(agent_output)
        env_rows.append(row)
        if cut is not None and cut(step):
            break
    seen, *others = zip(*env_rows, strict=True)
    observations = packed(seen) if pack and envs.stacked else np.stack(seen)
    return Unroll(
        EnvOutput(observations, *map(np.stack, others)),
        AgentOutput(*(np.stack(column) for column in zip(*agent_rows, strict=True))),
    )


def joined(first: Unroll, second: Unroll) -> Unroll:
    """One unroll of two that follow each other: `second` begins where `first` ends."""
    env_rows = zip(first.env_outputs, second.env_outputs, strict=True)
    agent_rows = zip(first.agent_outputs, second.agent_outputs, strict=True)
    return first._replace(
        env_outputs=EnvOutput(*(np.concatenate((a, b[1:])) for a, b in env_rows)),
        agent_outputs=AgentOutput(*(np.concatenate(pair) for pair in agent_rows)),
    )
