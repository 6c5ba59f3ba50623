"""How the terminal says amounts, and how wide it is."""

from itertools import pairwise

from rich.console import Console

from aquilamoe.reports import rows

SPARKS = "▁▂▃▄▅▆▇█"


def console() -> Console:
    """Standard output; wide enough for the tables when it is a file or a pipe."""
    found = Console(highlight=False, markup=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, width=160)


def size(count: int) -> str:
    """Bytes with a unit: 8.5 MB."""
    if not count:
        return rows.ABSENT
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


def duration(seconds: float | None) -> str:
    """Seconds as a reader says them: 4 s, 3 min, 5.2 h, 12 days."""
    if seconds is None:
        return rows.ABSENT
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}" if seconds >= 1 or not seconds else "1 s"
    return f"{seconds / 86_400:,.0f} days"


def spark(values: list[float], width: int) -> str:
    """A line of `width` characters at most, from the lowest value to the highest; each is a mean of its neighbours."""
    if len(values) < 2:
        return ""
    columns = min(width, len(values))
    edges = [len(values) * column // columns for column in range(columns + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    return "".join(SPARKS[round((mean - low) / span * (len(SPARKS) - 1)) if span else 0] for mean in means)
