"""What the figures and tables of the report are made of: curves, windows, ticks, labels, numbers as text."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.reports.curves import Jump, Series, series, thinned
from aquilamoe.reports.rows import count, decimal, power, seconds
from aquilamoe.reports.view import flops_ticks, spread, superscript, window


def test_a_curve_keeps_the_last_of_repeated_points_and_only_finite_ones() -> None:
    points = [
        {"x": 1, "y": 5.0},
        {"x": 2, "y": 4.0},
        {"x": 1, "y": 6.0},
        {"x": 3, "y": math.nan},
        {"x": 0},
        {"x": 0, "y": 9},
    ]
    assert series(points, "x", "y", above=0.0) == Series((1.0, 2.0), (6.0, 4.0))
    assert thinned(Series((1.0, 2.0, 3.0, 4.0), (1.0, 3.0, 5.0, 9.0)), 2) == Series((1.5, 3.5), (2.0, 7.0))


def test_the_window_shows_both_sides_of_a_growth_but_neither_the_first_fall_nor_a_ruinous_jump() -> None:
    fall = Series((1e11, 1e12, 1e13), (8.0, 5.0, 4.0))
    rest = Series((1e13, 2e13, 4e13), (4.5, 3.9, 3.7))
    mild = window([fall, rest], [Jump("scale-up", 1e13, 4.0, 4.5, 1, 2, 2)])
    assert 4.5 < mild.y_high < 5
    assert mild.y_low < 3.7
    assert 1e12 < mild.x_low <= 5e12
    assert mild.x_high == 4e13
    assert window([fall, rest], [Jump("scale-up", 1e13, 4.0, 12.0, 1, 2, 2)]).y_high < 6
    assert window([fall], []).y_high > 8


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(1, 20)), min_size=1, max_size=5))
def test_labels_never_overlap_and_stay_inside_when_they_fit(labels: list[tuple[float, float]]) -> None:
    wanted, sizes = sorted(start for start, _ in labels), [size for _, size in labels]
    places = spread(wanted, sizes, 0.0, 100.0)
    for i in range(len(places) - 1):
        assert places[i] + sizes[i] <= places[i + 1] + 1e-9
    if sum(sizes) <= 100:
        assert places[0] >= -1e-9
        assert places[-1] + sizes[-1] <= 100 + 1e-9


@settings(derandomize=True, deadline=None)
@given(st.floats(1e9, 1e24), st.floats(1.5, 1e9))
def test_the_flops_axis_has_a_few_round_ticks(low: float, ratio: float) -> None:
    ticks = flops_ticks(low, low * ratio)
    assert len(ticks) <= 8
    assert ticks == sorted(ticks)
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert ticks or ratio < 2
    assert len({superscript(tick) for tick in ticks}) == len(ticks)


def test_numbers_are_written_short_and_never_with_a_thousand_too_many() -> None:
    assert [count(n) for n in (None, 0, 7, 999, 999.9, 1000, 699_776, 2_118_144, 999_999, 8.224e9, 3.6e12)] == [
        "-", "0", "7", "999", "1k", "1k", "700k", "2.12M", "1M", "8.22B", "3.6T",
    ]  # fmt: skip
    assert [power(n) for n in (None, 0, 1.3e13, 9.999e12, 5e22)] == ["-", "0", "1.3e13", "1e13", "5e22"]
    assert [seconds(n) for n in (None, 0.84, 9.96, 3601.2)] == ["-", "0.8", "10", "3,601"]
    assert decimal(4.8712, 2) == "4.87"
