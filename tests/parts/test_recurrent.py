"""The LSTM actor-critic: against a cell stepped by hand; resets; batch; how it acts."""

import numpy as np
import pytest
import torch
from torch import nn

from rlbook.data import AgentOutput, EnvOutput, Unroll
from rlbook.parts.acting import Sampler, make_actor_critic, sampling_policy
from rlbook.parts.networks import ActorCritic
from rlbook.parts.recurrent import (
    RecurrentActorCritic,
    RecurrentSamplingPolicy,
    recurrent_action,
    unrolled,
)

T, B, H = 7, 3, 8


def network(seed: int = 0) -> RecurrentActorCritic:
    torch.manual_seed(seed)
    made = RecurrentActorCritic((4,), 2, H, (16,))
    nn.init.orthogonal_(made.policy_head.weight)  # not the near-uniform start: all must show
    return made


def rows(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0, 0] = first[3, 1] = first[3, 2] = first[5, 2] = True
    return torch.randn(T, B, 4, generator=generator), first


def by_hand(net: RecurrentActorCritic, x, first, state):
    """The equations, row by row and copy by copy, with nn.LSTMCell's weights."""
    cell = nn.LSTMCell(16, H)
    cell.load_state_dict({k.replace("_l0", ""): v for k, v in net.core.state_dict().items()})
    logits, values = torch.zeros(T, B, 2), torch.zeros(T, B)
    ends = []
    for b in range(B):
        h, c = state[0][b : b + 1], state[1][b : b + 1]
        for t in range(T):
            if first[t, b]:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            h, c = cell(net.torso(x[t, b : b + 1]), (h, c))
            logits[t, b], values[t, b] = net.policy_head(h)[0], net.value_head(h)[0, 0]
        ends.append((h, c))
    return logits, values, tuple(torch.cat(part) for part in zip(*ends, strict=True))


def test_logits_values_and_state_are_those_of_a_cell_stepped_by_hand():
    net, (x, first) = network(), rows()
    state = torch.randn(B, H), torch.randn(B, H)
    for wanted, found in zip(by_hand(net, x, first, state), net(x, first, state), strict=True):
        pairs = zip(wanted, found, strict=True) if isinstance(wanted, tuple) else [(wanted, found)]
        for a, b in pairs:
            assert torch.allclose(a, b, atol=1e-5)


def test_nothing_of_an_episode_is_known_in_the_next():
    net, (x, first) = network(), rows()
    state = torch.randn(B, H), torch.randn(B, H)
    logits = net(x, first, state)[0]
    other = x.clone()
    other[:3] += 1.0  # before the resets of copies 1 and 2
    changed = (net(other, first, state)[0] - logits).abs().amax(-1) > 1e-6
    assert changed[3:, 0].all(), "copy 0 goes on: it remembers"
    assert not changed[3:, 1:].any()
    anew = net(x, first, tuple(part + 1 for part in state))[0]
    assert torch.equal(anew[:, 0], logits[:, 0]), "copy 0 begins at row 0: its state counts nothing"
    assert not torch.allclose(anew[0, 1], logits[0, 1])


def test_one_call_is_as_good_as_many_and_gradients_reach_back():
    net, (x, first) = network(), rows()
    whole = net(x, first, net.initial_state(B))
    state, parts = net.initial_state(B), []
    for t in range(T):
        logits, _, state = net(x[t : t + 1], first[t : t + 1], state)
        parts.append(logits)
    assert torch.allclose(torch.cat(parts), whole[0], atol=1e-6)
    x.requires_grad_()
    net(x, first, net.initial_state(B))[0][2].sum().backward()
    reached = x.grad.abs().amax(-1) > 0
    assert reached[:3].all() and not reached[3:].any()


def test_atari_frames_go_through_the_convolutions():
    net = make_actor_critic((4, 84, 84), 3, (64, 64), lstm_size=16)
    frames = torch.randint(0, 255, (2, B, 4, 84, 84), dtype=torch.uint8)
    first = torch.zeros(2, B, dtype=torch.bool)
    logits, values, (h, _) = net(frames, first, net.initial_state(B))
    assert (logits.shape, values.shape, h.shape) == ((2, B, 3), (2, B), (B, 16))


# -- acting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lstm_size", [0, H])
def test_a_sampler_says_what_the_network_says_and_goes_on_from_its_state(lstm_size):
    torch.manual_seed(0)
    net = make_actor_critic((4,), 2, (16, 16), lstm_size)
    sampler = Sampler(net, B, np.random.default_rng(3))
    start, (x, first) = sampler.state, rows()
    outputs = []
    for t in range(T):
        outputs.append(sampler.act(x[t].numpy(), first[t].numpy()))
        if t == 3:
            kept = sampler.state_dict()
    stacked = AgentOutput(*(np.stack(column) for column in zip(*outputs, strict=True)))
    env = EnvOutput(x.numpy(), np.zeros((T, B)), np.ones((T, B)), first.numpy())
    logits, values = unrolled(net, Unroll(env, stacked, start))
    assert np.allclose(stacked.logits, logits.detach().numpy(), atol=1e-6)
    assert np.allclose(stacked.value, values.detach().numpy(), atol=1e-6)
    again = Sampler(net, B, np.random.default_rng(9))
    again.load_state_dict(kept)
    for t in range(4, T):
        assert np.array_equal(again.act(x[t].numpy(), first[t].numpy()).action, stacked.action[t])


def test_the_policy_for_evaluation_carries_its_state_and_resets_it():
    net, (x, first) = network(), rows()
    policy = sampling_policy(net)
    assert isinstance(policy, RecurrentSamplingPolicy)
    state, mine = policy.initial_state(B), np.random.default_rng(0)
    theirs, rng = net.initial_state(B), np.random.default_rng(0)
    for t in range(T):
        action, state = policy.act(x[t].numpy(), state, first[t].numpy(), mine)
        output, theirs = recurrent_action(net, x[t].numpy(), theirs, first[t].numpy(), rng)
        assert np.array_equal(action, output.action)
        assert torch.equal(state[0], theirs[0])
    # Copies 1 and 2 began anew in rows 3 and 5: they know as little as a fresh policy does.
    fresh = policy.initial_state(B)
    for t in range(5, T):
        _, fresh = policy.act(x[t].numpy(), fresh, first[t].numpy(), rng)
    assert torch.allclose(fresh[0][2], state[0][2], atol=1e-6)
    assert not torch.allclose(fresh[0][0], state[0][0], atol=1e-3)


def test_actions_are_drawn_with_the_policy_s_probabilities():
    torch.manual_seed(0)
    net = ActorCritic((4,), 3, (16,))
    nn.init.orthogonal_(net.policy_head.weight, 2.0)
    x = np.repeat(np.ones((1, 4), np.float32), 30_000, 0)
    sampler = Sampler(net, len(x), np.random.default_rng(0))
    output = sampler.act(x, np.zeros(len(x), bool))
    wanted = torch.from_numpy(output.logits[0]).softmax(-1).numpy()
    assert wanted.max() - wanted.min() > 0.2
    assert np.allclose(np.bincount(output.action, minlength=3) / len(x), wanted, atol=0.01)
