"""The graph of stages as a small SVG: who read whose output."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from aquilamoe.reports.rows import Record, input_stages

COLUMN, LANE = 112, 62  # distance between boxes, in units of the drawing
WIDTH, HEIGHT = 90, 42
LONGEST = 13  # characters of a name that fit a box


def graph_svg(records: Mapping[str, Record], chain: Sequence[str], colours: Mapping[str, str]) -> str:
    """Draw the stages left to right, an edge for each input that no longer path implies. Stages may be missing."""
    parents = {name: _parents(record, records) for name, record in records.items()}
    places = _places(parents, chain)
    edges = [(source, target) for target in parents for source in _direct(target, parents)]
    lanes, body = 1 + max((lane for _, lane in places.values()), default=0), []
    for source, target in edges:
        path, lane = _path(places, places[source], places[target])
        lanes = max(lanes, lane + 1)
        body.append(Markup('<path class="edge" d="{}"/>').format(path))
    for name, (column, lane) in places.items():
        body.append(_box(name, str(records[name].get("fingerprint", "")), column, lane, colours.get(name)))
    width = COLUMN * (1 + max((column for column, _ in places.values()), default=0)) - COLUMN + WIDTH + 2
    height = LANE * lanes - LANE + HEIGHT + 2
    return (
        Markup(
            '<svg class="graph" viewBox="-1 -1 {} {}" style="max-width:{}px" role="img" aria-label="Graph of stages">'
        ).format(width, height, width)
        + Markup("").join(body)
        + Markup("</svg>")
    )


def _parents(record: Record, records: Mapping[str, Record]) -> list[str]:
    return sorted({stage for stage in input_stages(record).values() if stage in records})


def _ancestors(name: str, parents: Mapping[str, list[str]]) -> set[str]:
    found: set[str] = set()
    todo = list(parents[name])
    while todo:
        stage = todo.pop()
        if stage not in found:
            found.add(stage)
            todo += parents[stage]
    return found


def _direct(name: str, parents: Mapping[str, list[str]]) -> list[str]:
    """Parents that are not also ancestors of another parent: the transitive reduction."""
    return [
        parent
        for parent in parents[name]
        if not any(parent in _ancestors(other, parents) for other in parents[name] if other != parent)
    ]


def _places(parents: Mapping[str, list[str]], chain: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (column, lane) of each stage: the longest way from a root, and the first free lane, the chain first."""
    depth: dict[str, int] = {}
    for name in sorted(parents, key=lambda stage: len(_ancestors(stage, parents))):
        depth[name] = 1 + max((depth[parent] for parent in parents[name]), default=-1)
    taken: set[tuple[int, int]] = set()
    places: dict[str, tuple[int, int]] = {}
    for name in sorted(parents, key=lambda stage: stage not in chain):
        lane = next(lane for lane in range(len(parents)) if (depth[name], lane) not in taken)
        taken.add((depth[name], lane))
        places[name] = depth[name], lane
    return places


def _path(places: Mapping[str, tuple[int, int]], start: tuple[int, int], end: tuple[int, int]) -> tuple[str, int]:
    """Return an edge that travels in the first lane, at or below both ends, without boxes in its way; and that lane."""
    between = {place for place in places.values() if start[0] < place[0] < end[0]}
    lane = max(start[1], end[1])
    while any((column, lane) in between for column in range(start[0] + 1, end[0])):
        lane += 1
    left, right = start[0] * COLUMN + WIDTH, end[0] * COLUMN
    y0, y, y1 = (row * LANE + HEIGHT / 2 for row in (start[1], lane, end[1]))
    bend = (COLUMN - WIDTH) / 2
    if end[0] - start[0] <= 1:
        return f"M{left} {y0:g}C{left + bend} {y0:g} {right - bend} {y1:g} {right} {y1:g}", lane
    gap = COLUMN - WIDTH
    return (
        f"M{left} {y0:g}C{left + bend} {y0:g} {left + bend} {y:g} {left + gap} {y:g}"
        f"H{right - gap}C{right - bend} {y:g} {right - bend} {y1:g} {right} {y1:g}"
    ), lane


def _box(name: str, fingerprint: str, column: int, lane: int, colour: str | None) -> Markup:
    x, y = column * COLUMN, lane * LANE
    short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return Markup(
        '<g><rect x="{}" y="{}" width="{}" height="{}" rx="5" stroke="{}"/>'
        '<text class="name" x="{}" y="{}" fill="{}">{}</text><text class="print" x="{}" y="{}">{}</text></g>'
    ).format(
        x, y, WIDTH, HEIGHT, colour or "#D1D5DB",
        x + WIDTH / 2, y + 18, colour or "#1F2937", escape(short),
        x + WIDTH / 2, y + 33, fingerprint[:8],
    )  # fmt: skip
