"""Time inside methods, as parts of the whole."""

import time

from rlbook.parts.meter import Meter


class Worker:
    def act(self, seconds: float) -> str:
        time.sleep(seconds)
        return "acted"


def test_fractions_are_parts_of_the_time_since_begin():
    worker, meter = Worker(), Meter()
    meter.watch(worker, "act", "env")
    assert worker.act(0.05) == "acted"  # before: does not count
    meter.begin()
    worker.act(0.06)
    time.sleep(0.02)
    fraction = meter.fractions()["env_time_fraction"]
    assert 0.4 < fraction < 0.99
    meter.begin()
    assert meter.fractions() == {}


def test_it_can_be_off():
    worker, meter = Worker(), Meter(on=False)
    meter.watch(worker, "act", "env")
    meter.begin()
    worker.act(0.0)
    assert meter.fractions() == {} and "act" not in vars(worker)
