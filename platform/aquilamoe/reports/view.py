"""Where things go in the loss figure: the window that is shown, ticks of the FLOPs axis, labels that keep apart."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from aquilamoe.reports.curves import Jump, Series

SUPERSCRIPTS = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclass(frozen=True)
class Box:
    """A rectangle in fractions of the figure."""

    left: float
    bottom: float
    width: float
    height: float

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        return self.left, self.bottom, self.width, self.height

    def part(self, left: float, bottom: float, width: float, height: float) -> "Box":
        """Return a rectangle inside this one, in fractions of it."""
        return Box(
            self.left + left * self.width, self.bottom + bottom * self.height, width * self.width, height * self.height
        )


@dataclass(frozen=True)
class View:
    """Limits of the axes: x in FLOPs (shown as their logarithm), y in nats per token."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @property
    def height(self) -> float:
        return self.y_high - self.y_low

    def across(self, x: float) -> float:
        """Where x lies, as a fraction of the axis."""
        return math.log(x / self.x_low) / math.log(self.x_high / self.x_low)

    def along(self, fraction: float) -> float:
        """The x that lies at a fraction of the axis."""
        return float(self.x_low * (self.x_high / self.x_low) ** fraction)

    def up(self, y: float) -> float:
        """Where y lies, as a fraction of the axis."""
        return (y - self.y_low) / self.height


def whole(curves: Sequence[Series]) -> View:
    """Return limits that show every point."""
    x = [at for curve in curves for at in curve.x]
    y = [value for curve in curves for value in curve.y]
    margin = 0.06 * (max(y) - min(y)) or 0.1
    x_low, x_high = (min(x), max(x)) if min(x) < max(x) else (min(x) / 2, max(x) * 2)
    return View(x_low, x_high, min(y) - margin, max(y) + margin)


def window(curves: Sequence[Series], jumps: Sequence[Jump]) -> View:
    """Return limits that show how the stages differ, and of the first steep fall only its end.

    The top is the worst loss among the ends of the stages and both sides of each growth - unless a growth loses so much
    that showing it would squash the rest: then it is cut at 3 times the spread of the final losses (at least 1.5 nats).
    """
    full = whole(curves)
    if not jumps:
        return full
    floor = min(value for curve in curves for value in curve.y)
    ends = [curve.y[-1] for curve in curves] + [jump.before for jump in jumps]
    highest = min(max([*ends, *(jump.after for jump in jumps)]), floor + max(3 * (max(ends) - floor), 1.5))
    span = highest - floor or 0.1
    top = highest + 0.32 * span  # room for the labels of the growths
    start = min(_reaches(curve, top) for curve in curves)
    first_growth = min(jump.flops for jump in jumps)
    # What comes before the first growth gets half of the axis at most, but never less than 0.3 decades.
    x_low = min(max(start, first_growth / (full.x_high / first_growth)), first_growth / 2)
    return View(max(full.x_low, x_low), full.x_high, floor - 0.09 * span, top)


def _reaches(curve: Series, level: float) -> float:
    """First x at which a curve is at or below a level, interpolated in log x; its end if never."""
    for i, value in enumerate(curve.y):
        if value <= level:
            if i == 0:
                return curve.x[0]
            share = (curve.y[i - 1] - level) / (curve.y[i - 1] - value)
            return float(curve.x[i - 1] * (curve.x[i] / curve.x[i - 1]) ** share)
    return curve.x[-1]


def extent(curves: Sequence[Series], low: float, high: float) -> tuple[float, float]:
    """Return least and largest value of the curves over low < x <= high, edges interpolated; else (inf, -inf)."""
    found: list[float] = []
    for curve in curves:
        found += [y for x, y in zip(curve.x, curve.y, strict=True) if low < x <= high]
        found += [value for edge in (low * 1.0001, high) if (value := _at(curve, edge)) is not None]
    return min(found, default=math.inf), max(found, default=-math.inf)


def _at(curve: Series, x: float) -> float | None:
    if not curve.x or not curve.x[0] <= x <= curve.x[-1]:
        return None
    i = bisect_left(curve.x, x)
    if curve.x[i] == x:
        return curve.y[i]
    share = (x - curve.x[i - 1]) / (curve.x[i] - curve.x[i - 1])
    return curve.y[i - 1] + share * (curve.y[i] - curve.y[i - 1])


def spread(targets: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Move ascending starts of labels so that none overlaps the next and all lie in [low, high], if they fit."""
    places: list[float] = []
    for start, size in zip(targets, sizes, strict=True):
        end_of_last = places[-1] + sizes[len(places) - 1] if places else low
        places.append(max(start, end_of_last))
        assert size >= 0
    limit = high
    for i in reversed(range(len(places))):
        places[i] = max(low, min(places[i], limit - sizes[i])) if i == 0 else min(places[i], limit - sizes[i])
        limit = places[i]
    return places


def flops_ticks(low: float, high: float, most: int = 8) -> list[float]:
    """Round values of a logarithmic axis: the densest choice with at most `most`."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for mantissas in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        values = [mantissa * 10.0**exponent for exponent in exponents for mantissa in mantissas]
        ticks = [tick for tick in values if low <= tick <= high]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]


def superscript(value: float) -> str:
    """Write 2e13 as 2 x 10^13 in real superscripts."""
    mantissa, exponent = f"{value:.0e}".split("e")
    power = "10" + str(int(exponent)).translate(SUPERSCRIPTS)
    return power if mantissa == "1" else f"{mantissa}\N{MULTIPLICATION SIGN}{power}"
