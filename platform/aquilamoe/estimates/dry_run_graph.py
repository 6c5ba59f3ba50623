"""An experiment made so small that its whole graph runs in a minute or so: the same stages, growths and layers.

Widths are divided by up to 64 (`config.scaling`), layers are all there, every stage trains one batch, and the corpus is
a few invented words in each of its languages.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquilamoe.config import graph, scaling
from aquilamoe.config.messages import UserError

Values = dict[str, Any]
WIDTHS = (64, 32, 16, 8, 4, 2, 1)
NARROWEST = 16  # channels of the residual stream
LENGTH = 32  # tokens of a sequence
ROWS = 4  # sequences of the one batch
VOCABULARY = 320  # tokens
DOCUMENTS, WORDS = 24, 80
BATCH = LENGTH * ROWS
TRAINING: Mapping[str, Any] = {
    "total_tokens": BATCH,
    "equal_flops": None,
    "batch_tokens": BATCH,
    "sequence_length": LENGTH,
    "validate_every_tokens": BATCH,
    "validation_tokens": LENGTH,
    "cluster": {},
    "precision": "fp32",  # which any CPU computes as fast as it can
}
CLUSTER: Mapping[str, Any] = {
    "executor": "process",
    "address": None,
    "workers": 1,
    "min_workers": None,
    "cpus_per_worker": 1,  # so little work is not worth dividing
    "gpus_per_worker": 0,
    "gpu_memory_bytes": 0,
    "micro_batch_tokens": BATCH // 2,
    "parallel": "ddp",
    "shard_size": None,
    "expert_parallel": 1,
    "compile": False,
    "runtime_env": {},
}


def shrunk(values: Mapping[str, Any], scratch: Path) -> tuple[Values, int]:
    """The values of the small experiment, and what its widths were divided by. It writes into `scratch` alone.

    UserError, that of the experiment at its own size, if no division of it can be built.
    """
    whole = _trained_instead(scaling.scaled(values))
    one_batch = _one_batch(whole, _invent(values, scratch), scratch)
    for width in WIDTHS:
        small = {**one_batch, scaling.KEY: {"width": width}}
        try:
            nodes = graph.build(graph.parse(small))
        except UserError:
            if width == 1:
                raise
            continue
        if width == 1 or all(node.model is None or node.model.hidden_size >= NARROWEST for node in nodes.values()):
            return small, width
    raise AssertionError("a width of 1 returns or raises")


def _one_batch(values: Values, sources: Values, scratch: Path) -> Values:
    stages = {name: _stage(stage, sources) for name, stage in values["stages"].items()}
    return {
        **values,
        "stages": stages,
        "model": _model(values["model"]),
        "data": {**values["data"], "sources": sources},
        "cluster": {**values["cluster"], **CLUSTER},
        "paths": {"root": str(scratch)},
        "tracking": {**values["tracking"], "enabled": False},
    }


def _trained_instead(values: Values) -> Values:
    """A network of the same sizes, trained from scratch, in the place of every checkpoint from elsewhere.

    UserError where no stage trains that it could be trained as, and no corpus is there to learn a tokenizer from.
    """
    stages: Values = {name: stage for name, stage in values["stages"].items() if isinstance(stage, Mapping)}
    external = [name for name, stage in stages.items() if stage["kind"] == "checkpoint"]
    if not external:
        return values
    nodes = graph.build(graph.parse(values))
    trained = next((stage for stage in stages.values() if stage["kind"] == "pretrain"), None)
    corpus = next((name for name, stage in stages.items() if stage["kind"] == "corpus"), None)
    if trained is None or corpus is None:
        raise UserError("action: dryrun of an experiment that trains nothing; action=plan checks its growths")
    tokens = {"inputs": {"tokens": trained["inputs"]["tokens"]}}
    for name in external:
        model = nodes[name].model
        assert model is not None
        stages[name] = {**trained, **tokens, "model": model.model_dump(mode="json"), "optimizer_state": "reset"}
    for name, stage in stages.items():
        if stage["kind"] == "tokenizer":
            stages[name] = {**stage, "inputs": {"corpus": corpus}}
    return {**values, "stages": stages}


def _stage(stage: Any, sources: Values) -> Any:
    if not isinstance(stage, Mapping):
        return stage
    found = dict(stage)
    if isinstance(stage.get("model"), Mapping):
        found["model"] = _model(stage["model"])
    if stage["kind"] == "corpus":
        found["sources"] = sources
    elif stage["kind"] == "tokenizer":
        # Learned from what was invented, also where the experiment has one from elsewhere.
        found |= {"vocab_size": VOCABULARY} | {key: None for key in ("path", "sha256") if key in stage}
    elif stage["kind"] == "pretrain":
        found |= {**TRAINING, "schedule": {**stage["schedule"], "warmup_tokens": 0, "decay_tokens": 0}}
    elif stage["kind"] in ("scale_up", "scale_out"):
        found["certificate_tokens"] = BATCH
    elif stage["kind"] == "evaluate":
        prompts = {language: texts[:1] for language, texts in (stage.get("prompts") or {}).items()}
        found |= {"sequence_length": LENGTH, "precision": "fp32"}
        found |= {"prompts": prompts, "generation": {"max_new_tokens": 2}}
    return found


def _model(model: Mapping[str, Any]) -> Values:
    return {**model, **({"vocab_size": VOCABULARY} if model.get("vocab_size") is not None else {})}


def _invent(values: Mapping[str, Any], scratch: Path) -> Values:
    """A file of invented documents for every language of the corpus."""
    draw, folder = random.Random(0), scratch / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    sources = {}
    for language in values["data"]["sources"]:
        words = ["".join(draw.choices("aeiounrst", k=draw.randint(2, 6))) for _ in range(VOCABULARY)]
        documents = [
            {"text": " ".join(draw.choices(words, k=WORDS)), "split": "train" if number % 4 else "validation"}
            for number in range(DOCUMENTS)
        ]
        path = folder / f"{language}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
        sources[language] = {"path": str(path), "sha256": None}
    return sources
