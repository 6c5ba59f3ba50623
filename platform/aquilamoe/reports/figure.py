"""The figures: held-out loss against cumulative model FLOPs (the paper's Figure 3), and what training looked like."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aquilamoe.format import count, power
from aquilamoe.pipeline.figures import Record
from aquilamoe.reports import canvas, labels
from aquilamoe.reports.canvas import Drawing
from aquilamoe.reports.curves import (
    Jump,
    Points,
    Series,
    TrainingCurve,
    chain_of,
    crossing,
    line_of,
    read_at,
    smoothed,
    thinned,
)
from aquilamoe.reports.view import Box, View, extent, flops_ticks, spread, superscript, whole, window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches; at 72 points an inch a drawing is 720 units wide, that for a narrow page 360.
LOSS_SIZE, LOSS_NARROW = (10.0, 6.0), (5.0, 5.4)
LOSS_BOX, LOSS_NARROW_BOX = Box(0.068, 0.108, 0.842, 0.768), Box(0.115, 0.115, 0.735, 0.745)
TRAIN_SIZE, TRAIN_NARROW = (10.0, 3.1), (5.0, 3.1)
TICK = 62.0  # points that a number below the axis needs
LINE = 11.5  # points between lines of a label
LETTER = 5.4  # points of a letter in it
MOST_POINTS = 400
LONGEST = 14  # characters of a stage's name


def colours(stages: Sequence[TrainingCurve]) -> dict[str, str]:
    """Return a colour for each trained stage, the same in every figure."""
    return {stage.stage: canvas.PALETTE[i % len(canvas.PALETTE)] for i, stage in enumerate(stages)}


def tints(
    records: Mapping[str, Record], curves: Mapping[str, Points], chain: Sequence[str], control: str | None
) -> dict[str, str]:
    """The same for pages, with what the line is compared with."""
    found = colours(chain_of(records, curves, chain)[0])
    return found | ({control: canvas.CONTROL} if control in records and control else {})


def loss_figure(
    stages: Sequence[TrainingCurve], jumps: Sequence[Jump], control: TrainingCurve | None
) -> Drawing | None:
    """Held-out loss over log10 cumulative FLOPs: the chain, its growths, the control. None without any point.

    It shows the part where the stages differ; an inset shows where in the whole run that lies.
    """
    drawn = [stage for stage in stages if stage.validation.x]
    control = control if control and control.validation.x else None
    everything = [*drawn, *([control] if control else [])]
    if not everything:
        return None
    view = window([stage.validation for stage in everything], jumps)
    title = "Held-out loss against cumulative model FLOPs of " + ", ".join(stage.stage for stage in everything)
    tints = colours(stages)

    def draw(figure: "Figure", narrow: bool) -> None:
        box = LOSS_NARROW_BOX if narrow else LOSS_BOX
        axes = figure.add_axes(box.bounds)
        _loss_axes(axes, view)
        _loss_curves(axes, drawn, control, tints)
        _bands(axes, drawn, tints, view)
        full = whole([stage.validation for stage in everything])
        inset = _inset_box(drawn, view, full)
        taken = _growths(axes, jumps, drawn, control, view=view, inset=inset)
        crossed = crossing(line_of(drawn), control.validation) if control else None
        if control and crossed and crossed > view.x_low:
            _crossing(axes, crossed, control.validation, view, taken)
        _ends(axes, drawn, control, tints, view)
        if inset:
            _inset(figure, box.part(*inset.bounds), stages=drawn, control=control, tints=tints, view=view, full=full)

    return Drawing("loss", title, draw, LOSS_SIZE, LOSS_NARROW)


def _loss_axes(axes: "Axes", view: View) -> None:
    axes.set_xscale("log")
    axes.set_xlim(view.x_low, view.x_high)
    axes.set_ylim(view.y_low, view.y_high)
    ticks = flops_ticks(view.x_low, view.x_high, int(_points(axes)[0] // TICK))
    axes.set_xticks(ticks, [superscript(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("cumulative model FLOPs, log scale", labelpad=7)
    axes.set_ylabel("held-out loss, nats per token", labelpad=7)


def _loss_curves(
    axes: "Axes", stages: Sequence[TrainingCurve], control: TrainingCurve | None, tints: dict[str, str]
) -> None:
    if control:
        curve = thinned(control.validation, MOST_POINTS)
        axes.plot(curve.x, curve.y, color=canvas.CONTROL, linewidth=1.6, dashes=(4, 2.5), dash_capstyle="butt")
    for stage in stages:
        curve = thinned(stage.validation, MOST_POINTS)
        axes.plot(curve.x, curve.y, color=tints[stage.stage], linewidth=2.4)


def _bands(axes: "Axes", stages: Sequence[TrainingCurve], tints: dict[str, str], view: View) -> None:
    """Head each stage's part of the axis with its name, size and tokens."""
    shown = [stage for stage in stages if stage.validation.x[-1] > view.x_low]
    width, height = _points(axes)
    texts = [(_short(stage.stage), _size(stage), f"{count(stage.tokens)} tokens") for stage in shown]
    widths = [max(6.2 * len(text[0]), *(5.2 * len(line) for line in text[1:])) + 10 for text in texts]
    targets = [view.across(max(stage.validation.x[0], view.x_low)) * width for stage in shown]
    places = spread(targets, widths, 0.0, width + 74)
    for stage, lines, place in zip(shown, texts, places, strict=True):
        for row, line in enumerate(lines):
            axes.text(
                place / width,
                1 + (46 - row * LINE) / height,
                line,
                transform=axes.transAxes,
                va="top",
                color=tints[stage.stage] if row == 0 else canvas.MUTED,
                fontweight="bold" if row == 0 else "normal",
                fontsize=10 if row == 0 else 8.5,
            )


def _short(name: str, longest: int = LONGEST) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _size(stage: TrainingCurve) -> str:
    if stage.is_sparse:
        return f"{count(stage.params_total)}, {count(stage.params_active)} active"
    return f"{count(stage.params_total)} dense"


def _growths(
    axes: "Axes",
    jumps: Sequence[Jump],
    stages: Sequence[TrainingCurve],
    control: TrainingCurve | None,
    *,
    view: View,
    inset: Box | None,
) -> list[labels.Segment | Box]:
    """Mark each growth: a hairline through the axis, the jump of the loss, what grew. Return what is where."""
    curves = [stage.validation for stage in [*stages, *([control] if control else [])]]
    lines = [(view.across(jump.flops), 0.0, view.across(jump.flops), 1.0) for jump in jumps]
    taken: list[labels.Segment | Box] = [*labels.segments(curves, view), *lines, *([inset] if inset else [])]
    for jump in jumps:
        top = min(jump.after, view.y_high)
        axes.axvline(jump.flops, color=canvas.HAIRLINE, linewidth=0.8, zorder=0.9)
        if abs(jump.after - jump.before) > 0.008 * view.height:
            axes.plot([jump.flops] * 2, [jump.before, top], color=canvas.INK, linewidth=1.2, linestyle=(0, (1, 1.6)))
        axes.plot([jump.flops], [jump.before], "o", markersize=5, color=canvas.INK, markeredgewidth=0)
        axes.plot([jump.flops], [jump.after], "o", markersize=5, color=canvas.PAPER, markeredgecolor=canvas.INK)
        taken.append(_growth_label(axes, jump, curves, view, taken))
    return taken


def _crossing(axes: "Axes", flops: float, control: Series, view: View, taken: Sequence[labels.Segment | Box]) -> None:
    """Mark from where on the line stays below the control, and label at how many FLOPs."""
    width, height = _points(axes)
    loss = read_at(control, flops)
    assert loss is not None
    axes.plot([flops], [loss], "D", markersize=8, color=canvas.PAPER, markeredgecolor=canvas.INK, zorder=6)
    lines = ("crosses the control", f"at {power(flops)} FLOPs")
    wide, high = (LETTER * max(map(len, lines)) + 4) / width, 2 * LINE / height
    target = view.up(loss) - high - 12 / height
    box = labels.place(view.across(flops), target, width=wide, height=high, gap=4 / width, taken=taken)
    for row, line in enumerate(lines):
        axes.text(
            box.left + 1 / width,
            box.bottom + ((1 - row) * LINE + 2) / height,
            line,
            transform=axes.transAxes,
            fontsize=8.5,
            color=canvas.INK,
            fontweight="bold" if row == 0 else "normal",
        )


def _growth_label(
    axes: "Axes", jump: Jump, curves: Sequence[Series], view: View, taken: Sequence[labels.Segment | Box]
) -> Box:
    """Label what grew, above all curves to the right of the growth or at the next place that is free; return where."""
    width, height = _points(axes)
    sizes = f"{count(jump.source_params)} \N{RIGHTWARDS ARROW} {count(jump.target_params)}"
    losses = f"{jump.before:.2f} \N{RIGHTWARDS ARROW} {jump.after:.2f}"
    lines = (jump.label, sizes, losses)
    wide, high = (LETTER * max(map(len, lines)) + 4) / width, 3 * LINE / height
    right = view.along(min(1.0, view.across(jump.flops) + wide))
    highest = max(extent(curves, jump.flops, right)[1], jump.before, jump.after)
    target = view.up(min(highest, view.y_high)) + 7 / height
    box = labels.place(view.across(jump.flops), target, width=wide, height=high, gap=4 / width, taken=taken)
    for row, line in enumerate(lines):
        axes.text(
            box.left + 1 / width,
            box.bottom + ((2 - row) * LINE + 2) / height,
            line,
            transform=axes.transAxes,
            fontsize=8.5,
            color=canvas.INK,
            fontweight="bold" if row == 0 else "normal",
        )
    return box


def _ends(
    axes: "Axes", stages: Sequence[TrainingCurve], control: TrainingCurve | None, tints: dict[str, str], view: View
) -> None:
    """Write the final losses of the chain and of the control at the ends of their curves."""
    width, height = _points(axes)
    ends = [(stage, tints[stage.stage]) for stage in stages[-1:]] + ([(control, canvas.CONTROL)] if control else [])
    ends.sort(key=lambda end: end[0].validation.y[-1])
    targets = [view.up(stage.validation.y[-1]) * height - LINE for stage, _ in ends]
    for (stage, colour), place in zip(ends, spread(targets, [2.3 * LINE] * len(ends), -14.0, height), strict=True):
        x, y = stage.validation.x[-1], stage.validation.y[-1]
        axes.plot([x], [y], "o", markersize=6, color=colour, markeredgecolor=canvas.PAPER, clip_on=False, zorder=5)
        left = view.across(x) + 8 / width
        label: dict[str, Any] = {"transform": axes.transAxes, "color": colour, "va": "center"}
        axes.text(left, (place + 1.5 * LINE) / height, f"{y:.2f}", fontweight="bold", fontsize=12, **label)
        axes.text(left, (place + 0.45 * LINE) / height, _short(stage.stage, 11), fontsize=9, **label)


def _inset_box(stages: Sequence[TrainingCurve], view: View, full: View) -> Box | None:
    """Where the whole run has room inside the axes, in fractions of them; None where it has none, or is no other."""
    if full.height <= 1.25 * view.height:
        return None
    lowest, highest = extent([stage.validation for stage in stages], view.x_low, view.along(0.3))
    if view.up(lowest) < 0.4 and view.up(highest) > 0.6:
        return None  # the curves take both corners
    return Box(0.035, 0.055 if view.up(lowest) >= 0.4 else 0.68, 0.235, 0.27)


def _inset(
    figure: "Figure",
    box: Box,
    *,
    stages: Sequence[TrainingCurve],
    control: TrainingCurve | None,
    tints: dict[str, str],
    view: View,
    full: View,
) -> None:
    """Show the whole run, small, with a frame around the part that the figure shows."""
    from matplotlib.patches import Rectangle

    axes = figure.add_axes(box.bounds, facecolor=canvas.PAPER)
    _loss_curves(axes, stages, control, tints)
    for line in axes.lines:
        line.set_linewidth(1.2)
    axes.set_xscale("log")
    axes.set_xlim(full.x_low, full.x_high)
    axes.set_ylim(full.y_low, full.y_high)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_xticks([], minor=True)
    axes.set_yticks([])
    low, high = max(view.y_low, full.y_low), min(view.y_high, full.y_high)
    frame: dict[str, Any] = {"facecolor": canvas.SHADE, "edgecolor": canvas.RULE, "linewidth": 0.7, "zorder": 0}
    axes.add_patch(Rectangle((view.x_low, low), view.x_high - view.x_low, high - low, **frame))
    axes.text(0.08, 0.97, "the whole run", transform=axes.transAxes, fontsize=8, color=canvas.MUTED)


def _points(axes: "Axes") -> tuple[float, float]:
    """Width and height of the axes in points."""
    assert axes.figure is not None
    box = axes.get_position()
    width, height = axes.figure.get_size_inches()  # type: ignore[union-attr]
    return float(box.width * width * 72), float(box.height * height * 72)


def training_figure(stages: Sequence[TrainingCurve], control: TrainingCurve | None) -> Drawing | None:
    """Training loss over tokens. None without any point."""
    drawn = [stage for stage in [*stages, *([control] if control else [])] if stage.train.x]
    if not drawn:
        return None
    tints = colours(stages) | ({control.stage: canvas.CONTROL} if control else {})

    def draw(figure: "Figure", narrow: bool) -> None:
        _train_panel(figure.subplots(), drawn, tints)
        figure.subplots_adjust(left=0.12 if narrow else 0.068, right=0.985, bottom=0.19, top=0.87)

    return Drawing("training", "Training loss over tokens", draw, TRAIN_SIZE, TRAIN_NARROW)


def _train_panel(axes: "Axes", stages: Sequence[TrainingCurve], tints: dict[str, str]) -> None:
    lowest, late = [], []
    for rank, stage in enumerate(stages):
        curve = thinned(stage.train, MOST_POINTS)
        mean = smoothed(curve, max(1, len(curve.x) // 12))
        axes.plot(curve.x, curve.y, color=tints[stage.stage], linewidth=0.8, alpha=0.3, zorder=1.5)
        axes.plot(mean.x, mean.y, color=tints[stage.stage], linewidth=1.8, zorder=3 - rank / 100)
        lowest.append(min(curve.y))
        late.append(max(mean.y[len(mean.y) // 6 :]))
    # The first sixth of a stage falls steeply and would squash the rest.
    margin = 0.06 * (max(late) - min(lowest)) or 0.1
    axes.set_ylim(min(lowest) - margin, max(late) + margin)
    _panel(axes, "training loss, nats per token", "tokens, ancestors included")
    _key(axes, stages, tints)


def _panel(axes: "Axes", title: str, across: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title, loc="left", fontsize=9, color=canvas.INK, pad=10)
    axes.set_xlabel(across, labelpad=6)
    axes.grid(visible=False, axis="x")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _key(axes: "Axes", stages: Sequence[TrainingCurve], tints: dict[str, str]) -> None:
    """Name the stages in their colours, in a row at the upper right."""
    width, height = _points(axes)
    right = 1.0
    for stage in reversed(stages):
        name = _short(stage.stage)
        axes.text(
            right, 1 - 4 / height, name, transform=axes.transAxes, ha="right", va="top", color=tints[stage.stage],
            fontsize=8.5, fontweight="bold",
        )  # fmt: skip
        right -= (5.4 * len(name) + 16) / width
