"""The descriptions that people read on a run's page, in Markdown."""

from collections.abc import Mapping
from typing import Any

from aquilamoe.tracking.receipts import Pipeline, Stage, fingerprint_of

COLUMNS = ("stage", "kind", "parameters", "tokens", "loss at start", "at end", "seconds", "run")


def stage(stage: Stage) -> str:
    """What a stage is, reads and found."""
    directory = str(stage.directory).removesuffix(".partial")
    reads = ", ".join(f"{entry['stage']} (`{entry['fingerprint']}`)" for entry in stage.inputs.values())
    lines = [f"**{stage.name}**: a {stage.kind} stage in `{directory}`. Reads {reads or 'nothing'}."]
    if stage.record:
        lines += ["", "| result | |", "|---|---|"]
        lines += [f"| {key} | {_figure(value)} |" for key, value in stage.record["metrics"].items()]
    return "\n".join(lines)


def pipeline(pipeline: Pipeline, records: Mapping[str, dict[str, Any]], runs: Mapping[str, str]) -> str:
    """A table of the finished stages, each with a link to its run, wherever that is filed."""
    lines = [pipeline.receipt["description"], "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for name, record in records.items():
        figures = [record["metrics"].get(key) for key in ("params_total", "tokens", "loss_start", "loss_end")]
        link = f"#/experiments/{pipeline.receipt['experiment_id']}/runs/{runs[name]}"
        identity = f"[{fingerprint_of(pipeline.stages[name])}]({link})"
        cells = [name, record["kind"], *map(_figure, figures), _figure(record["seconds"]), identity]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.3e}"
    return f"{value:,}"
