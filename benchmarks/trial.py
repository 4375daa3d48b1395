"""One training run of a system of the book in a fresh process; its row goes to stdout as JSON.

    python -m benchmarks.trial ppo --seed 1 --goal 475        until solved
    python -m benchmarks.trial ppo --seconds 10               for its rate

All settings are those of a preset: the default one, where the name says no other. What `STEPS` says
is how long a run until solved may be where the preset is for a rate.
"""

import argparse
import json
from dataclasses import replace
from typing import Any

from rlbook.harness.records import TreeMemory
from rlbook.harness.run import Result, system_module

SYSTEMS = {
    "ppo": ("ppo", "default"),
    "a2c": ("policy_gradient", "default"),
    "dqn": ("dqn", "default"),
    "parameter_server": ("parameter_server", "default"),
    "gorila": ("gorila", "default"),
    "a3c": ("a3c", "default"),
    "dppo": ("dppo", "default"),
    "dppo_server": ("dppo", "parameter_server"),
    "apex": ("apex", "default"),
    "apex_redis": ("apex", "redis"),
    "impala": ("impala", "default"),
    "impala_throughput": ("impala", "throughput"),
    "seed_rl": ("seed_rl", "default"),
    "seed_rl_throughput": ("seed_rl", "throughput"),
}
"""Name in the tables → module and preset."""

STEPS = {"seed_rl_throughput": 10_000_000, "impala_throughput": 10_000_000}
PILOT_STEPS = 20_000


def settings(system: str, seed: int, env_id: str) -> tuple[Any, Any]:
    """The module of a system and the config of its preset."""
    name, preset = SYSTEMS[system]
    module = system_module(name)
    return module, replace(module.PRESETS[preset], env_id=env_id, seed=seed, progress=False)


def until_solved(system: str, seed: int, goal: float, env_id: str) -> Result:
    """Trains until it is solved or its total of steps is used up."""
    module, config = settings(system, seed, env_id)
    steps = STEPS.get(system, config.total_env_steps)
    return module.train(replace(config, stop_at_return=goal, total_env_steps=steps))


def for_seconds(system: str, seed: int, seconds: float, env_id: str) -> Result:
    """Trains at least `seconds`: a short run tells how many steps that takes, and warms up."""
    module, config = settings(system, seed, env_id)
    pilot = PILOT_STEPS if seconds >= 1 else PILOT_STEPS // 10
    result = module.train(replace(config, total_env_steps=pilot))
    while result.wall_time_s < seconds:
        rate = result.env_steps / result.wall_time_s
        steps = max(int(1.1 * seconds * rate), result.env_steps + 1)
        result = module.train(replace(config, total_env_steps=steps))
    return result


def row(system: str, result: Result, memory_mb: float) -> dict[str, Any]:
    """The run as a row of a table."""
    metrics = result.metrics
    return {
        "system": system,
        "seed": result.config.seed,
        "solved": result.stopped_because == "solved",
        "env_steps": result.env_steps,
        "wall_time_s": result.wall_time_s,
        "env_steps_per_s": metrics["env_steps_per_s"],
        "evaluation_return_mean": metrics["evaluation_return_mean"],
        "num_envs": getattr(result.config, "all_envs", result.config.num_envs),
        "memory_mb": memory_mb,
    }


def main() -> None:
    """One run."""
    parser = argparse.ArgumentParser(description="One training run of a system of the book.")
    parser.add_argument("system", choices=sorted(SYSTEMS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--env-id", default="CartPole-v1")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--goal", type=float)
    what.add_argument("--seconds", type=float)
    options = parser.parse_args()
    with TreeMemory() as memory:
        if options.goal is not None:
            result = until_solved(options.system, options.seed, options.goal, options.env_id)
        else:
            result = for_seconds(options.system, options.seed, options.seconds, options.env_id)
    print(json.dumps(row(options.system, result, memory.peak_mb)))


if __name__ == "__main__":
    main()
