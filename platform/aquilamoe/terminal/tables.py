"""The tables that a user sees in the terminal: the plan, what there is at the end, what it cost."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.store import Record
from aquilamoe.reports import rows
from aquilamoe.reports.costs import CostTable
from aquilamoe.reports.rows import duration, size

STATE_STYLE = {"cached": "green", "resumes": "yellow", "runs": "cyan"}


def plan_table(plan: Sequence[Planned]) -> Table:
    """What would run and why, and what it takes: parameters, tokens, FLOPs, disk, time."""
    table = make_table("stage", "", "why", ">parameters", ">active", ">tokens", ">FLOPs", ">disk", ">time")
    for planned in plan:
        node = planned.node
        model = node.model
        table.add_row(
            planned.name,
            Text(planned.state, style=STATE_STYLE[planned.state]),
            planned.reason,
            rows.count(model.num_params if model else None),
            rows.count(model.num_active_params if model else None),
            rows.count(node.tokens or None),
            rows.power(node.flops or None),
            size(planned.estimate.disk_bytes),
            duration(planned.seconds),
        )
    pending = [planned for planned in plan if planned.state != "cached"]
    table.add_section()
    table.add_row(
        "total",
        "",
        f"{len(pending)} of {len(plan)} stages run",
        "",
        "",
        rows.count(sum(planned.node.tokens for planned in pending) or None),
        rows.power(sum(planned.node.flops for planned in pending) or None),
        size(sum(planned.estimate.disk_bytes for planned in pending)),
        duration(sum(planned.seconds or 0.0 for planned in pending)),
    )
    return table


def final_table(records: Mapping[str, Record], status: Mapping[str, str]) -> Table:
    """One row a stage: sizes, tokens, FLOPs, losses, recovery, seconds, cached or run."""
    right = [f">{title}" if index and title != "status" else title for index, title in enumerate(rows.HEADER)]
    table = make_table(*right)
    for row in rows.stage_rows(records, status):
        table.add_row(*row.cells())
    return table


def cost_table(costs: CostTable) -> Table:
    """What every stage costs: its own part, then with everything that it was made from; and all together."""
    halves = [
        f">{title if first == 0 else ''}\n{figure}"
        for title in ("its own", "with ancestors")
        for first, figure in enumerate(costs.figures)
    ]
    table = make_table("\ncost", *halves)
    for row in costs.rows:
        table.add_row(*costs.cells(row))
    table.add_section()
    table.add_row(*costs.cells(costs.total))
    return table


def make_table(*titles: str) -> Table:
    """A table of the terminal's style; columns whose title begins with `>` are flush right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left")
    return table
