"""The tables that a user sees in the terminal: the plan, the outputs at the end, what it cost."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from aquilamoe import format
from aquilamoe.config.graph import Node
from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.lineage.unused import Unused
from aquilamoe.pipeline.figures import metric as figures_metric
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.store import Record
from aquilamoe.reports import stage_rows
from aquilamoe.reports.costs import CostTable

# What a plan's states are called in the terminal: what will happen, not what is happening.
STATES = {"cached": "cached", "fetched": "to fetch", "resumes": "to resume", "runs": "to run"}
STATE_STYLE = {"cached": "green", "to fetch": "green", "to resume": "yellow", "to run": "cyan"}

# What a terminal that is too narrow for all columns goes without, first to last; never the status.
DISPENSABLE = ("tokens/s", "active", "energy", "lineage energy", "disk", "recovery tokens", "lineage FLOPs", "FLOPs")
GAP = 2
SHRUNK = 24


def plan_table(plan: Sequence[Planned], width: int) -> Table:
    """What would run and why, and what it takes: parameters, tokens, FLOPs, disk, time."""
    lines = []
    for planned in plan:
        node, model = planned.node, planned.node.model
        lines.append(
            {
                "stage": planned.name,
                "status": STATES[planned.state],
                "why": planned.reason,
                "parameters": format.count(model.num_params if model else None),
                "active": format.count(model.num_active_params if model else None),
                "tokens": _tokens(node),
                "FLOPs": _flops(node),
                "disk": format.size_or_absent(planned.estimate.disk_bytes),
                "time": format.duration(planned.seconds),
            }
        )
    pending = [planned for planned in plan if planned.is_computed]
    new = [planned for planned in plan if planned.state != "cached"]
    total = {
        **dict.fromkeys(lines[0], ""),
        "stage": "total",
        "why": f"{len(pending)} of {len(plan)} stages to run",
        "tokens": format.count(sum(planned.node.tokens for planned in pending) or None),
        "FLOPs": format.power(sum(planned.node.flops for planned in pending) or None),
        "disk": format.size_or_absent(sum(planned.estimate.disk_bytes for planned in new)),
        "time": _total_time(pending),
    }
    return _fitting(lines, total, width, left=("stage", "status", "why"), shrinks="why")


def _tokens(node: Node) -> str:
    """Trained in a stage, or stated of a checkpoint from elsewhere."""
    if node.is_external and node.before is not None:
        return format.stated(node.before.tokens, format.count)
    return format.count(node.tokens or None)


def _flops(node: Node) -> str:
    if node.is_external and node.before is not None:
        return format.stated(node.before.flops, format.power)
    return format.power(node.flops or None)


def _total_time(pending: Sequence[Planned]) -> str:
    """Of all stages; `>` marks that some are not known."""
    known = [planned.seconds for planned in pending if planned.seconds is not None]
    text = format.duration(sum(known)) if known or not pending else format.ABSENT
    return f"> {text}" if known and len(known) < len(pending) else text


def final_table(records: Mapping[str, Record], status: Mapping[str, str], width: int) -> Table:
    """One row a stage: sizes, tokens, FLOPs, losses, recovery, seconds, cached or run."""
    lines = [dict(zip(stage_rows.HEADER, row.cells(), strict=True)) for row in stage_rows.stage_rows(records, status)]
    return _fitting(lines, None, width, left=("stage", "status"))


def cost_table(costs: CostTable, width: int) -> Table:
    """What every stage costs: its own part, then with everything that it was made from; and all together."""
    titles = ["cost", *costs.figures, *(f"lineage {figure}" for figure in costs.figures)]
    lines = [dict(zip(titles, costs.cells(row), strict=True)) for row in [*costs.rows, costs.total]]
    return _fitting(lines[:-1], lines[-1], width, left=("cost",))


def output_table(entries: Sequence[Artifact], width: int) -> Table:
    """One row an output, in the given order: what it is, how good, where."""
    lines = [
        {
            "stage": entry.stage,
            "kind": entry.kind,
            "fingerprint": entry.fingerprint,
            "parameters": format.count(figures_metric(entry.record, "params_total")) if entry.is_stage else "",
            "tokens": format.count(figures_metric(entry.record, "tokens")) if entry.kind == "pretrain" else "",
            "loss": format.decimal(figures_metric(entry.record, "loss_end"), 4) if entry.kind == "pretrain" else "",
            "disk": format.size_or_absent(sum(size for size, _ in entry.files.values())),
            "finished": str(entry.record.get("finished", ""))[:19],
        }
        for entry in entries
    ]
    if not lines:
        return make_table()
    return _fitting(lines, None, width, left=("stage", "kind", "fingerprint", "finished"))


def unused_table(outputs: Sequence[Unused], width: int) -> Table:
    """One row a directory that `action=clean` may remove."""
    lines = [
        {"directory": each.path.name, "disk ": format.size_or_absent(each.bytes), "why": each.reason}
        for each in outputs
    ]
    total = {"directory": "total", "disk ": format.size_or_absent(sum(each.bytes for each in outputs)), "why": ""}
    return _fitting(lines, total, width, left=("directory", "why"), shrinks="why")


def task_table(figures: Sequence[tuple[str, str, float, int]]) -> Table:
    """Every figure of every task that a checkpoint was evaluated on: (task, metric, value, items)."""
    table = make_table("task", "metric", ">value", ">items")
    for task, metric, value, items in figures:
        table.add_row(task, metric, format.decimal(value, 4), str(items))
    return table


def _fitting(
    lines: Sequence[Mapping[str, str]],
    total: Mapping[str, str] | None,
    width: int,
    left: Sequence[str],
    shrinks: str | None = None,
) -> Table:
    """A table of `lines`, by title, and of their total, without the columns for which there is no room.

    left: titles of columns that are flush left. shrinks: the one whose texts may be broken.
    """
    everything = [*lines, *([total] if total else [])]
    needed = {
        title: max(len(text) for text in [*_broken(title).split("\n"), *(line[title] for line in everything)])
        for title in lines[0]
    }
    if shrinks:
        needed[shrinks] = min(needed[shrinks], SHRUNK)
    titles = list(needed)
    for dispensable in DISPENSABLE:
        if sum(needed[title] + GAP for title in titles) - GAP > width and dispensable in titles:
            titles.remove(dispensable)
    height = max(_broken(title).count("\n") for title in titles)
    heads = ["\n" * (height - _broken(title).count("\n")) + _broken(title) for title in titles]
    table = make_table(
        *(f"{'' if title in left else '>'}{head}" for title, head in zip(titles, heads, strict=True)),
    )
    for line in lines:
        table.add_row(*(Text(line[title], style=STATE_STYLE.get(line[title], "")) for title in titles))
    if total:
        table.add_section()
        table.add_row(*(total[title] for title in titles))
    return table


def _broken(title: str) -> str:
    """A title of several words on two lines: columns are as narrow as what is in them."""
    first, _, rest = title.partition(" ")
    return f"{first}\n{rest}" if rest and title != "device time" else title


def make_table(*titles: str) -> Table:
    """A table of the terminal's style; columns whose title begins with `>` are flush right."""
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left")
    return table
