"""What chapters show is the package's own source; a claim that does not hold stops them."""

import numpy as np
import pytest

from rlbook import ppo
from rlbook.harness.book import check, diagram, refused, show, source_of
from rlbook.maths import returns


def test_show_gives_the_source_without_the_outer_docstring():
    text = source_of(ppo.Learner)
    assert text.startswith("class Learner:\n") and "Several epochs of minibatches" not in text
    assert "def update(self, unroll" in text and '"""All gradient steps' in text
    assert source_of(ppo.Learner, docstring=True).splitlines()[1].strip().startswith('"""')
    assert "\n".join(text.splitlines()[2:]) in open(ppo.__file__).read()


def test_show_takes_methods_and_several_things():
    assert source_of(ppo.Actor.act).startswith("def act(self")
    page = show(ppo.Actor, returns.gae).data
    assert page.count("```python") == 2 and "def gae(" in page


def test_show_of_a_function_that_is_only_a_docstring():
    def nothing():
        """Does nothing."""

    assert "Does nothing" in source_of(nothing)


def test_the_diagram_is_the_systems_docstring():
    assert "Minibatches" not in diagram(ppo).data and "one process" in diagram(ppo).data


def test_check_says_what_holds(capsys):
    check("two and two", 2 + 2 == 4)
    check("arrays", np.ones(3), np.ones(3) + 1e-9)
    assert capsys.readouterr().out == "✓ two and two\n✓ arrays\n"


@pytest.mark.parametrize("arguments", [(False,), (1.0, 1.1), ([1, 2], [1, 3]), (float("nan"), 1.0)])
def test_check_stops_at_what_does_not_hold(arguments):
    with pytest.raises(AssertionError, match="the claim"):
        check("the claim", *arguments)


def test_refused_gives_the_message_and_insists():
    assert "clip" in refused(lambda: ppo.Config(clip=-1.0))
    with pytest.raises(AssertionError, match="not refused"):
        refused(lambda: ppo.Config())
