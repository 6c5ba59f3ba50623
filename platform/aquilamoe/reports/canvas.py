"""Matplotlib without its side effects: a figure in a fixed style, out as small deterministic SVGs and as a PNG."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquilamoe.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito, distinguishable with any colour vision; one colour a trained stage, grey for what it is compared with.
PALETTE = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL = "#6B7280"
INK = "#1F2937"
MUTED = "#6B7280"
GRID = "#E5E7EB"
RULE = "#9CA3AF"
HAIRLINE = "#D1D5DB"
SHADE, PAPER = "#F3F4F6", "#FFFFFF"
# The variables of style.css that take the colours' places in a page, which may be dark.
NAMED = {INK: "ink", MUTED: "muted", GRID: "line", RULE: "rule", HAIRLINE: "hairline", SHADE: "shade", PAPER: "paper"}
VARIABLES = {
    colour.lower(): name
    for colour, name in (*NAMED.items(), *((each, f"series-{i}") for i, each in enumerate(PALETTE)))
}
DPI = 160  # of PNG files
FONTS = "'Inter', 'Helvetica Neue', 'Segoe UI', 'Noto Sans', 'DejaVu Sans', Arial, sans-serif"
STYLE: dict[str, Any] = {
    "svg.hashsalt": "aquilamoe",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; wider than the fonts above, so nothing overlaps in those
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "xtick.major.pad": 6.0,
    "ytick.major.pad": 6.0,
}
# A white rim around text keeps labels legible where they cross a line.
CSS = (
    f"svg.plot text{{font-family:{FONTS}!important;paint-order:stroke;stroke:#fff;stroke-width:3px}}"
    "svg.plot text{stroke-linejoin:round}"
    "svg.plot path,svg.plot use{stroke-linejoin:round}"
)


# Before its first import, wherever that is: on a new machine it reports that it made a cache of fonts.
logging.getLogger("matplotlib").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn: `draw` gets a figure of a size and whether it is the one for a narrow page.

    name: of its files, and what keeps its ids apart from other figures' in a page. title: what it shows, for those who
    cannot see it. wide, narrow: sizes in inches; without a narrow one the wide one serves everywhere.
    """

    name: str
    title: str
    draw: Callable[["Figure", bool], None]
    wide: tuple[float, float]
    narrow: tuple[float, float] | None = None

    def svg(self, narrow: bool = False) -> str:
        """A standalone SVG. The bytes depend only on the drawing; text stays text, in a list of usual fonts."""
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        out = io.StringIO()
        with self._drawn(narrow) as figure:
            FigureCanvasSVG(figure)
            figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
        return _tidy(out.getvalue(), self.title, self.name + ("-narrow" if narrow else ""))

    def png(self) -> bytes:
        """The same on white, as a picture."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        out = io.BytesIO()
        with self._drawn(narrow=False) as figure:
            FigureCanvasAgg(figure)
            figure.savefig(out, format="png", dpi=DPI, facecolor=PAPER, metadata={"Software": None})
        return out.getvalue()

    def save(self, folder: Path) -> None:
        """Write `<name>.svg` and `<name>.png`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{self.name}.svg", self.svg())
        write_atomically(folder / f"{self.name}.png", self.png())

    def shown(self) -> "Shown":
        """What a page shows of it."""
        return Shown(self.name, embedded(self.svg()), embedded(self.svg(narrow=True)) if self.narrow else "")

    @contextmanager
    def _drawn(self, narrow: bool) -> Iterator["Figure"]:
        from matplotlib import style
        from matplotlib.figure import Figure

        with style.context(["default", STYLE]), warnings.catch_warnings():
            # The font that measures text lacks Chinese; the browser's fonts draw it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure = Figure(figsize=self.narrow if narrow and self.narrow else self.wide)
            self.draw(figure, narrow)
            yield figure


@dataclass(frozen=True)
class Shown:
    """A figure in a page: SVG for a wide window, and for a narrow one, empty where the wide one serves."""

    name: str
    wide: str
    narrow: str


def _tidy(text: str, title: str, name: str) -> str:
    """Drop what a figure in a page does not need, and give it a class, a description and ids of its own."""
    from markupsafe import escape

    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<style[^>]*>.*?</style>", f"<style>{CSS}</style>", text, count=1, flags=re.S)
    text = text.replace("xlink:href", "href").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: f' id="{name}-{match[1]}"' if match[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box, "matplotlib writes a viewBox"
    opening = f'<svg class="plot" xmlns="http://www.w3.org/2000/svg" {box[0]} role="img" aria-label="{escape(title)}">'
    return opening + body


def embedded(text: str) -> str:
    """Return an SVG for use inside a page, which has the namespace, the style and the colours."""
    text = text.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
    return themed(re.sub(r"<style>.*?</style>", "", text, flags=re.S))


def themed(text: str) -> str:
    """Let the page choose the colours of a drawing: `#1F2937` becomes `var(--ink, #1F2937)`."""
    return re.sub(
        r"#[0-9a-fA-F]{6}\b",
        lambda match: f"var(--{name}, {match[0]})" if (name := VARIABLES.get(match[0].lower())) else match[0],
        text,
    )
