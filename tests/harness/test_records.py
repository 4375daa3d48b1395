"""A record holds what is needed to believe and to repeat a run."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from rlbook import parameter_server, ppo
from rlbook.harness.checkpoint import load_checkpoint
from rlbook.harness.config import BaseConfig
from rlbook.harness.records import (
    POINTS,
    RecordedRun,
    TreeMemory,
    _thin,
    _without_optimizer,
    env_ceiling_of,
    make_record,
    record,
)
from rlbook.harness.run import Run

SEEDS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    config = ppo.Config(
        env_id="rlbook/Catch-v0", num_envs=8, total_env_steps=2_000, log_every_env_steps=500
    )
    make_record(root / "results" / "short", "ppo", config, SEEDS, "rlbook record short ppo")
    return root


def test_a_record_is_read_as_it_was_made(folder, monkeypatch):
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")  # chapters run in a folder of their own
    found = record("short")
    assert (found.name, found.system) == ("short", "ppo")
    assert found.command == "rlbook record short ppo"
    assert found.config["env_id"] == "rlbook/Catch-v0" and found.config["run_dir"] is None
    assert [run.metrics["seed"] for run in found.runs] == [1, 2]
    assert found.versions["rlbook"] and found.machine["cores"] >= 1 and "cores" in found.where
    assert found.solved == 0
    steps = [run.metrics["env_steps"] for run in found.runs]
    assert found.median("env_steps") == np.median(steps)
    for run in found.runs:
        assert run.curves["env_steps"][-1] == run.metrics["env_steps"]
        assert run.curves["loss"].dtype == float
    with pytest.raises(ValueError, match="evaluation_return_mean"):
        found.median("evaluation_return_mean")


def test_its_policy_can_play_and_holds_the_network_alone(folder):
    state = load_checkpoint(folder / "results" / "short" / "policy.npz")
    assert set(state["parts"]) == {"learner"} and "optimizer" not in state["parts"]["learner"]
    policy = ppo.load_policy(ppo.Config(env_id="rlbook/Catch-v0"), state["parts"])
    observation = np.zeros((3, 1, 10, 5), np.float32)
    assert policy.act(observation, None, None, np.random.default_rng(0))[0].shape == (3,)
    assert (folder / "results" / "short" / "episode.mp4").stat().st_size > 1000


def test_a_record_is_strict_json_and_names_no_folder(folder):
    text = (folder / "results" / "short" / "record.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert str(folder) not in text and "tmp" not in text


def test_existing_records_and_bad_counts_are_refused(folder):
    with pytest.raises(ValueError, match="^record: .* exists"):
        make_record(folder / "results" / "short", "ppo", ppo.Config(), 1, "")
    with pytest.raises(ValueError, match="^seeds: "):
        make_record(folder / "results" / "new", "ppo", ppo.Config(), 0, "")
    assert not (folder / "results" / "new").exists()
    with pytest.raises(ValueError, match="^record: there is no results/missing"):
        record("missing")


def test_long_curves_are_thinned_to_their_ends():
    curves = {"x": np.arange(1001.0), "y": np.full(1001, np.nan)}
    thin = _thin(curves)
    assert len(thin["x"]) == POINTS and thin["x"][0] == 0 and thin["x"][-1] == 1000
    assert thin["y"] == [None] * POINTS
    assert _thin({}) == {} and _thin({"x": np.array([1 / 3])}) == {"x": [0.333333]}


def test_solved_seeds_are_counted(folder, monkeypatch):
    monkeypatch.chdir(folder)
    found = record("short")
    found.runs.append(RecordedRun({"stopped_because": "solved"}, {}))
    assert found.solved == 1


def test_memory_counts_children_too() -> None:
    with TreeMemory(every_s=0.05) as alone:
        time.sleep(0.2)
    code = "import time; x = bytearray(200_000_000); print('ready', flush=True); time.sleep(30)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        with TreeMemory(every_s=0.05) as both:
            time.sleep(0.3)
    finally:
        child.kill()
        child.wait()
    assert both.peak_mb > alone.peak_mb + 190


def test_the_ceiling_is_of_as_many_processes_as_the_system_has() -> None:
    config = parameter_server.Config(env_id="rlbook/Catch-v0", num_workers=2, num_envs=4)
    assert env_ceiling_of(config) > 1_000
    assert env_ceiling_of(BaseConfig()) is None


def test_a_policy_is_kept_without_its_optimiser() -> None:
    state = {"shards": [{"parameters": 1, "optimizer": {"state": 2}}], "optimizer": 3}
    assert _without_optimizer(state) == {"shards": [{"parameters": 1}]}


def test_a_record_without_a_policy_writes_no_checkpoint(tmp_path, monkeypatch):
    """And names the commit that it is told, where the history of the code is not there."""
    monkeypatch.setenv("RLBOOK_COMMIT", "0123456789ab")
    written = []
    monkeypatch.setattr(Run, "checkpoint", lambda run: written.append(run.run_dir))
    config = ppo.Config(env_id="rlbook/Catch-v0", num_envs=4, total_env_steps=500)
    path = make_record(tmp_path / "bare", "ppo", config, 1, "rlbook record bare ppo", False)
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]
    assert set(written) <= {None} and json.loads(path.read_text())["commit"] == "0123456789ab"
