"""The figure that puts a run beside the paper's: loss of the three stages by log10 of cumulative FLOPs."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aquilamoe.reports import canvas, paper
from aquilamoe.reports.canvas import Drawing
from aquilamoe.reports.curves import Series, TrainingCurve, thinned
from aquilamoe.reports.figure import MOST_POINTS, colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE, NARROW = (10.0, 3.9), (5.0, 7.0)  # inches


def beside_the_paper(stages: Sequence[TrainingCurve], control: TrainingCurve | None) -> Drawing | None:
    """This run on the left, the paper on the right, each on scales of its own. None without any point of ours."""
    drawn = [stage for stage in stages if stage.validation.x]
    if not drawn:
        return None
    tints = colours(drawn)

    def draw(figure: "Figure", narrow: bool) -> None:
        ours, theirs = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        names = [stage.stage for stage in drawn]
        curves = [thinned(stage.validation, MOST_POINTS) for stage in drawn]
        _panel(ours, "this run, held-out loss", names=names, curves=curves, tints=[tints[name] for name in names])
        if control and control.validation.x:
            curve = thinned(control.validation, MOST_POINTS)
            ours.plot(_logs(curve), curve.y, color=canvas.CONTROL, linewidth=1.4, dashes=(4, 2.5), label=control.stage)
        _panel(
            theirs,
            "the paper, training loss",
            names=list(paper.CURVES),
            curves=paper.curves(),
            tints=list(canvas.PALETTE),
            marker="o",
        )
        for axes in (ours, theirs):
            axes.legend(frameon=False, fontsize=8.5, labelcolor="linecolor", handlelength=1.4)
        margins = (0.125, 0.08, 0.95) if narrow else (0.068, 0.15, 0.9)
        figure.subplots_adjust(
            left=margins[0], right=0.985, bottom=margins[1], top=margins[2], wspace=0.16, hspace=0.38
        )

    title = "Loss of the three stages by cumulative FLOPs: this run, and the paper"
    return Drawing("paper", title, draw, SIZE, NARROW)


def _panel(
    axes: "Axes", title: str, *, names: Sequence[str], curves: Sequence[Series], tints: Sequence[str], marker: str = ""
) -> None:
    for name, curve, tint in zip(names, curves, tints[: len(curves)], strict=True):
        axes.plot(_logs(curve), curve.y, color=tint, linewidth=2.0, marker=marker, markersize=3.5, label=name)
    axes.set_title(title, loc="left", fontsize=9, color=canvas.INK, pad=10)
    axes.set_xlabel("log10 of cumulative FLOPs", labelpad=6)
    axes.set_ylabel("nats per token", labelpad=5)
    axes.grid(visible=False, axis="x")


def _logs(curve: Series) -> list[float]:
    return [math.log10(x) for x in curve.x]
