"""Held-out loss of every checkpoint, by language, on the whole validation split."""

import math
from pathlib import Path
from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ClusterConfig, EvaluateStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics

VERSION = 1
RESUMES = False


def estimate(_: Node) -> Estimate:
    return Estimate(seconds=15.0)


def run(context: Context) -> Metrics:
    import torch

    from aquilamoe.weights.allocator import keep_large_buffers

    keep_large_buffers()
    torch.set_num_threads(context.cluster.cpus_per_worker)
    tokens = context.inputs["tokens"].directory
    checkpoints = {role: source.directory for role, source in context.inputs.items() if role != "tokens"}
    metrics: Metrics = {}
    for index, (role, directory) in enumerate(checkpoints.items()):
        context.progress(index, len(checkpoints), "checkpoints")
        losses = _losses(cast(EvaluateStage, context.node.stage), context.cluster, directory, tokens)
        metrics |= {f"{role}/{key}": value for key, value in losses.items()}
    context.progress(len(checkpoints), len(checkpoints), "checkpoints")
    return metrics


def _losses(stage: EvaluateStage, cluster: ClusterConfig, checkpoint: Path, tokens: Path) -> dict[str, float]:
    """Nats per token and bits per UTF-8 byte for each language, and their mean over the languages."""
    from aquilamoe.data.loader import validation_batches
    from aquilamoe.data.tokens import read_record
    from aquilamoe.training.validation import evaluate, validation_rows
    from aquilamoe.weights.huggingface import load_model

    model = load_model(checkpoint / "model")
    sources = read_record(tokens).sources
    length, rows = stage.sequence_length, validation_rows(cluster, stage.sequence_length)
    losses: dict[str, float] = {}
    for name, splits in sources.items():
        nats = evaluate(model, validation_batches(tokens, name, length, None, rows), stage.precision)
        split = splits["validation"]
        losses[f"{name}/nats_per_token"] = nats
        losses[f"{name}/bits_per_byte"] = nats / math.log(2) * split.tokens / split.bytes
    for unit in ("nats_per_token", "bits_per_byte"):
        losses[unit] = sum(losses[f"{name}/{unit}"] for name in sources) / len(sources)
    return losses
