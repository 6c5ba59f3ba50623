"""An observer that shows a pipeline while it runs: one calm view on a terminal, plain lines elsewhere."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from aquilamoe import format
from aquilamoe.cli import view
from aquilamoe.cli.progress import PipelineProgress, StageProgress
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.store import Record

REFRESHES_PER_S = 4
INTERRUPTIONS = ("KeyboardInterrupt", "SystemExit")


def of_plan(name: str, plan: Sequence[Planned]) -> PipelineProgress:
    """Where a plan begins: nothing done."""
    stages = [
        StageProgress(
            name=planned.name, tokens=planned.node.tokens, flops=planned.node.flops, expected_s=planned.seconds
        )
        for planned in plan
    ]
    return PipelineProgress(name, stages)


class LiveView:
    """Finished stages scroll up as lines; the present stays below them, and is gone when the pipeline ends."""

    def __init__(self, out: Console, name: str, plan: Sequence[Planned]) -> None:
        self.out = out
        self.pipeline = of_plan(name, plan)
        self.width = max(len(planned.name) for planned in plan)
        self._live: Live | None = None
        self._printed_at = 0.0

    def stage_started(
        self, stage: str, fingerprint: str, directory: Path, recipe: dict[str, Any], inputs: dict[str, dict[str, Any]]
    ) -> None:
        progress = self.pipeline[stage]
        progress.start(time.time())
        if not self.out.is_terminal:
            budget = f", {format.count(progress.tokens)} tokens" if progress.tokens else ""
            self.out.print(f"  {stage:<{self.width}}  started{budget}")
            self._printed_at = time.monotonic()
        elif self._live is None:
            self._live = Live(
                view.Present(self.pipeline, time.time),
                console=self.out,
                refresh_per_second=REFRESHES_PER_S,
                transient=True,
            )
            self._live.start()

    def stage_progress(self, stage: str, points: list[dict[str, Any]]) -> None:
        progress = self.pipeline[stage]
        progress.add(points)
        if not self.out.is_terminal and time.monotonic() - self._printed_at > view.PLAIN_EVERY_S:
            self._printed_at = time.monotonic()
            self.out.print(f"  {stage:<{self.width}}  {view.plain(progress, time.time())}")

    def stage_finished(self, stage: str, directory: Path, record: Record, cached: bool) -> None:
        progress = self.pipeline[stage]
        progress.state = "cached" if cached else "run"
        progress.seconds = float(record["seconds"])
        self.out.print(view.finished(stage, self.width, record, cached))
        if not self.pipeline.waiting:
            self._stop()

    def stage_failed(self, stage: str, message: str) -> None:
        self._stop()
        progress = self.pipeline[stage]
        what = "interrupted" if message in INTERRUPTIONS else "failed"
        amount = view.amount(progress) if progress.state == "running" and progress.done else ""
        self.out.print(Text(f"  {stage:<{self.width}}  {what}{f' at {amount}' if amount else ''}", style="yellow"))

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
