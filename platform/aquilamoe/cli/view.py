"""What is drawn of a pipeline's progress: a line for each finished stage, and a few lines for the present."""

from collections.abc import Callable

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from aquilamoe import format
from aquilamoe.cli.console import spark
from aquilamoe.cli.progress import PipelineProgress, StageProgress
from aquilamoe.config.growth import GROWTH_KINDS
from aquilamoe.pipeline.figures import metric
from aquilamoe.pipeline.store import Record
from aquilamoe.reports import stage_rows

WIDEST_BAR, NARROWEST_BAR = 40, 8
WIDEST_SPARK = 30
TEXT_UNITS = ("documents", "tokens")
PLAIN_EVERY_S = 60.0  # between lines of a long stage, where there is no terminal


class Present:
    """The stage that runs, those that wait, and how long it will take; redrawn at every width."""

    def __init__(self, pipeline: PipelineProgress, clock: Callable[[], float]) -> None:
        self.pipeline, self.clock = pipeline, clock

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in present(self.pipeline, self.clock(), options.max_width):
            line.no_wrap, line.overflow = True, "ellipsis"
            yield line


def finished(name: str, width: int, record: Record, cached: bool) -> Text:
    """The line of a stage that is complete."""
    if cached:
        return Text(f"  {name:<{width}}  cached", style="dim")
    return Text(f"  {name:<{width}}  {headline(record)}")


def headline(record: Record) -> str:
    """What a finished stage took and reached, on a line."""
    row = stage_rows.stage_rows({str(record["stage"]): record})[0]
    parts = [format.duration(round(row.seconds or 0.0, 1))]
    if row.tokens:
        parts.append(f"{format.count(row.tokens)} tokens")
    parts += [f"{format.count(total)} {unit}" for unit in TEXT_UNITS if (total := _sum(record, unit))]
    # Of a growth what its certificate measured: nothing has been trained after it that would have a validation.
    keys = ("source_loss", "target_loss") if row.kind in GROWTH_KINDS else ("loss_start", "loss_end")
    start, end = (metric(record, key) for key in keys)
    if start is not None:
        parts.append(f"loss {format.decimal(start, 2)} -> {format.decimal(end, 2)}")
    if row.tokens_per_s:
        parts.append(f"{format.count(row.tokens_per_s)} tokens/s")
    return "  ".join(parts)


def _sum(record: Record, unit: str) -> float:
    """Of a stage of text: its documents or tokens in all splits and languages."""
    metrics = record.get("metrics") or {}
    return sum(
        metric(record, name) or 0.0
        for name in metrics
        if name.startswith(("train/", "validation/")) and name.count("/") == 2 and name.endswith(f"/{unit}")
    )


def present(pipeline: PipelineProgress, now: float, width: int) -> list[Text]:
    """The lines under the finished stages, each at most `width` characters."""
    lines = []
    names = max(len(stage.name) for stage in pipeline.stages)
    if pipeline.running:
        lines.append(_bar_line(pipeline.running, names, now, width))
        if pipeline.running.tokens:
            lines.append(_loss_line(pipeline.running, names, width))
    if pipeline.waiting:
        lines.append(Text(f"  then {', '.join(stage.name for stage in pipeline.waiting)}", style="dim"))
    lines.append(Text(f"  {_standing(pipeline, now)}", style="dim"))
    return lines


def _standing(pipeline: PipelineProgress, now: float) -> str:
    done = sum(stage.state in ("run", "cached") for stage in pipeline.stages)
    left = pipeline.seconds_left(now)
    ending = f", about {format.duration(round(left))} left" if left >= 1 else ""
    return f"{done} of {len(pipeline.stages)} stages done{ending}"


def amount(stage: StageProgress) -> str:
    """131k of 287k tokens, 3 of 24 tensors."""
    return f"{format.count(stage.done)} of {format.count(stage.total)} {stage.unit}" if stage.total else ""


def plain(stage: StageProgress, now: float) -> str:
    """How far a stage is, as a line of its own."""
    parts = [amount(stage)]
    if stage.losses:
        parts.append(f"loss {stage.losses[-1]:.3f}")
    if stage.tokens_per_s:
        parts.append(f"{format.count(stage.tokens_per_s)} tokens/s")
    left = stage.seconds_left(now) if stage.tokens else None
    return "  ".join([*parts, *([f"{format.duration(round(left))} left"] if left is not None and left >= 1 else [])])


def _bar_line(stage: StageProgress, names: int, now: float, width: int) -> Text:
    if not stage.total:
        return bar(stage.name, names, None, "", width)
    # As wide at every moment: a bar whose length changes looks as if it went back.
    ending = f"  {format.count(stage.done):>5} of {format.count(stage.total)} {stage.unit}"
    if stage.tokens:
        left = stage.seconds_left(now)
        ending += f"  {f'{format.duration(round(left))} left' if left is not None and left >= 1 else '':<13}"
    return bar(stage.name, names, min(1.0, stage.done / stage.total), ending, width)


def bar(name: str, names: int, share: float | None, ending: str, width: int) -> Text:
    """The line of what runs: its name, a bar where there is room for one, and what follows it.

    Args:
        name: of what runs.
        names: characters of the longest name.
        share: of the work that is done, 0 to 1; None if it is unknown.
        ending: behind the bar.
        width: characters of the line.
    """
    line = Text.assemble(("▸ ", "cyan"), f"{name:<{names}}  ")
    if share is None:
        return line
    length = min(WIDEST_BAR, width - len(line.plain) - len(ending) - len("  100%"))
    if length >= NARROWEST_BAR:
        full = round(share * length)
        line.append("━" * full, style="cyan").append("─" * (length - full), style="dim").append(f"  {share:4.0%}")
    return line.append(ending if length >= NARROWEST_BAR else ending.strip())


def _loss_line(stage: StageProgress, names: int, width: int) -> Text:
    parts = []
    if stage.held_out is not None:
        parts.append(f"held-out {stage.held_out:.3f}")
    if stage.tokens_per_s:
        parts.append(f"{format.count(stage.tokens_per_s)} tokens/s")
    if stage.resumed_at:
        parts.append(f"resumed at {format.count(stage.resumed_at)}")
    line = Text(" " * (names + 4))
    if stage.losses:
        line.append(f"loss {stage.losses[-1]:.3f} ")
        room = min(WIDEST_SPARK, width - len(line.plain) - sum(len(part) + 2 for part in parts))
        line.append(spark(stage.losses, max(0, room)), style="cyan")
    for part in parts:
        line.append(f"  {part}" if line.plain.strip() else part)
    return line if line.plain.strip() else line.append("starts", style="dim")
