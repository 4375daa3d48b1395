"""dPPO: N workers are one, proved; unequal rollouts, stragglers, deaths; real processes too.

The proof. Unrolls of B copies are recorded once. One `ppo.Learner` learns from them as they are; N
workers get B/N copies each. Every worker shuffles its own rows and cuts them into as many parts as
all others do; what the workers have as their i-th parts is together the serial learner's i-th
minibatch: it is told which rows those are. Then all parameters must be the same.
"""

import os
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import psutil
import pytest
import torch

from rlbook import dppo, ppo
from rlbook.data import AgentOutput, Unroll, tree_map
from rlbook.harness.checkpoint import load_checkpoint
from rlbook.harness.result import Result
from rlbook.harness.run import Run
from rlbook.parts import acting
from rlbook.parts.actor_copy import ActorCopy, Away
from rlbook.parts.envs import make_envs
from rlbook.parts.flat import Flat
from rlbook.parts.minibatches import Minibatches
from rlbook.parts.surrogate import Batch, make_batch
from rlbook.parts.unroll import collect_unroll
from rlbook.plumbing import served_rounds
from rlbook.plumbing.cluster import Cluster, Crash, Node
from rlbook.plumbing.crew import CrewError
from rlbook.plumbing.lockstep import Conducted
from rlbook.plumbing.runtime import ActorDiedError, RayRuntime
from rlbook.plumbing.served_rounds import ServedRounds
from rlbook.plumbing.virtual import VirtualRuntime
from tests.runs import assert_same_run, ctrl_c_at, same_parameters

QUICK = dppo.Config(
    progress=False,
    num_envs=8,
    unroll_length=16,
    epochs=2,
    minibatch_size=128,
    total_env_steps=3_000,
    log_every_env_steps=500,
    runtime="virtual",
)
SERVED = replace(QUICK, wiring="parameter_server")
BOTH = pytest.mark.parametrize("wiring", ["all_reduce", "parameter_server"])


def virtual(seed=1, cores=8, hollow=False, **cluster) -> VirtualRuntime:
    nodes = cluster.pop("nodes", (Node(cores=cores),))
    costs = cluster.pop("costs", dppo.COSTS)
    return VirtualRuntime(seed, Cluster(nodes=nodes, costs=costs, **cluster), hollow=hollow)


def run_on(config: dppo.Config, seed: int = 1, **cluster) -> Result:
    with virtual(seed, **cluster) as runtime:
        return dppo.train(config, runtime)


# -- N workers are one -----------------------------------------------------------------------------

COPIES, LENGTH, ROUNDS = 8, 20, 4
PROOF = replace(
    QUICK, num_envs=COPIES, unroll_length=LENGTH, minibatch_size=50, epochs=2, learning_rate=1e-2
)


def recorded() -> list[Unroll]:
    """Float64, of episodes that terminate and that are cut after 23 steps."""
    envs = make_envs("CartPole-v1", COPIES, 5, max_episode_steps=23)
    rng = np.random.default_rng(5)

    def act(observation: np.ndarray) -> AgentOutput:
        logits = rng.normal(size=(len(observation), 2)) * 0.3
        return AgentOutput(rng.integers(2, size=len(observation)), logits, logits[:, 0] * 9)

    unrolls = [collect_unroll(envs, act, LENGTH) for _ in range(ROUNDS)]
    ends = np.concatenate([unroll.env_outputs.discount for unroll in unrolls])
    cut = [
        unroll.env_outputs.first[1:] & (unroll.env_outputs.discount[:-1] == 1) for unroll in unrolls
    ]
    assert (ends == 0).any() and np.any(cut)
    halves = [(u.valid[:, :4].sum(), u.valid[:, 4:].sum()) for u in unrolls]
    assert sum(a != b for a, b in halves) >= ROUNDS - 1, "gradients must count differently"
    widen = partial(tree_map, lambda x: x.astype(np.float64) if x.dtype == np.float32 else x)
    return [Unroll(widen(u.env_outputs), widen(u.agent_outputs)) for u in unrolls]


def columns(unroll: Unroll, worker: int, workers: int, length: int = LENGTH) -> Unroll:
    """A worker's copies, and the first steps of them."""
    part = slice(worker * COPIES // workers, (worker + 1) * COPIES // workers)
    return Unroll(
        tree_map(lambda x: x[: length + 1, part], unroll.env_outputs),
        tree_map(lambda x: x[:length, part], unroll.agent_outputs),
    )


class Replayed(dppo.Worker):
    """Gets recorded unrolls instead of collecting; notes which rows its minibatches have."""

    unrolls: list[list[Unroll]] = []
    """Of each worker."""
    noted: dict[int, list[list[torch.Tensor]]] = {}

    def collect(self, steps, cut=None):
        turn = len(self.noted.setdefault(self.index, []))
        self.meter.begin()
        self.collected = self.unrolls[self.index][turn]

    def statistics(self):
        found = super().statistics()
        self.noted[self.index].append(self.minibatches.rows)
        return found


def distributed(config: dppo.Config, unrolls: list[list[Unroll]], monkeypatch) -> np.ndarray:
    """The parameters after all rounds."""
    make_network = dppo.make_network
    monkeypatch.setattr(dppo, "make_network", lambda c, envs: make_network(c, envs).double())
    monkeypatch.setattr(dppo, "Worker", Replayed)
    Replayed.unrolls, Replayed.noted = unrolls, {}
    steps = 0

    def count(run: Run) -> bool:
        nonlocal steps
        steps += 1
        return steps <= ROUNDS

    monkeypatch.setattr(Run, "running", count)
    result = run_on(config)
    monkeypatch.setattr(dppo, "make_network", make_network)
    assert result.learner_steps == ROUNDS * config.minibatches
    return Flat(result.policy.network).vector.numpy()


def serial(config: dppo.Config, unrolls: list, numbers: list[list[np.ndarray]]) -> np.ndarray:
    """`ppo.Learner` on the same unrolls; `numbers`: its row for each worker's row, by round."""
    shared = {name: getattr(config, name) for name in vars(ppo.Config()) if hasattr(config, name)}
    theirs = ppo.Config(**{**shared, "num_envs": COPIES})
    network = ppo.make_network(theirs, make_envs("CartPole-v1", 1, 0)).double()
    learner = ppo.Learner(network, theirs)
    for turn, unroll in enumerate(unrolls):
        parts = range(config.minibatches)
        union = [
            torch.cat([torch.from_numpy(numbers[turn][w])[r[turn][k]] for w, r in noted()])
            for k in parts
        ]
        for epoch in range(config.epochs):
            rows = torch.cat(union[epoch * config.parts : (epoch + 1) * config.parts])
            assert sorted(rows.tolist()) == list(range(len(rows))), "each row once an epoch"
        learner.minibatches = lambda samples, union=union: iter(union)
        assert learner.update(unroll)["gradient_norm"] > 0
    return Flat(network).vector.numpy()


def noted() -> list:
    return sorted(Replayed.noted.items())


def rows_of_workers(unroll: Unroll, workers: int) -> list[np.ndarray]:
    """For each worker the numbers that its rows have in the whole batch (time by time)."""
    valid = unroll.valid
    number = (np.cumsum(valid) - 1).reshape(valid.shape)
    parts = np.array_split(np.arange(COPIES), workers)
    return [number[:, part][valid[:, part]] for part in parts]


def difference(config: dppo.Config, monkeypatch) -> float:
    """Between N workers and one, in the parameter that differs most."""
    workers, unrolls = config.num_workers, recorded()
    theirs = [[columns(u, w, workers) for u in unrolls] for w in range(workers)]
    mine = distributed(config, theirs, monkeypatch)
    one = serial(config, unrolls, [rows_of_workers(u, workers) for u in unrolls])
    return float(np.abs(mine - one).max())


@BOTH
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_n_workers_are_one(workers, wiring, monkeypatch):
    config = replace(PROOF, wiring=wiring, num_workers=workers, num_envs=COPIES // workers)
    assert config.parts == 3
    assert difference(config, monkeypatch) < 1e-9


@BOTH
def test_without_normalised_advantages_n_workers_are_one_too(wiring, monkeypatch):
    config = replace(PROOF, wiring=wiring, num_envs=4, normalize_advantages=False)
    assert difference(config, monkeypatch) < 1e-9


class Own(Minibatches):
    """Mistake: a worker normalises its advantages by itself."""

    def agree(self, everybody):
        super().agree(everybody)
        shares = self.shares
        super().agree([self.moments])
        self.shares = shares


class Alike(Minibatches):
    """Mistake: every worker's gradient counts the same."""

    def agree(self, everybody):
        super().agree(everybody)
        self.shares = [1 / len(everybody)] * len(self.shares)


@BOTH
def test_proof_fails_if_advantages_are_not_normalised_together(wiring, monkeypatch):
    monkeypatch.setattr(dppo, "Minibatches", Own)
    config = replace(PROOF, wiring=wiring, num_envs=4)
    assert difference(config, monkeypatch) > 1e-4


@BOTH
def test_proof_fails_if_gradients_do_not_count_by_their_samples(wiring, monkeypatch):
    in_pieces = served_rounds.in_pieces
    monkeypatch.setattr(dppo, "Minibatches", Alike)
    monkeypatch.setattr(dppo, "in_pieces", lambda g, w, samples: in_pieces(g, w, 1))
    config = replace(PROOF, wiring=wiring, num_envs=4)
    assert difference(config, monkeypatch) > 1e-5


def test_proof_fails_if_new_parameters_are_not_sent_to_all(monkeypatch):
    def first_time_only(vector, weights):
        if weights[0].version == 0:
            put_weights(vector, weights)

    put_weights = dppo.put_weights
    monkeypatch.setattr(dppo, "put_weights", first_time_only)
    config = replace(PROOF, wiring="parameter_server", num_envs=4)
    assert difference(config, monkeypatch) > 1e-4


def test_proof_fails_if_a_worker_does_not_apply_the_sum(monkeypatch):
    apply = dppo.Worker.apply

    def applied(self, total=None):
        if self.index == 1:
            self.updates += 1
        else:
            apply(self, total)

    monkeypatch.setattr(dppo.Worker, "apply", applied)
    assert difference(replace(PROOF, num_envs=4), monkeypatch) > 1e-4


@BOTH
def test_rollouts_of_unequal_length_count_by_their_valid_rows(wiring, monkeypatch):
    """As after preemption; serially the same rows lie side by side in one batch."""
    lengths, unrolls = (LENGTH, 6, 13), recorded()
    pieces = [[columns(u, w, 4, lengths[w]) for w in range(3)] for u in unrolls]
    config = replace(PROOF, wiring=wiring, num_envs=2, num_workers=3, minibatch_size=40)
    mine = distributed(config, [[u[w] for u in pieces] for w in range(3)], monkeypatch)

    def side_by_side(network, unroll, settings) -> Batch:
        batches = [make_batch(network, piece, settings) for piece in unroll]
        return Batch(*(torch.cat(column) for column in zip(*batches, strict=True)))

    numbers = []
    for unroll in pieces:
        edges = np.cumsum([0] + [int(piece.valid.sum()) for piece in unroll])
        numbers.append([np.arange(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    monkeypatch.setattr(ppo, "make_batch", side_by_side)
    assert np.abs(mine - serial(config, pieces, numbers)).max() < 1e-9


def ppo_of(config: dppo.Config, **changes) -> ppo.Config:
    """PPO in one process with the same settings."""
    shared = {name: getattr(config, name) for name in vars(ppo.Config()) if hasattr(config, name)}
    return ppo.Config(**{**shared, "num_envs": config.all_envs, **changes})


@pytest.mark.parametrize("env_id", ["CartPole-v1", "rlbook/Catch-v0"])
def test_one_worker_is_ppo_bit_for_bit(env_id, monkeypatch):
    """With the same forward pass (numpy adds in another order than PyTorch) and parameters that lie
    in memory alike (a matrix that begins elsewhere is multiplied in another order).
    """
    make_network = ppo.make_network

    def in_one_vector(config, envs):
        network = make_network(config, envs)
        network.flat = Flat(network)
        return network

    config = replace(QUICK, num_workers=1, env_id=env_id)
    monkeypatch.setattr(ppo, "make_network", in_one_vector)
    monkeypatch.setattr(acting, "numpy_forward", lambda network: None)
    mine, theirs = run_on(config), ppo.train(ppo_of(config))
    assert same_parameters(mine, theirs)
    assert mine.learner_steps == theirs.learner_steps and mine.env_steps == theirs.env_steps
    assert mine.metrics["episodes"] == theirs.metrics["episodes"]
    assert mine.curves["entropy"].tolist() == theirs.curves["entropy"].tolist()
    assert not same_parameters(mine, ppo.train(ppo_of(config, seed=2)))


def test_one_worker_is_ppo_but_for_the_last_bits():
    config = replace(QUICK, num_workers=1, total_env_steps=1_000)
    mine, theirs = run_on(config), ppo.train(ppo_of(config))
    one, other = (Flat(result.policy.network).vector for result in (mine, theirs))
    assert mine.env_steps == theirs.env_steps and torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("shards", [1, 3])
def test_both_wirings_are_one(shards):
    """Float32, and with three shards a bound that never acts: each shard bounds its own slice."""
    settings = {"num_workers": 3, "max_gradient_norm": 0.5 if shards == 1 else 1e9}
    reduced = run_on(replace(QUICK, **settings, total_env_steps=1_500))
    served = run_on(replace(SERVED, **settings, num_shards=shards, total_env_steps=1_500))
    assert reduced.learner_steps == served.learner_steps > 15
    one, other = (Flat(result.policy.network).vector for result in (reduced, served))
    assert torch.allclose(one, other, atol=1e-4)
    assert reduced.metrics["episodes"] == served.metrics["episodes"]


# -- observations ----------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """(workers by index, observations of valid rows as they come)."""
    workers, seen, original = {}, [], dppo.Worker.statistics

    def statistics(self):
        workers[self.index] = self
        seen.append(self.collected.env_outputs.observation[:-1][self.collected.valid])
        return original(self)

    monkeypatch.setattr(dppo.Worker, "statistics", statistics)
    return workers, seen


@BOTH
def test_observations_are_normalised_by_what_all_workers_saw(wiring, watched):
    config = replace(QUICK, wiring=wiring, num_workers=3, normalize_observations=True)
    result = run_on(config)
    workers, seen = watched
    everything = np.concatenate(seen).astype(np.float64)
    assert len(workers) == 3 and len(everything) == result.env_steps
    for network in [result.policy.network, *(worker.network for worker in workers.values())]:
        normalizer = network.normalizer
        before = normalizer.rows.clone()
        normalizer.renew()  # the last round's
        assert (normalizer.rows > before).all() and (normalizer.rows == len(everything)).all()
        assert np.allclose(normalizer.mean, everything.mean(0), rtol=1e-9)
        assert np.allclose(normalizer.moments.variance, everything.var(0), rtol=1e-9)


def test_asynchronous_workers_hear_what_the_others_saw(watched):
    config = replace(
        SERVED, update_rule="async", num_workers=3, normalize_observations=True, seed=3
    )
    run_on(config, seed=3)
    workers, seen = watched
    newest = max(len(rows) for rows in seen)
    for worker in workers.values():
        worker.network.normalizer.renew()
        heard = worker.network.normalizer.rows.max()
        assert sum(map(len, seen)) - 2 * newest <= heard <= sum(map(len, seen))


def test_actor_and_learner_see_the_same_observations():
    """The ratio is 1 before the first update of every round, however the statistics move."""
    config = replace(QUICK, num_workers=1, normalize_observations=True)
    worker = dppo.Worker(config, 0)
    for _ in range(3):
        worker.collect(config.unroll_length)
        worker.agree(worker.statistics())
        worker.share(0)
        assert worker.metrics["approx_kl"] < 1e-6
        worker.apply()
    assert worker.network.normalizer.rows.min() > 0


# -- the same run ----------------------------------------------------------------------------------


RUNS = {
    "all_reduce": replace(QUICK, num_workers=3),
    "hasty": replace(QUICK, num_workers=3, preempt=True, balance=True, normalize_observations=True),
    "server": replace(SERVED, num_workers=3, num_shards=2, balance=True),
    "async": replace(SERVED, num_workers=3, update_rule="async", normalize_observations=True),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_seed_gives_the_same_run_and_another_does_not(name):
    one, same = (run_on(RUNS[name], jitter=0.5) for _ in range(2))
    assert_same_run(one, same)
    assert one.wall_time_s == same.wall_time_s
    assert not same_parameters(one, run_on(replace(RUNS[name], seed=2), jitter=0.5))
    other = run_on(RUNS[name], seed=2, jitter=0.5)
    assert same_parameters(one, other) == (name == "all_reduce"), "who waits for all, sees no order"


@pytest.mark.parametrize("name", RUNS)
def test_resumed_is_uninterrupted_bit_for_bit(name, tmp_path, monkeypatch):
    """The power fails after a checkpoint; what is resumed ends as if it had not."""
    config = replace(RUNS[name], checkpoint_every_s=0.03)
    stragglers = {"Worker 1": 2.0}
    whole = run_on(replace(config, run_dir=str(tmp_path / "whole")), stragglers=stragglers)
    saved = []
    save, record = Run.checkpoint, Run.record

    def saving(run: Run) -> None:
        save(run)
        saved.append(run.env_steps)

    def until(run: Run, **turn) -> None:
        record(run, **turn)
        if saved and run.env_steps > saved[-1] + 300:
            raise EOFError

    with monkeypatch.context() as patch:
        patch.setattr(Run, "checkpoint", saving)
        patch.setattr(Run, "record", until)
        with pytest.raises(EOFError):
            run_on(replace(config, run_dir=str(tmp_path / "cut")), stragglers=stragglers)
    assert saved[-1] < config.total_env_steps - 500
    resumed = run_on(replace(config, resume=str(tmp_path / "cut")), stragglers=stragglers)
    assert_same_run(whole, resumed)
    assert np.isclose(whole.wall_time_s, resumed.wall_time_s, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", RUNS)
def test_what_is_kept_acts_as_what_was_trained(name, tmp_path):
    result = run_on(replace(RUNS[name], run_dir=str(tmp_path / "run")))
    kept = Result.load(tmp_path / "run")
    assert same_parameters(result, kept)
    assert result.evaluate(5).returns.tolist() == kept.evaluate(5).returns.tolist()


def test_every_worker_draws_for_itself_one_that_replaces_another_too():
    """Environments, actions, and the order of rows."""
    born = [dppo.Worker(QUICK, 0), dppo.Worker(QUICK, 1), dppo.Worker(QUICK, 0, born=1)]
    seen = {worker.envs.env_output.observation.tobytes() for worker in born}
    draws = {rng.random() for worker in born for rng in (worker.sampler.rng, worker.rng)}
    assert len(seen) == 3 and len(draws) == 6
    again = dppo.Worker(QUICK, 0)
    assert again.envs.env_output.observation.tobytes() in seen
    assert {again.sampler.rng.random(), again.rng.random()} < draws


def test_slices_of_the_largest_gradient_are_together_as_long_as_it_may_be():
    config = replace(SERVED, num_shards=4, max_gradient_norm=3.0)
    slices = [np.full(5, 100.0) for _ in range(4)]
    limit = dppo.server_settings(config).max_mean_norm
    scaled = [part * limit / np.linalg.norm(part) for part in slices]
    assert np.isclose(np.linalg.norm(np.concatenate(scaled)), 3.0)


# -- stragglers ------------------------------------------------------------------------------------

SLOW_ENVS = dppo.COSTS | {"env_step": 2e-3}


def test_a_straggler_is_cut_short_and_the_others_wait_less(watched, monkeypatch):
    """Four workers, one five times slower: whole rounds take as long as its rollouts."""
    config = replace(QUICK, num_workers=4)
    lengths, original = [], dppo.Worker.report

    def report(self):
        lengths.append((self.index, self.steps))
        return original(self)

    monkeypatch.setattr(dppo.Worker, "report", report)
    rates = {}
    for preempt in (False, True):
        lengths.clear()
        one = replace(config, preempt=preempt)
        result = run_on(one, costs=SLOW_ENVS, stragglers={"Worker 2": 5.0}, jitter=0.0)
        rates[preempt] = result.metrics["env_steps_per_s"]
        assert result.metrics["unroll_length_mean"] == (13.0 if preempt else 16.0)
        cut = {length for who, length in lengths if who == 2}
        whole = {length for who, length in lengths if who != 2}
        assert whole == {16} and (cut == {4} if preempt else cut == {16})
    assert rates[True] > 2 * rates[False]


def test_who_was_cut_short_is_known_to_be_slow(tmp_path):
    """After one round: speed is steps taken, not steps asked for."""
    config = replace(QUICK, num_workers=3, preempt=True, balance=True, total_env_steps=200)
    config = replace(config, run_dir=str(tmp_path / "run"))
    result = run_on(config, costs=SLOW_ENVS, stragglers={"Worker 1": 4.0}, jitter=0.0)
    assert result.learner_steps == config.minibatches
    parts = load_checkpoint(tmp_path / "run" / "checkpoint.npz", "dppo")["parts"]
    fast, slow, other = parts["workers"]["pace"]["speeds"]
    assert np.isclose(fast, other, rtol=0.1) and 3.0 < fast / slow < 5.0


def test_who_has_taken_little_is_not_cut_however_late():
    config = replace(QUICK, num_workers=2, preempt=True, short_rollout=0.9, total_env_steps=800)
    for fraction, stragglers in ((0.9, {"Worker 1": 9.0}), (1.0, {"Worker 1": 9.0})):
        result = run_on(
            replace(config, short_rollout=fraction), costs=SLOW_ENVS, stragglers=stragglers
        )
        rounds = result.learner_steps / config.minibatches
        steps = result.env_steps / rounds / config.num_envs / 2
        assert 0.85 * 16 < steps <= 16


def test_balanced_rollouts_end_together_and_nothing_is_lost():
    """Worker 0 is three times slower: 1/7 of the steps instead of 1/3."""
    config, rates = replace(QUICK, num_workers=3, unroll_length=14), []
    for balance in (False, True):
        result = run_on(
            replace(config, balance=balance), costs=SLOW_ENVS, stragglers={"Worker 0": 3.0}
        )
        rates.append(result.metrics["env_steps_per_s"])
    assert 1.5 * rates[0] < rates[1] < 3 * rates[0]


def test_unequal_computers_are_balanced_too_with_a_server(monkeypatch):
    lengths, original = [], dppo.Worker.rollout

    def rollout(self, steps, *weights):
        lengths.append((self.index, steps))
        return original(self, steps, *weights)

    monkeypatch.setattr(dppo.Worker, "rollout", rollout)
    config = replace(SERVED, num_workers=2, balance=True)
    run_on(config, costs=SLOW_ENVS, stragglers={"Worker 1": 3.0}, jitter=0.0)
    assert lengths[:2] == [(0, 16), (1, 16)]
    assert dict(lengths[-2:]) == {0: 24, 1: 8}


def test_a_hollow_run_predicts_the_same_clock_and_plays_hundreds():
    observing = {"num_workers": 4, "normalize_observations": True}
    for config in (replace(QUICK, num_workers=4), replace(SERVED, **observing)):
        rates = []
        for hollow in (False, True):
            with virtual(hollow=hollow) as runtime:
                rates.append(dppo.train(config, runtime).metrics["env_steps_per_s"])
        assert 0.85 < rates[1] / rates[0] < 1.15
    rates = []
    for workers in (4, 128):
        many = replace(
            QUICK,
            num_workers=workers,
            minibatch_size=16 * workers,
            total_env_steps=workers * 1_000,
        )
        with virtual(cores=workers + 1, hollow=True, costs=SLOW_ENVS) as runtime:
            rates.append(dppo.train(many, runtime).metrics["env_steps_per_s"])
    assert 16 < rates[1] / rates[0] < 32


# -- deaths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("restart_s", [None, 0.0])
def test_a_dead_worker_is_replaced_and_the_others_go_on(name, restart_s, watched):
    config = RUNS[name]
    half = 0.5 * run_on(config).wall_time_s
    for at_s in (half, half + 0.0007, half + 0.0019):
        result = run_on(config, crashes=(Crash("Worker 1", at_s=at_s, restart_s=restart_s),))
        assert result.stopped_because == "total_env_steps" and result.env_steps >= 3_000
        if config.wiring == "all_reduce":
            vectors = [worker.flat.vector for worker in watched[0].values()]
            assert all(torch.equal(vectors[0], vector) for vector in vectors)
            made = [worker.updates for worker in watched[0].values()]
            assert set(made) == {result.learner_steps}
            rounds = result.env_steps / (3 * config.num_envs * config.unroll_length)
            assert result.learner_steps > 0.9 * rounds * config.minibatches, "nothing is forgotten"


def test_a_rollout_in_which_somebody_died_is_not_taken_up_again(watched):
    half = 0.5 * run_on(RUNS["all_reduce"], costs=SLOW_ENVS).wall_time_s
    run_on(RUNS["all_reduce"], costs=SLOW_ENVS, crashes=(Crash("Worker 1", at_s=half),))
    assert max(map(len, watched[1])) <= QUICK.num_envs * QUICK.unroll_length


def test_the_adder_and_a_shard_may_die_too():
    for name, who in (("all_reduce", "Adder 0"), ("server", "Shard 1"), ("async", "Shard 0")):
        half = 0.5 * run_on(RUNS[name]).wall_time_s
        result = run_on(RUNS[name], crashes=(Crash(who, at_s=half),))
        assert result.stopped_because == "total_env_steps"


def observed(folder) -> list[float]:
    """By each worker that a checkpoint holds: how many observations its normaliser knows of."""
    parts = load_checkpoint(folder / "checkpoint.npz", "dppo")["parts"]
    found = []
    for member in parts["workers"]["members"] if "workers" in parts else parts["team"]["actors"]:
        network = dppo.make_network(OBSERVING["server"], make_envs("CartPole-v1", 1, 0))
        network.load_state_dict(member["network"])
        network.normalizer.renew()
        found.append(network.normalizer.rows.max().item())
    return found


OBSERVING = {name: replace(run, normalize_observations=True) for name, run in RUNS.items()}


@pytest.mark.parametrize("name", OBSERVING)
def test_who_dies_at_rest_is_replaced_before_anybody_is_asked_what_it_knows(
    name, tmp_path, monkeypatch
):
    """Before, in and after the last drain: what all have observed is in the new one too."""
    config, slow = OBSERVING[name], {"Worker 1": 3.0}
    kind, times = Conducted if config.wiring == "all_reduce" else ServedRounds, []

    def noting(self):
        times.append(self.now)
        brought = drain(self)
        times.append(self.now)
        return brought

    drain = kind.drain
    with monkeypatch.context() as patch:
        patch.setattr(kind, "drain", noting)
        run_on(config, stragglers=slow)
    begin, end = times
    for worker, at_s in ((0, begin + 1e-6), (1, end - 2e-3), (0, end + 1e-6)):
        folder = tmp_path / str(at_s)
        crashes = (Crash(f"Worker {worker}", at_s=at_s),)
        result = run_on(replace(config, run_dir=str(folder)), stragglers=slow, crashes=crashes)
        assert same_parameters(result, Result.load(folder))
        assert min(observed(folder)) > 0.8 * result.env_steps


def test_with_a_server_a_run_ends_when_nobody_is_left_who_knows_what_was_observed():
    config = replace(SERVED, num_workers=1)
    crashes = (Crash("Worker 0", at_s=0.5 * run_on(config).wall_time_s),)
    assert run_on(config, crashes=crashes).stopped_because == "total_env_steps"
    with pytest.raises(ActorDiedError, match="all workers died: resume from the last checkpoint"):
        run_on(replace(config, normalize_observations=True), crashes=crashes)


def test_if_nobody_is_left_who_knows_the_run_ends_with_a_clear_word():
    config = replace(QUICK, num_workers=1)
    half = 0.5 * run_on(config).wall_time_s
    with pytest.raises(ActorDiedError, match="all workers died: resume from the last checkpoint"):
        run_on(config, crashes=(Crash("Worker 0", at_s=half),))


# -- processes -------------------------------------------------------------------------------------

REAL = replace(QUICK, runtime="ray", num_workers=2)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@contextmanager
def at_env_steps(env_steps: int, act, monkeypatch):
    """Calls `act(run)` in the turn in which a run passes so many environment steps."""
    record, acted = Run.record, []

    def recording(self: Run, **turn) -> None:
        record(self, **turn)
        if self.env_steps >= env_steps and not acted:
            acted.append(True)
            act(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", recording)
        yield


def test_two_processes_are_two_virtual_ones_bit_for_bit(capfd, tmp_path):
    before = children()
    config = replace(REAL, normalize_observations=True, run_dir=str(tmp_path / "run"))
    result = dppo.train(config)
    assert children() == before and capfd.readouterr() == ("", "")
    same = run_on(replace(config, runtime="virtual", run_dir=None))
    assert same_parameters(result, same)
    assert result.env_steps == same.env_steps and result.learner_steps == same.learner_steps
    assert {"Worker 0", "Worker 1", "driver"} == {span.who for span in result.spans}
    parts = ("env", "inference", "gradient", "waiting")
    fractions = [result.metrics[f"{part}_time_fraction"] for part in parts]
    assert min(fractions) > 0 and 0.5 < sum(fractions) < 1
    rounds = result.learner_steps / config.minibatches
    vector = sum(p.numel() for p in result.policy.network.parameters())
    sums = config.minibatches * 4 * vector  # 2 (N − 1)/N of a vector each; and some statistics
    steps = result.env_steps / 2 / rounds  # on average; the metric is of the last round
    assert 0.9 * sums < result.metrics["bytes_per_env_step"] * steps < 1.2 * sums
    assert same_parameters(result, Result.load(tmp_path / "run"))
    more = {"total_env_steps": 4_000, "run_dir": None}
    resumed = dppo.train(replace(config, resume=str(tmp_path / "run"), **more))
    whole = run_on(replace(config, runtime="virtual", **more))
    assert same_parameters(resumed, whole), "on processes, too, resumed is uninterrupted"


def test_processes_that_hurry_and_balance_still_agree(monkeypatch):
    known = []

    def look(run: Run) -> None:
        known.extend(run.parts["workers"].crew.each("knowledge"))

    config = replace(REAL, num_workers=3, preempt=True, balance=True, normalize_observations=True)
    with at_env_steps(2_500, look, monkeypatch):
        result = dppo.train(config)
    assert result.env_steps >= 3_000 and len(known) == 3
    for other in known[1:]:
        for name, value in known[0]["network"].items():
            same = torch.equal if isinstance(value, torch.Tensor) else np.array_equal
            assert same(value, other["network"][name]), name
        assert other["updates"] == known[0]["updates"] > 0


def test_a_killed_process_is_replaced_by_one_that_learns_from_the_others(monkeypatch, capfd):
    seen = {}

    def kill(run: Run) -> None:
        crew = run.parts["workers"].crew
        os.kill(crew.pids[0], signal.SIGKILL)
        psutil.Process(crew.pids[0]).wait(10)
        seen.update(crew=crew, updates=run.learner_steps)

    def look(run: Run) -> None:
        known = seen["crew"].each("knowledge")
        seen["vectors"] = [known[i]["network"]["policy_head.weight"] for i in range(3)]
        seen["made"] = {one["updates"] for one in known}

    with at_env_steps(1_000, kill, monkeypatch), at_env_steps(2_700, look, monkeypatch):
        result = dppo.train(replace(REAL, num_workers=3))
    assert result.stopped_because == "total_env_steps" and capfd.readouterr() == ("", "")
    assert {"Worker 0", "Worker 1", "Worker 2", "Worker 3"} <= {s.who for s in result.spans}
    assert all(torch.equal(seen["vectors"][0], vector) for vector in seen["vectors"])
    assert min(seen["made"]) > seen["updates"] and len(seen["made"]) == 1


def test_a_process_killed_at_rest_is_replaced_before_a_checkpoint(monkeypatch, tmp_path):
    def kill_and_keep(run: Run) -> None:
        crew = run.parts["workers"].crew
        os.kill(crew.pids[1], signal.SIGKILL)
        run.checkpoint()
        state = load_checkpoint(tmp_path / "run" / "checkpoint.npz", "dppo")
        one, other = state["parts"]["workers"]["members"]
        assert crew.born == [0, 1] and one["updates"] == other["updates"] == run.learner_steps > 0
        for name, value in one["network"].items():
            assert np.array_equal(value, other["network"][name]), name

    with at_env_steps(1_500, kill_and_keep, monkeypatch):
        result = dppo.train(replace(REAL, run_dir=str(tmp_path / "run")))
    assert result.stopped_because == "total_env_steps" and result.env_steps >= 3_000


def test_if_the_only_process_dies_the_run_ends_with_a_clear_word(monkeypatch):
    before = children()

    def kill(run: Run) -> None:
        os.kill(run.parts["workers"].crew.pids[0], signal.SIGKILL)

    with at_env_steps(2_000, kill, monkeypatch):
        with pytest.raises(CrewError, match="all workers died: resume from the last checkpoint"):
            dppo.train(replace(REAL, num_workers=1))
    assert children() == before


def test_ctrl_c_ends_a_run_in_good_order_and_errors_leave_nobody(tmp_path, monkeypatch):
    before = children()
    with ctrl_c_at(2_000):
        result = dppo.train(replace(REAL, run_dir=str(tmp_path / "run")))
    assert result.stopped_because == "interrupted" and children() == before
    assert same_parameters(result, Result.load(tmp_path / "run"))

    def fail(run: Run) -> None:
        run.parts["workers"].crew.ask(1, "share", "many")

    with at_env_steps(1_000, fail, monkeypatch):
        with pytest.raises(CrewError, match="Worker 1 failed in share(.|\n)*TypeError"):
            dppo.train(REAL)
    assert children() == before


def test_a_real_run_with_a_server_on_ray(capfd):
    config = replace(SERVED, runtime="ray", num_workers=2, num_shards=2)
    with RayRuntime(num_cpus=4) as runtime:
        result = dppo.train(config, runtime)
    assert capfd.readouterr() == ("", "")
    same = run_on(config)
    assert same_parameters(result, same), "who waits for all, sees no order"
    assert {"Worker 0", "Worker 1", "Shard 0", "Shard 1"} <= {span.who for span in result.spans}


# -- devices ---------------------------------------------------------------------------------------

SHORT = replace(QUICK, total_env_steps=1_000)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def vector(result: Result) -> torch.Tensor:
    return Flat(result.policy.network).vector


@pytest.mark.parametrize("observing", [False, True])
def test_a_copy_that_acts_is_kept_up_to_date(observing, monkeypatch):
    """As for a small network that learns on a GPU; here both are on the CPU."""
    config = replace(SHORT, normalize_observations=observing)
    plain = run_on(config)
    monkeypatch.setattr(dppo, "ActorCopy", partial(ActorCopy, copied=True))
    assert same_parameters(run_on(config), plain)
    monkeypatch.setattr(ActorCopy, "refresh", lambda self: None)
    assert not same_parameters(run_on(config), plain), "it acted with what it was made with"


def test_a_network_that_acts_where_it_learns_sends_its_answers_back(monkeypatch):
    """As convolutions on a GPU; here it is the CPU that they are sent to."""
    monkeypatch.setattr(acting, "numpy_forward", lambda network: None)
    plain, calls = run_on(SHORT), []

    def away(network, device):
        calls.append(device)
        found = ActorCopy(network, device)
        found.network = Away(network, device)
        return found

    monkeypatch.setattr(dppo, "ActorCopy", away)
    assert same_parameters(run_on(SHORT), plain) and len(calls) == 2


def test_workers_of_a_server_share_the_gpus_that_ray_has(monkeypatch):
    asked = []
    monkeypatch.setattr(served_rounds, "placed", lambda _, learners: asked.append(learners) or {})
    run_on(replace(SERVED, num_workers=3, total_env_steps=300))
    assert asked == [3, 3, 3]


def test_in_bfloat16_parameters_and_losses_stay_float32(monkeypatch):
    seen, original = [], dppo.loss_function

    def noting(network, batch, config):
        loss, metrics = original(network, batch, config)
        seen.append((loss.dtype, next(network.parameters()).dtype))
        return loss, metrics

    monkeypatch.setattr(dppo, "loss_function", noting)
    fine, coarse = run_on(SHORT), run_on(replace(SHORT, precision="bfloat16"))
    assert set(seen) == {(torch.float32, torch.float32)}
    assert not same_parameters(fine, coarse)
    assert torch.allclose(vector(fine), vector(coarse), atol=0.05)
    assert (vector(fine) - vector(run_on(replace(SHORT, seed=2)))).abs().max() > 0.2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler here")
def test_compiled_is_eager():
    config = replace(SHORT, num_workers=1, total_env_steps=300)
    eager, compiled = run_on(config), run_on(replace(config, compile=True))
    assert eager.learner_steps == compiled.learner_steps > 3
    assert torch.allclose(vector(eager), vector(compiled), atol=1e-4)


@on_gpu
@pytest.mark.parametrize("wiring", ["all_reduce", "parameter_server"])
@pytest.mark.parametrize("observing", [False, True])
def test_on_a_gpu_a_round_is_the_same_but_for_the_last_bits(wiring, observing):
    settings = {"wiring": wiring, "normalize_observations": observing, "total_env_steps": 256}
    config = replace(QUICK, **settings)
    host, gpu = run_on(config), run_on(replace(config, device="cuda:0"))
    assert host.env_steps == gpu.env_steps and host.learner_steps == gpu.learner_steps > 3
    assert torch.allclose(vector(host), vector(gpu), atol=1e-4)


@on_gpu
def test_processes_share_a_gpu_and_their_run_goes_on_without_one(tmp_path):
    """By gloo; on a computer with two GPUs, by NCCL, with device "cuda"."""
    config = replace(REAL, device="cuda:0", total_env_steps=512, run_dir=str(tmp_path / "run"))
    gpu, host = dppo.train(config), run_on(replace(config, device="cpu", run_dir=None))
    assert torch.allclose(vector(gpu), vector(host), atol=1e-3)
    assert same_parameters(gpu, Result.load(tmp_path / "run"))
    more = replace(config, device="cpu", resume=str(tmp_path / "run"), run_dir=None)
    assert dppo.train(replace(more, total_env_steps=1_000)).env_steps >= 1_000


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_add_up_by_nccl():
    config = replace(REAL, device="cuda", learner_backend="nccl", total_env_steps=512)
    host = run_on(replace(config, device="cpu", learner_backend="auto"))
    assert torch.allclose(vector(dppo.train(config)), vector(host), atol=1e-3)


@on_gpu
def test_frames_are_acted_on_where_they_are_learnt_from():
    worker = dppo.Worker(replace(QUICK, env_id="ALE/Pong-v5", num_envs=2, device="cuda:0"), 0)
    assert isinstance(worker.actor.network, Away) and not worker.actor.copied
    worker.collect(4)
    worker.agree(worker.statistics())
    assert worker.minibatches[0].observation.is_cuda
    worker.weigh(0)
    assert worker.flat.gradients.is_cuda and worker.flat.gradients.abs().sum() > 0
    assert not any(t.is_cuda for t in worker.knowledge()["network"].values())


# -- learning and settings -------------------------------------------------------------------------


def test_units_of_work_have_the_names_that_costs_have():
    units = dppo.units_of_work(QUICK)
    assert units.keys() == dppo.COSTS.keys()
    for work in units.values():
        work()


@BOTH
def test_it_learns_catch(wiring):
    config = dppo.Config(
        env_id="rlbook/Catch-v0",
        wiring=wiring,
        runtime="virtual",
        num_envs=16,
        minibatch_size=256,
        learning_rate=2.5e-3,
        total_env_steps=200_000,
        stop_at_return=0.9,
        progress=False,
    )
    assert dppo.train(config).stopped_because == "solved"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"device": "gpu"}, "device: must be cpu, cuda"),
        ({"precision": "half"}, "precision: must be one of"),
        ({"wiring": "ring"}, "wiring: must be one of all_reduce, parameter_server"),
        ({"update_rule": "bounded"}, "update_rule: must be one of sync, async"),
        ({"runtime": "mpi"}, "runtime: must be one of ray, virtual"),
        ({"num_workers": 0}, "num_workers: must be at least 1"),
        ({"minibatch_size": 0}, "minibatch_size: must be at least 1"),
        ({"clip": 0.0}, "clip: must be larger than 0"),
        ({"sync_fraction": 1.2}, "sync_fraction: must be between"),
        ({"short_rollout": -0.1}, "short_rollout: must be between"),
        ({"preempt": True, "wiring": "parameter_server"}, "preempt: needs"),
        ({"update_rule": "async"}, 'update_rule: "async" needs a parameter server'),
        (
            {"update_rule": "async", "wiring": "parameter_server", "balance": True},
            "update_rule: .* balance False",
        ),
    ],
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        dppo.Config(**settings)


def test_presets_are_what_they_say():
    paper = dppo.PRESETS["paper"]
    assert (paper.sync_fraction, paper.short_rollout, paper.preempt) == (0.6, 0.25, True)
    assert (paper.unroll_length, paper.epochs, paper.learning_rate) == (128, 2, 2.5e-4)
    assert (paper.discount, paper.gae_lambda, paper.parts) == (0.99, 0.95, 2)
    assert dppo.PRESETS["parameter_server"].update_rule == "sync"
    assert dppo.PRESETS["async"].update_rule == "async"
