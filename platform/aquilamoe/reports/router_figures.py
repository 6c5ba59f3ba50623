"""What routers did, as figures: load by layer and expert over time, entropy, which experts each language chooses."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aquilamoe.format import count
from aquilamoe.reports import canvas
from aquilamoe.reports.canvas import Drawing
from aquilamoe.reports.curves import Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LAYERS, MOST_TIMES = 12, 60  # that a figure shows
DIVERGING = "PuOr_r"  # around balance, distinguishable with any colour vision; the middle is pale
FULLEST = 2.0  # load over mean load that the colours reach at least


def load_figure(stage: str, points: Points) -> Drawing:
    """Load of each expert over the mean load, a panel a layer: tokens to the right, experts upwards."""
    times = _spread(points, MOST_TIMES)
    layers = _spread(range(len(points[0]["load"])), MOST_LAYERS)
    experts = len(points[0]["load"][0])
    loads = {layer: [[share * experts for share in point["load"][layer]] for point in times] for layer in layers}
    most = max(FULLEST, *(value for rows in loads.values() for row in rows for value in row))

    def draw(figure: "Figure", narrow: bool) -> None:
        columns = 2 if narrow else 3
        rows = -(-len(layers) // columns)
        panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        image: Any = None
        for axes, layer in zip(panels, layers, strict=False):
            image = axes.imshow(
                list(zip(*loads[layer], strict=True)), aspect="auto", origin="lower", interpolation="nearest",
                cmap=DIVERGING, norm=_around_balance(most), extent=(0, times[-1]["tokens"], -0.5, experts - 0.5),
            )  # fmt: skip
            _plain(axes, f"layer {layer}")
            axes.xaxis.set_major_formatter(lambda value, _: count(value))
            axes.set_xticks([0, times[-1]["tokens"]])
            for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=False):
                label.set_horizontalalignment(side)
            _whole_numbers(axes, experts)
        for axes in panels[len(layers) :]:
            axes.set_axis_off()
        figure.subplots_adjust(
            left=0.09 if narrow else 0.045,
            right=0.98,
            bottom=_inches(1.05, rows),
            top=1 - _inches(0.3, rows),
            hspace=0.45,
            wspace=0.12,
        )
        _key(figure, image, "load of an expert / mean load (experts upwards, tokens to the right)", rows, narrow)

    return Drawing(
        f"load-{stage}", f"Load of each expert of each layer of {stage} over time", draw,
        (10.0, _height(-(-len(layers) // 3))), (5.0, _height(-(-len(layers) // 2))),
    )  # fmt: skip


def _around_balance(most: float) -> Any:
    """Colours from an unused expert over balance, which is pale, to the fullest."""
    from matplotlib.colors import TwoSlopeNorm

    return TwoSlopeNorm(1.0, vmin=0.0, vmax=most)


def _height(rows: int) -> float:
    return 1.35 * rows + 1.2


def _inches(size: float, rows: int) -> float:
    """A size in inches as a share of the figure."""
    return size / _height(rows)


def _key(figure: "Figure", image: Any, label: str, rows: int, narrow: bool) -> None:
    height = _height(rows)
    bar = figure.colorbar(
        image, cax=figure.add_axes((0.15 if narrow else 0.3, 0.48 / height, 0.7 if narrow else 0.4, 0.1 / height)),
        orientation="horizontal",
    )  # fmt: skip
    bar.set_label(label if not narrow else label.split(" (")[0], color=canvas.MUTED, fontsize=8.5)
    bar.outline.set_visible(False)


def _whole_numbers(axes: "Axes", experts: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(min(4, max(1, experts - 1)), integer=True))


def _plain(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=8.5, color=canvas.INK, pad=5)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def entropy_figure(stage: str, points: Points) -> Drawing:
    """Entropy of the routers of each layer, and the load of the fullest expert, over the tokens of the stage."""
    times = _spread(points, 300)
    experts = len(points[0]["load"][0])
    layers = _spread(range(len(points[0]["entropy"])), MOST_LAYERS)

    def draw(figure: "Figure", narrow: bool) -> None:
        left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        tokens = [point["tokens"] for point in times]
        for index, layer in enumerate(layers):
            style: dict[str, Any] = {"color": canvas.PALETTE[index % len(canvas.PALETTE)], "linewidth": 1.4}
            style["linestyle"] = ("-", (0, (4, 2)))[index // len(canvas.PALETTE) % 2]
            left.plot(tokens, [point["entropy"][layer] for point in times], label=f"layer {layer}", **style)
            right.plot(tokens, [max(point["load"][layer]) * experts for point in times], **style)
        for axes, level in ((left, math.log(experts)), (right, 1.0)):
            axes.axhline(level, color=canvas.MUTED, linewidth=0.8, dashes=(4, 2.5))
            axes.xaxis.set_major_formatter(lambda value, _: count(value))
            axes.set_xlabel("tokens of the stage", labelpad=5)
            axes.grid(visible=False, axis="x")
        left.margins(y=0.25)  # room for the legend
        left.set_title("entropy of the routers, nats", loc="left", fontsize=9, color=canvas.INK, pad=8)
        right.set_title("load of the fullest expert / mean load", loc="left", fontsize=9, color=canvas.INK, pad=8)
        left.legend(frameon=False, fontsize=8, labelcolor="linecolor", ncols=3, handlelength=1.2, columnspacing=1.0)
        margins = (0.13, 0.09, 0.94) if narrow else (0.068, 0.17, 0.88)
        figure.subplots_adjust(
            left=margins[0], right=0.985, bottom=margins[1], top=margins[2], wspace=0.16, hspace=0.45
        )

    title = f"Entropy of the routers of {stage}, and load of the fullest expert, over time"
    return Drawing(f"entropy-{stage}", title, draw, (10.0, 3.4), (5.0, 6.2))


def language_figure(stage: str, table: Mapping[str, Any]) -> Drawing:
    """Which experts the held-out tokens of each language choose: layers downwards, experts to the right."""
    languages = table["languages"]
    experts = len(next(iter(languages.values()))["load"][0])
    shares = {
        name: [[share * experts for share in layer] for layer in each["load"]] for name, each in languages.items()
    }
    most = max(FULLEST, *(value for layers in shares.values() for layer in layers for value in layer))

    def draw(figure: "Figure", narrow: bool) -> None:
        panels = figure.subplots(1, len(shares), squeeze=False, sharey=True)[0]
        image: Any = None
        for axes, (language, layers) in zip(panels, shares.items(), strict=True):
            image = axes.imshow(
                layers, aspect="auto", interpolation="nearest", cmap=DIVERGING, norm=_around_balance(most)
            )
            _plain(axes, language)
            axes.set_yticks(range(len(layers)), [str(layer) for layer in table["layers"]])
            axes.set_xlabel("expert", labelpad=4)
            if experts <= 16 and not (narrow and experts > 8):
                _numbers(axes, layers, most, narrow)
        panels[0].set_ylabel("layer", labelpad=5)
        height = _language_height(len(table["layers"]))
        figure.subplots_adjust(
            left=0.11 if narrow else 0.055, right=0.985, bottom=1.05 / height, top=1 - 0.3 / height, wspace=0.06
        )
        bar = figure.colorbar(
            image, cax=figure.add_axes((0.15 if narrow else 0.3, 0.42 / height, 0.7 if narrow else 0.4, 0.1 / height)),
            orientation="horizontal",
        )  # fmt: skip
        bar.set_label("share of the tokens / that of balance", color=canvas.MUTED, fontsize=8.5)
        bar.outline.set_visible(False)

    height = _language_height(len(table["layers"]))
    title = f"Which experts the tokens of {' and '.join(shares)} choose in {stage}"
    return Drawing(f"languages-{stage}", title, draw, (10.0, height), (5.0, height))


def _language_height(layers: int) -> float:
    return min(9.0, 0.34 * layers + 1.5)


def _numbers(axes: "Axes", layers: Sequence[Sequence[float]], most: float, narrow: bool) -> None:
    for row, layer in enumerate(layers):
        for column, value in enumerate(layer):
            dark = value < 0.4 or value > 1 + 0.6 * (most - 1)
            axes.text(
                column, row, f"{value:.1f}", ha="center", va="center", fontsize=6.5 if narrow else 8,
                color="#fefefe" if dark else "#1e1e1e",
            )  # fmt: skip


def _spread(values: Sequence[Any], most: int) -> list[Any]:
    """All values, or `most` of them, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
