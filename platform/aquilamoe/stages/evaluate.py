"""Held-out loss of every checkpoint, by language, on the validation split or a part of it, and samples of its text.

Of a Mixture of Experts also which experts the tokens of each language choose, and how alike the experts are.
"""

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ClusterConfig, EvaluateStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics
from aquilamoe.pipeline.store import to_json
from aquilamoe.stages._routing import Choices, figures

if TYPE_CHECKING:
    from aquilamoe.model.transformer import Decoder

VERSION = 3
SAMPLES, ROUTING = "samples.md", "routing.json"
RESUMES = False


def estimate(node: Node) -> Estimate:
    """Every checkpoint reads the validation split, or the part of it that the stage names."""
    checkpoints = tuple(role for role in node.stage.inputs if role != "tokens")
    is_part = cast(EvaluateStage, node.stage).validation_tokens is not None
    return Estimate(grows_with=(checkpoints,) if is_part else (("tokens",), checkpoints))


def run(context: Context) -> Metrics:
    import torch

    from aquilamoe.checkpoint.allocator import keep_large_buffers
    from aquilamoe.checkpoint.state_dict import load_model
    from aquilamoe.evaluation.generation import Generator
    from aquilamoe.evaluation.samples import page

    keep_large_buffers()
    torch.set_num_threads(context.cluster.cpus_per_worker)
    stage, tokens = cast(EvaluateStage, context.node.stage), context.inputs["tokens"].directory
    prompts = [prompt for each in stage.prompts.values() for prompt in each]
    checkpoints = {role: source.directory for role, source in context.inputs.items() if role != "tokens"}
    metrics: Metrics = {}
    written: dict[str, list[str]] = {}
    routing: dict[str, dict[str, Any]] = {}
    for index, (role, directory) in enumerate(checkpoints.items()):
        context.progress(index, len(checkpoints), "checkpoints")
        writer = Generator.open(directory / "model") if prompts else None  # who writes nothing needs no tokenizer
        model = writer.model if writer else load_model(directory / "model")
        choices = Choices(model)
        found = _losses(stage, context.cluster, model, tokens, choices)
        if choices.sparse:
            routing[role] = choices.table()
            found |= figures(routing[role])
        metrics |= {f"{role}/{key}": value for key, value in found.items()}
        written[role] = writer.continue_texts(prompts, stage.generation) if writer else []
    if prompts:
        (context.out / SAMPLES).write_text(page(stage.prompts, written, stage.generation), encoding="utf-8")
    if routing:
        (context.out / ROUTING).write_text(to_json(routing, context.node.name), encoding="utf-8")
    context.progress(len(checkpoints), len(checkpoints), "checkpoints")
    return metrics


def _losses(
    stage: EvaluateStage, cluster: ClusterConfig, model: "Decoder", tokens: Path, choices: Choices
) -> dict[str, float]:
    """Nats per token and bits per UTF-8 byte for each language, and their mean over the languages."""
    from aquilamoe.data.loader import validation_batches
    from aquilamoe.data.tokens import read_record
    from aquilamoe.training.validation import evaluate, validation_rows

    sources = read_record(tokens).sources
    length, rows = stage.sequence_length, validation_rows(cluster, stage.sequence_length)
    losses: dict[str, float] = {}
    for name, splits in sources.items():
        batches = validation_batches(tokens, name, length, stage.validation_tokens, rows)
        nats = evaluate(model, batches, stage.precision, watch=partial(choices.add, name))
        split = splits["validation"]
        losses[f"{name}/nats_per_token"] = nats
        losses[f"{name}/bits_per_byte"] = nats / math.log(2) * split.tokens / split.bytes
    for unit in ("nats_per_token", "bits_per_byte"):
        losses[unit] = sum(losses[f"{name}/{unit}"] for name in sources) / len(sources)
    return losses
