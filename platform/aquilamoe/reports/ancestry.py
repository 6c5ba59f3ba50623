"""The graph of stages as SVG: who read whose output, a link a stage, from the corpus down."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from aquilamoe.ancestors import ancestors
from aquilamoe.config.growth import GROWTH_KINDS
from aquilamoe.format import ABSENT, count, decimal
from aquilamoe.pipeline.figures import Record, input_stages, metric

LANE, ROW = 152, 84  # distance between boxes, in units of the drawing
WIDTH, HEIGHT = 132, 60
LONGEST = 16  # characters of a name that fit a box
GAP = ROW - HEIGHT


def graph_svg(records: Mapping[str, Record], chain: Sequence[str], colours: Mapping[str, str]) -> str:
    """Draw the stages from top to bottom, an edge for each input that no longer path implies. Stages may be missing.

    A box is a link to `#stage-<its position>`.
    """
    parents = {name: _parents(record, records) for name, record in records.items()}
    places = _places(parents, chain)
    edges = [(source, target) for target in parents for source in _direct(target, parents)]
    lanes, body = 1 + max((lane for _, lane in places.values()), default=0), []
    for source, target in edges:
        path, lane = _path(places, places[source], places[target])
        lanes = max(lanes, lane + 1)
        body.append(Markup('<path class="edge" d="{}"/>').format(path))
    for index, (name, record) in enumerate(records.items()):
        body.append(_box(index, name, record, places[name], colours.get(name)))
    rows = 1 + max((depth for depth, _ in places.values()), default=0)
    width, height = LANE * lanes - LANE + WIDTH + 8, ROW * rows - ROW + HEIGHT + 8
    return (
        Markup(
            '<svg class="graph" viewBox="-4 -4 {} {}" style="max-width:{}px" role="group" aria-label="Graph of stages">'
        ).format(width, height, width)
        + Markup("").join(body)
        + Markup("</svg>")
    )


def _parents(record: Record, records: Mapping[str, Record]) -> list[str]:
    return sorted({stage for stage in input_stages(record).values() if stage in records})


def _direct(name: str, parents: Mapping[str, list[str]]) -> list[str]:
    """Parents that are not also ancestors of another parent: the transitive reduction."""
    return [
        parent
        for parent in parents[name]
        if not any(parent in ancestors(other, parents.__getitem__) for other in parents[name] if other != parent)
    ]


def _places(parents: Mapping[str, list[str]], chain: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return (depth, lane) of each stage: the longest way from a root, and the first free lane, the chain first."""
    depth: dict[str, int] = {}
    for name in sorted(parents, key=lambda stage: len(ancestors(stage, parents.__getitem__))):
        depth[name] = 1 + max((depth[parent] for parent in parents[name]), default=-1)
    taken: set[tuple[int, int]] = set()
    places: dict[str, tuple[int, int]] = {}
    for name in sorted(parents, key=lambda stage: stage not in chain):
        lane = next(lane for lane in range(len(parents)) if (depth[name], lane) not in taken)
        taken.add((depth[name], lane))
        places[name] = depth[name], lane
    return places


def _path(places: Mapping[str, tuple[int, int]], start: tuple[int, int], end: tuple[int, int]) -> tuple[str, int]:
    """An edge that travels in the first lane, at or beside both ends, without boxes in its way; and that lane."""
    between = {place for place in places.values() if start[0] < place[0] < end[0]}
    lane = max(start[1], end[1])
    while any((depth, lane) in between for depth in range(start[0] + 1, end[0])):
        lane += 1
    top, bottom = start[0] * ROW + HEIGHT, end[0] * ROW
    x0, x, x1 = (column * LANE + WIDTH / 2 for column in (start[1], lane, end[1]))
    bend = GAP / 2
    if end[0] - start[0] <= 1:
        return f"M{x0:g} {top}C{x0:g} {top + bend:g} {x1:g} {bottom - bend:g} {x1:g} {bottom}", lane
    return (
        f"M{x0:g} {top}C{x0:g} {top + bend:g} {x:g} {top + bend:g} {x:g} {top + GAP}"
        f"V{bottom - GAP}C{x:g} {bottom - bend:g} {x1:g} {bottom - bend:g} {x1:g} {bottom}"
    ), lane


def _box(index: int, name: str, record: Record, place: tuple[int, int], colour: str | None) -> Markup:
    """A stage: its name, its size and tokens, its loss."""
    x, y = place[1] * LANE, place[0] * ROW
    short = name if len(name) <= LONGEST else name[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
    size, tokens, loss = facts(record)
    lines = [" \N{MIDDLE DOT} ".join(each for each in (size, tokens) if each), loss]
    text = Markup("").join(
        Markup('<text class="fact" x="{}" y="{}">{}</text>').format(x + WIDTH / 2, y + 35 + 15 * row, line)
        for row, line in enumerate(lines)
    )
    label = ", ".join(each for each in (name, size, tokens, loss) if each)
    return Markup(
        '<a href="#stage-{}" class="node" aria-label="{}">'
        '<rect x="{}" y="{}" width="{}" height="{}" rx="6" stroke="{}"/>'
        '<text class="name" x="{}" y="{}" fill="{}">{}</text>{}</a>'
    ).format(
        index, label, x, y, WIDTH, HEIGHT, colour or "#D1D5DB",
        x + WIDTH / 2, y + 18, colour or "#1F2937", short, text,
    )  # fmt: skip


def facts(record: Record) -> tuple[str, str, str]:
    """A stage's parameters, tokens and loss in a few characters each; empty where it has none."""
    kind = record.get("kind")
    size = count(metric(record, "params_total"))
    tokens = count(metric(record, "tokens")) if kind == "pretrain" else ABSENT
    grows = kind in GROWTH_KINDS
    start, end = (
        metric(record, key) for key in (("source_loss", "target_loss") if grows else ("loss_start", "loss_end"))
    )
    loss = "" if end is None else f"loss {decimal(start, 2)} \N{RIGHTWARDS ARROW} {decimal(end, 2)}"
    return size if size != ABSENT else "", f"{tokens} tokens" if tokens != ABSENT else "", loss
