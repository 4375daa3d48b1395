"""The normaliser: what it makes of observations, when statistics move, what is kept."""

import numpy as np
import pytest
import torch

from rlbook.maths.moments import moments
from rlbook.parts.networks import ActorCritic
from rlbook.parts.normalizer import LIMIT, Normalized, Normalizer


def moments_of(rows: np.ndarray) -> np.ndarray:
    return np.stack([part.numpy() for part in moments(torch.from_numpy(rows))])


def test_observations_of_all_workers_get_mean_0_and_deviation_1():
    rng = np.random.default_rng(0)
    rows = rng.normal([5.0, -2.0], [3.0, 0.1], size=(90, 2))
    normalizer = Normalizer((2,))
    normalizer.note([moments_of(rows[:20]), moments_of(rows[20:50])])
    normalizer.note([moments_of(rows[50:])])
    normalizer.renew()
    found = normalizer(torch.from_numpy(rows).float())
    assert found.dtype == torch.float32
    assert torch.allclose(found.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(found.std(0, unbiased=False), torch.ones(2), atol=1e-5)


def test_nothing_changes_before_it_is_renewed_and_at_first_observations_stay_as_they_are():
    normalizer, x = Normalizer((2,)), torch.tensor([[3.0, -40.0]])
    assert torch.equal(normalizer(x), x)
    normalizer.note([moments_of(np.array([[0.0, 0.0], [2.0, 2.0]]))])
    assert torch.equal(normalizer(x), x)
    normalizer.renew()
    assert normalizer(x).tolist() == [[(3 - 1) / 1, -LIMIT]]
    before = normalizer.state_dict()
    normalizer.renew()
    assert str(before) == str(normalizer.state_dict()), "taken in once"


def test_what_is_kept_includes_what_has_been_noted():
    network = Normalized(ActorCritic((2,), 3), (2,))
    network.normalizer.note([moments_of(np.array([[0.0, 1.0], [2.0, 5.0]]))])
    network.normalizer.renew()
    network.normalizer.note([moments_of(np.array([[4.0, 4.0]]))])
    other = Normalized(ActorCritic((2,), 3), (2,))
    other.load_state_dict(network.state_dict())
    for one in (network, other):
        one.normalizer.renew()
    assert other.normalizer.rows.tolist() == [3.0, 3.0]
    x = torch.rand(4, 2)
    for mine, theirs in zip(network(x), other(x), strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(network(x)[1], network.network(x)[1])


def test_frames_are_refused():
    with pytest.raises(ValueError, match="normalize_observations: must be False for frames"):
        Normalized(ActorCritic((4, 84, 84), 3), (4, 84, 84))
