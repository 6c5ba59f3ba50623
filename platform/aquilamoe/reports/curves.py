"""What the figures draw, from the points of metrics.jsonl and the records: curves of trained stages, jumps between."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from aquilamoe.config.growth import GROWTH_KINDS
from aquilamoe.pipeline.figures import Record, metric, number

Points = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Series:
    """A curve: finite values, x ascending."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TrainingCurve:
    """A pretrain stage as the figures see it. FLOPs and tokens on the x axes include all ancestors'."""

    stage: str
    params_total: float | None
    params_active: float | None
    tokens: float | None  # trained in this stage
    validation: Series  # x: lineage FLOPs > 0, y: held-out nats/token
    train: Series  # x: lineage tokens, y: training nats/token
    router_load: Series  # x: tokens of this stage, y: load of the fullest expert / mean load

    @property
    def is_sparse(self) -> bool:
        return (self.params_active or 0) < (self.params_total or 0)


@dataclass(frozen=True, kw_only=True)
class Jump:
    """A growth: held-out loss of the source at its end, and of the grown model before it trained."""

    label: str
    flops: float
    before: float
    after: float
    source_params: float | None
    target_params: float | None
    target_active: float | None


def trained(stage: str, record: Record, points: Points) -> TrainingCurve:
    """Collect the curves of a pretrain stage; each may be empty."""
    return TrainingCurve(
        stage=stage,
        params_total=metric(record, "params_total"),
        params_active=metric(record, "params_active"),
        tokens=metric(record, "tokens"),
        validation=series(points, "lineage_flops", "val/loss", above=0.0),  # the axis is logarithmic
        train=series(points, "lineage_tokens", "train/loss"),
        router_load=series(points, "tokens", "router/load_max_over_mean"),
    )


def series(points: Points, x: str, y: str, above: float = float("-inf")) -> Series:
    """Return y over x where both are finite numbers and x > `above`; of repeated x (after a resume) the last counts."""
    values: dict[float, float] = {}
    for point in points:
        at, value = number(point.get(x)), number(point.get(y))
        if at is not None and value is not None and at > above:
            values[at] = value
    return Series(tuple(sorted(values)), tuple(values[at] for at in sorted(values)))


def chain_of(
    records: Mapping[str, Record], curves: Mapping[str, Points], chain: Iterable[str]
) -> tuple[list[TrainingCurve], list[Jump]]:
    """Return the trained stages of a chain and the jumps of loss between them, as far as records and curves go."""
    stages: list[TrainingCurve] = []
    jumps: list[Jump] = []
    growths: list[str] = []
    for name in chain:
        record = records.get(name)
        if record is None:
            continue
        if record.get("kind") in GROWTH_KINDS:
            growths.append(name)
        elif record.get("kind") == "pretrain":
            stage = trained(name, record, curves.get(name, ()))
            if growths and stages:
                jump = _jump(stages[-1], stage, [records[growth] for growth in growths], curves.get(name, ()))
                jumps += [jump] if jump else []
            stages.append(stage)
            growths = []
    return stages, jumps


def _jump(source: TrainingCurve, target: TrainingCurve, growths: list[Record], points: Points) -> Jump | None:
    before = metric(growths[0], "source_final_loss")
    if before is None and source.validation.y:
        before = source.validation.y[-1]
    after = next((loss for point in points if (loss := number(point.get("val/loss"))) is not None), None)
    flops = next(iter(target.validation.x[:1] or source.validation.x[-1:]), None)
    if before is None or after is None or flops is None:
        return None
    return Jump(
        label=" + ".join(str(growth["kind"]).replace("_", "-") for growth in growths),
        flops=flops,
        before=before,
        after=after,
        source_params=source.params_total,
        target_params=target.params_total,
        target_active=target.params_active,
    )


def line_of(stages: Iterable[TrainingCurve]) -> Series:
    """Held-out loss of a line's training stages, one after the other."""
    points = sorted((x, y) for stage in stages for x, y in zip(stage.validation.x, stage.validation.y, strict=True))
    return Series(tuple(x for x, _ in points), tuple(y for _, y in points))


def crossing(line: Series, control: Series) -> float | None:
    """From where on a line stays below what it is compared with, to the end of both; None where it ends above.

    Both fall over cumulative FLOPs. The control is read between its points; where the line was never above it, the
    first place that both have counts.
    """
    gaps = [(x, y - other) for x, y in zip(line.x, line.y, strict=True) if (other := read_at(control, x)) is not None]
    if not gaps or gaps[-1][1] >= 0:
        return None
    last = max((index for index, (_, gap) in enumerate(gaps) if gap >= 0), default=None)
    if last is None:
        return gaps[0][0]
    (before, above), (after, below) = gaps[last], gaps[last + 1]
    return before + (after - before) * above / (above - below)


def read_at(curve: Series, x: float) -> float | None:
    """A curve at a place between two of its points; a little beyond its end, its end: budgets are whole steps."""
    if not curve.x or not curve.x[0] <= x <= 1.01 * curve.x[-1]:
        return None
    for (x0, y0), (x1, y1) in pairwise(zip(curve.x, curve.y, strict=True)):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return curve.y[-1]


def thinned(curve: Series, most: int) -> Series:
    """Average neighbours until at most `most` points are left, so that a long run does not make a heavy page."""
    size = -(-len(curve.x) // most)
    if size <= 1:
        return curve
    starts = range(0, len(curve.x), size)
    means = [tuple(_mean(values[i : i + size]) for i in starts) for values in (curve.x, curve.y)]
    return Series(means[0], means[1])


def smoothed(curve: Series, window: int) -> Series:
    """Running mean over about `window` points around each, and fewer at the ends."""
    half = window // 2
    return Series(curve.x, tuple(_mean(curve.y[max(0, i - half) : i + half + 1]) for i in range(len(curve.y))))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
