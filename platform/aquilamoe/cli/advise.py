"""`action=advise`: reads the query, the recorded studies and the published rules, and prints recommendations."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquilamoe.ablation.advice import TITLES, advise, load, rules
from aquilamoe.ablation.advice_query import AdviceQuery, GrowthSource, read_query
from aquilamoe.checkpoint.hf_config import CONFIG_FILE, read_config
from aquilamoe.cli import documents
from aquilamoe.cli.console import console
from aquilamoe.config import graph
from aquilamoe.config.paths import local
from aquilamoe.format import count
from aquilamoe.lineage.expected import expected_stages
from aquilamoe.lineage.graph import read_graph
from aquilamoe.lineage.lookup import find
from aquilamoe.pipeline.store import Store

KEYS = ("source", "target", "budget", "source_tokens")


def run(values: Mapping[str, Any], experiment: Mapping[str, Any], shipped: Path) -> None:
    """Print advice. values: with the query's keys. experiment: whose stages a source may name.

    shipped: the folder of the studies that come with the platform; those of the store are read, too.
    """
    root = local(str(experiment["paths"]["root"])).absolute()
    query = read_query(values, lambda text: _find(text, experiment, Store(root)))
    recorded = load([shipped, root / "ablations"])
    lines = advise(query, recorded, rules())
    if experiment["json"] is True:
        print(documents.text(documents.advice(query, lines, len(recorded))))
        return
    out = console()
    out.print(f"{described(query)}\n", soft_wrap=True)
    topic = ""
    for sentence in lines:
        if sentence.topic != topic:
            topic = sentence.topic
            out.print(f"{TITLES[sentence.topic]}:", style="bold")
        out.print(f"  {sentence.text}", soft_wrap=True)
        if sentence.evidence:
            out.print(f"      {_relative(sentence.evidence)}", style="dim", soft_wrap=True)
    out.print(f"\n{len(recorded)} recorded {'study' if len(recorded) == 1 else 'studies'} read.")


def described(query: AdviceQuery) -> str:
    """The query as it was read."""
    source, seen = query.source, "an unknown number of"
    if source.tokens is not None:
        seen = f"{count(source.tokens)} ({source.tokens / source.params:.3g} a parameter)"
    active = f", {count(query.active_params)} active" if query.kind == "scale_out" else ""
    return (
        f"From {count(source.params)} parameters trained on {seen} tokens to {count(query.target_params)}{active}, "
        f"with {count(query.budget)} tokens of training after growth:"
    )


def _find(text: str, experiment: Mapping[str, Any], store: Store) -> GrowthSource:
    """A checkpoint of the store, or a directory that transformers opens, whose training tokens are unknown."""
    path = local(text)
    if (path / CONFIG_FILE).is_file():
        model = read_config(path)
        return GrowthSource(model.num_params, None, model)
    nodes = graph.build(graph.parse({**experiment, "action": "lineage"}))
    expected = {name: each.fingerprint for name, each in expected_stages(nodes).items()}
    entry = find(read_graph(store.stages), expected, text, latest=True)
    model = read_config(entry.directory / "model" if entry.is_stage else entry.directory)
    tokens = entry.metrics.get("lineage_tokens")
    if "before_tokens" in entry.metrics:  # of a line that begins with a checkpoint from elsewhere
        known = entry.metrics["before_tokens"]
        tokens = None if known is None else known + (tokens or 0)
    return GrowthSource(model.num_params, float(tokens) if tokens is not None else None, model)


def _relative(evidence: str) -> str:
    """Evidence with the path of its file from here."""
    where, colon, rest = evidence.partition(": ")
    return f"{os.path.relpath(where)}{colon}{rest}" if Path(where).is_file() else evidence
