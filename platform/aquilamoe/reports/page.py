"""The report of an experiment: one HTML file without other files, with the conclusions and their limits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aquilamoe.config.external import Before
from aquilamoe.config.growth import GROWTH_KINDS
from aquilamoe.format import ABSENT, count, decimal, power, seconds, stated
from aquilamoe.pipeline.figures import Record, before, input_stages, metric, number
from aquilamoe.reports import conclusion, costs, figure, paper, paper_figure, template
from aquilamoe.reports.canvas import Drawing
from aquilamoe.reports.curves import Points, chain_of, line_of, trained
from aquilamoe.reports.stage_rows import stage_rows
from aquilamoe.reports.template import Heading, Link


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a growth did to the function, as text."""

    stage: str
    how: str
    claim: str
    max_abs_dlogit: str
    kl: str
    before: str
    after: str
    tolerance: str
    verdict: str


def render(
    heading: Heading,
    target: Path,
    *,
    records: Mapping[str, Record],
    curves: Mapping[str, Points],
    chain: Sequence[str],
    control: str | None,
    pages: list[Link] | None = None,
) -> list[Drawing]:
    """Write the page of a pipeline to `target` and return its figures.

    records: stage name -> record.json; curves: stage name -> points of metrics.jsonl; chain: the training and growth
    stages of the main line in order; control: the stage that continues the small model to the same FLOPs.
    Stages and metrics may be missing: the page is then shorter. Equal input gives equal bytes.
    """
    stages, jumps = chain_of(records, curves, chain)
    control_record = records.get(control) if control else None
    compared = trained(str(control), control_record, curves.get(str(control), ())) if control_record else None
    tints = figure.tints(records, curves, chain, control)
    loss = figure.loss_figure(stages, jumps, compared)
    training = figure.training_figure(stages, compared)
    beside = paper_figure.beside_the_paper(stages, compared)
    points = conclusion.checkpoints(records)
    found = conclusion.find(records, chain, control)
    context = {
        "experiment": heading.experiment,
        "description": heading.description,
        "story": conclusion.story(records, chain),
        "scale_note": conclusion.scale_note(records, chain),
        "finding": found,
        "crossing": conclusion.crossing_note(line_of(stages), compared.validation) if compared else "",
        "parts_note": conclusion.parts_note(records, found),
        "facts": _facts(records, chain),
        "loss": loss.shown() if loss else None,
        "training": training.shown() if training else None,
        "beside": beside.shown() if beside else None,
        "efficiency": [
            paper.Efficiency("the paper, as published", *paper.PUBLISHED),
            paper.recomputed(),
            paper.of_run(records, chain, line_of(stages), compared.validation if compared else None),
        ],
        "has_jumps": bool(jumps),
        "compared": compared,
        "control_source": input_stages(control_record).get("source") if control_record else None,
        "rows": stage_rows(records),
        "costs": costs.spent(records),
        "points": points,
        "languages": sorted({lang for point in points for lang in {**point.lang_nats, **point.lang_bits}}),
        "best": _best(points),
        "certificates": [_certificate(name, r) for name, r in records.items() if r.get("kind") in GROWTH_KINDS],
        "command": heading.command,
        "tints": tints,
    }
    template.write(target, "page.html.jinja", context, pages)
    return [drawing for drawing in (loss, beside, training) if drawing]


def _facts(records: Mapping[str, Record], chain: Sequence[str]) -> list[tuple[str, str]]:
    """A few numbers of the whole run, as (value, what it is)."""
    last = conclusion.last_trained(records, chain)
    if last is None:
        return []
    record = records[last]
    total, active = metric(record, "params_total"), metric(record, "params_active")
    known = before(record)
    times = [spent for record in records.values() if (spent := number(record.get("seconds"))) is not None]
    facts = [
        (count(total), "parameters at the end" + (f", {count(active)} active" if active != total else "")),
        (_along(known, "tokens", conclusion.trained_tokens(records, chain), count), "tokens along the chain"),
        (_along(known, "flops", metric(record, "lineage_flops"), power), "model FLOPs along the chain"),
        (f"{seconds(sum(times))} s", "for all stages" if len(times) > 1 else "in all"),
    ]
    return [(value, what) for value, what in facts if not value.startswith(ABSENT)]


def _along(known: Before | None, figure: str, here: float | None, write: Callable[[float | None], str]) -> str:
    """What was spent here, after what is stated of a checkpoint from elsewhere, if there is one."""
    return write(here) if known is None else f"{stated(getattr(known, figure), write)} + {write(here)}"


def _best(points: Sequence[conclusion.HeldOutLosses]) -> dict[str, float]:
    """The lowest value of each column of the evaluation table."""
    best: dict[str, float] = {}
    for point in points:
        cells = {"nats": point.nats}
        cells |= {f"{lang}/nats": value for lang, value in point.lang_nats.items()}
        cells |= {f"{lang}/bits": value for lang, value in point.lang_bits.items()}
        for column, value in cells.items():
            if value is not None:
                best[column] = min(value, best.get(column, value))
    return best


def _certificate(name: str, record: Record) -> Certificate:
    metrics = record.get("metrics") or {}
    preserving, passed = _flag(metrics.get("preserving")), _flag(metrics.get("passed"))
    verdict = "makes no claim" if preserving is False else {True: "passed", False: "failed", None: ABSENT}[passed]
    return Certificate(
        stage=name,
        how=_how(record),
        claim={True: "preserving", False: "not preserving", None: ABSENT}[preserving],
        max_abs_dlogit=_small(metric(record, "max_abs_dlogit")),
        kl=_small(metric(record, "kl")),
        before=decimal(metric(record, "source_loss"), 3),
        after=decimal(metric(record, "target_loss"), 3),
        tolerance=ABSENT if preserving is False else _small(metric(record, "tolerance")),
        verdict=verdict,
    )


def _how(record: Record) -> str:
    """The options of a growth from its recipe, e.g. `aki_pro, norm exact, depth interpolate`."""
    config = (record.get("recipe") or {}).get("config") or {}
    options = config.get("growth") or config.get("upcycling") or {}
    if not isinstance(options, Mapping):
        return str(options)
    method = [str(options["method"])] if "method" in options else []
    return ", ".join(
        method
        + [
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in sorted(options.items())
            if key != "method"
        ]
    )


def _flag(value: object) -> bool | None:
    """Read a truth value that may have been stored as a number or a text."""
    if value is None:
        return None
    return value.lower() in ("true", "yes", "1") if isinstance(value, str) else bool(value)


def _small(value: float | None) -> str:
    """Write a number that may be tiny: 2.1e-06, 0.034, 5.2."""
    if value is None:
        return ABSENT
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.3g}"
