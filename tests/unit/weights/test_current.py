"""What an engine's weights are after updates, and how an instance gets there."""

from __future__ import annotations

import pytest

from aseer.weights.current import CurrentWeights

NONE = CurrentWeights()
ONE, TWO = CurrentWeights("one"), CurrentWeights("two")


def test_adapters_stand_on_whole_weights_and_go_with_them():
    both = ONE.after("adapters", is_adapters=True)
    assert both == CurrentWeights("one", "adapters")
    assert both.paths == {"one", "adapters"}
    later = both.after("later", is_adapters=True)
    assert later.paths == {"one", "later"}
    assert later.after("two", is_adapters=False) == TWO
    assert NONE.after("adapters", is_adapters=True).paths == {"adapters"}
    assert NONE.paths == set()


@pytest.mark.parametrize(
    ("has", "wanted", "way"),
    [
        (NONE, NONE, []),
        (NONE, ONE, ["one"]),
        (NONE, CurrentWeights(None, "a"), ["a"]),
        (NONE, CurrentWeights("one", "a"), ["one", "a"]),
        (ONE, TWO, ["two"]),
        (ONE, CurrentWeights("one", "a"), ["a"]),
        (CurrentWeights("one", "a"), CurrentWeights("one", "b"), ["b"]),
        (CurrentWeights("one", "a"), CurrentWeights("two", "b"), ["two", "b"]),
        (CurrentWeights("one", "a"), ONE, ["one"]),
        (ONE, NONE, None),
        (CurrentWeights(None, "a"), NONE, None),
        (ONE, CurrentWeights(None, "a"), None),
    ],
)
def test_an_instance_loads_what_it_lacks(has, wanted, way):
    assert has.way_to(wanted) == way
