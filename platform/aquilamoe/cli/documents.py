"""What `json=true` prints: one JSON document for programs, with the facts of the tables (docs/json.md)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from aquilamoe.ablation.advice import AdviceLine
from aquilamoe.ablation.advice_query import AdviceQuery
from aquilamoe.config.schema import ExperimentConfig
from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.lineage.graph import ArtifactGraph
from aquilamoe.lineage.unused import Unused
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.stage import Input
from aquilamoe.reports.conclusion import Finding
from aquilamoe.reports.costs import CostTable

ACTIONS = ("plan", "status", "list", "lineage", "clean")
SUMMARY = "summary.json"
VERSION = 1  # raised when a field changes its meaning or goes


def text(document: Mapping[str, Any]) -> str:
    """A document as it is printed."""
    return json.dumps({"version": VERSION, **document}, indent=1, allow_nan=False)


def pipeline(experiment: ExperimentConfig, plan: Sequence[Planned], costs: CostTable) -> dict[str, Any]:
    """Of `plan` and `status`: the stages in their order, and what they cost."""
    return {
        "action": experiment.action,
        "experiment": experiment.name,
        "stages": [_stage(planned) for planned in plan],
        "costs": _costs(costs),
    }


def _costs(costs: CostTable) -> dict[str, Any]:
    return {
        row.name: {"own": asdict(row.own), "lineage": asdict(row.lineage) if row.lineage else None}
        for row in [*costs.rows, costs.total]
    }


def _stage(planned: Planned) -> dict[str, Any]:
    node, model = planned.node, planned.node.model
    return {
        "stage": planned.name,
        "kind": node.stage.kind,
        "fingerprint": planned.fingerprint,
        "state": planned.state,
        "reason": planned.reason,
        "directory": str(planned.directory),
        "parameters": model.num_params if model else None,
        "active_parameters": model.num_active_params if model else None,
        "tokens": node.tokens or None,
        "flops": node.flops or None,
        **(node.before.metrics if node.before else {}),
        "disk_bytes": planned.estimate.disk_bytes,
        "seconds": planned.seconds,
        "metrics": planned.record.get("metrics") if planned.record else None,
    }


def outputs(library: ArtifactGraph) -> dict[str, Any]:
    """Of `list`: every output, newest first, and what is damaged."""
    return {
        "action": "list",
        "outputs": [output(entry) for entry in library.newest_first()],
        "damaged": {str(path): reason for path, reason in library.damaged.items()},
    }


def summary(
    experiment: ExperimentConfig, outputs: Mapping[str, Input], costs: CostTable, finding: Finding, command: str
) -> dict[str, Any]:
    """Of a finished pipeline, kept beside its report: every stage, what all cost, and what it found."""
    return {
        "experiment": experiment.name,
        "description": experiment.description,
        "command": command,
        "stages": [
            {"stage": name, "directory": str(each.directory)}
            | {key: each.record.get(key) for key in ("kind", "fingerprint", "finished", "seconds", "inputs", "metrics")}
            for name, each in outputs.items()
        ],
        "costs": _costs(costs),
        "finding": asdict(finding),
    }


def advice(query: AdviceQuery, lines: Sequence[AdviceLine], studies: int) -> dict[str, Any]:
    """Of `advise`: the query as it was understood, and every statement with its evidence."""
    return {
        "action": "advise",
        "source": {"parameters": query.source.params, "tokens": query.source.tokens},
        "target": {"parameters": query.target_params, "active_parameters": query.active_params, "kind": query.kind},
        "budget_tokens": query.budget,
        "studies": studies,
        "advice": [asdict(line) for line in lines],
    }


def unused(outputs: Sequence[Unused], removed: bool) -> dict[str, Any]:
    """Of `clean`: directories that nothing needs, largest first, and whether they are being removed."""
    directories = [{"directory": str(each.path), "bytes": each.bytes, "reason": each.reason} for each in outputs]
    return {"action": "clean", "removed": removed, "directories": directories}


def lineage(library: ArtifactGraph, entry: Artifact) -> dict[str, Any]:
    """Of `lineage`: an output, and everything that it was made from, nearest first."""
    ancestors = [output(ancestor) for ancestor in library.ancestors(entry)]
    return {"action": "lineage", "output": output(entry), "ancestors": ancestors}


def output(entry: Artifact) -> dict[str, Any]:
    """One output: its record, without the digest of every file."""
    return {
        "stage": entry.stage,
        "kind": entry.kind,
        "fingerprint": entry.fingerprint,
        "directory": str(entry.directory),
        "finished": entry.record.get("finished"),
        "recipe": entry.recipe,
        "inputs": entry.inputs,
        "metrics": entry.metrics,
        "cost": entry.record.get("cost"),
        "weights_sha256": entry.weights_sha256,
    }
