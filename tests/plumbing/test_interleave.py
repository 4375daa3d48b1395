"""Interleavings: who goes on is what was asked for, and the same seed asks for the same."""

from collections.abc import Iterator

from rlbook.plumbing.interleave import interleave, play


class Adder:
    """Reads a shared number, waits, writes one more."""

    def __init__(self, shared: list[int]) -> None:
        self.shared = shared

    def round(self) -> Iterator[str]:
        seen = self.shared[0]
        yield "read"
        self.shared[0] = seen + 1
        yield "wrote"


def adders(count: int) -> tuple[list[Adder], list[int]]:
    shared = [0]
    return [Adder(shared) for _ in range(count)], shared


def test_an_order_by_hand_loses_exactly_what_it_says():
    workers, shared = adders(2)
    assert play(workers, [0, 0, 1, 1]) == [(0, "read"), (0, "wrote"), (1, "read"), (1, "wrote")]
    assert shared == [2]
    workers, shared = adders(2)
    assert play(workers, [0, 1, 0, 1]) == [(0, "read"), (1, "read"), (0, "wrote"), (1, "wrote")]
    assert shared == [1]


def test_rounds_follow_each_other_and_those_under_way_are_ended():
    workers, shared = adders(2)
    trace = play(workers, [0, 0, 0, 1])
    words = [(0, "read"), (0, "wrote"), (0, "read"), (1, "read"), (0, "wrote"), (1, "wrote")]
    assert trace == words and shared == [2]


def test_the_same_seed_gives_the_same_order_and_all_rounds_are_played():
    traces = []
    for seed in (1, 1, 2):
        workers, shared = adders(3)
        traces.append(interleave(workers, seed, rounds=20))
        assert len(traces[-1]) == 3 * 20 * 2
        assert 20 <= shared[0] < 60
    assert traces[0] == traces[1] != traces[2]
    one, shared = adders(1)
    interleave(one, 1, rounds=20)
    assert shared == [20]
