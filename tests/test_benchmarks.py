"""The measurements run and write what they promise. How fast things are is no test."""

import json
import math
import shutil
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from benchmarks import (
    a3c,
    apex,
    codecs,
    common,
    dppo,
    envs,
    frames,
    gorila,
    gpu,
    impala,
    imports,
    learners,
    parameter_server,
    peer,
    rate,
    replay,
    rllib,
    rllib_peer,
    seed_rl,
    solve,
    value_iteration,
    virtual,
)
from rlbook import cli

HEADER = {"benchmark", "command", "machine", "load_before", "versions", "targets", "rows"}


def written(module: Any, folder: Path) -> dict[str, Any]:
    """The file that a quick run leaves."""
    name = module.__name__.rpartition(".")[2]
    module.main(["--quick", "--out", str(folder)])
    document = json.loads((folder / f"{name}.json").read_text())
    assert set(document) >= HEADER
    assert document["benchmark"] == name
    assert document["command"] == f"python -m benchmarks.{name} --quick"
    assert document["machine"]["cores"] >= 1 and "torch" in document["versions"]
    assert not any(str(path) in json.dumps(document) for path in (folder, common.ROOT))
    assert document["rows"]
    return document


def test_imports(tmp_path: Path) -> None:
    rows = written(imports, tmp_path)["rows"]
    assert [row["what"] for row in rows][0] == "import rlbook"
    assert all(row["seconds"] > 0 for row in rows)
    assert imports.import_seconds()[1] == []  # neither torch nor ray


def test_a3c(tmp_path: Path) -> None:
    rows = written(a3c, tmp_path)["rows"]
    assert [row["what"] for row in rows] == ["a3c", "a3c_locked", "a2c"]
    assert rows[1]["updates lost"] == 0.0 and rows[2]["updates lost"] is None
    assert all(row["steps/s"] > 0 and row["env steps"] >= 4_000 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")
def test_apex(tmp_path: Path) -> None:
    rows = written(apex, tmp_path)["rows"]
    assert [row["system"] for row in rows] == ["apex", "apex_redis", "dqn"]
    assert all(row["what"] == "rate" and row["steps/s"] > 0 for row in rows)


@pytest.mark.slow
def test_gorila(tmp_path: Path) -> None:
    rows = written(gorila, tmp_path)["rows"]
    assert [(row["system"], row["what"]) for row in rows] == [("gorila", "rate"), ("dqn", "rate")]
    assert all(row["steps/s"] > 0 for row in rows)


@pytest.mark.slow
def test_value_iteration(tmp_path: Path) -> None:
    document = written(value_iteration, tmp_path)
    assert [row["backend"] for row in document["rows"]][:2] == ["plain Python", "arrays"]
    compared = [row["largest difference"] for row in document["rows"]]
    assert all(difference < 1e-12 for difference in compared if difference is not None)
    assert sum(difference is not None for difference in compared) == 4
    assert document["solved_by_arrays"]["sweeps"] > 10


def test_replay(tmp_path: Path) -> None:
    rows = written(replay, tmp_path)["rows"]
    made = [(row["what"], row["batch"], row["operation"]) for row in rows]
    operations = ("update", "sample", replay.BOTH)
    assert made[:9] == [
        ("tree: rlbook", batch, operation) for batch in replay.BATCHES for operation in operations
    ]
    memories = ["this process"]
    if shutil.which("redis-server"):
        memories += [f"Redis, {kind}" for kind in ("none", "everysec", "always")]
    assert made[9:] == [
        (f"replay: {what}", replay.BATCH, operation)
        for what in memories
        for operation in ("add", "sample", "update")
    ]
    assert all(row["items/s"] == pytest.approx(row["batch"] * row["batches/s"]) for row in rows)


def test_figures_of_replay_take_the_worst_row() -> None:
    rows = [
        {**replay.line("tree: rlbook", size, replay.BOTH, 1e-4), "× best peer": ratio}
        for size, ratio in ((1 << 16, 6.0), (1 << 20, 4.5))
    ]
    rows += [replay.line("replay: shard on Ray", 1 << 16, "add", 512 / 250_000)]
    rows += [replay.line("replay: shard on Ray", 1 << 16, "sample", 512 / 90_000)]
    found = replay.figures(rows)
    assert [line["measured"] for line in found] == pytest.approx([4.5, 250_000, 90_000, None])
    assert [line["reached"] for line in found] == [False, True, False, False]


def test_frames(tmp_path: Path) -> None:
    document = written(frames, tmp_path)
    kinds = [(row["what"], row["how"]) for row in document["rows"]]
    assert kinds == [(what, how) for what in ("transitions", "sequences") for how in frames.HOW]
    assert all(row["made/s"] > 0 and row["drawn/s"] > 0 for row in document["rows"])
    for whole, once in zip(document["rows"][::2], document["rows"][1::2], strict=True):
        assert once["bytes sent"] <= once["bytes kept"] <= 1.01 * once["bytes sent"]
        assert whole["bytes drawn"] == whole["bytes sent"] > 3 * once["bytes sent"]
    assert [row["reached"] for row in document["targets"]] == [True] * 4


def test_codecs(tmp_path: Path) -> None:
    document = written(codecs, tmp_path)
    assert [row["codec"] for row in document["rows"]] == ["copy", *codecs.NAMES] * 2
    for row in document["rows"]:
        if row["codec"] != "copy":
            assert row["ratio"] == pytest.approx(4 * row["values"] / row["bytes"])
    assert [line["reached"] for line in document["targets"]] == [True, True]  # bytes, not speeds


def test_where_a_codec_pays() -> None:
    """9 MB whole, 3 MB sent, 2 s of work: at 3 MB/s, 9 / 3 = 3 / 3 + 2."""
    assert codecs.pays_below(9_000_000, 3_000_000, 2.0) == pytest.approx(3.0)
    assert codecs.pays_below(9_000_000, 9_000_008, 2.0) is None


def test_virtual(tmp_path: Path) -> None:
    rows = written(virtual, tmp_path)["rows"]
    assert [row["what"] for row in rows] == list(virtual.KINDS)
    # A call takes 100 × 50 µs; ten actors do 200 of them, in the same virtual time whatever waits.
    assert rows[0]["virtual s"] == pytest.approx(200 / 10 * 100 * 50e-6, rel=0.3)
    same = [row["virtual s"] for row in rows if row["what"] != "… weights as an argument"]
    assert len(set(same)) == 1


def test_a_tree_that_finds_other_leaves_voids_the_race() -> None:
    found = replay.trees(64)
    replay.agree(found, 64)
    found["wrong"] = {"sample": lambda leaves, draws: np.zeros(len(draws), dtype=np.int64)}
    with pytest.raises(RuntimeError, match="different leaves"):
        replay.agree(found, 64)


@pytest.mark.slow
def test_envs(tmp_path: Path) -> None:
    rows = written(envs, tmp_path)["rows"]
    assert [row["envs"] for row in rows[1:]] == list(envs.MANY)
    assert rows[0]["system"] == "a2c"
    assert rows[0]["fraction"] == rows[0]["training steps/s"] / rows[0]["bare steps/s"]


def test_the_ceiling_counts_valid_steps_alone() -> None:
    made = envs.make_envs("rlbook/Catch-v0", 3, seed=0)
    bare, book = envs.bare_step(made), None
    counts = [bare(np.zeros(3, dtype=np.int64)) for _ in range(40)]
    made.reset(0)
    book = envs.book_step(made)
    assert counts == [book(np.zeros(3, dtype=np.int64)) for _ in range(40)]
    assert set(counts) == {0, 3}  # all copies of Catch end together: then comes a pseudo-step


@pytest.mark.slow
def test_rate(tmp_path: Path) -> None:
    rows = written(rate, tmp_path)["rows"]
    assert [row["system"] for row in rows] == list(rate.LEAST_RATE)
    for row in rows:
        assert row["seconds"] >= 0.2  # at least as long as was asked for
        assert row["steps/s"] == pytest.approx(row["env steps"] / row["seconds"])


@pytest.mark.slow
def test_solve(tmp_path: Path) -> None:
    document = written(solve, tmp_path)
    assert [row["system"] for row in document["rows"]] == list(solve.MOST_SECONDS)
    for run, line in zip(document["rows"], document["summary"], strict=True):
        assert run["solved"] and run["evaluation_return_mean"] >= document["goal"]
        assert line["solved"] == "1 of 1" and line["seconds"] == run["wall_time_s"]


def run_of(library: str, seconds: float, solved: bool = True) -> common.Row:
    shared = {"library": library, "system": "ppo", "solved": solved, "wall_time_s": seconds}
    return {**shared, "env_steps": 7, "env_steps_per_s": 1.0, "num_envs": 8, "memory_mb": 1.0}


def test_an_unsolved_run_counts_as_infinitely_slow() -> None:
    runs = [run_of("stable-baselines3", s, s < 60) for s in (5.0, 60.0, 6.0, 60.0, 60.0)]
    line = solve.summary(runs, 60.0)
    assert line["solved"] == "2 of 5"
    assert line["seconds"] == line["slowest"] == "not in 60 s"
    runs[1] = run_of("stable-baselines3", 9.0)
    line = solve.summary(runs, 60.0)
    assert (line["seconds"], line["slowest"]) == (9.0, "not in 60 s")


def test_figures_tell_a_missed_target() -> None:
    fast = [run_of("rlbook", seconds) for seconds in (1.0, 1.1, 1.2, 1.3, 3.7)]
    assert [row["reached"] for row in solve.figures(fast, ["ppo"])] == [True, True]
    two_late = [run_of("rlbook", seconds) for seconds in (1.0, 1.1, 1.2, 3.7, 3.8)]
    assert [row["reached"] for row in solve.figures(two_late, ["ppo"])] == [True, False]
    slow = [run_of("rlbook", 2.6) for _ in range(5)]
    assert [row["reached"] for row in solve.figures(slow, ["ppo"])] == [False, True]
    failed = [run_of("rlbook", 1.0, solved=False) for _ in range(5)]
    assert [row["reached"] for row in solve.figures(failed, ["ppo"])] == [False, False]


class Rule:
    """A policy: CartPole by a hand-written rule, or always to the left."""

    def __init__(self, balances: bool) -> None:
        self.balances = balances

    def initial_state(self, num_envs: int) -> None:
        pass

    def act(self, observation: np.ndarray, state: Any, first: np.ndarray, rng: Any) -> Any:
        push = observation[:, 2] + 0.5 * observation[:, 3] + 0.02 * observation[:, 1] > 0
        return (push if self.balances else 0 * push).astype(np.int64), state


def clock(balances: bool) -> peer.Clock:
    made = peer.Clock(Rule(balances), 2, 1, "CartPole-v1", 100.0, math.inf)
    made.start()
    return made


def test_the_peers_clock_confirms_with_fresh_episodes() -> None:
    """99 good training episodes are too few; the 100th asks for a confirmation, which counts."""
    good, poor = clock(balances=True), clock(balances=False)
    for made in (good, poor):
        assert all(made.book(1, [200.0]) for _ in range(99)) and made.evaluations == 0
    assert not good.book(1, [200.0])
    assert good.evaluation_return_mean is not None and good.evaluation_return_mean >= 100.0
    assert good.row()["solved"] and good.row()["env_steps"] == 100
    assert poor.book(1, [200.0]) and poor.evaluations == 1 and not poor.returns
    assert poor.evaluation_return_mean is None and not poor.row()["solved"]
    assert poor.paused_s > 0


def test_the_peers_schedule_falls_to_a_tenth() -> None:
    schedule = peer.falling(1e-3, 1_000)
    left = [1 - steps / peer.LONGEST_RUN for steps in (0, 500, 900, 1_000, 50_000)]
    assert [schedule(x) for x in left] == pytest.approx([1e-3, 5e-4, 1e-4, 1e-4, 1e-4], rel=1e-5)


@pytest.mark.slow
def test_dppo(tmp_path: Path) -> None:
    rows = written(dppo, tmp_path)["rows"]
    assert [(row["system"], row["what"]) for row in rows] == [(s, "rate") for s in dppo.SYSTEMS]
    assert all(row["steps/s"] > 0 and row["solved"] is None for row in rows)


@pytest.mark.slow
def test_impala(tmp_path: Path) -> None:
    (bound,) = written(impala, tmp_path)["rows"]
    ceiling = (bound["ceiling before"] + bound["ceiling after"]) / 2
    assert bound["fraction"] == pytest.approx(bound["training steps/s"] / ceiling)
    # No process steps more than 1,000 times a second if each step takes a millisecond of its core.
    assert max(bound["ceiling before"], bound["ceiling after"]) <= 2_000 * 1.01
    assert bound["training steps/s"] <= 2_000 * 1.01


@pytest.mark.slow
def test_learners(tmp_path: Path) -> None:
    """Two ranks do what one does, whatever it takes."""
    pytest.importorskip("ale_py")
    rows = written(learners, tmp_path)["rows"]
    assert [row["what"] for row in rows] == ["update"] * 2 + ["copy"] * 3 + ["ranks"] * 2 + ["idle"]
    assert all(row["samples/s"] > 0 for row in rows if row["what"] != "copy")
    assert rows[6]["case"] == "2 of nature" and rows[6]["difference"] < 1e-5
    assert 0 <= rows[-1]["fraction"] <= 1
    gpu = torch.cuda.is_available()
    assert all(("GB/s" in row) is gpu and ("why not" in row) is not gpu for row in rows[2:5])


def test_a_made_up_unroll_is_one_that_a_learner_takes() -> None:
    unroll = learners.made_up(3, 2)
    assert unroll.env_outputs.observation.shape == (4, 2, 4, 84, 84)
    assert unroll.env_outputs.observation.dtype == np.uint8
    assert unroll.agent_outputs.logits.shape == (3, 2, 6) and unroll.valid.dtype == bool
    again = learners.made_up(3, 2)
    assert np.array_equal(unroll.env_outputs.observation, again.env_outputs.observation)


def test_all_records_of_a_gpu_have_commands_that_are_understood(tmp_path: Path) -> None:
    """Each fits a call of ten minutes, and trains what it is called after."""
    for rehearse in (False, True):
        asked = gpu.Asked(tmp_path, rehearse)
        for job in gpu.JOBS:
            words = job.command(job, asked)
            assert job.name.startswith("gpu-") and job.minutes < 10
            if words[:2] == ["rlbook", "record"]:
                options, rest = cli._parser().parse_known_args(words[1:])
                config = cli._config(options.system, rest, "record")
                assert (options.name, options.system) == (job.name, job.name.split("-")[1])
                assert config.env_id == "ALE/Pong-v5" and options.no_policy
                assert (config.stop_at_return == 18.0) is job.name.endswith("-pong")
                assert not rehearse or config.total_env_steps == gpu.TINY_STEPS
    assert len({job.name for job in gpu.JOBS}) == len(gpu.JOBS)


def test_a_run_until_solved_is_as_long_as_the_measured_rate_allows(tmp_path: Path) -> None:
    asked = gpu.Asked(tmp_path, False)
    job = next(job for job in gpu.JOBS if job.name == "gpu-impala-pong")
    assert "--total-env-steps" not in job.command(job, asked)
    folder = tmp_path / "gpu-impala-throughput"
    folder.mkdir()
    runs = [{"metrics": {"env_steps_per_s": 20_000.0}}]
    (folder / "record.json").write_text(json.dumps({"runs": runs}))
    words = job.command(job, asked)
    assert int(words[words.index("--total-env-steps") + 1]) == 20_000 * 450 < 20_000 * 60 * 10


def words_for(code: str) -> Any:
    return lambda job, asked: ["timeit", "-n1", "-r1", code.format(asked.results / job.name)]


MAKES = (
    "import os; os.mkdir('{0}'); open('{0}/record.json', 'w').write(os.environ['RLBOOK_COMMIT'])"
)


def test_records_are_made_once_and_kept_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child_id = tmp_path / "pid"
    hangs = (
        "import subprocess, time; p = subprocess.Popen(['sleep', '60']);"
        f"open({str(child_id)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    jobs = (
        gpu.Job("gpu-good", 1.0, words_for(MAKES)),
        gpu.Job("gpu-hangs", 0.05, words_for(hangs)),
        gpu.Job("gpu-fails", 1.0, words_for("raise ValueError(1234)")),
        gpu.Job("gpu-long", 9.0, words_for(MAKES)),
        gpu.Job("gpu-short", 1.0, words_for(MAKES)),
    )
    monkeypatch.setattr(gpu, "JOBS", jobs)
    results, tar = tmp_path / "results", tmp_path / "all.tar"
    flags = ["--results-dir", str(results), "--budget", "5", "--commit", "0123"]
    assert gpu.main([*flags, "--archive", str(tar)]) == 1
    said = capsys.readouterr().err
    for word in ("good: made", "hangs: took too long", "1234", "long: no time", "short: made"):
        assert word in said
    assert (results / "gpu-good" / "record.json").read_text() == "0123"
    with suppress(psutil.NoSuchProcess):  # a zombie where nobody asks how it ended
        assert psutil.Process(int(child_id.read_text())).status() == psutil.STATUS_ZOMBIE
    with tarfile.open(tar) as found:
        names = set(found.getnames())
    assert {"results/gpu-good/record.json", "results/gpu-short/record.json"} <= names
    assert "results/gpu-fails.log" in names and not any("long" in name for name in names)
    gpu.main([*flags, "--only", "gpu-good"])
    assert "gpu-good: is there" in capsys.readouterr().err


@pytest.mark.slow
def test_the_rehearsal(tmp_path: Path) -> None:
    pytest.importorskip("ale_py")
    name = "gpu-dppo-throughput"
    assert gpu.main(["--rehearse", "--only", name, "--results-dir", str(tmp_path)]) == 0
    document = json.loads((tmp_path / name / "record.json").read_text())
    assert document["system"] == "dppo" and document["config"]["env_id"] == "ALE/Pong-v5"
    assert document["env_ceiling"] > 0 and str(tmp_path) not in json.dumps(document)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_seed_rl(tmp_path: Path) -> None:
    *roads, run = written(seed_rl, tmp_path)["rows"]
    assert [row["road"] for row in roads] == list(seed_rl.ROADS)
    assert all(row["ours/s"] > 0 and row["echo/s"] > 0 for row in roads)
    assert all(row["bytes"] == 84 * 84 * 4 + 9 for row in roads)
    assert (run["system"], run["what"]) == ("seed_rl", "rate") and run["steps/s"] > 0


def test_the_figures_of_seed_rl() -> None:
    def reached(ours: float, share: float, rate: float, seconds: float) -> list[bool]:
        run = {"system": "seed_rl", "solved": True, "seconds": seconds, "steps/s": rate}
        rows: list[common.Row] = [
            {"road": "unix", "ours/s": ours, "of echo": share, "of plain": share},
            {"road": "tcp", "ours/s": 1.0, "of echo": 0.1, "of plain": 0.1},
            {**run, "what": "until solved"},
            {**run, "what": "rate"},
            {**run, "system": "seed_rl_throughput", "what": "rate", "steps/s": 1.0},
        ]
        for row in rows[:2]:
            row["what"] = "round trips"
        return [row["reached"] for row in seed_rl.figures(rows)]

    assert reached(4_000.0, 0.85, 110_000.0, 6.0) == [True] * 5
    assert reached(3_999.0, 0.84, 109_000.0, 6.1) == [False] * 5


@pytest.mark.slow
def test_rllib(tmp_path: Path) -> None:
    document = written(rllib, tmp_path)
    assert [row["what"] for row in document["rows"]] == ["until solved", "rate"]
    (line,) = document["summary"]
    assert line["solved"] == "1 of 1" and line["seconds"] == document["rows"][0]["wall_time_s"]
    assert document["peer_versions"] == {}  # a quick run leaves RLlib out


def rllib_lines(seconds: float | str, theirs: float | str, rate: float = 300.0) -> list[common.Row]:
    line = {"seconds": 3.0, "steps/s": 10.0, "memory MB": 900.0}
    ours = {name: {"library": "rlbook", "system": name, **line} for name in rllib.SYSTEMS["rlbook"]}
    peers = {name: {"library": "RLlib", "system": name, **line} for name in rllib.SYSTEMS["RLlib"]}
    ours["impala"]["seconds"], ours["impala_throughput"]["steps/s"] = seconds, rate
    peers["impala"]["seconds"], peers["ppo"]["memory MB"] = theirs, 950.0
    return [*ours.values(), *peers.values()]


def test_the_figures_beside_rllib() -> None:
    def reached(*lines: Any) -> list[bool]:
        return [row["reached"] for row in rllib.figures(rllib_lines(*lines), 90.0)]

    assert reached(4.0, 50.0) == [True] * 6
    assert reached(4.0, 39.0) == [True, False, True, True, True, True]
    assert reached(4.0, ">90") == [True] * 6  # at least 90 / 4 times sooner
    assert reached(9.5, ">90") == [False, False, True, True, True, True]
    assert reached("not solved", 50.0) == [False, False, True, True, True, True]
    assert reached(4.0, 50.0, 199.0) == [True, True, False, True, True, True]
    lines = rllib_lines(4.0, 50.0)
    lines[2]["memory MB"] = 901.0
    assert [row["reached"] for row in rllib.figures(lines, 90.0)] == [True] * 5 + [False]


def test_a_line_beside_rllib() -> None:
    rate = {**run_of("RLlib", 10.0), "env_steps_per_s": 5.0}
    slow = [run_of("RLlib", s, s < 90) for s in (30.0, 90.2, 50.0, 90.4, 91.0)]
    line = rllib.summary(slow, rate, 90.0)
    assert (line["solved"], line["seconds"], line["slowest"]) == ("2 of 5", ">90", ">90")
    line = rllib.summary([*slow[:4], run_of("RLlib", 60.0)], rate, 90.0)
    assert (line["seconds"], line["slowest"], line["steps/s"]) == (60.0, ">90", 5.0)


class Piece:
    """A piece of an episode, as an env runner of RLlib hands it over."""

    def __init__(self, name: str, value: float, ends: bool) -> None:
        self.id_, self.value, self.is_done = name, value, ends

    def get_return(self) -> float:
        return self.value


def test_a_turn_of_rllib_without_an_episode_has_no_returns() -> None:
    def turn(found: object) -> dict[str, dict[str, object]]:
        return {"env_runners": {rllib_peer.RETURNS: found}}

    assert rllib_peer.returns_of(turn([9.0, 12.0])) == [9.0, 12.0]
    assert rllib_peer.returns_of(turn(float("nan"))) == []
    assert rllib_peer.returns_of(turn(31.0)) == [31.0]
    assert rllib_peer.returns_of({"env_runners": {}}) == []


def test_episodes_are_added_up_from_their_pieces() -> None:
    pieces = rllib_peer.Pieces()
    assert pieces.ended([Piece("a", 50.0, False), Piece("b", 50.0, False)]) == []
    assert pieces.ended([Piece("b", 7.0, True), Piece("c", 9.0, True)]) == [57.0, 9.0]
    assert pieces.ended([Piece("a", 50.0, False)]) == []
    assert pieces.ended([Piece("a", 1.0, True), Piece("b", 2.0, True)]) == [101.0, 2.0]


class Algorithm:
    """What is asked of RLlib's algorithm: its module, and the learner's parameters."""

    def __init__(self) -> None:
        self.learner_group, self.shift = self, 0.0

    def get_module(self) -> Any:
        return self

    def get_weights(self) -> dict[str, float]:
        return {"default_policy": math.log(3.0)}

    def set_state(self, state: float) -> None:
        self.shift = state

    def forward_exploration(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        right = batch["obs"][:, 0] + self.shift
        return {"action_dist_inputs": torch.stack([torch.zeros_like(right), right], dim=1)}


def test_rllibs_policy_is_sampled_with_the_learners_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rllib_peer, "filter_of", lambda _: (np.full(1, 8.0), np.full(1, 2.0)))
    rng, first = np.random.default_rng(0), np.zeros(4_000, dtype=bool)
    for filtered, seen in ((False, 0.0), (True, 8.0)):
        policy = rllib_peer.LearnersPolicy(Algorithm(), filtered)
        policy.initial_state(4_000)
        actions, _ = policy.act(np.full((4_000, 1), seen), None, first, rng)
        assert actions.mean() == pytest.approx(0.75, abs=0.03)
    actions, _ = policy.act(np.full((4_000, 1), 10.0), None, first, rng)  # (10 − 8) / 2 = 1
    assert actions.mean() == pytest.approx(3 * math.e / (1 + 3 * math.e), abs=0.03)


def test_the_median_of_runs_of_which_most_are_not_solved_is_no_number() -> None:
    row = {"system": "dppo", "what": "until solved", "solved": True}
    rows = [{**row, "seconds": seconds} for seconds in (1.0, 2.0, 9.0)]
    rows += [{**row, "system": "ppo", "seconds": 0.1}, {**row, "what": "rate", "seconds": 0.1}]
    assert common.seconds_to_solved(rows, "dppo") == 2.0
    rows[0]["solved"] = False
    assert common.seconds_to_solved(rows, "dppo") == 9.0
    rows[1]["solved"] = False
    assert common.seconds_to_solved(rows, "dppo") is None


def test_flags_that_are_not_the_usual_ones_are_told() -> None:
    flags = common.parser("")
    flags.add_argument("--seeds", type=int, default=5)
    flags.add_argument("--cap", type=float, default=60.0)
    flags.add_argument("--systems", nargs="+", default=["ppo"])
    options = flags.parse_args(["--seeds", "2", "--systems", "a", "b"])
    names = ("seeds", "cap", "systems")
    assert common.unusual(flags, options, *names) == ["--seeds 2", "--systems a b"]


def test_a_process_is_ended_with_all_that_it_started() -> None:
    code = (
        "import subprocess, sys, time;"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        "print(inner.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    inner = psutil.Process(int(process.stdout.readline()))
    common.end_family(process)
    process.stdout.close()
    assert process.returncode != 0
    gone, alive = psutil.wait_procs([inner], timeout=30)
    assert not alive or alive[0].status() == psutil.STATUS_ZOMBIE


def test_a_failing_process_is_told() -> None:
    with pytest.raises(RuntimeError, match="invalid choice"):
        common.child(["benchmarks.trial", "nothing", "--seconds", "1"])


def test_a_quick_run_leaves_the_stored_results_alone() -> None:
    options = common.parser("").parse_args(["--quick"])
    assert common.keep("never", [], [], options) is None
    assert not (common.RESULTS / "never.json").exists()


def test_parameter_server(tmp_path: Path) -> None:
    rows = written(parameter_server, tmp_path)["rows"]
    assert [row["codec"] for row in rows] == list(parameter_server.CODECS)
    assert rows[0]["times fewer"] == 1 and rows[-1]["times fewer"] > 50
