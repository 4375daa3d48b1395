"""ΔQ: nothing for the parameters that acted, something for others; by hand in one place."""

import numpy as np
import pytest
import torch

from rlbook.parts.envs import make_envs
from rlbook.parts.flat import Flat
from rlbook.parts.recurrent_q import make_q_network
from rlbook.parts.sequences import SequencePlayer
from rlbook.parts.staleness import state_staleness

SHAPE = {"burn_in": 0, "length": 4, "overlap": 0, "tail": 1}


def acted(steps: int = 80):
    """Rows of an untrained network with memory, and a network with other parameters."""
    torch.manual_seed(0)
    old = make_q_network((2,), 2, (16,), 8)
    flat = Flat(old)
    envs = make_envs("rlbook/MaskedCartPole-v0", 4, 0)
    rows = SequencePlayer(envs, old, np.full(4, 0.5), 0, **SHAPE).rows(steps)
    new = make_q_network((2,), 2, (16,), 8)
    noise = torch.randn(flat.vector.shape, generator=torch.Generator().manual_seed(1))
    Flat(new).vector.copy_(flat.vector + 0.1 * noise)
    return rows, old, new


def test_the_parameters_that_acted_find_their_own_state():
    rows, old, _ = acted()
    for burn_in in (0, 3):
        own = state_staleness(old, rows, length=4, burn_in=burn_in, stored=True)
        assert own.shape[0] == 2 and own.shape[1] > 20 and own.max() < 1e-5
        assert state_staleness(old, rows, length=4, burn_in=burn_in, stored=False).max() > 0.01


def test_a_burn_in_mends_a_state_and_a_stored_one_is_better_than_none():
    rows, _, new = acted(200)

    def mean(burn_in: int, stored: bool) -> np.ndarray:
        return state_staleness(new, rows, length=4, burn_in=burn_in, stored=stored).mean(1)

    for stored in (True, False):
        first, last = mean(0, stored)
        assert last < first, "time mends it too"
        assert (mean(6, stored) < [first, last]).all()
    assert mean(0, True)[0] < mean(0, False)[0]


def test_one_sequence_by_hand():
    rows, _, new = acted()
    found = state_staleness(new, rows, length=4, burn_in=2, stored=True)
    end = int(np.flatnonzero(~rows.valid[:, 0])[0])
    assert end >= 6, "the first episode of copy 0 has a sequence"
    x = torch.from_numpy(rows.observation[:, :1])
    none = torch.zeros(len(x), 1, dtype=torch.bool)
    with torch.no_grad():
        whole, _ = new(x[:6], none[:6], new.initial_state(1))
        state = torch.from_numpy(rows.hidden[0, :1]), torch.from_numpy(rows.cell[0, :1])
        replayed, _ = new(x[:6], none[:6], state)
        for row, t in ((0, 2), (1, 5)):
            gap = (replayed[t, 0] - whole[t, 0]).norm() / abs(replayed[2:6].max())
            assert found[row, 0] == pytest.approx(gap.item(), abs=1e-6)
        assert found[:, 0].max() < 1e-6, "it begins where the episode begins: nothing is stale"


def test_without_memory_nothing_is_stale():
    rows, _, _ = acted()
    net = make_q_network((2,), 2, (16,), 0)
    bare = rows._replace(hidden=rows.hidden[..., :0], cell=rows.cell[..., :0])
    assert state_staleness(net, bare, length=4, burn_in=2, stored=True).max() == 0


def test_rows_that_are_too_short_are_refused():
    rows, old, _ = acted(5)
    with pytest.raises(ValueError, match="within one episode"):
        state_staleness(old, rows, length=9, burn_in=2, stored=True)


def test_the_same_sequences_can_be_asked_for_whatever_the_burn_in():
    rows, _, new = acted()
    counts = [
        state_staleness(new, rows, length=4, burn_in=burn_in, stored=True, since=since).shape[1]
        for burn_in, since in ((0, 6), (3, 6), (6, None), (0, None))
    ]
    assert counts[0] == counts[1] == counts[2] < counts[3]
    first = state_staleness(new, rows, length=4, burn_in=0, stored=True, since=6)[0, 0]
    end = int(np.flatnonzero(~rows.valid[:, 0])[0])
    assert end >= 10, "the first episode of copy 0 has a sequence"
    x, none = torch.from_numpy(rows.observation[:10, :1]), torch.zeros(10, 1, dtype=torch.bool)
    state = torch.from_numpy(rows.hidden[6, :1]), torch.from_numpy(rows.cell[6, :1])
    with torch.no_grad():
        whole, _ = new(x, none, new.initial_state(1))
        read, _ = new(x[6:], none[6:], state)
    assert first == pytest.approx(((read[0] - whole[6]).norm() / abs(read.max())).item(), rel=1e-4)
    with pytest.raises(ValueError, match="since: must be at least burn_in, which is 3, got 2"):
        state_staleness(new, rows, length=4, burn_in=3, stored=True, since=2)
