"""The descriptions that people read on a run's page, in Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aquilamoe.format import UNKNOWN
from aquilamoe.tracking.sync_state import Pipeline, Stage, fingerprint_of

FIGURE = "loss.svg"  # of a report: as wide as a page of MLflow, which does not shrink pictures
COLUMNS = ("stage", "kind", "parameters", "tokens", "loss at start", "at end", "seconds", "run")


def stage(stage: Stage) -> str:
    """What a stage is, reads and found."""
    directory = str(stage.directory).removesuffix(".partial")
    reads = ", ".join(f"{entry['stage']} (`{entry['fingerprint']}`)" for entry in stage.inputs.values())
    lines = [f"**{stage.name}**: a {stage.kind} stage in `{directory}`. Reads {reads or 'nothing'}."]
    if stage.record:
        lines += ["", "| result | |", "|---|---|"]
        # Of a checkpoint from elsewhere: what was spent before it came here.
        unknown = {key: UNKNOWN for key, value in stage.record["metrics"].items() if key.startswith("before_")}
        lines += [
            f"| {key} | {_figure(value) or unknown.get(key, '')} |" for key, value in stage.record["metrics"].items()
        ]
    return "\n".join(lines)


def pipeline(
    pipeline: Pipeline, records: Mapping[str, dict[str, Any]], runs: Mapping[str, str], pages: Sequence[Path]
) -> str:
    """The figure of its losses, and a table of the finished stages, each with a link to its run, wherever it is filed.

    pages: of its report, and the figure, which are artifacts of the pipeline's run.
    """
    lines = [pipeline.receipt["description"], "", *_losses(records)]
    if any(page.name == FIGURE for page in pages):
        # Relative to MLflow's page, so that it is found under whatever address the server is reached.
        address = f"get-artifact?path={FIGURE}&run_uuid={pipeline.receipt['run_id']}"
        lines += [f"![Held-out loss against cumulative FLOPs]({address})", ""]
        names = ", ".join(f"`{page.name}`" for page in pages if page.suffix == ".html")
        lines += [f"The report is among the artifacts: {names}.", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, record in records.items():
        figures = [record["metrics"].get(key) for key in ("params_total", "tokens", "loss_start", "loss_end")]
        link = f"#/experiments/{pipeline.receipt['experiment_id']}/runs/{runs[name]}"
        identity = f"[{fingerprint_of(pipeline.stages[name])}]({link})"
        cells = [name, record["kind"], *map(_figure, figures), _figure(record["seconds"]), identity]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _losses(records: Mapping[str, dict[str, Any]]) -> list[str]:
    """The last losses on a line: MLflow shows only the beginning of a description at once."""
    found = {name: record["metrics"].get("loss_end") for name, record in records.items()}
    ends = [f"{name} **{loss:.3f}**" for name, loss in found.items() if isinstance(loss, float)]
    return [f"Held-out loss at the end, nats per token: {', '.join(ends)}.", ""] if ends else []


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.3e}"
    return f"{value:,}"
