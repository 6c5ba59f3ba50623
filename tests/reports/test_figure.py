"""What the figures and tables of the report are made of: curves, windows, ticks, labels, numbers as text."""

import math
import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.format import count, decimal, power, seconds
from aquilamoe.reports import labels
from aquilamoe.reports.curves import Jump, Series, series, thinned
from aquilamoe.reports.view import Box, View, flops_ticks, spread, superscript, window


def test_a_curve_keeps_the_last_of_repeated_points_and_only_finite_ones() -> None:
    points: list[dict[str, float]] = [
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
    mild = window(
        [fall, rest],
        [Jump(label="scale-up", flops=1e13, before=4.0, after=4.5, source_params=1, target_params=2, target_active=2)],
    )
    assert 4.5 < mild.y_high < 5
    assert mild.y_low < 3.7
    assert 1e12 < mild.x_low <= 5e12
    assert mild.x_high == 4e13
    assert (
        window(
            [fall, rest],
            [
                Jump(
                    label="scale-up",
                    flops=1e13,
                    before=4.0,
                    after=12.0,
                    source_params=1,
                    target_params=2,
                    target_active=2,
                )
            ],
        ).y_high
        < 6
    )
    assert window([fall], []).y_high > 8


@settings(derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(1, 20)), min_size=1, max_size=5))
def test_labels_never_overlap_and_stay_inside_when_they_fit(labels: list[tuple[float, float]]) -> None:
    targets, sizes = sorted(start for start, _ in labels), [size for _, size in labels]
    places = spread(targets, sizes, 0.0, 100.0)
    for i in range(len(places) - 1):
        assert places[i] + sizes[i] <= places[i + 1] + 1e-9
    if sum(sizes) <= 100:
        assert places[0] >= -1e-9
        assert places[-1] + sizes[-1] <= 100 + 1e-9


FRACTION = st.floats(0, 1)
POINT = st.tuples(FRACTION, st.floats(-0.5, 1.5))


def corners(box: Box) -> tuple[float, float, float, float]:
    return box.left, box.bottom, box.left + box.width, box.bottom + box.height


@settings(derandomize=True, deadline=None)
@given(POINT, POINT, FRACTION, FRACTION)
def test_a_segment_meets_a_label_where_a_point_of_it_is_inside(
    start: tuple[float, float], end: tuple[float, float], left: float, bottom: float
) -> None:
    box = Box(left, bottom, 0.2, 0.1)
    low_x, low_y, high_x, high_y = corners(box)
    points = [tuple(a + (b - a) * step / 999 for a, b in zip(start, end, strict=True)) for step in range(1000)]
    deep = any(low_x + 0.002 < x < high_x - 0.002 and low_y + 0.002 < y < high_y - 0.002 for x, y in points)
    near = any(low_x - 0.002 < x < high_x + 0.002 and low_y - 0.002 < y < high_y + 0.002 for x, y in points)
    assert deep <= labels.meets(box, (*start, *end)) <= near


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.floats(0, 1), st.floats(-0.2, 1.2), st.lists(st.tuples(POINT, POINT), max_size=12))
def test_a_label_stays_in_the_axes_beside_its_line_and_off_the_curves_where_there_is_room(
    at: float, target: float, lines: list[tuple[tuple[float, float], tuple[float, float]]]
) -> None:
    curves = [(*start, *end) for start, end in lines]
    box = labels.place(at, target, width=0.2, height=0.1, gap=0.01, taken=curves)
    left, bottom, right, top = corners(box)
    assert left >= -1e-9 and bottom >= -1e-9 and right <= 1 + 1e-9 and top <= 1 + 1e-9
    assert left >= at or right <= at
    met = sum(labels.meets(box, each) for each in curves)
    rows = [Box(side, row / 50, 0.2, 0.1) for side in (at + 0.01, at - 0.21) if 0 <= side <= 0.8 for row in range(46)]
    assert all(met <= sum(labels.meets(row, each) for each in curves) for row in rows)


def test_a_label_leaves_the_place_above_a_curve_that_rises_out_of_the_axes() -> None:
    view = View(1.0, 100.0, 0.0, 1.0)
    rising = labels.segments([Series((10.0, 12.0, 14.0, 100.0), (0.5, 0.9, 1.4, 0.9))], view)
    box = labels.place(0.5, 1.0, width=0.14, height=0.1, gap=0.01, taken=rising)
    assert not any(labels.meets(box, each) for each in rising)


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


def test_the_first_figure_on_a_machine_prints_nothing_of_caches(tmp_path: Path) -> None:
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout)
from aquilamoe.reports.canvas import Drawing
drawing = Drawing("one", "One", lambda figure, narrow: figure.add_subplot().plot([0, 1]), (2.0, 1.0))
assert drawing.svg() and drawing.png()
"""
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.glob("fontlist-*.json")), "matplotlib had a cache to make"
