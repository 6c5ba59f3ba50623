"""What the numbers of an ablation allow to be said: paired differences, intervals, ranks with ties, crossings."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

CONFIDENCE = 0.95
Curve = Sequence[tuple[float, float]]  # (tokens or FLOPs, loss), rising in the first


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval; `half_width` is None for a single pair, from which none follows."""

    mean: float
    half_width: float | None
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width


def paired_difference(ones: Mapping[int, float], others: Mapping[int, float]) -> Interval:
    """Mean of `ones - others` over the seeds that both have, by Student's t on the differences.

    Pairing takes out what a seed gives to both: data order and source model. ValueError if no seed is common.
    """
    seeds = sorted(ones.keys() & others.keys())
    if not seeds:
        raise ValueError("the two have no seed in common")
    differences = [ones[seed] - others[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return Interval(mean, None, 1)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Interval(mean, _t_quantile(len(differences) - 1) * error, len(differences))


def _t_quantile(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, freedom))


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


def saving(scratch: Curve, loss: float, flops: float) -> float | None:
    """Scratch's FLOPs to a loss over the line's FLOPs to the same (METHODS section 6); None where scratch never has it.

    scratch: its losses against cumulative FLOPs. loss: what the line ends with. flops: what that has cost.
    """
    for (before, loss_before), (after, loss_after) in pairwise(scratch):
        if loss_after <= loss:
            share = min(1.0, max(0.0, (loss_before - loss) / (loss_before - loss_after))) if loss_before > loss else 0.0
            return (before + share * (after - before)) / flops
    return None
