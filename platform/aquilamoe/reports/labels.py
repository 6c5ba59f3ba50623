"""Where a label in the loss figure goes: the free place that is nearest to its target."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from aquilamoe.reports.curves import Series
from aquilamoe.reports.view import Box, View

Segment = tuple[float, float, float, float]  # from (x, y) to (x, y), in fractions of the axes

STEP = 0.02  # between the heights that are tried, in fractions of the axes
OTHER_SIDE = 0.15  # how much higher or lower a label goes before it goes to the left


def segments(curves: Sequence[Series], view: View) -> list[Segment]:
    """The curves as they lie on the axes, whose frame may cut them."""
    found: list[Segment] = []
    for curve in curves:
        places = [(view.across(x), view.up(y)) for x, y in zip(curve.x, curve.y, strict=True)]
        found += [(*start, *end) for start, end in pairwise(places)]
    return found


def place(at: float, target: float, *, width: float, height: float, gap: float, taken: Sequence[Segment | Box]) -> Box:
    """Return a box of a label beside a line at x = `at`, its lower edge as near to `target` as can be.

    All are fractions of the axes; `gap` is kept to the line. Where no place is free, it is one that meets least of what
    is taken; the right of the line is preferred to the left.
    """
    reach = width + gap
    around = Box(at - reach, 0.0, 2 * reach, 1.0)  # of a curve with many points few are near
    near = [each for each in taken if meets(around, each)]
    return min(
        _candidates(at, target, width, height, gap),
        key=lambda candidate: (sum(meets(candidate[0], each) for each in near), candidate[1]),
    )[0]


def _candidates(at: float, target: float, width: float, height: float, gap: float) -> Iterator[tuple[Box, float]]:
    """Boxes inside the axes, and how far each is from its target height."""
    highest = 1.0 - height
    heights = [min(max(target, 0.0), highest), *(step * STEP for step in range(int(highest / STEP) + 1))]
    sides = [(left, cost) for left, cost in ((at + gap, 0.0), (at - gap - width, OTHER_SIDE)) if 0 <= left <= 1 - width]
    for left, cost in sides or [(max(0.0, min(at + gap, 1 - width)), 0.0)]:
        for bottom in heights:
            yield Box(left, bottom, width, height), abs(bottom - target) + cost


def meets(box: Box, other: Segment | Box) -> bool:
    """Whether a segment enters a box, or two boxes overlap."""
    right, top = box.left + box.width, box.bottom + box.height
    if isinstance(other, Box):
        return (
            box.left < other.left + other.width
            and other.left < right
            and box.bottom < other.bottom + other.height
            and other.bottom < top
        )
    x, y, end_x, end_y = other
    enters, leaves = 0.0, 1.0  # the part of the segment that is within the box so far
    for start, change, low, high in ((x, end_x - x, box.left, right), (y, end_y - y, box.bottom, top)):
        if change == 0:
            if not low < start < high:
                return False
            continue
        first, last = sorted(((low - start) / change, (high - start) / change))
        enters, leaves = max(enters, first), min(leaves, last)
    return enters < leaves
