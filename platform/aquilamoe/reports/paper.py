"""What AquilaMoE (arXiv 2408.06567) published, computed again, and the same figures of a run of ours.

All three factors compare the line of checkpoints with a Mixture of Experts that is trained from scratch on as many
tokens as the whole line had. That was not trained: the factors assume it. `measured_saving` is measured by a control.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from aquilamoe.pipeline import cost
from aquilamoe.pipeline.figures import Record, metric
from aquilamoe.reports.curves import Series

PUBLISHED = (4.12, 3.35, 2.39)
# Of each stage: billions of tokens, billions of (active) parameters, billions of tokens a day.
STAGES = {"7B": (3600, 8.224, 279), "16B": (1200, 16.655, 70), "8x16B": (545, 29.24, 25)}
# Training loss by log10 of cumulative 6ND, read off the published figure to within 0.003.
CURVES = {
    "7B": (
        (21.75, 22.05, 22.35, 22.53, 22.65, 22.75, 22.90, 23.05, 23.155),
        (2.578, 2.307, 2.170, 2.124, 2.086, 2.058, 2.029, 1.994, 1.904),
    ),
    "16B": ((23.20, 23.27, 23.32, 23.37, 23.44), (1.879, 1.847, 1.802, 1.764, 1.714)),
    "8x16B": ((23.49, 23.52, 23.54, 23.55), (1.655, 1.621, 1.549, 1.528)),
}


@dataclass(frozen=True)
class Efficiency:
    """How many times as much the model from scratch would take; None is what cannot be known.

    time: at the speeds that were reached. devices: device time. flops: 6ND. saving: FLOPs of the control to a loss that
    both reached, over those of the line, ancestors included.
    """

    name: str
    time: float | None
    devices: float | None
    flops: float | None
    saving: float | None = None


def curves() -> list[Series]:
    """The three stages, by FLOPs."""
    return [Series(tuple(10**x for x in exponents), losses) for exponents, losses in CURVES.values()]


def recomputed() -> Efficiency:
    """From the tokens, parameters and speeds that were published; what the phases ran on was not."""
    parts = list(STAGES.values())
    time = _factor([(tokens, 1 / rate) for tokens, _, rate in parts])
    return Efficiency("the paper, computed again", time, None, _factor([(tokens, size) for tokens, size, _ in parts]))


def of_run(records: Mapping[str, Record], chain: Sequence[str], line: Series, control: Series | None) -> Efficiency:
    """Of a line of checkpoints: from the tokens, speeds and active parameters of its training stages.

    line, control: held-out loss by cumulative FLOPs of the line and of the stage that it is compared with.
    """
    stages = [records[name] for name in chain if records.get(name, {}).get("kind") == "pretrain"]
    rates = [(metric(each, "tokens"), _inverse(metric(each, "tokens_per_s"))) for each in stages]
    sizes = [(metric(each, "tokens"), metric(each, "params_active")) for each in stages]
    spent = [cost.own({"fingerprint": "", **each}).device_seconds or None for each in stages]
    devices = [
        (tokens, time / tokens if time and tokens else None) for (tokens, _), time in zip(sizes, spent, strict=True)
    ]
    saving = measured_saving(line, control) if control else None
    return Efficiency("this run", _factor(rates), _factor(devices), _factor(sizes), saving)


def measured_saving(line: Series, control: Series) -> float | None:
    """FLOPs of the control over FLOPs of the line, each to the lowest loss that both reached; below 1, growing lost."""
    if not line.y or not control.y:
        return None
    level = max(min(line.y), min(control.y))
    ours, theirs = _flops_at(line, level), _flops_at(control, level)
    return theirs / ours if ours and theirs else None


def _flops_at(curve: Series, level: float) -> float | None:
    """Where a curve is first at or below a level, interpolated."""
    if curve.y[0] <= level:
        return curve.x[0]
    for (x0, y0), (x1, y1) in pairwise(zip(curve.x, curve.y, strict=True)):
        if y1 <= level:
            return x0 + (y0 - level) / (y0 - y1) * (x1 - x0)
    return None


def _factor(parts: Sequence[tuple[float | None, float | None]]) -> float | None:
    """All tokens at what a token of the last stage takes, over what they took; None if a stage lacks a figure."""
    known = [(tokens, each) for tokens, each in parts if tokens and each]
    if len(known) < len(parts) or len(known) < 2:
        return None
    return sum(tokens for tokens, _ in known) * known[-1][1] / sum(tokens * each for tokens, each in known)


def _inverse(value: float | None) -> float | None:
    return 1 / value if value else None
