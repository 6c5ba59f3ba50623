"""How wide the terminal is, and a curve in one line of it."""

from itertools import pairwise

from rich.console import Console

SPARKS = "▁▂▃▄▅▆▇█"


def console() -> Console:
    """Standard output; wide enough for the tables when it is a file or a pipe."""
    found = Console(highlight=False, markup=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, width=160)


def spark(values: list[float], width: int) -> str:
    """A line of `width` characters at most, from the lowest value to the highest; each is a mean of its neighbours."""
    columns = min(width, len(values))
    if columns < 2:
        return ""
    edges = [len(values) * column // columns for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(SPARKS[round((mean - low) / span * (len(SPARKS) - 1)) if span else 0] for mean in means)
