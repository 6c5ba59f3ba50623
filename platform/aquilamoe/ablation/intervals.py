"""Means over seeds with their intervals: of figures, of paired differences, of ratios."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache

from aquilamoe.ablation.study import Interval, Ratio

CONFIDENCE = 0.95


def paired_difference(ones: Mapping[int, float], others: Mapping[int, float]) -> Interval:
    """Mean of `ones - others` over the seeds that both have, by Student's t on the differences.

    Pairing takes out what a seed gives to both: data order and source model. ValueError if no seed is common.
    """
    seeds = sorted(ones.keys() & others.keys())
    if not seeds:
        raise ValueError("the two have no seed in common")
    return mean_interval([ones[seed] - others[seed] for seed in seeds])


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of one figure for each seed, with its interval by Student's t."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean=mean, half_width=None, pairs=1)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean=mean, half_width=t_quantile(len(values) - 1) * error, pairs=len(values))


def mean_ratio(values: Sequence[float]) -> Ratio:
    """The geometric mean of one ratio (above 0) for each seed; its interval is Student's of the logarithms."""
    logs = mean_interval([math.log(value) for value in values])
    low, high = (None, None) if logs.half_width is None else (logs.mean - logs.half_width, logs.mean + logs.half_width)
    return Ratio(mean=math.exp(logs.mean), low=_bounded_exp(low), high=_bounded_exp(high), pairs=logs.pairs)


def _bounded_exp(exponent: float | None) -> float | None:
    """No infinity, which JSON cannot hold: two seeds far apart give exponents of hundreds."""
    return None if exponent is None else math.exp(max(-700.0, min(exponent, 700.0)))


@cache
def t_quantile(freedom: int) -> float:
    """How many standard errors hold a mean with 95 %, by halving; SciPy would take a second to be imported."""
    low, high = 0.0, 1000.0
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, freedom) < CONFIDENCE else (low, middle)
    return high


def _t_inside(t: float, freedom: int) -> float:
    """The probability that Student's t lies between -t and t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    term, total = (math.cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
    for power in range(1 + freedom % 2, freedom, 2):
        total += term
        term *= math.cos(angle) ** 2 * power / (power + 1)
    inside = total * math.sin(angle)
    return 2 / math.pi * (angle + inside) if freedom % 2 else inside
