"""One training run of RLlib's new API stack in a fresh process, on the same clock as ours.

    python -m benchmarks.rllib_peer impala --seed 1 --goal 475 --seconds 90

The clock starts after the first turn of training that brought steps, when all processes are there
(ours starts before its first), and stands still during confirmations (`benchmarks.peer.Clock`).
What counts as solved is judged by raw episodes: a callback adds up the rewards of every piece of an
episode that an env runner hands over. RLlib's own `episode_return_mean` is something else: it
crosses 475 well before the mean of the last 100 episodes does.
"""

import argparse
import json
import logging
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.peer import Clock
from rlbook.harness.records import TreeMemory

RUNNERS, ENVS_EACH = 2, 16
RETURNS = "raw_episode_returns"
LOOK_EVERY_S = 0.5
"""So often `train()` is asked to come back: RLlib's 10 s would be too coarse a clock."""


@dataclass(frozen=True)
class Settings:
    """What RLlib is told besides its defaults."""

    config: str
    """Class in `ray.rllib.algorithms`."""
    note: str
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    filtered: bool = False
    """Observations brought to mean 0 and deviation 1 by a `MeanStdFilter`."""


SETTINGS = {
    "impala": Settings(
        "IMPALAConfig",
        "RLlib's example cartpole_impala: batch 500, lr 5e-4, clip 40, value loss 0.05, no entropy"
        " bonus, one network for policy and value, MeanStdFilter; fragments of 50 steps, 1 learner",
        training={
            "train_batch_size_per_learner": 500,
            "grad_clip": 40.0,
            "grad_clip_by": "global_norm",
            "lr": 0.0005,
            "vf_loss_coeff": 0.05,
            "entropy_coeff": 0.0,
        },
        model={"vf_share_layers": True},
        filtered=True,
    ),
    "appo": Settings(
        "APPOConfig",
        "RLlib's example cartpole_appo: value loss 0.05, no entropy bonus, 2 uses of each batch of"
        " 500, one network for policy and value; lr 5e-4, fragments of 50 steps, 1 learner",
        training={
            "circular_buffer_iterations_per_batch": 2,
            "vf_loss_coeff": 0.05,
            "entropy_coeff": 0.0,
        },
        model={"vf_share_layers": True},
    ),
    "ppo": Settings(
        "PPOConfig",
        "RLlib's example cartpole_ppo: lr 3e-4, 6 epochs, value loss 0.01, 32 linear units, one"
        " network for policy and value; batch 4000, minibatches of 128, learner in the driver",
        training={"lr": 0.0003, "num_epochs": 6, "vf_loss_coeff": 0.01},
        model={"fcnet_hiddens": [32], "fcnet_activation": "linear", "vf_share_layers": True},
    ),
}
"""The documented settings for CartPole of RLlib's `rllib/examples/algorithms`, but for the numbers
of processes: here two env runners of 16 copies."""


class Pieces:
    """Returns of whole episodes from the pieces that an env runner hands over."""

    def __init__(self) -> None:
        self._so_far: defaultdict[str, float] = defaultdict(float)

    def ended(self, samples: Sequence[Any]) -> list[float]:
        """Of the episodes that end in these pieces, oldest first."""
        returns = []
        for piece in samples:
            self._so_far[piece.id_] += float(piece.get_return())
            if piece.is_done:
                returns.append(self._so_far.pop(piece.id_))
        return returns


class LearnersPolicy:
    """The learner's parameters as they are at the moment, as `harness.evaluate` wants a policy.

    Samples from the policy, as ours do.
    """

    def __init__(self, algorithm: Any, filtered: bool) -> None:
        self.algorithm, self.filtered = algorithm, filtered
        self.module = algorithm.get_module()
        self.mean, self.deviation = np.zeros(1), np.ones(1)

    def initial_state(self, num_envs: int) -> None:
        """No memory; fetches the parameters."""
        weights = self.algorithm.learner_group.get_weights()
        self.module.set_state(next(iter(weights.values())))
        if self.filtered:
            self.mean, self.deviation = filter_of(self.algorithm)

    def act(self, observation: np.ndarray, state: Any, first: np.ndarray, rng: Any) -> Any:
        """Actions `[B]` for observations `[B, ...]`."""
        import torch

        seen = np.clip((observation - self.mean) / self.deviation, -10.0, 10.0)
        if not self.filtered:
            seen = observation
        with torch.no_grad():
            batch = {"obs": torch.from_numpy(seen.astype(np.float32))}
            logits = self.module.forward_exploration(batch)["action_dist_inputs"].numpy()
        noise = rng.gumbel(size=logits.shape)
        return (logits + noise).argmax(axis=1), state


def filter_of(algorithm: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation by which the first env runner's filter works."""
    from ray.rllib.utils.filter import RunningStat

    found = algorithm.env_runner_group.foreach_env_runner(
        lambda runner: runner._env_to_module.get_state(), local_env_runner=False
    )[0]
    state = next(part for name, part in found.items() if "MeanStdFilter" in name)
    stat = RunningStat.from_state(state[None]["running_stats"][0])
    return stat.mean, stat.std + 1e-8


def make_algorithm(system: str, env_id: str, seed: int) -> Any:
    """RLlib's algorithm with its processes."""
    import ray.rllib.algorithms as algorithms
    from ray.rllib.callbacks.callbacks import RLlibCallback
    from ray.rllib.connectors.env_to_module.mean_std_filter import MeanStdFilter
    from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

    class Raw(RLlibCallback):
        """Logs every training episode's return, unreduced."""

        def __init__(self) -> None:
            super().__init__()
            self.pieces = Pieces()

        def on_sample_end(self, *, metrics_logger: Any, samples: Any, **_: Any) -> None:
            for value in self.pieces.ended(samples):
                metrics_logger.log_value(RETURNS, value, reduce="item_series")

    settings = SETTINGS[system]
    runners = {"num_env_runners": RUNNERS, "num_envs_per_env_runner": ENVS_EACH}
    if settings.filtered:
        runners["env_to_module_connector"] = lambda env, spaces, device: MeanStdFilter()
    config = (
        getattr(algorithms, settings.config)()
        .environment(env_id)
        .env_runners(**runners)
        .training(**settings.training)
        .rl_module(model_config=DefaultModelConfig(**settings.model))
        .callbacks(Raw)
        .debugging(seed=seed, log_level="ERROR")
        .reporting(min_time_s_per_iteration=LOOK_EVERY_S)
    )
    return config.build_algo()


def run(system: str, seed: int, goal: float | None, seconds: float, env_id: str) -> dict[str, Any]:
    """Trains and gives the row of a table."""
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HOME"] = scratch  # where RLlib makes a folder of results for every run
        import ray

        ray.init(
            address="local",
            num_cpus=RUNNERS + 2,  # a learner and the driver besides
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        try:
            with TreeMemory() as memory:
                algorithm = make_algorithm(system, env_id, seed)
                try:
                    clock = train(algorithm, system, seed, goal, seconds, env_id)
                finally:  # what is not stopped starts Ray once more when it is collected
                    algorithm.stop()
        finally:
            ray.shutdown()
    shared = {"num_envs": RUNNERS * ENVS_EACH, "memory_mb": memory.peak_mb}
    return {"system": system, "seed": seed, **clock.row(), **shared}


def train(
    algorithm: Any, system: str, seed: int, goal: float | None, seconds: float, env_id: str
) -> Clock:
    """Trains until the clock says that it is over."""
    policy = LearnersPolicy(algorithm, SETTINGS[system].filtered)
    clock = Clock(policy, RUNNERS * ENVS_EACH, seed, env_id, goal, seconds)
    taken, going = 0, True
    while not taken:
        taken = steps_of(result := algorithm.train())
    clock.start()
    clock.returns.extend(returns_of(result))
    while going:
        before, taken = taken, steps_of(result := algorithm.train())
        going = clock.book(taken - before, returns_of(result))
    return clock


def returns_of(result: dict[str, Any]) -> list[float]:
    """Of the training episodes that ended in this turn; RLlib's word for none is NaN."""
    found = result["env_runners"].get(RETURNS, ())
    return [] if isinstance(found, float) and math.isnan(found) else list(found)


def steps_of(result: dict[str, Any]) -> int:
    """Environment steps since the beginning."""
    return int(result["env_runners"].get("num_env_steps_sampled_lifetime", 0))


def main() -> None:
    """One run; its row goes to stdout as JSON."""
    parser = argparse.ArgumentParser(description="One training run of RLlib.")
    parser.add_argument("system", choices=sorted(SETTINGS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--goal", type=float, default=None)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--env-id", default="CartPole-v1")
    options = parser.parse_args()
    row = run(options.system, options.seed, options.goal, options.seconds, options.env_id)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
