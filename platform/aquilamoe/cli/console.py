"""How wide the terminal is, and a curve in one line of it."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from aquilamoe.config.messages import printable

SPARKS = "▁▂▃▄▅▆▇█"


def console() -> Console:
    """Standard output; wide enough for the tables when it is a file or a pipe.

    Whatever is printed, a name from a file cannot move the cursor or clear the screen.
    """
    found = Console(highlight=False, markup=False)
    found = found if found.is_terminal else Console(highlight=False, markup=False, width=160)
    found.push_render_hook(_Escaping())
    return found


class _Escaping(RenderHook):
    """Text on its way to the terminal, with its control characters escaped; rich's own are segments of their own."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


@dataclass
class _Escaped:
    renderable: ConsoleRenderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        return _escaped(console.render(self.renderable, options))


def _escaped(segments: Iterable[Segment]) -> Iterable[Segment]:
    for text, style, control in segments:
        lines = text.split("\n")
        yield Segment(text if control else "\n".join(printable(line) for line in lines), style, control)


def spark(values: list[float], width: int) -> str:
    """A line of `width` characters at most, from the lowest value to the highest; each is a mean of its neighbours."""
    columns = min(width, len(values))
    if columns < 2:
        return ""
    edges = [len(values) * column // columns for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(SPARKS[round((mean - low) / span * (len(SPARKS) - 1)) if span else 0] for mean in means)
