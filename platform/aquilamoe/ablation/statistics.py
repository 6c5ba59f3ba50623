"""What the curves of an ablation support: ranks with ties, crossings, savings."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from aquilamoe.ablation.intervals import mean_interval, paired_difference
from aquilamoe.ablation.study import Interval

Curve = Sequence[tuple[float, float]]  # (tokens or FLOPs, loss), rising in the first


@dataclass(frozen=True)
class Ranked:
    """rank: 1 is best; equal ranks are ties: no difference to the best of them is shown by these seeds."""

    name: str
    rank: int
    mean: float
    to_baseline: Interval


def ranking(results: Mapping[str, Mapping[int, float]], baseline: str) -> list[Ranked]:
    """Order variants by their mean, less is better; a variant shares the rank of the best one it does not differ from.

    results: of every variant, its objective by seed.
    """
    means = {name: statistics.fmean(by_seed.values()) for name, by_seed in results.items()}
    ranked: list[Ranked] = []
    leader, rank = "", 0
    for place, name in enumerate(sorted(results, key=means.__getitem__), start=1):
        if not leader or paired_difference(results[name], results[leader]).excludes_zero:
            leader, rank = name, place
        ranked.append(Ranked(name, rank, means[name], paired_difference(results[name], results[baseline])))
    return ranked


def mean_curve(curves: Sequence[Curve]) -> list[tuple[float, float]]:
    """The mean over seeds, at the places that all of them have."""
    by_place = [dict(curve) for curve in curves]
    places = sorted(set.intersection(*(set(curve) for curve in by_place))) if by_place else []
    return [(place, statistics.fmean(curve[place] for curve in by_place)) for place in places]


def crossings(one: Curve, other: Curve) -> list[float]:
    """Where one curve falls below the other, or rises above it, after having been on the other side; interpolated."""
    others = dict(other)
    gaps = [(place, loss - others[place]) for place, loss in one if place in others]
    found: list[float] = []
    signed = [(place, gap) for place, gap in gaps if gap != 0.0]
    for (before, gap_before), (after, gap_after) in pairwise(signed):
        if (gap_before > 0) != (gap_after > 0):
            found.append(before + (after - before) * gap_before / (gap_before - gap_after))
    return found


@dataclass(frozen=True)
class CurveCrossing:
    """Where two mean curves cross. is_shown: with the seeds' intervals on both sides of it, not by the means alone."""

    place: float
    is_shown: bool


def shown_crossings(ones: Mapping[int, Curve], others: Mapping[int, Curve]) -> list[CurveCrossing]:
    """The crossings of the mean curves of seeds that both have, and which of them the seeds distinguish from noise."""
    seeds = sorted(ones.keys() & others.keys())
    if not seeds:
        return []
    found = crossings(mean_curve([ones[seed] for seed in seeds]), mean_curve([others[seed] for seed in seeds]))
    ours, theirs = ({seed: dict(curves[seed]) for seed in seeds} for curves in (ones, others))
    places = set.intersection(*(set(curve) for curves in (ours, theirs) for curve in curves.values()))
    apart = [
        place
        for place in places
        if mean_interval([ours[seed][place] - theirs[seed][place] for seed in seeds]).excludes_zero
    ]
    edges = [-math.inf, *found, math.inf]
    return [
        CurveCrossing(place, any(before < at < place for at in apart) and any(place < at < after for at in apart))
        for before, place, after in zip(edges, found, edges[2:], strict=False)
    ]


def leaders(curves: Mapping[str, Curve]) -> list[tuple[float, str]]:
    """Which of several mean curves is lowest, from where on; places that not all of them have are left out."""
    if not curves:
        return []
    by_place = {name: dict(curve) for name, curve in curves.items()}
    found: list[tuple[float, str]] = []
    for place in sorted(set.intersection(*(set(curve) for curve in by_place.values()))):
        best = min(by_place, key=lambda name: by_place[name][place])
        if not found or found[-1][1] != best:
            found.append((place, best))
    return found


def value_at(curve: Curve, place: float) -> float | None:
    """A curve at a place between two of its points, on the line between them; None outside of it."""
    for (before, loss_before), (after, loss_after) in pairwise(curve):
        if before <= place <= after:
            return loss_before + (place - before) / (after - before) * (loss_after - loss_before)
    return None


def first_at(curve: Curve, loss: float) -> float | None:
    """Where a curve is first at a loss or below, interpolated; None if it never is."""
    for index, (place, value) in enumerate(curve):
        if value <= loss:
            if index == 0:
                return place
            before, above = curve[index - 1]
            return before + (above - loss) / (above - value) * (place - before)
    return None


def saving(scratch: Curve, line: Curve) -> float | None:
    """Scratch's FLOPs to its final loss over the line's to the same (METHODS 6).

    None if the line never has it, and where it had it when it was grown: then the source reached it, at a place that
    is not on this curve, and every way of growing would be given the same figure.

    Args:
        scratch: loss against cumulative FLOPs.
        line: the same of the grown line from its growth on; its first place has the FLOPs of all ancestors.
    """
    goal = scratch[-1][1]
    if not line or line[0][1] <= goal:
        return None
    reached = first_at(line, goal)
    return None if reached is None else scratch[-1][0] / reached
