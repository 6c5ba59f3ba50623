"""What a user sees in the terminal: plan and status tables, a progress bar per stage, the final table."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.store import Record
from aquilamoe.reports import rows

STATE_STYLE = {"cached": "green", "resumes": "yellow", "runs": "cyan"}


def console() -> Console:
    """Standard output; wide enough for the tables when it is a file or a pipe."""
    found = Console(highlight=False, markup=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, width=160)


class StageProgress:
    """An observer that draws a line per stage: a bar on a terminal, a line at start and end elsewhere."""

    def __init__(self, out: Console, plan: Sequence[Planned]) -> None:
        self.out = out
        self.plan = {planned.name: planned for planned in plan}
        self.width = max(map(len, self.plan))
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=out,
            transient=True,
        )
        self.task: TaskID | None = None
        self.started = 0.0
        self.loss: float | None = None

    def stage_started(
        self, stage: str, fingerprint: str, directory: Path, recipe: dict[str, Any], inputs: dict[str, dict[str, Any]]
    ) -> None:
        self.started, self.loss = time.monotonic(), None
        if not self.out.is_terminal:
            self.out.print(f"  {stage:<{self.width}}  ...")
            return
        tokens = self.plan[stage].node.tokens
        self.task = self.bars.add_task(f"{stage:<{self.width}}", total=tokens or None, numbers="")
        self.bars.start()

    def stage_progress(self, stage: str, points: list[dict[str, Any]]) -> None:
        if self.task is None:
            return
        for point in points:
            self.loss = point.get("train/loss", point.get("val/loss", self.loss))
        last = points[-1]
        if "done" in last:
            numbers = f"{last['done']}/{last['total']} {last['unit']}"
            self.bars.update(self.task, completed=last["done"], total=last["total"], numbers=numbers)
        else:
            speed = f"  {rows.count(last['train/tokens_per_s'])} tokens/s" if "train/tokens_per_s" in last else ""
            numbers = f"{rows.count(last['tokens'])} tokens  loss {rows.decimal(self.loss, 3)}{speed}"
            self.bars.update(self.task, completed=last["tokens"], numbers=numbers)

    def stage_finished(self, stage: str, directory: Path, record: Record, cached: bool) -> None:
        self._drop_bar()
        if cached:
            self.out.print(Text(f"  {stage:<{self.width}}  cached", style="dim"))
            return
        self.out.print(f"  {stage:<{self.width}}  {_headline(record)}", style=None)

    def stage_failed(self, stage: str, message: str) -> None:
        self._drop_bar()

    def _drop_bar(self) -> None:
        if self.task is not None:
            self.bars.stop()
            self.bars.remove_task(self.task)
            self.task = None


def _headline(record: Record) -> str:
    row = rows.stage_rows({str(record["stage"]): record})[0]
    parts = [f"{rows.seconds(row.seconds)} s"]
    if row.tokens:
        parts.append(f"{rows.count(row.tokens)} tokens")
    if row.loss_start is not None:
        parts.append(f"loss {rows.decimal(row.loss_start, 2)} -> {rows.decimal(row.loss_end, 2)}")
    if row.tokens_per_s:
        parts.append(f"{rows.count(row.tokens_per_s)} tokens/s")
    return "  ".join(parts)


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


def make_table(*titles: str) -> Table:
    """A table of the terminal's style; columns whose title begins with `>` are flush right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(title.removeprefix(">"), justify="right" if title.startswith(">") else "left")
    return table


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
