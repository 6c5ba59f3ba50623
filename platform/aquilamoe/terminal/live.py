"""What a user sees while a pipeline runs."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.store import Record
from aquilamoe.reports import rows


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
