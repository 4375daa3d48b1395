"""Collects unrolls: T steps of B environments, with the row of overlap that bootstrapping needs."""

from collections.abc import Callable

import numpy as np

from rlbook.data import AgentOutput, EnvOutput, Unroll
from rlbook.parts.envs import Envs


def collect_unroll(
    envs: Envs,
    act: Callable[[np.ndarray], AgentOutput],
    unroll_length: int,
    cut: Callable[[int], bool] | None = None,
) -> Unroll:
    """Steps the environments `unroll_length` times, from where they stand.

    Args:
        envs: B environments (NEXT_STEP autoreset).
        act: observation `[B, ...]` → `AgentOutput` `[B, ...]`.
        unroll_length: T.
        cut: steps taken so far → whether to leave it at that; asked after each step.

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
    return Unroll(
        EnvOutput(*(np.stack(column) for column in zip(*env_rows, strict=True))),
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
