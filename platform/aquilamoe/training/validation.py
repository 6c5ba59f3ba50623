"""Held-out losses, and what happens when a loss is not finite."""

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.data.loader import validation_batches
from aquilamoe.model import Decoder
from aquilamoe.training import state
from aquilamoe.training.job import Job, micro_batch_rows
from aquilamoe.training.objective import cross_entropy

VALIDATION_ROWS = 32


def validation_rows(cluster: ClusterConfig, sequence_length: int) -> int:
    """Sequences that go through a model at once when it is not trained."""
    return min(VALIDATION_ROWS, micro_batch_rows(cluster, sequence_length))


def validate(job: Job, model: Decoder, step: int) -> dict[str, float]:
    """Held-out loss by language, and their mean weighted as the training mixture, in nats per token."""
    stage = job.stage
    rows = validation_rows(job.cluster, stage.sequence_length)
    losses = {
        source: evaluate(
            model,
            validation_batches(job.tokens, source, stage.sequence_length, stage.validation_tokens, rows),
            stage.precision,
        )
        for source in stage.mixture
    }
    weights = sum(stage.mixture.values())
    mean = sum(losses[source] * weight for source, weight in stage.mixture.items()) / weights
    values = {"val/loss": mean, **{f"val/loss/{source}": loss for source, loss in losses.items()}}
    require_finite(job, step, values, weights_of=step)
    return values


@torch.no_grad()
def evaluate(model: Decoder, batches: Iterable[np.ndarray], precision: str) -> float:
    """Mean next-token loss in nats over batches, at least one, of (rows, length + 1) token ids."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for rows in batches:
        tokens_bt = torch.from_numpy(rows).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits_btv, _ = model(tokens_bt[:, :-1])
        targets_bt = tokens_bt[:, 1:]
        total += cross_entropy(logits_btv, targets_bt).item() * targets_bt.numel()
        count += targets_bt.numel()
    return total / count


def require_finite(job: Job, step: int, values: Mapping[str, float], weights_of: int) -> None:
    """UserError for a value that is NaN or Inf.

    It was computed from the weights that the step `weights_of` made. A checkpoint of that step is as bad as they are;
    the weights of every step before it gave finite values.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad:
        return
    good = [path for path in state.checkpoints(job.out) if state.step_of(path) < weights_of]
    raise UserError(
        f"stage {job.name}: {bad[0]} is {values[bad[0]]} at step {step} of {job.stage.num_steps} "
        f"({step * job.stage.batch_tokens:,} tokens); "
        f"{f'last good checkpoint: {good[0]}' if good else 'there is no good checkpoint before it'}; "
        f"lower its learning_rate ({job.stage.learning_rate}) or lengthen its schedule.warmup_tokens and run again"
    )
