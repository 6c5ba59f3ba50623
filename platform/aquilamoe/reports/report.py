"""The report of an experiment: pages that lead to each other, and every figure as SVG and PNG beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aquilamoe.pipeline import integrity
from aquilamoe.pipeline.stage import Input
from aquilamoe.pipeline.store import METRICS, read_points
from aquilamoe.reports import figure, lineage_page, page, router_page
from aquilamoe.reports.template import Heading, Link

INDEX = "index.html"
LINEAGE = "lineage.html"
ROUTER = "router.html"
LABELS = {INDEX: "Pipeline", LINEAGE: "Lineage", ROUTER: "Routers"}
ROUTER_POINTS, ROUTING = "router.jsonl", "routing.json"


def write(
    heading: Heading, folder: Path, *, done: Mapping[str, Input], chain: Sequence[str], control: str | None
) -> Path:
    """Write all pages and figures into `folder`; return the first page. What it shows is read from finished outputs."""
    for output in done.values():
        read = [name for name in (METRICS, ROUTER_POINTS, ROUTING) if name in output.record["files"]]
        integrity.check(output.directory, output.record, "the report", read)
    records = {name: output.record for name, output in done.items()}
    curves = {name: read_points(output.directory / METRICS) for name, output in done.items()}
    routers = {
        name: points for name, output in done.items() if (points := read_points(output.directory / ROUTER_POINTS))
    }
    routing = _routing(done)
    addresses = [INDEX, LINEAGE, *([ROUTER] if routers or routing else [])]
    tints = figure.tints(records, curves, chain, control)
    first = folder / INDEX
    drawings = page.render(
        heading,
        first,
        records=records,
        curves=curves,
        chain=chain,
        control=control,
        pages=_links(addresses, INDEX),
    )
    lineage_page.render(
        heading, folder / LINEAGE, records=records, chain=chain, tints=tints, pages=_links(addresses, LINEAGE)
    )
    if ROUTER in addresses:
        drawings += router_page.render(
            heading,
            folder / ROUTER,
            records=records,
            routers=routers,
            routing=routing,
            pages=_links(addresses, ROUTER),
        )
    for drawing in drawings:
        drawing.save(folder)
    return first


def _links(addresses: Sequence[str], here: str) -> list[Link]:
    return [(LABELS[address], address, address == here) for address in addresses]


def _routing(done: Mapping[str, Input]) -> dict[str, Any]:
    """Routing tables of the evaluations, by stage; the last evaluation counts."""
    found: dict[str, Any] = {}
    for output in done.values():
        path = output.directory / ROUTING
        if output.record.get("kind") == "evaluate" and path.exists():
            found |= router_page.by_stage(output.record, json.loads(path.read_text(encoding="utf-8")))
    return found
