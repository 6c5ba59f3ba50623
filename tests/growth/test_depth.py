"""Maps of layers: interpolation, stacking, multiplicities and which layers are further copies."""

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.config.depth import RULES, interpolate, stack, stack_top
from aquilamoe.growth.units import UnitMap

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)


def test_interpolation_from_32_to_40_doubles_every_fourth_layer() -> None:
    layers = UnitMap(interpolate(32, 40), 32)
    assert [layer for layer, count in enumerate(layers.counts) if count == 2] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert max(layers.counts) == 2


def test_interpolation_from_14_to_18_is_what_the_float_form_gets_wrong() -> None:
    assert interpolate(14, 18) == (0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11, 12, 13)
    assert tuple(int(layer / (18 / 14)) for layer in range(18)) != interpolate(14, 18)


def test_interpolation_is_exact_for_every_pair_up_to_64_and_128_layers() -> None:
    for old in range(1, 65):
        for new in range(old, 129):
            exact = tuple(math.floor(Fraction(layer * old, new)) for layer in range(new))
            assert interpolate(old, new) == exact


def test_stacking_repeats_the_whole_and_then_the_bottom() -> None:
    assert stack(3, 8) == (0, 1, 2, 0, 1, 2, 0, 1)


def test_stacking_on_top_repeats_the_whole_and_then_the_top() -> None:
    assert stack_top(3, 8) == (0, 1, 2, 0, 1, 2, 1, 2)
    assert stack_top(3, 5) == (0, 1, 2, 1, 2)
    assert stack_top(3, 6) == stack(3, 6)


@pytest.mark.parametrize("rule", sorted(RULES))
@given(old=st.integers(1, 40), more=st.integers(0, 60))
@PROPERTY
def test_every_rule_keeps_all_layers_in_order_and_shares_copies_evenly(rule: str, old: int, more: int) -> None:
    layers = UnitMap(RULES[rule](old, old + more), old)
    originals = [layer for layer, new in zip(layers.sources, layers.is_new, strict=True) if not new]
    assert originals == list(range(old))
    multiplicities = Counter(layers.sources)
    assert list(layers.copies) == [multiplicities[layer] for layer in layers.sources]
    assert max(layers.counts) - min(layers.counts) <= 1
    assert sum(layers.is_new) == more
