"""The router page: whether the experts of a Mixture of Experts are alive, and what each of them is for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquilamoe.pipeline.figures import Record, input_stages
from aquilamoe.reports import router_figures, template
from aquilamoe.reports.canvas import Drawing, Shown
from aquilamoe.reports.curves import Points
from aquilamoe.reports.template import Heading, Link

SILENT = 0.1  # of the mean load: an expert below it is hardly used


@dataclass(frozen=True, kw_only=True)
class RouterStage:
    """A stage that trained a Mixture of Experts: its last measured step, and figures of all of them."""

    stage: str
    dropped: int
    silent: list[str]  # experts that are hardly used at the end
    experts: int
    layers: int
    load: Shown
    entropy: Shown


@dataclass(frozen=True)
class Examined:
    """A checkpoint whose routers read held-out text; `rows` are of its layers."""

    stage: str
    languages: list[str]
    rows: list[list[str]]
    choices: Shown


def render(
    heading: Heading,
    target: Path,
    *,
    records: Mapping[str, Record],
    routers: Mapping[str, Points],
    routing: Mapping[str, Mapping[str, Any]],
    pages: list[Link] | None = None,
) -> list[Drawing]:
    """Write the page to `target` and return its figures.

    routers: stage -> points of router.jsonl. routing: of routing.json of the evaluation, stage -> table.
    """
    drawings: list[Drawing] = []
    trained = [_trained(stage, points, drawings) for stage, points in routers.items() if points]
    examined = [_examined(stage, table, drawings) for stage, table in routing.items()]
    context = {"experiment": heading.experiment, "trained": trained, "examined": examined, "kinds": _kinds(records)}
    template.write(target, "router.html.jinja", context, pages)
    return drawings


def by_stage(record: Record, routing: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of an evaluation by the stage behind each role."""
    stages = input_stages(record)
    return {stages.get(role, role): table for role, table in routing.items()}


def _kinds(records: Mapping[str, Record]) -> dict[str, str]:
    return {name: str(record.get("kind")) for name, record in records.items()}


def _trained(stage: str, points: Points, drawings: list[Drawing]) -> RouterStage:
    load, entropy = router_figures.load_figure(stage, points), router_figures.entropy_figure(stage, points)
    drawings += [load, entropy]
    last = points[-1]
    experts = len(last["load"][0])
    silent = [
        f"layer {layer}, expert {expert}"
        for layer, shares in enumerate(last["load"])
        for expert, share in enumerate(shares)
        if share * experts < SILENT
    ]
    dropped = sum(sum(point["dropped"]) for point in points)
    return RouterStage(
        stage=stage,
        dropped=dropped,
        silent=silent,
        experts=experts,
        layers=len(last["load"]),
        load=load.shown(),
        entropy=entropy.shown(),
    )


def _examined(stage: str, table: Mapping[str, Any], drawings: list[Drawing]) -> Examined:
    drawing = router_figures.language_figure(stage, table)
    drawings.append(drawing)
    languages = list(table["languages"])
    rows = []
    for index, layer in enumerate(table["layers"]):
        loads = [table["languages"][name]["load"][index] for name in languages]
        fullest = [f"{max(shares) * len(shares):.2f}" for shares in loads]
        entropies = [f"{table['languages'][name]['entropy'][index]:.3f}" for name in languages]
        rows.append([str(layer), *fullest, *entropies, _distance(loads), _cosine(table["cosine"][index])])
    return Examined(stage, languages, rows, drawing.shown())


def _distance(loads: Sequence[Sequence[float]]) -> str:
    """Total variation between the first two languages, as a share of the choices."""
    if len(loads) < 2:
        return "-"
    return f"{sum(abs(a - b) for a, b in zip(*loads[:2], strict=True)) / 2:.1%}"


def _cosine(cosines: Sequence[Sequence[float]]) -> str:
    """Mean over pairs of experts."""
    size = len(cosines)
    return f"{(sum(map(sum, cosines)) - size) / max(1, size * (size - 1)):.4f}"
