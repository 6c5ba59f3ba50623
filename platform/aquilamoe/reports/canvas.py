"""Matplotlib without its side effects: a figure in a fixed style, out as one small deterministic SVG."""

import io
import logging
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito, told apart with any colour vision; one colour a trained stage, grey for what it is compared with.
PALETTE = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
CONTROL = "#6B7280"
INK, MUTED, GRID = "#1F2937", "#6B7280", "#E5E7EB"
FONTS = "'Inter', 'Helvetica Neue', 'Segoe UI', 'Noto Sans', 'DejaVu Sans', Arial, sans-serif"
STYLE: dict[str, Any] = {
    "svg.hashsalt": "aquilamoe",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib; wider than the fonts above, so nothing overlaps in those
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": "#9CA3AF",
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


def svg(draw: Callable[["Figure"], None], size: tuple[float, float], title: str, name: str) -> str:
    """Return what `draw` draws as an SVG of `size` inches; `name` keeps its ids apart from other figures' in a page.

    The bytes depend only on the drawing. Text stays text; the file names no font but by a list of fallbacks.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # or a first import tells of its font cache
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = io.StringIO()
    with style.context(["default", STYLE]), warnings.catch_warnings():
        # The font that measures text lacks Chinese; the browser's fonts draw it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size)
        FigureCanvasSVG(figure)
        draw(figure)
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _tidy(out.getvalue(), title, name)


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
    """Return an SVG for use inside HTML, where it needs no namespace."""
    return text.replace(' xmlns="http://www.w3.org/2000/svg"', "", 1)
