"""How near to the physical limit: the rate of each system against its environments' bare stepping.

    python -m benchmarks.envs [--quick]

"bare" steps Gymnasium's vector with random actions and nothing else; "Envs" adds what the book
keeps (returns, rows of an unroll). "fraction" is what training reaches of "bare", all on one core.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.common import Row, child, keep, parser, table
from benchmarks.trial import settings
from rlbook.parts.envs import Envs, make_envs, require_discrete

COLUMNS = ("system", "envs", "bare steps/s", "Envs steps/s", "training steps/s", "fraction")
ONE_PROCESS = ["ppo", "a2c", "dqn"]
MANY = (128, 512, 2_048)
TRIES = 3


def ceiling(env_id: str, num_envs: int, seconds: float, *, bare: bool) -> float:
    """Valid steps a second with random actions drawn beforehand: the best of `TRIES` tries.

    Args:
        env_id: Gymnasium id.
        num_envs: copies that step together.
        seconds: length of one try.
        bare: Gymnasium's own vector, or the book's `Envs` around it.
    """
    envs = make_envs(env_id, num_envs, seed=0)
    rng = np.random.default_rng(0)
    actions = [rng.integers(require_discrete(envs, "envs"), size=num_envs) for _ in range(64)]
    step = bare_step(envs) if bare else book_step(envs)
    rates = []
    for _ in range(TRIES):
        taken, turn, begun = 0, 0, time.perf_counter()
        while (spent := time.perf_counter() - begun) < seconds:
            taken += step(actions[turn % 64])
            turn += 1
        rates.append(taken / spent)
    envs.close()
    return max(rates)


def bare_step(envs: Envs) -> Callable[[np.ndarray], int]:
    """Steps the vector alone and counts the valid steps."""
    vector, copies = envs.vector_env, envs.num_envs
    ended = np.zeros(copies, dtype=bool)

    def step(action: np.ndarray) -> int:
        nonlocal ended
        valid = copies - int(np.count_nonzero(ended))
        _, _, terminated, truncated, _ = vector.step(action)
        ended = terminated | truncated
        return valid

    return step


def book_step(envs: Envs) -> Callable[[np.ndarray], int]:
    """Steps through the book's `Envs` and takes the finished episodes, as a system does."""

    def step(action: np.ndarray) -> int:
        row = envs.step(action)
        envs.episodes()
        return int((~row.first).sum())

    return step


def measure(system: str, seconds: float, training_seconds: float) -> Row:
    """One system's line."""
    _, config = settings(system, 1, "CartPole-v1")
    bare = ceiling(config.env_id, config.num_envs, seconds, bare=True)
    wrapped = ceiling(config.env_id, config.num_envs, seconds, bare=False)
    training = child(["benchmarks.trial", system, "--seconds", str(training_seconds)])
    rate = training["env_steps_per_s"]
    return {
        "system": system,
        "envs": config.num_envs,
        "bare steps/s": bare,
        "Envs steps/s": wrapped,
        "training steps/s": rate,
        "fraction": rate / bare,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Each system, then the ceiling for more copies."""
    options = parser("Rate of each system against bare environment stepping.").parse_args(arguments)
    seconds, training_seconds = (0.02, 0.2) if options.quick else (0.4, 4.0)
    systems = ["a2c"] if options.quick else ONE_PROCESS
    rows = [measure(system, seconds, training_seconds) for system in systems]
    for copies in MANY:
        bare = ceiling("CartPole-v1", copies, seconds, bare=True)
        wrapped = ceiling("CartPole-v1", copies, seconds, bare=False)
        rows.append({"system": "–", "envs": copies, "bare steps/s": bare, "Envs steps/s": wrapped})
    table("Fraction of the environments' own speed (CartPole-v1, one core)", rows, COLUMNS)
    keep("envs", rows, [], options)


if __name__ == "__main__":
    main()
