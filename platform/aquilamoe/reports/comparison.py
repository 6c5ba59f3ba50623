"""The report of an ablation: a page that needs nothing else, and every figure as a file beside it."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aquilamoe.ablation.conclusions import conclusions, horizon, shown, signed, times
from aquilamoe.ablation.study import Entry, Study
from aquilamoe.format import ABSENT, count, decimal, power
from aquilamoe.reports import comparison_curves as curves
from aquilamoe.reports import comparison_dots as dots
from aquilamoe.reports import template
from aquilamoe.reports.canvas import Drawing

PAGE, FIGURES = "report.html", "figures"


@dataclass(frozen=True)
class TableRow:
    """A row of a table, as text."""

    name: str
    colour: str
    cells: Sequence[str]
    note: str = ""


def write(study: Study, folder: Path) -> Path:
    """Write the page into a folder, and its figures as SVG and PNG; return the page. The same study, the same bytes."""
    drawings = drawn(study)
    for drawing in drawings.values():
        drawing.save(folder / FIGURES)
    tints = {name: look.colour for name, look in curves.looks(study).items()}
    ranked = study.ranked()
    context = {
        "study": study,
        "sentences": conclusions(study),
        "horizon": horizon(study),
        "ranked": ranked,
        "rows": [_ranking_row(entry, tints) for entry in ranked],
        "controls": [_control_row(study, entry, tints) for entry in study.controls if entry.mean is not None],
        "growths": [_growth_row(entry, tints, _routed(study)) for entry in ranked if entry.figure("loss_source")],
        "routed": _routed(study),
        "failed": [(e.name, seed, reason) for e in study.entries for seed, reason in e.missing.items()],
        "drawings": {name: drawing.shown() for name, drawing in drawings.items()}
        | {name: None for name in MAKERS if name not in drawings},
    }
    page = folder / PAGE
    template.write(page, "comparison.html.jinja", context)
    return page


MAKERS: dict[str, Callable[[Study], Drawing | None]] = {
    "ranking": dots.ranking_figure,
    "controls": dots.controls_figure,
    "loss_by_tokens": curves.tokens_figure,
    "loss_by_flops": curves.flops_figure,
    "measures": dots.measures_figure,
    "expert_load": curves.load_figure,
}


def drawn(study: Study) -> dict[str, Drawing]:
    """The figures that the numbers carry, by name."""
    found = {name: make(study) for name, make in MAKERS.items()}
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def _routed(study: Study) -> bool:
    return any(entry.figure("similarity_end") or entry.figure("load_end") for entry in study.variants)


def _ranking_row(entry: Entry, tints: dict[str, str]) -> TableRow:
    interval = ABSENT
    difference = entry.to_baseline
    if difference is not None and difference.half_width:
        low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
        interval = f"{signed(low)} to {signed(high)}"
    spent = next(iter(entry.seeds.values())).lineage_flops
    saving = ABSENT
    if entry.saving is not None:
        saving = times(entry.saving)
    cells = (
        str(entry.rank),
        decimal(entry.mean, 4) if (entry.mean or 0) < 1000 else count(entry.mean),
        signed(difference.mean, 4) if difference else ABSENT,
        interval,
        power(spent),
        str(entry.equal_flops_rank) if entry.equal_flops_rank is not None else ABSENT,
        saving,
        str(len(entry.seeds)),
    )
    return TableRow(entry.name, tints[entry.name], cells)


def _control_row(study: Study, entry: Entry, tints: dict[str, str]) -> TableRow:
    assert entry.control is not None
    seed = next(iter(entry.seeds.values()))
    cells = (
        f"{entry.control.learning_rate_ratio:g}",
        count(seed.tokens),
        power(seed.lineage_flops),
        decimal(entry.mean, 4) if (entry.mean or 0) < 1000 else count(entry.mean),
    )
    own = dots.opposite(study, entry)
    note = f"{own.name}: {shown(entry.control.differences[own.name])}" if own else ""
    return TableRow(curves.called(entry), tints[entry.name], cells, note)


def _growth_row(entry: Entry, tints: dict[str, str], routed: bool) -> TableRow:
    def mean(name: str, write: Callable[[float], str]) -> str:
        values = entry.figure(name)
        return write(statistics.fmean(values)) if len(values) == len(entry.seeds) else ABSENT

    def three(value: float) -> str:
        return f"{value:.3f}"

    cells = [
        mean("loss_source", three),
        mean("loss_grown", three),
        mean("loss_jump", signed),
        mean("kl", lambda value: f"{value:.2g}"),
        three(statistics.fmean(seed.loss for seed in entry.seeds.values())),
        mean("recovery_tokens", count) if entry.figure("recovery_tokens") else "not reached",
        mean("recovery_flops", power),
        mean("rank_grown", three),
        mean("rank_end", three),
    ]
    if routed:
        cells += [mean(name, three) for name in ("similarity_grown", "similarity_end", "load_end")]
    return TableRow(entry.name, tints[entry.name], cells)
