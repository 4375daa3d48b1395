"""Central inference: who waits how long, whose rows are whose, what an unroll is made of."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlbook.data import EnvOutput
from rlbook.parts.acting import Sampler, make_actor_critic
from rlbook.parts.central_acting import CentralQ, CentralSampler
from rlbook.parts.envs import make_envs
from rlbook.parts.flat import Flat
from rlbook.parts.frames import restacked
from rlbook.parts.recurrent_q import make_q_network
from rlbook.parts.unroll import collect_unroll
from rlbook.plumbing.devices import refuse_devices
from rlbook.plumbing.inference import Inference, Request, Waiting, Who
from rlbook.plumbing.learner_group import Vector
from tests.counters import register
from tests.seeds import echoing, newer, stacks

# -- batches ---------------------------------------------------------------------------------------


def request(place: int, rows: int = 4, since: float = 0.0) -> Request:
    return Request(Who(place, 0), rows, since)


def test_a_batch_is_due_when_it_is_full_or_has_waited_long_enough():
    waiting = Waiting(8, 0.5)
    assert waiting.due_in(0.0) is None
    waiting.add(request(0, since=1.0))
    assert waiting.due_in(1.0) == 0.5 and waiting.due_in(1.2) == pytest.approx(0.3)
    assert waiting.due_in(9.0) == 0.0
    waiting.add(request(1, since=1.1))
    assert waiting.due_in(1.1) == 0.0, "it is full"
    assert [one.who.place for one in waiting.take()] == [0, 1]
    assert waiting.due_in(99.0) is None and waiting.rows == 0


def test_without_a_time_out_only_more_rows_help():
    waiting = Waiting(8, None)
    waiting.add(request(0))
    assert waiting.due_in(1e9) is None
    waiting.add(request(1))
    assert waiting.due_in(0.0) == 0.0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 12))
def test_batches_take_all_in_order_and_never_too_much(sizes, most):
    waiting = Waiting(most, 0.0)
    for place, rows in enumerate(sizes):
        waiting.add(request(place, rows))
    taken = []
    while waiting.requests:
        batch = waiting.take()
        assert len(batch) == 1 or sum(one.rows for one in batch) <= most
        taken += [one.who.place for one in batch]
    assert taken == list(range(len(sizes))) and waiting.rows == 0


def test_who_is_gone_is_in_no_batch():
    waiting = Waiting(8, None)
    for place in (0, 1, 2):
        waiting.add(request(place))
    assert [one.who.place for one in waiting.drop(lambda one: one.who.place == 1)] == [1]
    assert waiting.rows == 8 and [one.who.place for one in waiting.take()] == [0, 2]


# -- slots and unrolls -----------------------------------------------------------------------------


def test_unrolls_are_put_together_as_an_actor_collects_them():
    """Two slots in turns and together; against `collect_unroll` on twins of the environments."""
    register()
    mine = [make_envs("test/Counter-v0", 2, seed) for seed in (0, 1)]
    register()
    twins = [make_envs("test/Counter-v0", 2, seed) for seed in (0, 1)]
    inference, rows, found = echoing(unroll_length=5), [e.env_output for e in mine], [[], []]
    version = 0
    for step in range(23):
        together = step % 3 > 0
        for places in ([0, 1],) if together else ([0], [1]):
            for place in places:
                unroll = inference.observe(Who(place, 0), rows[place])
                if unroll is not None:
                    found[place].append(unroll)
            for place, action in zip(places, inference.act(places), strict=True):
                rows[place] = mine[place].step(action)
        version += 1
        inference.load(newer(version))
    for place in (0, 1):
        assert len(found[place]) == 4
        state, agent = (np.zeros((2, 1)),), inference.agent
        for number, unroll in enumerate(found[place]):
            assert unroll.actor == place
            assert unroll.version.tolist() == list(range(5 * number, 5 * number + 5))
            assert (unroll.agent_outputs.logits[..., 1] == unroll.version[:, None]).all()
            assert np.array_equal(unroll.agent_state[0], state[0])

            def act(observation, twin=twins[place], agent=agent):
                nonlocal state
                output, state = agent.act(observation, twin.env_output.first, state, [(None, 2, 0)])
                return output

            expected = collect_unroll(twins[place], act, 5)
            for a, b in zip(unroll.env_outputs, expected.env_outputs, strict=True):
                assert np.array_equal(a, b)
            for name in ("action", "value"):
                a, b = getattr(unroll.agent_outputs, name), getattr(expected.agent_outputs, name)
                assert np.array_equal(a, b)
            assert np.array_equal(
                unroll.agent_outputs.logits[..., 0], expected.agent_outputs.logits[..., 0]
            )


def row(*copies: int, first: bool = False) -> EnvOutput:
    count = len(copies)
    observation = np.array([[copy, 0, 0] for copy in copies], np.float32)
    flags = np.full(count, first)
    return EnvOutput(observation, np.zeros(count), np.ones(count), flags)


def test_a_new_run_begins_with_no_memory_and_an_empty_unroll():
    inference = echoing(unroll_length=3)
    for _ in range(2):
        assert inference.observe(Who(0, 0), row(7)) is None
        inference.act([0])
    assert inference.slots[0].state[0].item() == 2
    for step in range(4):
        unroll = inference.observe(Who(0, 1), row(8))
        assert (unroll is None) == (step < 3), "nothing of the old run is in it"
        inference.act([0])
    assert unroll.agent_state[0].item() == 0 and (unroll.env_outputs.observation[..., 0] == 8).all()
    assert unroll.agent_outputs.logits[:, 0, 0].tolist() == [1, 2, 3]


def test_a_row_that_was_not_acted_upon_may_be_said_again():
    inference = echoing(unroll_length=2)
    for step in range(2):
        inference.observe(Who(0, 0), row(step))
        inference.act([0])
    assert inference.observe(Who(0, 0), row(2)) is not None
    assert inference.observe(Who(0, 0), row(2)) is None
    assert inference.slots[0].count == 1
    inference.act([0])
    inference.observe(Who(0, 0), row(3))
    inference.act([0])
    unroll = inference.observe(Who(0, 0), row(4))
    assert unroll.env_outputs.observation[:, 0, 0].tolist() == [2, 3, 4]


def test_a_place_that_is_freed_knows_nothing():
    inference = echoing()
    assert not inference.free(0)
    inference.observe(Who(0, 0), row(1))
    assert not inference.free(0), "no step was in it"
    inference.observe(Who(0, 0), row(1))
    inference.act([0])
    assert inference.free(0) and not inference.slots


@pytest.mark.parametrize("lstm_size", [0, 5])
def test_it_acts_as_an_actor_would_alone_and_in_a_batch(lstm_size):
    """The same draws from the same seed; in a batch the last bits of the network may differ."""
    network = make_actor_critic((4,), 2, (8,), lstm_size)
    flat = Flat(network)
    together, alone = (
        Inference(CentralSampler(network), flat.vector.numpy(), 3, lambda place, run: 10 * place)
        for _ in range(2)
    )
    samplers = [Sampler(network, 6, np.random.default_rng([10 * place, 1])) for place in (0, 1)]
    rng = np.random.default_rng(0)
    for step in range(7):
        seen = rng.normal(size=(2, 6, 4)).astype(np.float32)
        first = rng.random((2, 6)) < 0.2
        rows = [EnvOutput(seen[i], np.zeros(6), np.ones(6), first[i]) for i in (0, 1)]
        for i in (0, 1):
            together.observe(Who(i, 0), rows[i])
            alone.observe(Who(i, 0), rows[i])
        batched, single = together.act([0, 1]), [alone.act([0])[0], alone.act([1])[0]]
        for i in (0, 1):
            expected = samplers[i].act(seen[i], first[i])
            assert np.array_equal(single[i], expected.action)
            said = alone.slots[i].said[-1]
            assert np.array_equal(said.logits, expected.logits)
            assert np.allclose(together.slots[i].said[-1].logits, expected.logits, atol=1e-6)
            if step < 5:
                assert np.array_equal(batched[i], expected.action)
            if lstm_size:
                assert np.array_equal(alone.slots[i].state[0], samplers[i].state[0].numpy())
                assert np.allclose(together.slots[i].state[0], alone.slots[i].state[0], atol=1e-6)


def test_its_state_is_all_there_is_to_know():
    def played(inference: Inference, steps: range) -> list[np.ndarray]:
        said = []
        for step in steps:
            inference.observe(Who(3, 2), row(step, step + 1))
            said.append(inference.act([3])[0])
            inference.load(newer(step))
        return said

    one, two = echoing(3), echoing(3)
    played(one, range(7))
    two.load_state_dict(one.state_dict())
    for step in range(7, 12):
        a, b = (inference.observe(Who(3, 2), row(step, 0)) for inference in (one, two))
        assert (a is None) == (b is None)
        if a is not None:
            assert np.array_equal(a.version, b.version) and np.array_equal(a.valid, b.valid)
            assert np.array_equal(a.agent_state[0], b.agent_state[0])
            assert np.array_equal(a.agent_outputs.logits, b.agent_outputs.logits)
        assert np.array_equal(one.act([3])[0], two.act([3])[0])


@pytest.mark.parametrize("saved_after", range(1, 7))
def test_an_unroll_has_each_frame_once_after_a_checkpoint_too(saved_after):
    """Six rows make an unroll of four steps and begin another; the next ends in the third."""
    made, rows, found = echoing(), stacks(12), []
    made.planes, whole = 4, echoing()
    for count, row in enumerate(rows, 1):
        mine, theirs = made.observe(Who(0, 0), row), whole.observe(Who(0, 0), row)
        for one in (made, whole):
            one.act([0])
        if count == saved_after:
            state, made = made.state_dict(), echoing()
            made.planes = 4
            made.load_state_dict(state)
        if mine is not None:
            found.append(mine)
            frames = mine.env_outputs.observation
            assert frames.shape == (4 + 4, 2, 3, 5)
            stack = restacked(torch.from_numpy(frames), mine.env_outputs.first).numpy()
            assert np.array_equal(stack, theirs.env_outputs.observation)
            assert np.array_equal(mine.env_outputs.reward, theirs.env_outputs.reward)
    assert len(found) == 2


def test_it_acts_with_the_newest_parameters():
    network = make_actor_critic((4,), 2, (8,))
    flat = Flat(network)
    inference = Inference(CentralSampler(network), flat.vector.numpy(), 3, lambda place, run: 0)
    inference.observe(Who(0, 0), EnvOutput(np.ones((1, 4), "f4"), np.zeros(1), np.ones(1), [True]))
    inference.act([0])
    inference.load(Vector(4, np.zeros(len(flat.vector), np.float32)))
    inference.observe(Who(0, 0), EnvOutput(np.ones((1, 4), "f4"), np.zeros(1), np.ones(1), [False]))
    inference.act([0])
    assert not inference.slots[0].said[1].logits.any() and inference.slots[0].versions == [0, 4]


# -- other devices ---------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu:0", "cuda"])
@pytest.mark.parametrize("lstm_size", [0, 5])
@pytest.mark.parametrize("replays", [False, True])
def test_it_says_the_same_from_another_device(device, lstm_size, replays):
    """Rows go there and answers come back; so do new parameters, when they are told of."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    make = make_q_network if replays else make_actor_critic
    network = make((4,), 2, (8,), lstm_size)
    flat = Flat(network)
    kind = partial(CentralQ, epsilon=np.full((1, 6), 0.3)) if replays else CentralSampler
    agents = [kind(network), kind(network, device=device)]
    states = [agent.initial_state(6) for agent in agents]
    rng = np.random.default_rng(0)
    for step in range(6):
        seen, first = rng.normal(size=(6, 4)).astype(np.float32), rng.random(6) < 0.3
        draws = [(np.random.default_rng(step), 6, 0)]
        here, states[0] = agents[0].act(seen, first, states[0], draws)
        draws = [(np.random.default_rng(step), 6, 0)]
        there, states[1] = agents[1].act(seen, first, states[1], draws)
        for a, b in zip(here, there, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and np.allclose(a, b, atol=1e-5)
        flat.vector.mul_(-1.5)
        told = agents[1].act(seen, first, states[1], [(np.random.default_rng(0), 6, 0)])[0]
        assert np.allclose(told[1], there[1], atol=1e-5) or lstm_size, "it was not told yet"
        for agent in agents:
            agent.refresh()


def test_a_device_that_is_not_there_is_refused():
    refuse_devices("inference_devices", ("cpu", "cpu:0"))
    for name in ("pigeon", "cuda:99"):
        with pytest.raises(ValueError, match=f"inference_devices: .*{name}"):
            refuse_devices("inference_devices", ("cpu", name))
