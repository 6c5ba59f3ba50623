"""The dots of a study: differences with their intervals, and what else was measured of every variant, a row each."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aquilamoe.ablation.conclusions import signed
from aquilamoe.ablation.study import Entry, Interval, Study
from aquilamoe.format import count
from aquilamoe.reports import canvas
from aquilamoe.reports.canvas import Drawing
from aquilamoe.reports.comparison_curves import LETTER, called, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, TALL = 0.235, 0.4  # inches; a row in which a narrow figure has two lines
AGAINST = "  against  "  # where a narrow figure breaks a name
AROUND = 0.95  # inches above and below the rows of a panel
FAR = 12.0  # a value this many times the middle one's distance is not drawn to scale, but at the edge, with its number


@dataclass(frozen=True)
class Dot:
    """A row of a panel. before: an open dot, what the value was after growth."""

    name: str
    colour: str
    value: Interval | None
    before: float | None = None


@dataclass(frozen=True)
class Panel:
    """Rows under a title. zero: a line to compare with."""

    title: str
    dots: Sequence[Dot]
    zero: float | None = None
    counts: bool = False


def ranking_figure(study: Study) -> Drawing | None:
    """Every variant less the baseline, and every control less the variant that it stands for, with intervals."""
    tints = looks(study)
    ranked = study.ranked()
    if len(ranked) < 2:
        return None
    dots = [Dot(f"{entry.rank}  {entry.name}", tints[entry.name].colour, entry.to_baseline) for entry in ranked]
    panels = [Panel(f"minus the baseline '{study.baseline}', nats/token", dots, 0.0)]
    if unequal(study):
        by_flops = sorted(ranked, key=lambda entry: entry.equal_flops or float("inf"))
        equal = [
            Dot(f"{entry.equal_flops_rank}  {entry.name}", tints[entry.name].colour, entry.equal_flops_minus_baseline)
            for entry in by_flops
            if entry.equal_flops_minus_baseline is not None
        ]
        if len(equal) > 1:
            panels.append(Panel("the same at equal cumulative FLOPs", equal, 0.0))
    return _drawing("ranking", "Ranks, and differences to the baseline with 95 % intervals", panels)


def controls_figure(study: Study) -> Drawing | None:
    """What not growing gives, less what growing gives: above zero growing is better."""
    dots = []
    for entry in study.controls:
        own = opposite(study, entry)
        if own is not None and entry.control is not None:
            name = called(entry).partition(" of ")[0]
            dots.append(Dot(f"{name}{AGAINST}{own.name}", canvas.CONTROL, entry.control.differences[own.name]))
    if not dots:
        return None
    panel = Panel("control minus variant, nats/token: above 0 growing is better", dots, 0.0)
    return _drawing("controls", "Controls less variants, with 95 % intervals", [panel])


def measures_figure(study: Study) -> Drawing | None:
    """What growing did to loss and weights, and how long it took to recover."""
    tints = looks(study)
    ranked = study.ranked()
    panels = []
    for title, end, start in (
        ("loss change at growth, nats/token", "loss_jump", None),
        ("tokens until the source's final loss", "recovery_tokens", None),
        ("effective rank, open: after growth", "rank_end", "rank_grown"),
        ("similarity of experts, open: after growth", "similarity_end", "similarity_grown"),
    ):
        dots = [Dot(entry.name, tints[entry.name].colour, _mean(entry, end), _plain(entry, start)) for entry in ranked]
        if any(dot.value is not None for dot in dots):
            panels.append(Panel(title, dots, 0.0 if end == "loss_jump" else None, end == "recovery_tokens"))
    return _drawing("measures", "Loss change, recovery, effective rank and similarity of experts", panels)


def opposite(study: Study, entry: Entry) -> Entry | None:
    """The best variant that a control stands for: what it is compared with."""
    differences = entry.control.differences if entry.control is not None else {}
    return next((each for each in study.ranked() if each.name in differences), None)


def unequal(study: Study) -> bool:
    """Whether the variants' lines have cost different FLOPs, so that ranks at equal FLOPs are others."""
    spent = [seed.lineage_flops for entry in study.variants for seed in entry.seeds.values()]
    return bool(spent) and max(spent) > 1.01 * min(spent)


def _mean(entry: Entry, figure: str) -> Interval | None:
    """Over the seeds, if all have it: the mean, and half of the range."""
    values = entry.figure(figure)
    if not values or len(values) < len(entry.seeds):
        return None
    return Interval(mean=statistics.fmean(values), half_width=(max(values) - min(values)) / 2, pairs=len(values))


def _plain(entry: Entry, figure: str | None) -> float | None:
    values = entry.figure(figure) if figure else []
    return statistics.fmean(values) if values else None


def _drawing(name: str, title: str, panels: Sequence[Panel]) -> Drawing | None:
    if not panels:
        return None
    rows = [len(panel.dots) * _row(panel) for panel in panels]
    columns = 2 if len(panels) > 1 else 1
    bands = [ROW * max(len(panel.dots) for panel in panels[i : i + columns]) for i in range(0, len(panels), columns)]

    def draw(figure: "Figure", narrow: bool) -> None:
        across = 1 if narrow else columns
        heights = rows if narrow else bands
        width, height = map(float, figure.get_size_inches())
        top = height
        for i, panel in enumerate(panels):
            column, band = i % across, i // across
            if column == 0 and band:
                top -= heights[band - 1] + AROUND
            parts = [part for dot in panel.dots for part in (dot.name.split(AGAINST) if narrow else [dot.name])]
            left = column * width / across + (max(map(len, parts)) * LETTER + 14) / 72
            inner = len(panel.dots) * (_row(panel) if narrow else ROW)
            box = (left, top - 0.42 - inner, (column + 1) * width / across - left - 0.78, inner)
            axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
            _panel(axes, panel, narrow)

    return Drawing(
        name,
        title,
        draw,
        (10.0, sum(bands) + AROUND * len(bands)),
        (5.0, sum(rows) + AROUND * len(rows)),
    )


def _row(panel: Panel) -> float:
    """Height of a row in a narrow figure."""
    return TALL if any(AGAINST in dot.name for dot in panel.dots) else ROW


def _panel(axes: "Axes", panel: Panel, narrow: bool) -> None:
    low, high = _limits(panel)
    if panel.zero is not None:
        axes.axvline(panel.zero, color=canvas.MUTED, linewidth=0.8, dashes=(4, 2.5))
    for row, dot in enumerate(panel.dots):
        _dot(axes, dot, row, (low, high), panel.counts)
    axes.set_xlim(low, high)
    axes.set_ylim(len(panel.dots) - 0.5, -0.5)
    names = [dot.name.replace(AGAINST, "\nagainst ") if narrow else dot.name for dot in panel.dots]
    axes.set_yticks(range(len(panel.dots)), names)
    for label, dot in zip(axes.get_yticklabels(), panel.dots, strict=True):
        label.set_color(dot.colour)
    axes.grid(visible=True, axis="y")
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)
    title = panel.title.replace(": ", ":\n") if narrow and AGAINST in panel.dots[0].name else panel.title
    axes.set_title(title, loc="left", fontsize=9, color=canvas.INK, pad=6)
    _ticks(axes, panel.counts)


def _ticks(axes: "Axes", counts: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    if counts:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _dot(axes: "Axes", dot: Dot, row: int, limits: tuple[float, float], counts: bool) -> None:
    if dot.value is None:
        text = "not in every seed" if counts else "not measured"
        axes.text(limits[0], row, f"  {text}", va="center", fontsize=8, color=canvas.MUTED)
        return
    low, high = limits
    place = min(max(dot.value.mean, low), high)
    if dot.value.half_width:
        ends = [min(max(dot.value.mean + sign * dot.value.half_width, low), high) for sign in (-1, 1)]
        axes.plot(ends, [row, row], color=dot.colour, linewidth=2.2, alpha=0.55)
    if dot.before is not None:
        before = min(max(dot.before, low), high)
        axes.plot([before, place], [row, row], color=dot.colour, linewidth=0.9)
        axes.plot([before], [row], "o", markersize=5, color=canvas.PAPER, markeredgecolor=dot.colour)
    axes.plot([place], [row], "o", markersize=6, color=dot.colour, markeredgewidth=0, clip_on=False)
    beyond = dot.value.mean > high or dot.value.mean < low
    plain = count(dot.value.mean) if counts else f"{dot.value.mean:.3f}"
    number = plain if counts or dot.before is not None else signed(dot.value.mean)
    axes.annotate(
        f"{number}{' →' if beyond else ''}",
        (1.0, row),
        xycoords=("axes fraction", "data"),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=canvas.INK,
        annotation_clip=False,
    )


def _limits(panel: Panel) -> tuple[float, float]:
    """The range of an axis; what lies far beyond the others is left at its edge."""
    values: Mapping[str, Interval] = {dot.name: dot.value for dot in panel.dots if dot.value is not None}
    means = [value.mean for value in values.values()]
    middle = statistics.median(means)
    typical = statistics.median(abs(mean - middle) for mean in means)
    kept = [v for v in values.values() if not typical or abs(v.mean - middle) <= FAR * typical] or list(values.values())
    ends = [value.mean + sign * (value.half_width or 0.0) for value in kept for sign in (-1, 1)]
    ends += [dot.before for dot in panel.dots if dot.before is not None]
    ends += [panel.zero] if panel.zero is not None else []
    margin = 0.06 * (max(ends) - min(ends)) or 0.01
    return min(ends) - margin, max(ends) + margin
