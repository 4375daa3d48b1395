"""Ape-X: reduction to DQN, priorities of actors, the ladder, rates, faults, checkpoints, Redis."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlbook import apex, dqn
from rlbook.data import Transition
from rlbook.harness.log import METRICS
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.maths.exploration import epsilon_ladder
from rlbook.maths.priorities import importance_weights
from rlbook.parts.replay import Sample
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.faults import sigkill
from rlbook.plumbing.learner_group import Vector
from rlbook.plumbing.memory_shard import MemoryShard, Part
from rlbook.plumbing.runtime import RayRuntime
from rlbook.plumbing.virtual import VirtualRuntime
from tests.runs import assert_same_run, same_parameters

SHARED = {
    "progress": False,
    "num_envs": 4,
    "learning_starts": 64,
    "batch_size": 16,
    "hidden_sizes": (16,),
    "log_every_env_steps": 150,
    "target_period": 7,
    "replay_capacity": 400,
    "total_env_steps": 900,
    "n_step": 3,
    "dueling": True,
}
QUICK = apex.Config(
    **SHARED,
    num_actors=3,
    num_replays=2,
    unroll_length=5,
    updates_per_call=2,
    broadcast_period=2,
    rate_tolerance=80,
)


def virtual(seed=1, cores=8, **cluster) -> VirtualRuntime:
    return VirtualRuntime(seed, Cluster(nodes=(Node(cores=cores),), costs=apex.COSTS, **cluster))


def train(config: apex.Config, seed: int = 1, **cluster) -> Result:
    with virtual(seed, **cluster) as runtime:
        return apex.train(config, runtime)


# -- reductions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"double": False, "n_step": 1, "dueling": False},
        {"target_period": 1, "num_envs": 7, "seed": 5},
    ],
    ids=["default", "plain", "others"],
)
def test_one_actor_drawing_uniformly_in_turns_is_dqn(settings, monkeypatch):
    """With one ε for all: DQN is given a schedule that stands still."""
    monkeypatch.setattr(dqn, "linear_schedule", lambda *_, end, **__: end)
    shared = {**SHARED, **settings}
    theirs = dqn.train(dqn.Config(**shared, epsilon_end=0.4))
    config = apex.Config(
        **shared,
        num_actors=1,
        unroll_length=1,
        prioritized=False,
        samples_per_insert=shared["batch_size"] / shared["num_envs"],
        update_rule="sync",
        updates_per_call=1,
        calls_in_flight=1,
        broadcast_period=1,
        epsilon_base=0.4,
        epsilon_alpha=0.0,
    )
    mine = train(config)
    pairs = zip(mine.policy.network.parameters(), theirs.policy.network.parameters(), strict=True)
    for one, other in pairs:
        assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert (mine.env_steps, mine.learner_steps) == (theirs.env_steps, theirs.learner_steps)
    assert mine.metrics["episodes"] == theirs.metrics["episodes"]
    assert mine.learner_steps > 100
    moved = train(replace(config, samples_per_insert=2 * config.samples_per_insert))
    assert not same_parameters(mine, moved)
