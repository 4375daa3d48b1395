"""Every bad value is refused with the name of its field; a config survives its JSON."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from rlbook import dppo, dqn, policy_gradient, ppo
from rlbook.harness.config import RunConfig, config_from_json, config_to_json, refuse_changes

HERE = Path("config.json")
BAD = [
    (RunConfig, {"seed": -1}),
    (RunConfig, {"seed": 1.5}),
    (RunConfig, {"seed": "one"}),
    (RunConfig, {"num_envs": 0}),
    (RunConfig, {"num_envs": -8}),
    (RunConfig, {"num_envs": 2.5}),
    (RunConfig, {"num_envs": True}),
    (RunConfig, {"num_envs": None}),
    (RunConfig, {"total_env_steps": 0}),
    (RunConfig, {"log_every_env_steps": 0}),
    (RunConfig, {"torch_threads": 0}),
    (RunConfig, {"checkpoint_every_s": -1.0}),
    (RunConfig, {"checkpoint_every_s": float("nan")}),
    (RunConfig, {"stop_at_return": float("nan")}),
    (RunConfig, {"stop_at_return": "high"}),
    (ppo.Config, {"unroll_length": 0}),
    (ppo.Config, {"epochs": 0}),
    (ppo.Config, {"minibatch_size": -4}),
    (ppo.Config, {"clip": 0.0}),
    (ppo.Config, {"value_clip": -0.1}),
    (ppo.Config, {"discount": 1.01}),
    (ppo.Config, {"gae_lambda": -0.01}),
    (ppo.Config, {"learning_rate": -1e-3}),
    (ppo.Config, {"learning_rate": float("nan")}),
    (ppo.Config, {"hidden_sizes": (64, -64)}),
    (ppo.Config, {"hidden_sizes": (0,)}),
    (ppo.Config, {"hidden_sizes": 64}),
    (policy_gradient.Config, {"algorithm": "a3c"}),
    (policy_gradient.Config, {"lambda_": 2.0}),
    (policy_gradient.Config, {"unroll_length": -1}),
    (dqn.Config, {"n_step": 0}),
    (dqn.Config, {"replay_capacity": 0}),
    (dqn.Config, {"batch_size": -32}),
    (dqn.Config, {"update_period": 0}),
    (dqn.Config, {"target_period": 0}),
    (dqn.Config, {"epsilon_end": 1.5}),
    (dqn.Config, {"epsilon_steps": 0}),
    (dqn.Config, {"priority_exponent": -0.1}),
    (dqn.Config, {"importance_exponent": 1.1}),
    (dqn.Config, {"learning_starts": 100_000}),
]


@pytest.mark.parametrize(
    "kind, bad", BAD, ids=[f"{list(b)[0]}={list(b.values())[0]}" for _, b in BAD]
)
def test_bad_values_are_refused_by_name(kind, bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))}: ") as refusal:
        kind(**bad)
    assert "\n" not in str(refusal.value)


def test_a_new_folder_and_a_resumed_one_exclude_each_other():
    with pytest.raises(ValueError, match="^run_dir: "):
        RunConfig(run_dir="a", resume="b")


@pytest.mark.parametrize("system", [dqn, policy_gradient, ppo])
def test_every_preset_survives_its_json(system):
    for preset in system.PRESETS.values():
        assert config_from_json(system.Config, config_to_json(preset), HERE) == preset


@pytest.mark.parametrize("values", [{"num_env": 3}, {"num_envs": "3"}, {"num_envs": -3}])
def test_a_damaged_document_is_refused_with_its_path(values):
    with pytest.raises(ValueError, match="^config.json: .*num_env"):
        config_from_json(RunConfig, values, HERE)


def test_a_continued_run_may_only_get_longer():
    stored = ppo.Config()
    refuse_changes(stored, dataclasses.replace(stored, total_env_steps=1, stop_at_return=3.0))
    elsewhere = dataclasses.replace(dppo.Config(), device="auto", compile=True)
    refuse_changes(dppo.Config(), elsewhere)
    with pytest.raises(ValueError, match="clip was 0.2"):
        refuse_changes(stored, dataclasses.replace(stored, clip=0.3))
    with pytest.raises(ValueError, match="seed was 1"):
        refuse_changes(stored, dataclasses.replace(stored, seed=2))


@pytest.mark.parametrize("system", [dqn, policy_gradient, ppo])
def test_configs_are_frozen_and_every_field_is_documented(system):
    with pytest.raises(dataclasses.FrozenInstanceError):
        system.Config().seed = 3
    source = Path(system.__file__).read_text()
    for name in system.Config.__annotations__:
        assert f"\n    {name}: " in source
        after = source.split(f"\n    {name}: ", 1)[1].split("\n", 2)[1]
        assert after.startswith('    """'), f"{name} says nothing about itself"


@dataclass(frozen=True, kw_only=True)
class Choosy(RunConfig):
    """One word of two."""

    torso: Literal["nature", "resnet"] = "nature"


@pytest.mark.parametrize("word", ["alexnet", "", None, 1, ["nature"]])
def test_a_word_that_its_type_does_not_allow_is_refused(word):
    assert Choosy(torso="resnet").torso == "resnet"
    with pytest.raises(ValueError, match="torso: must be one of nature, resnet; got "):
        Choosy(torso=word)


@pytest.mark.parametrize("system", [dqn, policy_gradient, ppo])
def test_a_gradient_may_not_be_scaled_to_nothing(system):
    with pytest.raises(ValueError, match="max_gradient_norm: 0 would scale .* inf leaves all"):
        system.Config(max_gradient_norm=0.0)
    assert system.Config(max_gradient_norm=float("inf")).max_gradient_norm > 1e9
