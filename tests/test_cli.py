"""The command as people use it: every bad input in one line, interrupts, crashes, a full disk."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from rlbook import ppo
from rlbook.cli import main
from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.harness.run import Result
from rlbook.parts.timeline import Timeline
from tests.counters import register
from tests.runs import assert_same_run, rlbook, wait_for

BAD = {
    "train": "name a system",
    "train dpo": "there is no 'dpo'",
    "train ppo --env-id Nowhere-v0": "env_id: ",
    "train ppo --env-id ALE/Nowhere-v5": "env_id: ",
    "train ppo --env-id Pendulum-v1": "env_id: Pendulum-v1 has the action space",
    "train dqn --env-id Pendulum-v1": "needs a discrete one",
    "train policy_gradient --env-id Pendulum-v1": "needs a discrete one",
    "train td --env-id CartPole-v1": "env_id: ",
    "train mdp --env-id CartPole-v1": "env_id: ",
    "train ppo --num-envs -3": "num_envs: must be at least 1, got -3",
    "train ppo --num-envs two": "--num-envs: invalid",
    "train ppo --num-envs": "--num-envs",
    "train ppo --total-env-steps 0": "total_env_steps: ",
    "train ppo --hidden-sizes 64 -5": "hidden_sizes: ",
    "train ppo --clip 0": "clip: must be larger than 0",
    "train ppo --stop-at-return nan": "stop_at_return: ",
    "train ppo --seed 1.5": "--seed: invalid",
    "train ppo --seed -1": "seed: must be 0 or larger",
    "train ppo --nonsense 3": "Unrecognized options: --nonsense",
    "train dqn --batch-size -32": "batch_size: ",
    "train dqn --replay-capacity 1000000000000 --learning-starts 9": "replay_capacity: ",
    "train policy_gradient --algorithm a3c": "a3c",
    "train mdp --num-envs 3": "--num-envs",
    "train ppo --preset huge": "preset: ppo has default, paper; got 'huge'",
    "train ppo --preset": "preset: ppo has default, paper",
    "train ppo --preset paper --resume somewhere": "preset: ",
    "train ppo --run-dir .": "run_dir: . exists",
    "train ppo --resume nowhere": "nowhere is no run folder",
    "train ppo --run-dir a --resume b": "",
    "eval nowhere": "nowhere is no run folder",
    "eval": "run_dir",
    "eval nowhere --seed x": "--seed",
    "train ppo --trace trace.json": "trace: ppo runs in one process: there is nothing to trace",
    "train ppo --trace": "--trace: expected one argument",
    "why nowhere": "nowhere is no run folder",
    "why": "run_dir",
    "plot nowhere": "nowhere is no run folder",
    "plot": "run_dir",
    "video nowhere": "nowhere is no run folder",
    "record": "give a name and a system",
    "record short": "give a name and a system",
    "record short dpo": "there is no 'dpo'",
    "record short ppo --seeds 0": "seeds: must be at least 1",
    "record short ppo --seed -5": "seed: must be 0 or larger",
    "list more": "unknown argument 'more'",
    "fly": "invalid choice: 'fly'",
    "": "command",
}


def one_line(captured) -> str:
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("rlbook: ")
    return captured.err


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_line_code_2_and_leaves_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    assert BAD[words] in one_line(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_a_custom_continuous_environment_is_refused(tmp_path, monkeypatch, capsys):
    register()
    monkeypatch.chdir(tmp_path)
    assert main(["train", "ppo", "--env-id", "test/Continuous-v0"]) == 2
    assert "needs a discrete one" in one_line(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


SHORT = "--env-id rlbook/Catch-v0 --runtime virtual --total-env-steps 4000"


def test_trace_and_why_of_a_system_with_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = f"train parameter_server {SHORT} --run-dir run --trace t.json"
    assert main(words.split()) == 0
    assert "who worked on what: t.json" in capsys.readouterr().out
    spans = Timeline.read("t.json")
    assert {"driver", "Shard 0", "Worker 0", "Worker 1"} <= {span.who for span in spans}
    assert (tmp_path / "run" / "trace.json").read_bytes() == (tmp_path / "t.json").read_bytes()
    result = Result.load("run")
    assert result.wall_time_s <= max(span.end for span in spans), "seconds of one virtual clock"
    assert main(["why", "run"]) == 0
    told = capsys.readouterr().out
    assert told.rstrip("\n") == str(result.why())
    assert told.startswith("Bound by ") and "What to change:\n- " in told


@pytest.mark.parametrize("file", [".", "nowhere/trace.json"])
def test_a_trace_that_cannot_be_written_is_refused_before_training(
    file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "parameter_server", *SHORT.split(), "--trace", file]) == 2
    assert f"trace: {file} is no file in a folder that exists" in one_line(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_why_of_a_run_that_kept_nothing_that_says_it(run_dir, capsys):
    assert main(["why", str(run_dir)]) == 2
    assert "nothing says what bound it" in one_line(capsys.readouterr())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    words = f"train ppo --env-id rlbook/Catch-v0 --total-env-steps 2000 --run-dir {folder}"
    assert main(words.split()) == 0
    return folder


def test_training_twice_into_one_folder_is_refused(run_dir, capsys):
    before = {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    assert main(["train", "ppo", "--run-dir", str(run_dir)]) == 2
    assert "exists; give a new folder, or resume it" in one_line(capsys.readouterr())
    assert before == {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}


def test_a_damaged_or_foreign_checkpoint_is_refused(run_dir, tmp_path, capsys):
    import shutil

    for content in (b"junk", None):
        copy = shutil.copytree(run_dir, tmp_path / f"copy{content is None}")
        if content is None:
            save_checkpoint(copy / "checkpoint.npz", {"system": "ppo", "parts": {"learner": {}}})
        else:
            (copy / "checkpoint.npz").write_bytes(content)
        for words in (["eval"], ["video"], ["plot"], ["train", "ppo", "--resume"]):
            assert main([*words, str(copy)]) == 2
            assert str(copy) in one_line(capsys.readouterr())


def test_resuming_with_another_system_or_setting_is_refused(run_dir, capsys):
    assert main(["train", "dqn", "--resume", str(run_dir)]) == 2
    assert "is a run of ppo, not of dqn" in one_line(capsys.readouterr())
    assert main(["train", "ppo", "--resume", str(run_dir), "--clip", "0.3"]) == 2
    assert "clip was 0.2" in one_line(capsys.readouterr())


def test_a_finished_run_stays_as_it_is_or_gets_longer(run_dir, capsys):
    steps = Result.load(run_dir).env_steps
    rows = (run_dir / "metrics.jsonl").read_text()
    for _ in range(2):  # resuming twice changes nothing
        assert main(["train", "ppo", "--resume", str(run_dir)]) == 0
        assert Result.load(run_dir).env_steps == steps
        assert len((run_dir / "metrics.jsonl").read_text()) == len(rows)
    words = ["train", "ppo", "--resume", str(run_dir), "--total-env-steps", str(2 * steps)]
    assert main(words) == 0
    assert Result.load(run_dir).env_steps >= 2 * steps
    assert "total_env_steps" in capsys.readouterr().out


def test_list_eval_plot_video_help(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["list"]) == 0
    assert {"mdp", "td", "dqn", "policy_gradient", "ppo"} <= set(capsys.readouterr().out.split())
    assert main(["eval", str(run_dir), "--episodes", "7"]) == 0
    told = capsys.readouterr().out
    assert str(Result.load(run_dir).evaluate(7)) in told and "over 7 episodes" in told
    assert main(["plot", str(run_dir), "--out", "curve.png"]) == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(run_dir), "--y", "profit"]) == 2
    assert main(["video", str(run_dir), "--out", "episode.mp4"]) == 0
    assert (tmp_path / "episode.mp4").stat().st_size > 1000
    capsys.readouterr()
    for words in (["train", "--help"], ["record", "--help"]):
        assert main(words) == 0
        assert "usage: rlbook" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["train", "dqn", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--prioritized" in text and "Schaul" in text


def test_a_run_without_a_folder_gets_one_under_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("train ppo --env-id rlbook/Catch-v0 --total-env-steps 500 --seed 7".split()) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("ppo-rlbook-Catch-v0-seed7-")
    assert f"kept in {folder.relative_to(tmp_path)}" in capsys.readouterr().out


def test_record_passes_settings_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = "record short ppo --env-id rlbook/Catch-v0 --total-env-steps 500 --seed 5 --seeds 2"
    assert main(words.split()) == 0
    document = json.loads((tmp_path / "results" / "short" / "record.json").read_text())
    assert [run["metrics"]["seed"] for run in document["runs"]] == [5, 6]
    assert document["command"].startswith("rlbook record short ppo --env-id rlbook/Catch-v0")
    assert main(words.split()) == 2


# -- processes of their own ------------------------------------------------------------------------

LONG = ["--env-id", "CartPole-v1", "--num-envs", "8", "--total-env-steps", "50000000"]


def test_ctrl_c_leaves_a_run_that_goes_on_bit_for_bit(tmp_path):
    folder = tmp_path / "run"
    process = rlbook("train", "ppo", *LONG, "--run-dir", str(folder), "--checkpoint-every-s", "0.1")
    wait_for(folder / "checkpoint.npz", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "interrupted" in out
    goes_on_bit_for_bit(folder)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    folder = tmp_path / "run"
    process = rlbook("train", "ppo", *LONG, "--run-dir", str(folder), "--checkpoint-every-s", "0.1")
    wait_for(folder / "checkpoint.npz", process)
    process.kill()
    process.communicate()
    assert not (folder / "result.json").exists()
    goes_on_bit_for_bit(folder)


def goes_on_bit_for_bit(folder) -> None:
    steps = load_checkpoint(folder / "checkpoint.npz")["counters"]["env_steps"] + 3_000
    whole = ppo.train(ppo.Config(num_envs=8, total_env_steps=steps, progress=False))
    assert main(["train", "ppo", "--resume", str(folder), "--total-env-steps", str(steps)]) == 0
    assert_same_run(whole, Result.load(folder))


def test_a_full_disk_ends_the_run_and_the_last_good_checkpoint_stays(tmp_path):
    folder = tmp_path / "run"
    words = ["train", "dqn", "--num-envs", "8", "--learning-starts", "50000"]
    assert main([*words, "--total-env-steps", "400", "--run-dir", str(folder)]) == 0
    good = (folder / "checkpoint.npz").read_bytes()
    limit = len(good) + 20_000

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    run = subprocess.run(
        [sys.executable, "-m", "rlbook.cli", "train", "dqn", "--resume", str(folder)]
        + ["--total-env-steps", "8000", "--checkpoint-every-s", "0.2"],
        capture_output=True,
        text=True,
        preexec_fn=small_disk,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert run.returncode == 2, run
    assert run.stderr.count("\n") == 1 and "the last good one stays" in run.stderr
    state = load_checkpoint(folder / "checkpoint.npz", "dqn")
    assert state["counters"]["env_steps"] >= 400
    assert main(["train", "dqn", "--resume", str(folder), "--total-env-steps", "8000"]) == 0


def test_importing_is_light_and_the_command_warns_of_nothing():
    program = "import sys, rlbook; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    process = rlbook("list")
    out, err = process.communicate()
    assert process.returncode == 0 and "ppo" in out and err == ""
