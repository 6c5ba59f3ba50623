"""What a user of the growth tool sees: the plan, a bar with rates, the certificate, the summary."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from aquilamoe import format
from aquilamoe.checkpoint.companions import left_behind
from aquilamoe.checkpoint.safetensors_header import ITEM_BYTES
from aquilamoe.cli.tables import make_table
from aquilamoe.cli.view import bar
from aquilamoe.config.grow import GrowConfig
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.paths import shown
from aquilamoe.format import duration, size_or_absent
from aquilamoe.growth.tool import comparison, plan
from aquilamoe.growth.tool.card import NEARLY, certificate_rows
from aquilamoe.growth.tool.remarks import architecture, remarks, written
from aquilamoe.growth.tool.request import CheckpointFiles, Request
from aquilamoe.process import interruption

STEPS = 11  # characters of a step's name
REFRESHES_PER_S = 4


class Bar:
    """One step of the work: a bar on a terminal, and a line at its end. With `total_bytes` it also shows the rate."""

    def __init__(self, out: Console, step: str, unit: str, total_bytes: int = 0) -> None:
        self.out = out
        self.step = step
        self.unit = unit
        self.total_bytes = total_bytes
        self._started = time.monotonic()
        self._done, self._total = 0, 0
        self._last = ""
        self._live = Live(self, console=out, refresh_per_second=REFRESHES_PER_S, transient=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def update(self, done: int, total: int) -> None:
        """Show how far the step is."""
        interruption.check()
        self._done, self._total = done, total

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        done, total = self._done, self._total
        share = done / total if total else None
        # As wide at every moment: a bar whose length changes looks as if it went back.
        ending = f"  {done:>{len(str(total))}}/{total} {self.unit}"
        if self.total_bytes:
            rate = size_or_absent(int(self.total_bytes * share / max(self.seconds, 1e-3))) + "/s" if share else ""
            ending += f"  {rate:<10}"
        left = round(self.seconds * (1 - share) / share) if share else 0
        ending += f"  {f'{duration(left)} left' if left else '':<13}"
        line = bar(self.step, STEPS, share, ending, options.max_width)
        line.no_wrap, line.overflow = True, "ellipsis"
        yield line

    def __enter__(self) -> "Bar":
        if self.out.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.out.is_terminal:
            self._live.stop()
        if self._last:
            print_step(self.out, self.step, self._last)

    def end(self, text: str) -> None:
        """The text of the line that stays when the bar is gone."""
        self._last = text


class TerminalReporter:
    """Shows how a growth goes."""

    def __init__(self, out: Console) -> None:
        self.out = out

    def step(self, name: str, unit: str, total_bytes: int = 0) -> Bar:
        return Bar(self.out, name, unit, total_bytes)

    def note(self, step: str, text: str) -> None:
        print_step(self.out, step, text)

    def cached(self, target: Path) -> None:
        self.out.print(f"cached: {shown(target)} is complete, by this very recipe")

    def comparing(self, source: CheckpointFiles, target: CheckpointFiles) -> None:
        """Which two checkpoints are compared."""
        table = make_table("", "", "", ">parameters", ">active", ">bytes", "")
        for name, found in (("source", source), ("target", target)):
            counts = *_counts(found.model), size_or_absent(found.weight_bytes)
            table.add_row(name, shown(found.directory), architecture(found), *counts, found.dtype_name)
        self.out.print(table)


def print_step(out: Console, step: str, text: str) -> None:
    """A line about one step of the work."""
    out.print(f"  {step:<{STEPS}}  {text}", soft_wrap=True)


def show_plan(out: Console, request: Request, config: GrowConfig, state: str, tolerance: float) -> None:
    """Where everything comes from and what it takes; nothing was started."""
    _show_heads(out, request, state)
    differences = make_table("size", ">source", ">target", "")
    for row in plan.sizes(request):
        differences.add_row(row.field, row.source, row.target, row.why)
    out.print(differences)
    if left := left_behind(request.source.directory):
        out.print(f"\nleft    {', '.join(left)}: about the source alone", soft_wrap=True)
    if copies := plan.copies(request):
        out.print(f"\ncopies  {', '.join(copies)}", soft_wrap=True)
    if layers := plan.layers(request):
        star = "" if request.kind == "shrink" else "; * is a further copy"
        out.print(f"layers  {', '.join(layers)}   (target <- source{star})", soft_wrap=True)
    out.print()
    _show_tensors(out, request, config.plan == "full")
    out.print()
    _show_cost(out, request, config)
    _show_claim(out, request, config, tolerance)
    read = (
        "The weights were read and compared" if request.kind == "shrink" else "Only headers and config.json were read"
    )
    out.print(f"\n{read}; nothing was started.")


def _show_heads(out: Console, request: Request, state: str) -> None:
    heads = make_table("", "", "", ">parameters", ">active", ">bytes", "")
    for source in request.sources:
        counts = *_counts(source.model), size_or_absent(source.weight_bytes), source.dtype_name
        heads.add_row("source", shown(source.directory), architecture(source), *counts)
    counts = *_counts(request.model), size_or_absent(plan.target_bytes(request)), request.dtype_name
    heads.add_row("target", shown(request.target), written(request), *counts)
    out.print(heads)
    out.print(f"{request.kind} by {request.growth.method}; {state}\n")
    for remark in remarks(request):
        out.print(f"{remark}\n", soft_wrap=True)


def _counts(model: ModelConfig) -> tuple[str, str]:
    return format.count(model.num_params), format.count(model.num_active_params)


def _show_tensors(out: Console, request: Request, full: bool) -> None:
    lines = [(one.tensor, one.layers, _shape(one), one.source, one.how) for one in plan.lines(request, full)]
    if full:  # text that tools can read: a tensor a line, however wide
        cells = [(tensor, shape, source, how) for tensor, _, shape, source, how in lines]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for row in cells:
            text = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            out.print(text.rstrip(), soft_wrap=True)
        return
    table = make_table("tensor", "layers", "shape", "from", "how")
    for column in table.columns:
        column.overflow = "fold"
    for line in lines:
        table.add_row(*line)
    out.print(table)


def _shape(line: plan.TensorLine) -> str:
    return " x ".join(map(str, line.shape))


def _show_cost(out: Console, request: Request, config: GrowConfig) -> None:
    cost = plan.cost(request, config.disk_bytes_per_s)
    files = f"{cost.files} file{'s' * (cost.files > 1)}"
    out.print(f"reads   {size_or_absent(cost.read_bytes)}")
    out.print(
        f"writes  {size_or_absent(cost.written_bytes)} in {files}; {size_or_absent(cost.free_bytes)} are free there"
    )
    certifying = ""
    if config.certificate.enabled:
        needed = comparison.memory_bytes(request, config.certificate)
        certifying = f", the certificate at most {size_or_absent(needed)}"
    what = "shrink" if request.kind == "shrink" else "growth"
    out.print(
        f"memory  the {what} at most {size_or_absent(cost.memory_bytes)}{certifying}, beside the libraries",
        soft_wrap=True,
    )
    rate = f"{size_or_absent(int(config.disk_bytes_per_s))}/s, as set by disk_bytes_per_s (not measured)"
    more = "calibration and certificate come" if plan.is_calibrated(request) else "the certificate comes"
    out.print(f"time    about {duration(cost.seconds)} at {rate}; {more} on top", soft_wrap=True)


def _show_claim(out: Console, request: Request, config: GrowConfig, tolerance: float) -> None:
    if not request.preserving and request.growth.method == "split":
        tokens = f"{comparison.settings_for(request.growth, config.certificate).tokens:,} tokens"
        measured = f"the certificate measures both on {tokens}, and refuses nothing"
        if not config.certificate.enabled:
            measured = "certificate.enabled is false, so nothing will be measured"
        out.print(f"claim   {NEARLY} are expected; {measured}", soft_wrap=True)
    elif not request.preserving:
        sides = "the mix differs from its sources" if request.others else "source and target differ"
        out.print(f"claim   none: {sides}, the certificate states by how much")
    elif config.certificate.enabled:
        tokens = f"{comparison.settings_for(request.growth, config.certificate).tokens:,} tokens"
        limit = f"{tolerance:.3g} of the logits' spread"
        is_rounded = any(ITEM_BYTES[dtype] < 4 for dtype in request.dtypes.values())
        is_before = is_rounded and request.kind != "shrink"
        before = f", before it is rounded to {request.dtype_name}" if is_before else ""
        out.print(
            f"claim   the function is kept; refused if a logit is off by more than {limit} on {tokens}{before}",
            soft_wrap=True,
        )
    else:
        out.print("claim   the function is kept; certificate.enabled is false, so nothing will be measured")


def show_certificate(out: Console, certificate: Mapping[str, Any]) -> None:
    """What was measured, one measure a line."""
    table = make_table("certificate", "")
    for measure, value in certificate_rows(certificate):
        table.add_row(measure, value)
    out.print(table)


def show_result(out: Console, request: Request, record: Mapping[str, Any]) -> None:
    """The last table: source and target."""
    table = make_table("", "", ">layers", ">hidden", ">heads", ">experts", ">parameters", ">active", ">bytes")
    for name, kind, model, count in (
        *(("source", architecture(source), source.model, source.weight_bytes) for source in request.sources),
        ("target", written(request), request.model, plan.target_bytes(request)),
    ):
        experts = f"{model.num_experts}, top {model.num_experts_per_tok}" if model.is_moe else format.ABSENT
        heads = f"{model.num_attention_heads}/{model.num_key_value_heads}"
        shape = (str(model.num_hidden_layers), str(model.hidden_size), heads, experts)
        table.add_row(name, kind, *shape, *_counts(model), size_or_absent(count))
    out.print(table)
    if record["certificate"] is not None:
        out.print()
        show_certificate(out, record["certificate"])
