"""What bound a run: one made-up timeline for each verdict, and mistakes that change the verdict."""

from types import SimpleNamespace

import numpy as np
import pytest

from rlbook.harness.shares import driver_waits, shares, stragglers
from rlbook.harness.why import Diagnosis, explain
from rlbook.parts.timeline import DRIVER, Timeline

CONFIG = SimpleNamespace(
    num_envs=32,
    num_workers=4,
    num_shards=1,
    unroll_length=16,
    update_rule="sync",
    calls_in_flight=2,
    compression="none",
    hidden_sizes=(64, 64),
)
SPLIT = {
    "env_time_fraction": 0.6,
    "inference_time_fraction": 0.25,
    "gradient_time_fraction": 0.1,
}
Spans = list[tuple[str, str, float, float]]


def rounds(durations: dict[str, float], push: float, message: float, count: int = 20) -> Spans:
    """Workers that start together; when the last is through, the shard works; then again."""
    spans: Spans = [(who, "__init__", -9.0, 0.0) for who in durations]
    now = 0.0
    for _ in range(count):
        begun = now + message
        for late, (who, seconds) in enumerate(durations.items()):  # one is told after the other
            spans.append((who, "unroll", begun + 0.003 * late, begun + seconds))
        through = begun + max(durations.values()) + message
        spans += [("Shard 0", "push", through, through + push), (DRIVER, "wait", now, through)]
        now = through + push
    return spans


def streams(workers: int, work: float, idle: float, push: float, count: int = 40) -> Spans:
    """Workers that never wait for each other, each begun at a moment of its own."""
    spans: Spans = [(DRIVER, "wait", 0.0, count * (work + idle))]
    for k in range(workers):
        moment = k * (work + idle) / workers
        for _ in range(count):
            end = moment + work
            spans += [(f"Worker {k}", "unroll", moment, end)]
            spans += [("Shard 0", "push", end, end + push)]
            moment = end + idle
    return spans


def equal(workers: int, seconds: float) -> dict[str, float]:
    return {f"Worker {k}": seconds for k in range(workers)}


def advice_of(diagnosis: Diagnosis) -> str:
    return "\n".join(diagnosis.advice)


def test_busy_workers_that_step_environments() -> None:
    diagnosis = explain(streams(4, 0.9, 0.1, 0.01), SPLIT, CONFIG)
    assert diagnosis.bound_by == "env"
    assert "`num_envs` (now 32)" in advice_of(diagnosis)
    assert "60 % environment steps, 25 % inference, 10 % gradients" in str(diagnosis)
    assert "the Workers worked 89 % of the time" in diagnosis.sentences[0]


@pytest.mark.parametrize(
    ("part", "bound", "word"),
    [
        ("inference_time_fraction", "inference", "forward pass"),
        ("gradient_time_fraction", "learner", "`num_workers`"),
        ("env_time_fraction", "env", "`num_envs`"),
    ],
)
def test_the_metrics_divide_the_workers_work(part: str, bound: str, word: str) -> None:
    diagnosis = explain(streams(4, 0.9, 0.1, 0.01), {**SPLIT, part: 0.7}, CONFIG)
    assert diagnosis.bound_by == bound and word in advice_of(diagnosis)


@pytest.mark.parametrize(
    ("method", "bound"), [("unroll", "env"), ("gradient", "learner"), ("infer", "inference")]
)
def test_without_metrics_the_names_of_methods_divide_it(method: str, bound: str) -> None:
    spans = streams(2, 0.9, 0.1, 0.01)
    spans = [(a, method if b == "unroll" else b, c, d) for a, b, c, d in spans]
    guessed = explain(spans, {}, CONFIG)
    assert guessed.bound_by == bound and "is guessed from its methods' names" in str(guessed)
    assert "guessed" not in str(explain(spans, SPLIT, CONFIG))


def test_waits_within_a_call_are_no_work() -> None:
    spans = streams(2, work=1.0, idle=0.01, push=0.001)
    assert explain(spans, {**SPLIT, "waiting_time_fraction": 0.2}, CONFIG).bound_by == "env"
    found = explain(spans, {**SPLIT, "waiting_time_fraction": 0.7}, CONFIG)
    assert found.bound_by == "waiting" and "for 68 % of the time" in found.sentences[0]


def test_a_server_for_inference_that_never_rests() -> None:
    spans: Spans = [("InferenceServer 0", "step", float(k), k + 0.97) for k in range(50)]
    spans += [("Actor 0", "unroll", k + 0.97, k + 1.0) for k in range(50)]
    assert explain(spans, SPLIT, CONFIG).bound_by == "inference"


def test_a_shard_that_never_rests() -> None:
    """Many workers, idle because they queue for it; that they mostly step environments is no
    reason.
    """
    spans: Spans = [("Shard 0", "push", float(k), k + 1.0) for k in range(100)]
    spans += [(f"Worker {k % 10}", "unroll", float(k), k + 3.0) for k in range(100)]
    diagnosis = explain(spans, SPLIT, CONFIG)
    assert diagnosis.bound_by == "learner"
    assert "the Shard worked" in diagnosis.sentences[0]
    assert "`num_shards` (now 1)" in diagnosis.advice[0]


def test_a_learner_behind_a_straggling_actor_that_matters_to_nobody() -> None:
    """The slow actor is the busiest process of all; the others are idle since the learner works."""
    spans: Spans = [("Learner 0", "update", float(k), k + 0.97) for k in range(100)]
    for k in range(1, 4):
        spans += [
            (f"Actor {k}", "unroll", 2.0 * t + k / 3, 2.0 * t + k / 3 + 0.3) for t in range(50)
        ]
    spans += [("Actor 0", "unroll", 2.0 * t, 2.0 * t + 1.99) for t in range(50)]
    spans += [("Evaluator 0", "evaluate", 50.0, 51.0)]
    diagnosis = explain(spans, SPLIT, CONFIG)
    assert diagnosis.bound_by == "learner"
    assert "Actor 0 takes 6.6 times" in str(diagnosis)


def test_everybody_waits_for_one() -> None:
    spans = rounds({**equal(4, 0.2), "Worker 2": 1.0}, push=0.05, message=0.01)
    diagnosis = explain(spans, SPLIT, CONFIG)
    assert diagnosis.bound_by == "waiting"
    assert "Worker 2 takes 5.0 times as long" in str(diagnosis)
    assert diagnosis.advice[0].startswith("mend or leave out Worker 2")
    assert "`update_rule` (now sync)" in diagnosis.advice[1]


def test_rounds_of_two_calls_wait_for_the_straggler_s_second_call() -> None:
    spans: Spans = []
    for k in range(20):
        spans += [(f"Worker {n}", "unroll", k + 0.05, k + 0.15) for n in range(3)]
        spans += [(f"Worker {n}", "gradient", k + 0.16, k + 0.2) for n in range(3)]
        spans += [("Worker 3", "unroll", k + 0.05, k + 0.5)]
        spans += [("Worker 3", "gradient", k + 0.6, k + 0.95)]
    diagnosis = explain(spans, SPLIT, CONFIG)
    assert diagnosis.bound_by == "waiting"
    worker = shares(Timeline.of(spans))["Worker"]
    assert worker.waiting == pytest.approx((3 * 0.75 + 0.1) / 4 * 20 / 19.9, abs=0.08)


def test_everybody_waits_for_another_one_each_round() -> None:
    """No straggler, only uneven work: nobody is to be mended."""
    rng, spans, now = np.random.default_rng(0), [], 0.0
    for _ in range(150):
        lengths = rng.lognormal(0.0, 0.8, size=16)
        spans += [(f"Worker {k}", "unroll", now, now + float(s)) for k, s in enumerate(lengths)]
        now += float(lengths.max()) + 0.02
    diagnosis = explain(spans, SPLIT, CONFIG)
    assert diagnosis.bound_by == "waiting"
    assert "mend" not in advice_of(diagnosis)


def test_a_straggler_for_whom_nobody_waits_is_named_but_is_no_verdict() -> None:
    spans = streams(3, 0.9, 0.1, 0.01) + [
        ("Worker 3", "unroll", 3.0 * k, 3.0 * k + 2.9) for k in range(13)
    ]
    diagnosis = explain(spans, SPLIT, CONFIG)
    assert diagnosis.bound_by == "env" and "Worker 3 takes 3.2 times" in str(diagnosis)


def test_one_long_call_makes_nobody_slow() -> None:
    spans = streams(3, 0.9, 0.1, 0.01) + [("Worker 0", "unroll", 40.0, 140.0)]
    assert stragglers(Timeline.of(spans)) == {}


def test_one_full_shard_of_two_is_the_bound_though_the_shards_mean_is_below_the_workers() -> None:
    spans: Spans = [("Shard 0", "push", k / 10, (k + 1) / 10) for k in range(400)]
    spans += [("Shard 1", "push", float(k), k + 0.1) for k in range(40)]
    for n in (0, 1):
        spans += [(f"Worker {n}", "unroll", k + n / 3, k + n / 3 + 0.6) for k in range(40)]
    found = shares(Timeline.of(spans))
    assert found["Shard"].work < 0.56 < found["Worker"].work
    assert explain(spans, SPLIT, CONFIG).bound_by == "learner"


def test_the_one_who_waits_at_a_bound_waits_for_the_straggler() -> None:
    """The slow worker never pauses; the fast ones go on when one of its calls is through."""
    spans: Spans = [("Worker 0", "unroll", float(k), k + 1.0) for k in range(30)]
    for k in range(30):
        spans += [(f"Worker {n}", "unroll", k + 0.02, k + 0.2) for n in (1, 2)]
    assert explain(spans, SPLIT, CONFIG).bound_by == "waiting"


@pytest.mark.parametrize("workers", [1, 4, 64])
def test_messages_take_longer_than_work(workers: int) -> None:
    diagnosis = explain(streams(workers, 0.05, 0.95, 0.0005), SPLIT, CONFIG)
    assert diagnosis.bound_by == "wire"
    assert "`calls_in_flight` (now 2)" in diagnosis.advice[0]


def test_rounds_whose_messages_take_most_of_the_time() -> None:
    assert explain(rounds(equal(4, 0.2), 0.05, 0.5), SPLIT, CONFIG).bound_by == "wire"
    assert explain(rounds(equal(4, 0.8), 0.05, 0.05), SPLIT, CONFIG).bound_by == "env"
    assert explain(rounds(equal(4, 0.3), 0.9, 0.05), SPLIT, CONFIG).bound_by == "learner"


def test_many_bytes_are_compressed_first() -> None:
    spans = streams(4, 0.05, 0.95, 0.01)
    heavy = explain(spans, {"bytes_per_env_step": 5000.0, "env_steps_per_s": 2000.0}, CONFIG)
    assert "`compression` (now none)" in heavy.advice[0]
    assert "5,000 bytes on the wire: 10.0 MB/s" in str(heavy)


# -- without a timeline ------------------------------------------------------------------------


def test_metrics_alone_can_tell() -> None:
    assert explain(None, SPLIT).bound_by == "env"
    assert explain([], {**SPLIT, "inference_time_fraction": 0.8}).bound_by == "inference"
    assert explain(None, {**SPLIT, "learner_idle_fraction": 0.03}).bound_by == "learner"
    assert explain(None, {**SPLIT, "learner_idle_fraction": 0.9}).bound_by == "env"
    with pytest.raises(ValueError, match="nothing says what bound it") as refusal:
        explain(None, {"loss": 1.0, "episode_return_mean": None})
    assert "\n" not in str(refusal.value)


def test_advice_names_only_settings_that_there_are() -> None:
    for spans in (streams(4, 0.9, 0.1, 0.01), streams(4, 0.05, 0.95, 0.01)):
        diagnosis = explain(spans, SPLIT, SimpleNamespace(seed=1))
        assert diagnosis.advice and "`" not in advice_of(diagnosis)


def test_a_full_learner_with_replay_draws_less_often() -> None:
    """Longer unrolls would change nothing: each step is drawn as often."""
    spans: Spans = [("Learner 0", "learn", float(k), k + 0.98) for k in range(100)]
    spans += [("Actor 0", "play", k + 0.2, k + 0.4) for k in range(100)]
    replayed = SimpleNamespace(unroll_length=20, samples_per_insert=8.0)
    advice = advice_of(explain(spans, SPLIT, replayed))
    assert "`samples_per_insert` (now 8.0)" in advice and "unroll_length" not in advice
    free = SimpleNamespace(unroll_length=20, samples_per_insert=None)
    assert "unroll_length" not in advice_of(explain(spans, SPLIT, free))
    unused = SimpleNamespace(unroll_length=20, samples_per_insert=8.0, learner="vtrace")
    advice = advice_of(explain(spans, SPLIT, unused))
    assert "samples_per_insert" not in advice and "`unroll_length` (now 20)" in advice
    assert "`unroll_length` (now 16)" in advice_of(explain(spans, SPLIT, CONFIG))


# -- the arithmetic ----------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    """Two workers, two rounds of 10 s; the second is slower; the shard works from 5 to 8."""
    spans: Spans = []
    for t in (0.0, 10.0):
        spans += [("Worker 0", "unroll", t, t + 3.0), ("Worker 1", "unroll", t, t + 6.0)]
        spans += [("Shard 0", "push", t + 5.0, t + 8.0)]
    spans += [("Worker 0", "unroll", 20.0, 20.0 + 1e-9), ("Worker 1", "unroll", 20.0, 20.0 + 1e-9)]
    found = shares(Timeline.of(spans))
    worker = found["Worker"]
    assert worker[:5] == pytest.approx(
        (
            2 * (3 + 6) / (2 * 20),
            2 * (6 - 3) / (2 * 20),
            2 * (2 + 2) / (2 * 20),  # 6 to 8; until 6 it is the slower one that is waited for
            2 * (2 + 2) / (2 * 20),  # 8 to 10
            2 * 6 / 20,
        )
    )
    assert worker.union == pytest.approx(2 * 6 / 20) and worker.processes == 2
    assert found["Shard"][:4] == pytest.approx((6 / 20, 0.0, 2 * 5 / 20, 2 * 2 / 20))


def test_shares_add_up_to_one() -> None:
    rng = np.random.default_rng(3)
    spans: Spans = []
    for who in ("Worker 0", "Worker 1", "Worker 2", "Shard 0", "Shard 1"):
        edges = np.cumsum(rng.exponential(1.0, size=200))
        spans += [(who, "work", float(a), float(b)) for a, b in edges.reshape(-1, 2)]
    for share in shares(Timeline.of(spans)).values():
        assert sum(share[:4]) == pytest.approx(1.0) and min(share) >= 0.0


def test_workers_out_of_step_are_not_said_to_wait_for_each_other() -> None:
    rng, spans = np.random.default_rng(1), []
    for k in range(4):
        edges = np.cumsum(np.exp(rng.normal(np.log([0.7, 0.3] * 100), 0.3)))
        spans += [(f"Worker {k}", "unroll", float(a), float(b)) for a, b in edges.reshape(-1, 2)]
    assert shares(Timeline.of(spans))["Worker"].waiting == 0.0


def test_the_driver_s_waits_and_stragglers_by_hand() -> None:
    spans = Timeline.of(
        [
            ("Worker 0", "unroll", 2.0, 4.0),
            ("Worker 1", "unroll", 2.0, 5.0),
            ("Worker 2", "unroll", 2.0, 10.0),
            (DRIVER, "wait", 0.0, 4.0),
            (DRIVER, "get", 6.0, 12.0),
        ]
    )
    assert driver_waits(spans) == (4 - 2 + 10 - 6) / (10 - 2)
    assert stragglers(spans) == {"Worker 2": 8 / ((2 + 3) / 2)}
    assert stragglers(Timeline.of([("Worker 0", "unroll", 0.0, 1.0)])) == {}
