"""Groups: sums and gatherings of real processes, who dies; pace and haste by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlbook.plumbing.crew import Crew, CrewError
from rlbook.plumbing.group import Adder, Group, GroupBroken, Haste, Pace, held
from rlbook.plumbing.lockstep import Lockstep
from rlbook.plumbing.runtime import ActorDiedError


class Peer:
    """A process of a group; for tests."""

    def __init__(self, index: int) -> None:
        self.index = index

    def join(self, meeting: str, size: int) -> None:
        self.group = Group(meeting, self.index, size, timeout_s=20.0)

    def work(self) -> tuple[list[float], list[list[list[float]]]]:
        vector = torch.full((2,), 10.0**self.index)
        self.group.add(vector)
        arrays = [np.array([[self.index, 1]]), np.arange(3.0) + self.index]
        return vector.tolist(), [[a.tolist() for a in row] for row in self.group.gather(arrays)]

    def wait(self) -> str:
        try:
            self.group.add(torch.zeros(2))
        except GroupBroken:
            self.group.close()
            return "broken"
        return "whole"

    def keep(self) -> str:
        try:
            self.group.gather([np.zeros(2)])
        except GroupBroken as error:
            self.error = error
            self.group.close()
            return str(error).lower()
        return "whole"

    def die(self) -> None:
        raise SystemExit


@pytest.mark.parametrize("size", [1, 3])
def test_sums_and_gatherings(size, tmp_path):
    with Crew(Peer, lambda index, born: (index,), size) as crew:
        crew.each("join", [(str(tmp_path / "a"), size)] * size)
        for summed, gathered in crew.each("work"):
            assert summed == [sum(10.0**i for i in range(size))] * 2
            assert gathered == [[[[i, 1]], [i, i + 1, i + 2]] for i in range(size)]


def test_four_learn_of_a_death_while_its_error_is_kept(tmp_path):
    """Rings: who is no neighbour of the dead one hears of it from those who have left."""
    with Crew(Peer, lambda index, born: (index,), 4) as crew:
        crew.each("join", [(str(tmp_path / "a"), 4)] * 4)
        for index in (0, 1, 2):
            crew.ask(index, "keep")
        crew.ask(3, "die")
        answers = dict(crew.rest())
        assert sorted(answers) == [0, 1, 2]
        for why in answers.values():
            assert why != "whole" and "timed out" not in why, "it waited all of its time"


def test_who_waits_for_a_dead_one_learns_of_it_and_may_meet_anew(tmp_path):
    with Crew(Peer, lambda index, born: (index,), 3) as crew:
        crew.each("join", [(str(tmp_path / "a"), 3)] * 3)
        crew.ask(0, "wait")
        crew.ask(2, "wait")
        crew.ask(1, "die")
        answers = crew.rest()
        assert sorted(answers) == [(0, "broken"), (2, "broken")] and crew.born == [0, 1, 0]
        crew.each("join", [(str(tmp_path / "b"), 3)] * 3)
        assert crew.each("wait") == ["whole"] * 3


class InVain:
    """A worker whose sums fail every time; for tests."""

    def __init__(self, config, index, born, metered, memory) -> None:
        self.learnt = 0

    def join(self, meeting, rank, size):
        pass

    def round(self):
        return None

    def knowledge(self):
        return {"updates": 0}

    def learn_from(self, knowledge):
        self.learnt += 1

    def load_state_dict(self, state):
        pass

    def count(self):
        return self.learnt


def test_rounds_that_fail_for_ever_end_the_run():
    with Lockstep(InVain, SimpleNamespace(num_workers=2)) as team:
        assert team.turn() == ([], ()) and team.crew.each("count") == [1, 1], "once may be chance"
        with pytest.raises(CrewError, match="nobody dies, but rounds fail"):
            for _ in range(5):
                team.turn()


def test_after_resuming_too_workers_who_know_less_are_not_believed():
    with Lockstep(InVain, SimpleNamespace(num_workers=2)) as team:
        team.load_state_dict({"members": [{}, {}], "updates": 5})
        with pytest.raises(CrewError, match="all workers died"):
            team.turn()


def test_the_adder_adds_in_order_and_leaves_one_vector_alone():
    vectors = [np.float32([x]) for x in (1e8, 1.0, -1e8)]
    assert Adder().add(*vectors) == [0.0] and Adder().add(vectors[0], vectors[2], vectors[1]) == [1]
    assert Adder().add(vectors[1]) is not vectors[1] and vectors[0] == [1e8]


def test_steps_are_dealt_out_by_speed():
    pace = Pace(3, 10, balanced=True)
    pace.deal()
    assert pace.lengths == [10, 10, 10], "nothing is known yet"
    for index, seconds in enumerate((1.0, 1.0, 4.0)):
        pace.note(index, 10, seconds)
    pace.deal()
    assert pace.lengths == [13, 13, 3] and pace.speeds == [10.0, 10.0, 2.5]
    pace.note(2, 3, 0.2)
    assert pace.speeds[2] == (2.5 + 15) / 2, "the newest counts half"
    pace.forget(2)
    pace.deal()
    assert pace.lengths == [10, 10, 10], "who is new is taken to be as fast as the others"
    other = Pace(3, 10, balanced=True)
    other.load_state_dict(pace.state_dict())
    assert other.speeds == pace.speeds and other.lengths == pace.lengths
    pace.note(2, 1, 1e9)
    pace.deal()
    assert pace.lengths == [15, 15, 1], "everybody takes a step"
    alike = Pace(2, 10, balanced=False)
    alike.hear([np.array([10, 1.0]), np.array([10, 5.0])])
    assert alike.lengths == [10, 10]


def test_a_rollout_is_cut_when_enough_others_have_finished_and_it_has_enough_steps():
    haste = Haste(True, 0.6, 0.25)
    cases = [(8, 3), (8, 2), (7, 4), (31, 0), (32, 4)]
    assert [haste.cuts(steps, 32, ready, 5) for steps, ready in cases] == [
        True,  # 3 of 5 are 60 %, 8 of 32 are 25 %
        False,
        False,
        False,
        True,
    ]
    assert not Haste(False).cuts(32, 32, 5, 5)
    assert not Haste(True, 0.0, 0.0).cuts(1, 32, 0, 5), "nobody has finished"


def test_who_was_born_anew_holds_nothing():
    assert held(3) == 3 and held([]) == []
    with pytest.raises(ActorDiedError, match="born anew"):
        held(None)
