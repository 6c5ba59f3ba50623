"""Held-out losses."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from aquilamoe.config.schema import ClusterConfig
from aquilamoe.data.loader import validation_batches
from aquilamoe.model.transformer import Decoder, Routing
from aquilamoe.training import spikes
from aquilamoe.training.job import Job, micro_batch_rows
from aquilamoe.training.parallel import ParallelContext
from aquilamoe.training.spikes import TrainProgress

VALIDATION_ROWS = 32


def validation_rows(cluster: ClusterConfig, sequence_length: int) -> int:
    """Sequences that go through a model at once when it is not trained."""
    return min(VALIDATION_ROWS, micro_batch_rows(cluster, sequence_length))


def validate(job: Job, model: Decoder, progress: TrainProgress, group: ParallelContext) -> dict[str, float]:
    """Held-out loss by language, and their mean weighted as the training mixture, in nats per token.

    Raises:
        SpikeError: a loss is not finite.
    """
    stage = job.stage
    rows = validation_rows(job.cluster, stage.sequence_length) * group.world_size
    losses = {
        source: evaluate(
            model,
            validation_batches(job.tokens, source, stage.sequence_length, stage.validation_tokens, rows),
            stage.precision,
            group,
        )
        for source in stage.mixture
    }
    weights = sum(stage.mixture.values())
    mean = sum(losses[source] * weight for source, weight in stage.mixture.items()) / weights
    values = {"val/loss": mean, **{f"val/loss/{source}": loss for source, loss in losses.items()}}
    if spike := spikes.find(job, progress, values, weights_of=progress.step):
        raise spike
    return values


@torch.no_grad()
def evaluate(
    model: Decoder,
    batches: Iterable[np.ndarray],
    precision: str,
    group: ParallelContext | None = None,
    watch: Callable[[Sequence[Routing]], None] | None = None,
) -> float:
    """Mean next-token loss in nats over batches, at least one, of (rows, length + 1) token ids.

    group: the processes that have the same batches and divide the rows of each among them. All make as many passes;
    a process without a row of a batch runs its first one and does not count it. watch: is shown what the routers of a
    Mixture of Experts did in every pass.
    """
    device = next(model.parameters()).device
    rank, world_size = (group.rank, group.world_size) if group else (0, 1)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, tokens
    for rows in batches:
        mine = rows[rank::world_size]
        tokens_bt = torch.from_numpy(mine if len(mine) else rows[:1]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
            loss, routings = model(tokens_bt[:, :-1], tokens_bt[:, 1:])
        if watch and routings:
            watch(routings)
        counted = tokens_bt[:, 1:].numel() if len(mine) else 0
        sums += torch.stack([loss.double() * counted, torch.full_like(sums[1], counted)])
    if group:
        group.sum_(sums)
    return (sums[0] / sums[1]).item()
