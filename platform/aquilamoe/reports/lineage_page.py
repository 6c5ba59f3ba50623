"""The lineage page: a graph of stages to choose from, and what each is, cost and changed; without scripts a list."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquilamoe.ancestors import ancestors
from aquilamoe.format import ABSENT, count
from aquilamoe.lineage import tree
from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.pipeline.figures import Record, input_stages, number
from aquilamoe.reports import ancestry, canvas, template
from aquilamoe.reports.template import Heading, Link

NEEDED = ("fingerprint", "recipe", "metrics", "files")


@dataclass(frozen=True, kw_only=True)
class Details:
    """One stage. parents: (role, stage, its position). changes: of its recipe, to its parent's. facts: in words."""

    stage: str
    kind: str
    fingerprint: str
    parents: list[tuple[str, str, int]]
    changes: list[str]
    facts: dict[str, str]
    files: str
    finished: str


def render(
    heading: Heading,
    target: Path,
    *,
    records: Mapping[str, Record],
    chain: Sequence[str],
    tints: Mapping[str, str],
    pages: list[Link] | None = None,
) -> None:
    """Write the page to `target`. Stages, and fields of records, may be missing."""
    stages = [details(name, records) for name in records]
    shown = next((name for name in reversed(chain) if name in records), next(iter(records), ""))
    context = {
        "experiment": heading.experiment,
        "graph": canvas.themed(ancestry.graph_svg(records, chain, tints)),
        "stages": stages,
        "first": [stage.stage for stage in stages].index(shown) if stages else 0,
        "tints": tints,
        "command": heading.command,
        "versions": _versions(records),
        "commits": sorted({str(record["git_commit"]) for record in records.values() if record.get("git_commit")}),
    }
    template.write(target, "lineage.html.jinja", context, pages)


def details(name: str, records: Mapping[str, Record]) -> Details:
    """All that a page shows of a stage."""
    record, positions = records[name], {stage: index for index, stage in enumerate(records)}
    changes: list[str] = []
    facts: dict[str, str] = {}
    if _is_whole(record):
        changes = tree.recipe_changes(_entry(name, record), _ancestors(name, records))
        facts = tree.figures(_entry(name, record))
    sizes = [number(entry.get("bytes")) or 0.0 for entry in (record.get("files") or {}).values()]
    return Details(
        stage=name,
        kind=str(record.get("kind", ABSENT)),
        fingerprint=str(record.get("fingerprint") or ABSENT)[:12],
        parents=[(role, stage, positions[stage]) for role, stage in input_stages(record).items() if stage in positions],
        changes=changes,
        facts=facts,
        files=f"{len(sizes)} file{'s' if len(sizes) > 1 else ''}, {_bytes(sum(sizes))}" if sizes else "",
        finished=str(record.get("finished") or "")[:19].replace("T", " "),
    )


def _is_whole(record: Record) -> bool:
    return all(key in record for key in NEEDED) and "config" in record["recipe"]


def _entry(name: str, record: Record) -> Artifact:
    return Artifact(Path(name), {**record, "stage": name})


def _ancestors(name: str, records: Mapping[str, Record]) -> list[Artifact]:
    """What a stage was made from, nearest first."""

    def parents(stage: str) -> list[str]:
        sources = input_stages(records[stage]).values()
        return [source for source in sources if source in records and _is_whole(records[source])]

    return [_entry(stage, records[stage]) for stage in ancestors(name, parents)]


def _bytes(size: float) -> str:
    text = count(size)
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1].replace('B', 'G')}B"


def _versions(records: Mapping[str, Record]) -> list[tuple[str, str]]:
    """Every version that a record names; several where cached stages were made with others."""
    found: dict[str, set[str]] = {}
    for record in records.values():
        versions: Mapping[str, Any] = record.get("versions") or {}
        for name, version in versions.items():
            found.setdefault(str(name), set()).add(str(version))
    return [(name, ", ".join(sorted(values))) for name, values in sorted(found.items())]
