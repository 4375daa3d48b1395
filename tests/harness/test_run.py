"""Runs: the clock, rows, the rule of "solved", folders, interruption, damaged folders."""

import json
import signal
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlbook import ppo
from rlbook.harness import run as run_module
from rlbook.harness.checkpoint import load_checkpoint, save_checkpoint
from rlbook.harness.config import RunConfig
from rlbook.harness.log import METRICS
from rlbook.harness.run import Result, Run
from rlbook.parts.envs import Episode, make_envs
from rlbook.parts.timeline import Timeline

CATCH = {"env_id": "rlbook/Catch-v0", "progress": False}


class Catcher:
    """Plays Catch: perfectly, or always to the left."""

    def __init__(self, perfect: bool) -> None:
        self.perfect = perfect

    def initial_state(self, num_envs):
        return None

    def act(self, observation, state, first, rng):
        ball = observation[:, 0, :-1].sum(1).argmax(-1)
        paddle = observation[:, 0, -1].argmax(-1)
        return np.sign(ball - paddle) + 1 if self.perfect else np.zeros(len(ball), int), None


class Part:
    """A part of a run that holds one number."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run_module, "time", clock)
    return clock


def episodes(count: int, value: float, env: int = 0) -> list[Episode]:
    return [Episode(env, value, 9)] * count


def make(perfect: bool = True, **settings) -> Run:
    return Run("ppo", RunConfig(**{**CATCH, **settings}), Catcher(perfect), {"part": Part()})


# -- solved -------------------------------------------------------------------------------


def test_solved_needs_a_full_window_and_a_confirmation():
    with make(stop_at_return=0.9, num_envs=4) as run:
        assert run.running()
        run.record(env_steps=1, episodes=episodes(99, 1.0))
        assert run.running() and run.evaluations == 0, "99 episodes are no window"
        run.record(env_steps=1, episodes=episodes(1, 1.0))
        assert not run.running() and run.evaluations == 1
    result = run.result()
    assert result.stopped_because == "solved"
    assert result.metrics["evaluation_return_mean"] == 1.0
    assert result.metrics["episode_return_mean"] == 1.0


def test_the_window_is_two_episodes_a_copy():
    with make(stop_at_return=0.9, num_envs=100) as run:
        run.running()
        run.record(env_steps=1, episodes=episodes(199, 1.0))
        assert run.running()
        run.record(env_steps=1, episodes=episodes(1, 1.0))
        assert not run.running()


def test_a_lucky_window_is_not_confirmed_and_a_new_one_begins():
    """Training episodes that look good do not help a policy whose fresh episodes are bad."""
    with make(perfect=False, stop_at_return=0.9, total_env_steps=1000) as run:
        run.running()
        run.record(env_steps=1, episodes=episodes(100, 1.0))
        assert run.running() and run.evaluations == 1
        run.record(env_steps=1, episodes=episodes(99, 1.0))
        assert run.evaluations == 1, "the old window does not count again"
        run.record(env_steps=1, episodes=episodes(1, 1.0))
        assert run.running() and run.evaluations == 2
    assert run.result().metrics["evaluation_return_mean"] is None


def test_the_mean_of_the_window_counts():
    with make(stop_at_return=0.9) as run:
        run.running()
        run.record(env_steps=1, episodes=episodes(80, 1.0) + episodes(20, 0.0))
        assert run.running() and run.evaluations == 0
        run.record(env_steps=1, episodes=episodes(89, 1.0))  # the oldest fall out
        assert run.evaluations == 0, "the mean is 0.89"
        run.record(env_steps=1, episodes=episodes(1, 1.0))
        assert not run.running()


def test_without_a_goal_nothing_is_evaluated():
    with make(total_env_steps=10) as run:
        run.running()
        run.record(env_steps=10, episodes=episodes(500, 1.0))
        assert not run.running()
    assert (run.evaluations, run.stopped_because) == (0, "total_env_steps")


# -- clock and rows ---------------------------------------------------------------------------


def test_the_clock_counts_training_alone(clock, monkeypatch, tmp_path):
    def evaluate(*args, **kwargs):
        clock.now += 50.0
        return SimpleNamespace(mean=0.0)

    def save(path, state):
        clock.now += 7.0
        save_checkpoint(path, state)

    monkeypatch.setattr(run_module, "evaluate", evaluate)
    monkeypatch.setattr(run_module, "save_checkpoint", save)
    folder = str(tmp_path / "run")
    with make(stop_at_return=0.9, run_dir=folder, checkpoint_every_s=3.0) as run:
        clock.now += 100.0  # before the first step: not counted
        while run.running() and run.env_steps < 10:
            clock.now += 2.0
            run.record(env_steps=5, episodes=episodes(100, 1.0))
    assert run.wall_time_s() == 2.0 + 2.0
    assert run.evaluation_time_s == 50.0 + 50.0
    assert run.result().metrics["env_steps_per_s"] == 10 / 4.0


def test_checkpoints_are_written_every_so_many_seconds(clock, tmp_path):
    folder = tmp_path / "run"
    with make(run_dir=str(folder), checkpoint_every_s=10.0) as run:
        run.running()
        written = []
        for turn in range(12):
            clock.now += 3.0
            run.parts["part"].number = turn
            run.record(env_steps=1)
            if (folder / "checkpoint.npz").exists():
                state = load_checkpoint(folder / "checkpoint.npz")
                written.append(state["parts"]["part"]["number"])
    assert sorted(set(written)) == [3, 7, 11]


class Virtual:
    """A virtual clock, as a runtime has: it moves when calls are played."""

    def __init__(self) -> None:
        self.now = 0.0


def on(runtime: Virtual, checkpoints: str = "regular", **settings) -> Run:
    config = RunConfig(**{**CATCH, **settings})
    parts = {"part": Part()}
    return Run("ppo", config, Catcher(True), parts, lambda: runtime.now, checkpoints)


def saved(folder) -> int | None:
    """The number that the part held when the run was saved last."""
    path = folder / "checkpoint.npz"
    return load_checkpoint(path)["parts"]["part"]["number"] if path.exists() else None


def test_a_virtual_clock_is_the_run_s_clock(clock, tmp_path):
    """Seconds, rates and the moments of saving are virtual; the wall's clock says nothing."""
    runtime, folder, seen = Virtual(), tmp_path / "run", []
    with on(runtime, run_dir=str(folder), checkpoint_every_s=10.0, total_env_steps=12) as run:
        runtime.now += 100.0  # before the first step: not counted
        while run.running():
            runtime.now += 3.0
            clock.now += 1000.0
            run.parts["part"].number = run.env_steps
            run.record(env_steps=1)
            seen.append(saved(folder))
    assert seen == [None] * 3 + [3] * 4 + [7] * 4 + [11]
    assert run.result().wall_time_s == 12 * 3.0
    assert run.result().metrics["env_steps_per_s"] == 12 / 36.0


def test_a_continued_run_saves_at_the_moments_of_the_whole_one(tmp_path):
    def play(turns: int, **settings) -> list[float]:
        runtime, moments = Virtual(), []
        run = on(runtime, "asked", checkpoint_every_s=10.0, **settings)
        with run:
            runtime.now += 100.0
            while run.running() and run.env_steps < turns:
                runtime.now += 3.0
                run.record(env_steps=1)
                if run.checkpoint_due():
                    moments.append(run.wall_time_s())
                    run.checkpoint()
        return moments

    whole = play(20)
    assert whole == [4 * 3.0, 8 * 3.0, 12 * 3.0, 16 * 3.0, 20 * 3.0]
    folder = str(tmp_path / "run")
    assert play(8, run_dir=folder) + play(20, resume=folder) == whole


def test_a_run_that_saves_when_asked_never_saves_by_itself(tmp_path):
    runtime, folder = Virtual(), tmp_path / "run"
    with on(runtime, "asked", run_dir=str(folder), checkpoint_every_s=10.0) as run:
        run.running()
        due = []
        for turn in range(6):
            runtime.now += 4.0
            run.parts["part"].number = turn
            run.record(env_steps=1)
            due.append(run.checkpoint_due())
            assert saved(folder) is None
        run.checkpoint()
        assert due == [False, False, True, True, True, True]
        assert saved(folder) == 5 and not run.checkpoint_due()
        run.parts["part"].number = 6
    assert saved(folder) == 6, "leaving the `with` saves"


def test_rows_average_the_metrics_of_their_turns():
    with make(log_every_env_steps=10) as run:
        run.running()
        for value in (1.0, 2.0, 6.0):
            run.record(env_steps=4, learner_steps=2, metrics={"loss": value})
        run.record(env_steps=4, metrics={"loss": 5.0}, episodes=episodes(2, 3.0))
    curves = run.result().curves
    assert curves["env_steps"].tolist() == [12, 16]
    assert curves["loss"].tolist() == [(1.0 + 2.0 + 6.0) / 3, 5.0]
    assert curves["learner_steps"].tolist() == [6, 6]
    assert np.isnan(curves["episode_return_mean"][0]) and curves["episode_return_mean"][1] == 3.0


def test_of_a_maximum_a_row_holds_the_largest():
    with make(log_every_env_steps=8) as run:
        run.running()
        for value in (1.0, 6.0, 2.0, float("nan")):
            run.record(env_steps=4, metrics={"staleness_max": value, "staleness_mean": value})
    curves = run.result().curves
    assert curves["staleness_max"].tolist() == [6.0, 2.0]
    assert curves["staleness_mean"][0] == (1.0 + 6.0) / 2


def test_a_run_that_ends_on_a_row_has_it_once_and_complete():
    with make(log_every_env_steps=5, total_env_steps=10) as run:
        while run.running():
            run.record(env_steps=5, metrics={"loss": 1.0})
    assert run.result().curves["env_steps"].tolist() == [5, 10]
    assert run.result().metrics["loss"] == 1.0


def test_what_is_no_number_becomes_null(tmp_path):
    folder = tmp_path / "run"
    with make(run_dir=str(folder), total_env_steps=1) as run:
        run.running()
        run.record(env_steps=1, metrics={"loss": float("nan")})
    for name in ("metrics.jsonl", "result.json"):
        text = (folder / name).read_text()
        assert "NaN" not in text and json.loads(text)["loss"] is None


# -- who worked on what ------------------------------------------------------------------------

SPANS = [("Worker 0", "unroll", 0.0, 0.5), ("driver", "wait", 0.1, 0.7)]


def traced(tmp_path, spans, **settings) -> Result:
    config = ppo.Config(**CATCH, **settings, total_env_steps=1)
    network = ppo.make_network(config, make_envs(config.env_id, 1, 1))
    learner = ppo.Learner(network, config)
    with Run("ppo", config, Catcher(True), {"learner": learner}) as run:
        run.running()
        run.record(env_steps=1)
    run.trace(spans)
    return run.result()


def test_spans_are_in_the_result_in_the_folder_and_in_the_loaded_result(tmp_path):
    result = traced(tmp_path, iter(SPANS), run_dir=str(tmp_path / "run"))
    assert list(result.spans) == SPANS
    document = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert {event["name"] for event in document["traceEvents"]} >= {"unroll", "wait"}
    loaded = Result.load(tmp_path / "run")
    assert [tuple(span) for span in loaded.spans] == SPANS
    figure = loaded.timeline(0.2, 0.4)
    assert figure.axes[0].get_xlim() == (200.0, 400.0)
    assert loaded.why().bound_by == "env"
    (tmp_path / "run" / "trace.json").write_text("[]")
    with pytest.raises(ValueError, match="trace.json: missing or damaged"):
        Result.load(tmp_path / "run")


def test_a_run_keeps_its_newest_spans_and_a_copy_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "KEPT_SPANS", 3)
    spans = Timeline.of(("Worker 0", "unroll", float(k), k + 0.5) for k in range(5))
    result = traced(tmp_path, spans)
    spans.add(0, 1, 5.0, 5.5)
    assert [span.start for span in result.spans] == [2.0, 3.0, 4.0]


def test_a_run_without_spans_says_so_in_one_line(trained):
    for ask in (trained.timeline, Result.load(trained.run_dir).timeline):
        with pytest.raises(ValueError, match="this run of ppo kept no timeline") as refusal:
            ask()
        assert "\n" not in str(refusal.value)
    assert trained.spans is None and not (trained.run_dir / "trace.json").exists()


# -- folders -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = ppo.Config(
        **CATCH, num_envs=8, total_env_steps=2_000, log_every_env_steps=500, run_dir=str(folder)
    )
    return ppo.train(config)


def test_a_folder_holds_what_is_promised(trained):
    names = {path.name for path in trained.run_dir.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "result.json",
        "checkpoint.npz",
        "versions.json",
        "tensorboard",
    }
    result = json.loads((trained.run_dir / "result.json").read_text())
    promised = (
        "system env_id seed env_steps wall_time_s env_steps_per_s episode_return_mean"
        " evaluation_return_mean stopped_because"
    )
    assert set(promised.split()) <= set(result)
    assert (result["system"], result["env_id"], result["seed"]) == ("ppo", "rlbook/Catch-v0", 1)
    assert result["stopped_because"] == "total_env_steps"
    assert {"python", "rlbook", "torch"} <= set(
        json.loads((trained.run_dir / "versions.json").read_text())
    )
    assert list((trained.run_dir / "tensorboard").iterdir())


def test_every_logged_name_is_in_the_table(trained):
    assert set(trained.curves) <= set(METRICS)


def test_the_events_hold_the_rows(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained.run_dir / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("entropy")]
    steps, values = trained.curves["env_steps"], trained.curves["entropy"]
    assert [step for step, _ in shown] == steps.tolist()
    assert np.allclose([value for _, value in shown], values)


def test_a_loaded_result_is_the_one_in_memory(trained):
    loaded = Result.load(trained.run_dir)
    assert loaded.metrics == trained.metrics and loaded.env_steps == trained.env_steps
    for name, curve in trained.curves.items():
        assert np.array_equal(loaded.curves[name], curve, equal_nan=True)
    for mine, theirs in zip(
        loaded.policy.network.parameters(), trained.policy.network.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert np.array_equal(loaded.evaluate(20).returns, trained.evaluate(20).returns)


def test_an_existing_folder_is_refused_and_left_alone(trained, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match="^run_dir: .* exists"):
        make(run_dir=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.fixture
def copy(trained, tmp_path):
    import shutil

    return shutil.copytree(trained.run_dir, tmp_path / "copy")


DAMAGE = {
    "no config": lambda f: (f / "config.json").unlink(),
    "half a config": lambda f: (f / "config.json").write_text('{"system": "ppo", '),
    "a list as config": lambda f: (f / "config.json").write_text("[]"),
    "unknown system": lambda f: (f / "config.json").write_text('{"system": "a3po"}'),
    "no checkpoint": lambda f: (f / "checkpoint.npz").unlink(),
    "half a checkpoint": lambda f: (f / "checkpoint.npz").write_bytes(
        (f / "checkpoint.npz").read_bytes()[:900]
    ),
    "a bare checkpoint": lambda f: save_checkpoint(
        f / "checkpoint.npz", {"system": "ppo", "parts": {}}
    ),
    "another system's": lambda f: save_checkpoint(f / "checkpoint.npz", {"system": "dqn"}),
    "other sizes": lambda f: (f / "config.json").write_text(
        (f / "config.json").read_text().replace("64", "32")
    ),
    "no rows": lambda f: (f / "metrics.jsonl").unlink(),
    "half a row": lambda f: (f / "metrics.jsonl").write_text('{"env_steps": 5'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_neither_loaded_nor_resumed(damage, copy):
    DAMAGE[damage](copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
    with pytest.raises(ValueError) as refusal:
        Result.load(copy)
    assert "\n" not in str(refusal.value)
    config = ppo.Config(**CATCH, num_envs=8, total_env_steps=4_000, resume=str(copy))
    if damage == "other sizes":
        config = ppo.Config(**{**vars(config), "hidden_sizes": (32, 32), "unroll_length": 32})
    with pytest.raises(ValueError) as refusal:
        ppo.train(config)
    assert "\n" not in str(refusal.value)
    if damage not in ("no rows", "half a row"):
        after = {path.name: path.read_bytes() for path in copy.iterdir() if path.is_file()}
        assert {**after, "config.json": 0} == {**before, "config.json": 0}


def test_a_solved_run_that_is_resumed_is_still_solved(tmp_path):
    folder = str(tmp_path / "run")
    with make(stop_at_return=0.9, run_dir=folder) as run:
        run.running()
        run.record(env_steps=1, episodes=episodes(100, 1.0))
    again = Run(
        "ppo", RunConfig(**CATCH, resume=folder, stop_at_return=0.9), Catcher(True), run.parts
    )
    with again:
        assert not again.running()
    assert again.result().stopped_because == "solved"
    assert again.result().metrics["evaluation_return_mean"] == 1.0
    further = RunConfig(**CATCH, resume=folder, stop_at_return=None)
    with Run("ppo", further, Catcher(True), run.parts) as longer:
        assert longer.running(), "without the goal it goes on"
    assert longer.result().metrics["evaluation_return_mean"] is None


# -- ends ----------------------------------------------------------------------------------------


def test_ctrl_c_waits_for_the_end_of_the_turn():
    with make() as run:
        turns = 0
        while run.running():
            signal.raise_signal(signal.SIGINT)
            turns += 1  # reached: the turn is whole
            run.record(env_steps=1)
    assert turns == 1 and run.result().stopped_because == "interrupted"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_interrupts_at_once():
    with make() as run:
        while run.running():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")
    assert run.result().stopped_because == "interrupted"


def test_a_run_outside_the_main_thread_leaves_signals_alone():
    found = []

    def work():
        with make(total_env_steps=1) as run:
            while run.running():
                run.record(env_steps=1)
        found.append(run.result().stopped_because)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["total_env_steps"]


def test_other_errors_go_on_and_write_no_result(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError), make(run_dir=str(folder)) as run:
        run.running()
        run.record(env_steps=1 // 0)
    assert not (folder / "result.json").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
