"""Collects unrolls: T steps of B environments, with the row of overlap that bootstrapping needs."""

from collections.abc import Callable

import numpy as np

from rlbook.data import AgentOutput, EnvOutput, Unroll
from rlbook.parts.envs import Envs


def collect_unroll(
    envs: Envs, act: Callable[[np.ndarray], AgentOutput], unroll_length: int
) -> Unroll:
    """Steps the environments `unroll_length` times, from where they stand.

    Args:
        envs: B environments (NEXT_STEP autoreset).
        act: observation `[B, ...]` → `AgentOutput` `[B, ...]`.
        unroll_length: T.

    Returns:
        An unroll of newly allocated numpy arrays; row 0 of `env_outputs` is where the last unroll
        ended.
    """
    row = envs.env_output
    env_rows, agent_rows = [row], []
    for _ in range(unroll_length):
        agent_output = act(row.observation)
        row = envs.step(agent_output.action)
        agent_rows.append(agent_output)
        env_rows.append(row)
    return Unroll(
        EnvOutput(*(np.stack(column) for column in zip(*env_rows, strict=True))),
        AgentOutput(*(np.stack(column) for column in zip(*agent_rows, strict=True))),
    )
