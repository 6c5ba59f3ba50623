"""Where an output comes from, as text: itself, and below it what it was made from, down to the corpus."""

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from aquilamoe.config.paths import shown
from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.lineage.graph import ArtifactGraph, Parent
from aquilamoe.pipeline.fingerprint import differences, flatten

WIDTH = 110  # of a recipe's lines, without the branches
LABEL = 12


def tree(library: ArtifactGraph, entry: Artifact) -> list[str]:
    """The lines of an output's tree; what was shown once is named only."""
    return [_title(entry), *_below(library, entry, [], {entry.directory})]


def _below(library: ArtifactGraph, entry: Artifact, descendants: list[Artifact], shown: set[Any]) -> Iterator[str]:
    """An output's facts and its parents, with branches drawn to the left."""
    parents = library.parents(entry)
    bar = "│  " if parents else "   "
    for line in facts(entry, list(library.ancestors(entry))):
        yield f"{bar}{line}"
    for index, parent in enumerate(parents):
        last = index == len(parents) - 1
        branch, rail = ("└─ ", "   ") if last else ("├─ ", "│  ")
        yield f"{branch}{parent.role}: {_parent_title(parent)}" + (" (above)" if _is_shown(parent, shown) else "")
        if parent.entry is not None and not _is_shown(parent, shown):
            shown.add(parent.entry.directory)
            for line in _below(library, parent.entry, [*descendants, entry], shown):
                yield f"{rail}{line}"


def _is_shown(parent: Parent, shown: set[Any]) -> bool:
    return parent.entry is not None and parent.entry.directory in shown


def _title(entry: Artifact) -> str:
    return f"{entry.stage} {entry.fingerprint}  {entry.kind}  in {shown(entry.directory)}"


def _parent_title(parent: Parent) -> str:
    if parent.entry is not None:
        return f"{parent.entry.stage} {parent.entry.fingerprint}  {parent.entry.kind}"
    return f"{parent.stage} {parent.fingerprint or ''}  {parent.problem}".replace("  ", " ")


def facts(entry: Artifact, ancestors: list[Artifact]) -> Iterator[str]:
    """What an output is, cost and reached, a line each; recipes against the nearest ancestor of its kind."""
    lines = textwrap.wrap("; ".join(recipe_changes(entry, ancestors)), WIDTH)
    yield from (f"{'' if index else 'recipe':<{LABEL}}{line}" for index, line in enumerate(lines))
    yield from (f"{label:<{LABEL}}{text}" for label, text in figures(entry).items())


def figures(entry: Artifact) -> dict[str, str]:
    """What an output is, cost and reached, in words, by what they are about."""
    metrics = entry.metrics
    parts = {
        "parameters": _parameters(metrics),
        "tokens": _own_and_all(metrics, "tokens", "{:,}"),
        "FLOPs": _own_and_all(metrics, "flops", "{:.3g}"),
        "cost": _cost(entry.record.get("cost")) if metrics.get("params_total") else "",
        "loss": _loss(metrics),
        "certificate": _certificate(metrics),
        "SHA-256": _sha256(entry),
        "made": _made(entry) if metrics.get("params_total") else "",
    }
    return {label: text for label, text in parts.items() if text}


def recipe_changes(entry: Artifact, ancestors: list[Artifact]) -> list[str]:
    """How a recipe differs from that of its parent.

    The sizes of its network against those of the nearest ancestor that states them, its other fields against the
    nearest ancestor of its kind; of the first of its kind, what they are.
    """
    config = _config(entry)
    model = config.pop("model", None) or {}
    sized = next((each for each in ancestors if _config(each).get("model")), None)
    found = []
    before_model = _config(sized)["model"] if sized else entry.record.get("source", {}).get("model")
    if model and before_model:
        found += differences({"model": before_model}, {"model": model})
    elif model:
        found += _stated({"model": model})
    alike = (each for each in ancestors if (each.kind, each.is_stage) == (entry.kind, entry.is_stage))
    same_kind = next(alike, None)
    if same_kind is None:
        return [*found, *_stated(config)]
    before = {key: value for key, value in _config(same_kind).items() if key != "model"}
    changed = [*found, *differences(before, config)]
    return [f"as {same_kind.stage}, but {changed[0]}", *changed[1:]] if changed else [f"as {same_kind.stage}"]


def _stated(config: Mapping[str, Any]) -> list[str]:
    """Every field with a value: null, empty and zero are omitted."""
    return [f"{key} {value}" for key, value in flatten(config).items() if value]


def _config(entry: Artifact) -> dict[str, Any]:
    return dict(entry.recipe["config"])


def _parameters(metrics: Mapping[str, Any]) -> str:
    total, active = metrics.get("params_total"), metrics.get("params_active")
    if total is None:
        return ""
    return f"{total:,}" + (f", {active:,} of them active" if active not in (None, total) else "")


def _own_and_all(metrics: Mapping[str, Any], own: str, form: str) -> str:
    """Of a stage itself, with its ancestors, and of a checkpoint from elsewhere before it came here."""
    lineage, before = f"lineage_{own}", f"before_{own}"
    is_external = before in metrics
    behind = "unknown" if metrics.get(before) is None else form.format(metrics[before])
    if metrics.get(lineage) is None:
        return f"{behind}, before it came here" if is_external else ""
    everything = f"{behind} + {form.format(metrics[lineage])}" if is_external else form.format(metrics[lineage])
    text = f"{form.format(metrics.get(own) or 0)} own, {everything} with its ancestors"
    return re.sub(r"e\+0*", "e", text)  # 3.68e11, as tables and pages have it


def _cost(cost: Mapping[str, Mapping[str, float]] | None) -> str:
    if not cost:
        return ""
    own, lineage = cost["own"], cost["lineage"]
    time = f"{own['device_seconds']:,.3g} device-seconds own, {lineage['device_seconds']:,.3g} with its ancestors"
    return time + (f"; money {own['money']:,.2f} and {lineage['money']:,.2f}" if lineage["money"] else "")


def _loss(metrics: Mapping[str, Any]) -> str:
    """Validation losses of a training; of a growth those of source and target, on the certificate's tokens."""
    for keys, where in (
        (("loss_start", "loss_end"), ""),
        (("source_loss", "target_loss"), ", on the certificate's tokens"),
    ):
        start, end = (metrics.get(key) for key in keys)
        if start is not None and end is not None:
            return f"{start:.4f} -> {end:.4f} nats per token{where}"
    return ""


def _certificate(metrics: Mapping[str, Any]) -> str:
    if metrics.get("max_abs_dlogit") is None:
        return ""
    claim = "keeps the function" if metrics.get("preserving") else "does not claim to keep the function"
    if metrics.get("preserving") and not metrics.get("passed", True):
        claim = "claims to keep the function and does not"
    off = f"a logit is off by at most {metrics['max_abs_dlogit']:.3g}"
    spread = f" (their spread is {metrics['logit_spread']:.3g})" if metrics.get("logit_spread") is not None else ""
    return f"{claim}; {off}{spread}, KL {metrics['kl']:.3g}"


def _sha256(entry: Artifact) -> str:
    if entry.weights_sha256 is not None:
        shards = len(entry.weights)
        return entry.weights_sha256 + (f" (of the {shards} lines that sha256sum prints)" if shards > 1 else "")
    return f"of each of its {len(entry.tensors)} tensors in record.json" if entry.tensors else ""


def _made(entry: Artifact) -> str:
    record = entry.record
    commit, torch = str(record.get("git_commit") or ""), record.get("versions", {}).get("torch")
    digits, _, changes = commit.partition("+")
    by = ", ".join(
        part
        for part in (
            f"by commit {digits[:12]}" + (f" with {changes}" if changes else "") if digits else "",
            f"torch {torch}" if torch else "",
        )
        if part
    )
    if "finished" not in record:
        return by
    return f"{str(record['finished'])[:19].replace('T', ' ')} UTC in {record['seconds']:.1f} s " + by
