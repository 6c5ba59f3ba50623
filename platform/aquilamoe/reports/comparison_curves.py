"""The curves of a study: loss against tokens and against cumulative FLOPs, with the seeds' range, and expert load."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aquilamoe.ablation.study import Entry, Study
from aquilamoe.format import count
from aquilamoe.reports import canvas
from aquilamoe.reports.canvas import Drawing
from aquilamoe.reports.view import flops_ticks, spread, superscript

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = (10.0, 5.6), (5.0, 5.2)  # inches
LINE = 11.5  # points between labels
LETTER = 5.0  # points that a letter of a label takes
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.2, 1.6), (6, 2, 1.2, 2))
CONTROL_DASHES = {"flops": (4.0, 2.5), "tokens": (1.2, 1.8)}
# Of what lies above the curves' ends: how many times the distance of their middle from the lowest is shown, in nats.
SHOWN, AT_LEAST = 5.0, 0.12
MANY = 5  # lines; the bands of more would hide each other

Reading = Callable[[Any], Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Look:
    """How an entry is drawn in every figure."""

    colour: str
    dashes: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class MeanCurve:
    """An entry's curve: the mean over seeds where all were measured, and the lowest and highest of them."""

    name: str
    look: Look
    x: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def looks(study: Study) -> dict[str, Look]:
    """Of two axes one is shown by colour and the other by dashes; else variants get colours, then dashes, in turn."""
    shown = [entry for entry in study.variants if entry.seeds]
    used = {axis: [v for v in values if any(e.axes[axis] == v for e in shown)] for axis, values in study.axes.items()}
    axes = sorted(used.items(), key=lambda axis: -len(axis[1]))
    by_axis = len(axes) == 2 and len(axes[0][1]) <= len(canvas.PALETTE) and len(axes[1][1]) <= len(DASHES)
    found = {}
    for place, entry in enumerate(shown):
        colour, dash = place % len(canvas.PALETTE), place // len(canvas.PALETTE) % len(DASHES)
        if by_axis:
            (first, colours), (second, dashes) = axes
            colour, dash = colours.index(entry.axes[first]), dashes.index(entry.axes[second])
        found[entry.name] = Look(canvas.PALETTE[colour], DASHES[dash])
    for entry in study.controls:
        assert entry.control is not None
        found[entry.name] = Look(canvas.CONTROL, CONTROL_DASHES[entry.control.equal])
    return found


def line_of(entry: Entry, look: Look, reading: Reading) -> MeanCurve | None:
    """An entry's curve by whatever `reading` takes from its seeds; None without a point."""
    curves = [dict(reading(seed)) for seed in entry.seeds.values()]
    places = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not places:
        return None
    columns = [[curve[place] for curve in curves] for place in places]
    return MeanCurve(
        name=called(entry),
        look=look,
        x=tuple(places),
        mean=tuple(map(statistics.fmean, columns)),
        low=tuple(map(min, columns)),
        high=tuple(map(max, columns)),
    )


def called(entry: Entry) -> str:
    """What a figure calls an entry: a variant by its name, a control in short."""
    if entry.control is None:
        return entry.name
    what = "scratch" if entry.control.of is None else f"{entry.control.of} continued"
    owner = f" of {entry.control.stands_for[0]}" if " of " in entry.name else ""
    return f"{what}, equal {'FLOPs' if entry.control.equal == 'flops' else 'tokens'}{owner}"


def tokens_figure(study: Study) -> Drawing | None:
    """Held-out loss against tokens of the compared stage; controls that continue a checkpoint beside it."""
    by_tokens: Reading = lambda seed: seed.by_tokens()  # noqa: E731
    continued = [e for e in study.controls if e.control and e.control.of and e.control.equal == "tokens"]
    lines = _lines(study, [*study.variants, *continued], by_tokens)
    variants = [line for line in lines if line.look.colour != canvas.CONTROL]
    if not variants:
        return None
    longest = max(line.x[-1] for line in variants)
    marks = [
        (crossing.tokens, line)
        for entry in study.variants
        for crossing in entry.crossings
        if crossing.shown
        for line in variants
        if line.name == entry.name
    ]

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = _axes(figure, narrow, lines)
        axes.set_xlim(0, longest)
        _set_height(axes, lines, longest * 0.06)
        _draw(axes, lines)
        for tokens, line in marks:
            axes.plot([tokens], [_at(line, tokens)], "o", markersize=7, color=canvas.PAPER, markeredgecolor=canvas.INK)
        _count_axis(axes, f"tokens of {study.objective['stage']}", narrow)
        axes.set_ylabel("held-out loss, nats per token", labelpad=7)
        _name(figure, axes, lines, narrow)

    title = f"Held-out loss against tokens of {study.objective['stage']}, by variant"
    return Drawing("loss_by_tokens", title, draw, WIDE, _narrow(lines))


def flops_figure(study: Study) -> Drawing | None:
    """Held-out loss against the log of cumulative FLOPs: sources, variants, and controls of the same FLOPs."""
    by_flops: Reading = lambda seed: seed.by_flops()  # noqa: E731
    equal = [entry for entry in study.controls if entry.control and entry.control.equal == "flops"]
    lines = _lines(study, [*study.variants, *equal], by_flops)
    variants = [line for line in lines if line.look.colour != canvas.CONTROL]
    if not variants:
        return None
    before = _ancestors(study)
    start, end = min(line.x[0] for line in variants), max(line.x[-1] for line in lines)

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = _axes(figure, narrow, lines)
        axes.set_xscale("log")
        # What comes before the first growth takes a third of the axis at most.
        axes.set_xlim(max(start * (start / end) ** 0.5, 1.0), end)
        _set_height(axes, lines, start * (end / start) ** 0.15, [curve[-1] for curve in before])
        for curve in before:
            axes.plot(*zip(*curve, strict=True), color=canvas.INK, linewidth=1.6)
            axes.plot(*curve[-1], "o", markersize=5, color=canvas.INK, markeredgewidth=0)
        _draw(axes, lines)
        low, high = axes.get_xlim()
        ticks = flops_ticks(low, high, 4 if narrow else 8)
        axes.set_xticks(ticks, [superscript(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("cumulative model FLOPs, log scale", labelpad=7)
        axes.set_ylabel("held-out loss, nats per token", labelpad=7)
        _name(figure, axes, lines, narrow)

    return Drawing(
        "loss_by_flops", "Held-out loss against cumulative model FLOPs, by variant", draw, WIDE, _narrow(lines)
    )


def load_figure(study: Study) -> Drawing | None:
    """Load of the fullest expert over the mean, against tokens; None without experts."""
    by_load: Reading = lambda seed: seed.load  # noqa: E731
    lines = _lines(study, study.variants, by_load)
    if not lines:
        return None

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = _axes(figure, narrow, lines)
        axes.axhline(1.0, color=canvas.MUTED, linewidth=0.8, dashes=(4, 2.5))
        axes.set_xlim(0, max(line.x[-1] for line in lines))
        _draw(axes, lines)
        _count_axis(axes, f"tokens of {study.objective['stage']}", narrow)
        axes.set_ylabel("load of the fullest expert / mean load", labelpad=7)
        _name(figure, axes, lines, narrow)

    return Drawing("expert_load", "Load of the fullest expert against tokens", draw, (10.0, 3.8), _narrow(lines))


def _lines(study: Study, entries: Sequence[Entry], reading: Reading) -> list[MeanCurve]:
    own = looks(study)
    drawn = [line_of(entry, own[entry.name], reading) for entry in entries if entry.seeds]
    return [line for line in drawn if line is not None]


def _ancestors(study: Study) -> list[list[tuple[float, float]]]:
    """Mean curves of what the variants grew from: of each line's stages, over seeds."""
    groups: dict[tuple[str, int, float], list[Mapping[float, float]]] = {}
    for ancestor in study.ancestors.values():
        key = (ancestor.stage, ancestor.params, ancestor.flops)
        groups.setdefault(key, []).append(dict(ancestor.curve))
    found = []
    for curves in groups.values():
        places = sorted(set.intersection(*(set(curve) for curve in curves)))
        found.append([(place, statistics.fmean(curve[place] for curve in curves)) for place in places if place > 0])
    return [curve for curve in found if curve]


def _narrow(lines: Sequence[MeanCurve]) -> tuple[float, float]:
    """Room for a key below the figure."""
    return NARROW[0], NARROW[1] + 0.17 * len(lines)


def _axes(figure: "Figure", narrow: bool, lines: Sequence[MeanCurve]) -> "Axes":
    width, height = figure.get_size_inches()
    if narrow:
        below = 0.17 * len(lines) + 0.75
        return figure.add_axes((0.12, below / height, 0.85, (height - below - 0.2) / height))
    right = (max(len(line.name) for line in lines) * LETTER + 52) / 72
    return figure.add_axes((0.068, 0.62 / height, (width - right) / width - 0.068, (height - 0.82) / height))


def _set_height(
    axes: "Axes", lines: Sequence[MeanCurve], first: float, others: Sequence[tuple[float, float]] = ()
) -> None:
    """Show how the lines end: of what is above, so much that the variants' middle is distinct from the lowest."""
    variants = [line for line in lines if line.look.colour != canvas.CONTROL]
    ends = sorted(line.mean[-1] for line in variants)
    lowest = min(min(line.low) for line in variants)
    floor = min([lowest, *(min(line.mean) for line in lines)])
    highest = max(
        [value for line in variants for x, value in zip(line.x, line.high, strict=True) if x >= first]
        + [loss for _, loss in others]
    )
    middle = statistics.median(ends)
    tops = (lowest + SHOWN * (middle - lowest), floor + SHOWN / 2 * (middle - floor), lowest + AT_LEAST)
    top = min(highest, max(tops))
    axes.set_ylim(floor - 0.06 * (top - floor), top + 0.04 * (top - floor))


def _draw(axes: "Axes", lines: Sequence[MeanCurve]) -> None:
    pale = 0.13 if len(lines) <= MANY else 0.06
    for line in lines:
        control = line.look.colour == canvas.CONTROL
        if not control:
            axes.fill_between(line.x, line.low, line.high, color=line.look.colour, alpha=pale, linewidth=0)
        axes.plot(
            line.x,
            line.mean,
            color=line.look.colour,
            linewidth=1.5 if control else 1.9,
            dashes=line.look.dashes or (None, None),
            dash_capstyle="butt",
        )


def _at(line: MeanCurve, x: float) -> float:
    """The mean at a place between two points."""
    for index in range(1, len(line.x)):
        if line.x[index] >= x:
            share = (x - line.x[index - 1]) / (line.x[index] - line.x[index - 1])
            return line.mean[index - 1] + share * (line.mean[index] - line.mean[index - 1])
    return line.mean[-1]


def _count_axis(axes: "Axes", label: str, narrow: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid(visible=False, axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(4 if narrow else 7, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.set_xlabel(label, labelpad=7)


def _name(figure: "Figure", axes: "Axes", lines: Sequence[MeanCurve], narrow: bool) -> None:
    """Name the lines at their ends, best last value lowest; in a narrow figure, in a key below."""
    low, high = axes.get_ylim()
    box = axes.get_position()
    points = float(box.height * figure.get_size_inches()[1] * 72)
    ordered = sorted(lines, key=lambda line: line.mean[-1])
    if narrow:
        _key(figure, ordered)
        return
    targets = [min(max((line.mean[-1] - low) / (high - low), 0.0), 1.0) * points - LINE / 2 for line in ordered]
    for line, place in zip(ordered, spread(targets, [LINE] * len(ordered), -20.0, points + 8), strict=True):
        arrow = "\N{UPWARDS ARROW} " if line.mean[-1] > high else ""
        axes.annotate(
            f"{line.mean[-1]:.3f}  {arrow}{line.name}",
            (1.0, (place + LINE / 2) / points),
            xycoords="axes fraction",
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=line.look.colour,
            annotation_clip=False,
        )


def _key(figure: "Figure", lines: Sequence[MeanCurve]) -> None:
    from matplotlib.lines import Line2D

    height = float(figure.get_size_inches()[1])
    for row, line in enumerate(lines):
        y = (0.1 + 0.17 * (len(lines) - 1 - row)) / height
        own: dict[str, Any] = {"transform": figure.transFigure, "color": line.look.colour}
        sample = Line2D([0.03, 0.1], [y, y], linewidth=1.9, **own)
        if line.look.dashes:
            sample.set_dashes(line.look.dashes)
        figure.add_artist(sample)
        figure.text(0.12, y, f"{line.mean[-1]:.3f}  {line.name}", va="center", fontsize=8.5, color=line.look.colour)
