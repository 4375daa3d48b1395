"""Action values with memory: against a cell stepped by hand; how they act and are evaluated."""

import numpy as np
import pytest
import torch
from torch import nn

from rlbook.parts.flat import Flat
from rlbook.parts.recurrent import RecurrentQNetwork
from rlbook.parts.recurrent_q import (
    QActor,
    RecurrentGreedyPolicy,
    make_q_network,
    numpy_step,
    q_policy,
    q_values,
)

T, B, H = 7, 3, 8


def network(dueling: bool = True, lstm_size: int = H) -> nn.Module:
    torch.manual_seed(0)
    return make_q_network((4,), 3, (16,), lstm_size, dueling)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.zeros(T, B, dtype=torch.bool)
    first[0, 0] = first[3, 1] = first[3, 2] = first[5, 2] = True
    return torch.randn(T, B, 4, generator=torch.Generator().manual_seed(1)), first


@pytest.mark.parametrize("dueling", [True, False])
def test_q_and_state_are_those_of_a_cell_stepped_by_hand(dueling):
    net, (x, first) = network(dueling), rows()
    start = torch.randn(B, H), torch.randn(B, H)
    found, after = net(x, first, start)
    cell = nn.LSTMCell(16, H)
    cell.load_state_dict({k.replace("_l0", ""): v for k, v in net.core.state_dict().items()})
    for b in range(B):
        h, c = start[0][b : b + 1], start[1][b : b + 1]
        for t in range(T):
            if first[t, b]:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            h, c = cell(net.torso(x[t, b : b + 1]), (h, c))
            wanted = net.advantage_head(h)[0]
            if dueling:
                wanted = net.value_head(h)[0] + wanted - wanted.mean()
            assert torch.allclose(found[t, b], wanted, atol=1e-5)
        assert torch.allclose(after[0][b], h[0], atol=1e-5)
        assert torch.allclose(after[1][b], c[0], atol=1e-5)


@pytest.mark.parametrize("dueling", [True, False])
@pytest.mark.parametrize("lstm_size", [0, H])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_actor_says_what_the_network_says_and_goes_on_from_its_state(dueling, lstm_size, kind):
    net, (x, first) = network(dueling, lstm_size), rows()
    flat = Flat(net)
    actor = QActor(net if kind == "numpy" else net.double(), B)
    assert (numpy_step(net) is not None) == (kind == "numpy")
    if kind == "numpy":
        flat.vector.mul_(1.1)  # parameters change under it: views see it
        start = tuple(torch.from_numpy(part) for part in actor.state)
    else:
        x = x.double()
        actor.state = tuple(part.astype(float) for part in actor.state)
        start = tuple(torch.from_numpy(part) for part in actor.state)
    wanted, after = q_values(net, x, first, start)
    for t in range(T):
        if t == 4:
            kept = actor.state_dict()
        q, before = actor.values(x[t].numpy(), first[t].numpy())
        assert np.allclose(q, wanted[t].detach().numpy(), atol=1e-5)
        assert not before[0][first[t].numpy()].any(), "the state that is kept is the one used"
    assert all(
        np.allclose(a, b.detach().numpy(), atol=1e-5)
        for a, b in zip(actor.state, after, strict=True)
    )
    actor.load_state_dict(kept)
    for t in range(4, T):
        q, _ = actor.values(x[t].numpy(), first[t].numpy())
    assert np.allclose(q, wanted[-1].detach().numpy(), atol=1e-5)


def test_the_state_before_a_row_makes_the_row_again():
    """What is stored with a sequence: from it the learner gets what the actor got."""
    net, (x, first) = network(), rows()
    Flat(net)
    actor, befores, found = QActor(net, B), [], []
    for t in range(T):
        q, before = actor.values(x[t].numpy(), first[t].numpy())
        befores.append(before)
        found.append(q)
    for t in range(T):
        state = tuple(torch.from_numpy(part) for part in befores[t])
        none = torch.zeros(1, B, dtype=torch.bool)
        q, _ = net(x[t : t + 1], none, state)
        assert np.allclose(q[0].detach().numpy(), found[t], atol=1e-5)


def test_the_policy_for_evaluation_carries_its_state_and_resets_it():
    net, (x, first) = network(), rows()
    policy, rng = q_policy(net), np.random.default_rng(0)
    assert isinstance(policy, RecurrentGreedyPolicy)
    state = policy.initial_state(B)
    wanted, _ = net(x, first, net.initial_state(B))
    for t in range(T):
        action, state = policy.act(x[t].numpy(), state, first[t].numpy(), rng)
        assert np.array_equal(action, wanted[t].argmax(-1).numpy())
    fresh = policy.initial_state(B)
    for t in range(5, T):  # copies 1 and 2 began anew in rows 3 and 5
        _, fresh = policy.act(x[t].numpy(), fresh, first[t].numpy(), rng)
    assert torch.allclose(fresh[0][2], state[0][2], atol=1e-6)
    assert not torch.allclose(fresh[0][0], state[0][0], atol=1e-3)


def test_atari_frames_go_through_the_convolutions():
    net = RecurrentQNetwork((4, 84, 84), 3, 16)
    frames = torch.randint(0, 255, (2, B, 4, 84, 84), dtype=torch.uint8)
    q, (h, _) = net(frames, torch.zeros(2, B, dtype=torch.bool), net.initial_state(B))
    assert (q.shape, h.shape) == ((2, B, 3), (B, 16))
    assert numpy_step(net) is None
    found, _ = QActor(net, B).values(frames[0].numpy(), np.ones(B, bool))
    assert np.allclose(found, q[0].detach().numpy(), atol=1e-5)
