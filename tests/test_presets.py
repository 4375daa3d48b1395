"""The presets for Atari: what they claim to be told, and that they train."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from rlbook import apex, dppo, dqn, impala, r2d2, seed_rl
from rlbook.harness.run import Result
from rlbook.parts.envs import Envs
from rlbook.parts.unroll import collect_unroll

pytest.importorskip("ale_py")

TINY: dict[str, Any] = {"progress": False, "torch_threads": 1, "num_envs": 2, "seed": 3}
REPLAY: dict[str, Any] = {"num_actors": 1, "num_replays": 1, "updates_per_call": 1}
SMALL: dict[Any, dict[str, Any]] = {
    impala: {"num_actors": 2, "unroll_length": 4, "unrolls_per_batch": 2, "total_env_steps": 48},
    seed_rl: {
        "num_workers": 2,
        "groups": 1,
        "num_inference": 1,
        "inference_batch": 4,
        "unroll_length": 4,
        "unrolls_per_batch": 2,
        "wiring": "calls",
        "total_env_steps": 48,
    },
    apex: {
        **REPLAY,
        "unroll_length": 5,
        "batch_size": 4,
        "learning_starts": 10,
        "replay_capacity": 100,
        "rate_tolerance": 16,
        "samples_per_insert": 0.5,
        "total_env_steps": 60,
    },
    r2d2: {
        **REPLAY,
        "sequence_length": 4,
        "sequence_overlap": 2,
        "burn_in_length": 2,
        "unroll_length": 6,
        "batch_size": 2,
        "learning_starts": 2,
        "replay_capacity": 20,
        "lstm_size": 8,
        "total_env_steps": 60,
    },
    dppo: {
        "num_workers": 2,
        "unroll_length": 4,
        "minibatch_size": 8,
        "epochs": 1,
        "total_env_steps": 48,
    },
}
"""What a preset must be cut down to, so that some updates of it take a second or two."""
CASES = [
    *((module, "one_gpu") for module in SMALL),
    *((module, "paper") for module in (impala, seed_rl, apex, r2d2)),
]


@pytest.mark.parametrize(
    "module, preset", CASES, ids=[f"{m.__name__[7:]}-{preset}" for m, preset in CASES]
)
def test_a_preset_for_atari_trains(module: Any, preset: str) -> None:
    config = module.PRESETS[preset]
    assert config.env_id == "ALE/Pong-v5"
    small = replace(config, **TINY, **SMALL[module], runtime="virtual", device="cpu")
    result: Result = module.train(small)
    assert result.env_steps >= small.total_env_steps and result.learner_steps >= 2
    assert result.metrics["loss"] == result.metrics["loss"], "not NaN"


def test_one_gpu_is_for_one_gpu_and_sixteen_cores() -> None:
    for module in SMALL:
        config = module.PRESETS["one_gpu"]
        assert (config.device, config.precision) == ("auto", "bfloat16")
        assert getattr(config, "num_learners", 1) == 1
        processes = getattr(config, "num_actors", getattr(config, "num_workers", 0))
        processes += getattr(config, "num_replays", 0)
        assert 12 <= processes <= 14, "two cores are for the driver and the learner"
        assert config.log_every_env_steps >= 20_000


def test_the_replay_memory_fits() -> None:
    """The machine has 128 GiB, and a checkpoint may hold three times the memory: see `one_gpu`."""
    a, r = apex.PRESETS["one_gpu"], r2d2.PRESETS["one_gpu"]
    size = a.replay_capacity * apex.kept_bytes(a), r.replay_capacity * r2d2.row_bytes(r)
    assert [round(one / 2**30, 1) for one in size] == [16.4, 22.6] and 3 * max(size) < 96 * 2**30
    stacks = a.replay_capacity * apex.item_bytes(a)
    assert round(stacks / 2**30) == 105, "what it was with whole stacks"
    assert apex.kept_bytes(a) / 84**2 == pytest.approx(1.24, rel=0.01)
    frames = r2d2.example(r).observation.nbytes
    assert frames == (20 + 40 + 5 + 3) * 84**2 and frames / r2d2.row_bytes(r) > 0.98
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlbook.harness.doctor.memory_bytes", lambda: 15 * 2**30)
        for module, config in ((apex, a), (r2d2, r)):
            with pytest.raises(ValueError, match="^replay_capacity: .* need (16|23) GiB, this"):
                module.train(replace(config, **TINY, runtime="virtual", device="cpu"))


def test_impalas_paper_is_table_g1() -> None:
    config = impala.PRESETS["paper"]
    values = {
        "life_loss_ends": True,
        "unroll_length": 20,
        "discount": 0.99,
        "value_cost": 0.5,
        "entropy_cost": 0.01,
        "rmsprop_decay": 0.99,
        "rmsprop_epsilon": 0.01,
        "learning_rate": 6e-4,
        "anneal_learning_rate": True,
        "max_gradient_norm": 40.0,
        "loss_reduction": "sum",
        "optimizer": "rmsprop",
        "lambda_": 1.0,
        "torso": "resnet",
        "lstm_size": 0,
        "precision": "float32",
        "total_env_steps": 200_000_000 // 4,
    }
    assert {name: getattr(config, name) for name in values} == values
    assert config.unrolls_per_batch * config.num_envs == 32


def test_apexs_paper_and_r2d2s_paper() -> None:
    a, r = apex.PRESETS["paper"], r2d2.PRESETS["paper"]
    assert (a.batch_size, a.n_step, a.replay_capacity, a.target_period) == (512, 3, 2_000_000, 2500)
    assert (a.priority_exponent, a.importance_exponent, a.epsilon_base) == (0.6, 0.4, 0.4)
    assert (a.learning_rate, a.optimizer_epsilon) == (0.00025 / 4, 1.5e-7)
    assert (a.max_gradient_norm, a.learning_starts, a.epsilon_alpha) == (40.0, 50_000, 7.0)
    assert (r.batch_size, r.n_step, r.sequence_length, r.burn_in_length) == (64, 5, 80, 40)
    assert (r.priority_exponent, r.importance_exponent, r.priority_mix) == (0.9, 0.6, 0.9)
    assert (r.learning_rate, r.optimizer_epsilon, r.target_period) == (1e-4, 1e-3, 2500)
    assert (r.discount, r.rescaling_epsilon, r.lstm_size) == (0.997, 1e-3, 512)


def test_dqns_paper_ends_with_a_life() -> None:
    config = dqn.PRESETS["paper"]
    assert config.life_loss_ends and not config.double and config.n_step == 1


def test_frames_that_are_told_once_change_nothing_but_the_bytes(monkeypatch) -> None:
    config = replace(impala.PRESETS["paper"], **TINY, **SMALL[impala], runtime="virtual")
    config = replace(config, env_id="ALE/Breakout-v5", total_env_steps=160, torso="nature")
    packed = impala.train(config)
    whole = partial(collect_unroll, pack=False)
    monkeypatch.setattr(impala, "collect_unroll", lambda *found, pack: whole(*found))
    plain = impala.train(config)
    for name in ("loss", "value_loss", "gradient_norm"):
        assert packed.metrics[name] == plain.metrics[name]
    # Of an unroll of 4 steps 5 · 4 frames, or 4 + 4, and less than 7 % of other things.
    counts = [result.metrics["bytes_per_env_step"] for result in (packed, plain)]
    weights = sum(p.numel() for p in plain.policy.network.parameters()) * 4 / 8
    frames = [count - weights for count in counts]
    assert frames[0] / frames[1] == pytest.approx(8 / 20, rel=0.07)


@pytest.mark.parametrize("module", [apex, r2d2], ids=["apex", "r2d2"])
def test_replay_that_keeps_each_frame_once_changes_nothing_but_the_bytes(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of random play, so that games end; in turns, for fewer bytes are sooner there."""
    config = replace(module.PRESETS["paper"], **TINY, **SMALL[module], runtime="virtual")
    random = {"epsilon_base": 1.0, "epsilon_alpha": 0.0, "scored_fraction": 1.0}
    config = replace(config, env_id="ALE/Breakout-v5", **random)
    config = replace(config, total_env_steps=700, update_rule="sync")
    packed = module.train(config)
    monkeypatch.setattr(Envs, "planes", 1)
    whole = module.train(config)
    assert whole.metrics["episodes"] >= 1 and whole.learner_steps >= 50
    ways = [result.policy.network.state_dict() for result in (packed, whole)]
    assert all(torch.equal(values, ways[1][name]) for name, values in ways[0].items())
    # Ape-X: of 5 steps 5 + 3 − 1 + 4 frames, not 5 · 8; R2D2: of 11 rows 11 + 3, not 11 · 4.
    ratio = packed.extra["replay_nbytes"] / whole.extra["replay_nbytes"]
    assert ratio == pytest.approx({apex: 11 / 40, r2d2: 14 / 44}[module], rel=0.01)
    assert packed.extra["wire_bytes"] < whole.extra["wire_bytes"]


SEQUENCES: dict[str, Any] = {
    "learner": "r2d2",
    "sequence_length": 6,
    "sequence_overlap": 3,
    "burn_in_length": 2,
    "batch_size": 4,
    "learning_starts": 4,
    "samples_per_insert": 1.0,
    "lstm_size": 8,
    "epsilon_base": 1.0,  # random play, or nobody begins the game
    "epsilon_alpha": 0.0,
    "scored_fraction": 1.0,
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, SEQUENCES], ids=["vtrace", "r2d2"])
def test_single_frames_on_a_stream_change_nothing_but_the_bytes(tmp_path, changes) -> None:
    """Whole rows by calls, newest frames by a stream, and that with a rest after each update."""
    config = replace(seed_rl.PRESETS["paper"], **TINY, **SMALL[seed_rl], inference_timeout_s=None)
    lockstep = {"update_rule": "sync", "unrolls_in_flight": 1, "unroll_length": 30}
    config = replace(config, **lockstep, env_id="ALE/Breakout-v5", inference_batch=2)
    config = replace(config, torso="nature", total_env_steps=600, **changes)
    rests = {"run_dir": str(tmp_path / "run"), "checkpoint_every_s": 0.0}
    calls = seed_rl.train(replace(config, runtime="virtual"))
    streamed = seed_rl.train(replace(config, wiring="unix"))
    rested = seed_rl.train(replace(config, wiring="unix", **rests))
    assert calls.metrics["episodes"] >= 2 and calls.learner_steps >= 4
    ways = [result.policy.network.state_dict() for result in (calls, streamed, rested)]
    for name, values in ways[0].items():
        assert all(torch.equal(values, way[name]) for way in ways[1:]), name
    count = [result.metrics["bytes_per_env_step"] for result in (calls, streamed)]
    assert count[1] / count[0] == pytest.approx(0.25, rel=0.03)
