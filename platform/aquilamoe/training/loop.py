"""The training loop: a plain function of a job. It knows nothing of Ray, MLflow or Hydra."""

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig, ModelConfig, PretrainStage
from aquilamoe.data.loader import Batches, validation_batches
from aquilamoe.model import Decoder
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training import state
from aquilamoe.training.metrics import MetricsFile
from aquilamoe.training.objective import RouterObjective, cross_entropy
from aquilamoe.training.schedules import learning_rate_factor
from aquilamoe.weights.allocator import keep_large_buffers

LOG_POINTS = 200  # training points logged over a stage
VALIDATION_ROWS = 32


@dataclass(frozen=True)
class Job:
    """Everything that a training stage needs, as plain data that can be sent to a worker.

    name: the stage's name, for messages.
    source: directory of a stage whose `model/` is continued, None to start from scratch.
    out: directory for metrics, checkpoints and the result.
    ancestor_tokens, ancestor_flops: what the checkpoint has behind it; the data go on where the ancestors stopped.
    """

    name: str
    stage: PretrainStage
    model: ModelConfig
    tokens: Path
    source: Path | None
    out: Path
    ancestor_tokens: int
    ancestor_flops: int
    cluster: ClusterConfig


@dataclass(frozen=True)
class Rank:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


FIRST = Rank()


def train(job: Job, rank: Rank = FIRST) -> dict[str, Any]:
    """Train the job to its end, from its last checkpoint if it has one; return the stage's metrics.

    The same bytes come out whether or not it was interrupted (CPU, same number of ranks and threads). UserError for
    what a user can repair, a loss that is not finite among it.
    """
    keep_large_buffers()
    with state.only_writer(job.out) if rank.rank == 0 else nullcontext():
        if dist.is_initialized():
            dist.barrier()  # nobody reads a checkpoint before the writer of this run is the only one
        return _train(job, rank)


def _train(job: Job, rank: Rank) -> dict[str, Any]:
    if not job.cluster.gpus_per_worker:
        torch.set_num_threads(job.cluster.cpus_per_worker)
    batches = _batches(job, rank)  # a mistake in the data shows before anything is built or exchanged
    model, optimizer, done = _restore(job, state.device_of(job.cluster.gpus_per_worker, rank.local_rank))
    metrics = _metrics_file(job, done, rank)
    stepper = Stepper(job, model, optimizer, rank)
    if done == 0:
        metrics.write(0, validate(job, model, 0))
    last = job.stage.num_steps
    log_every = max(1, last // LOG_POINTS)
    watch = _Stopwatch()
    steps = range(done + 1, last + 1)
    for step, rows in zip(steps, batches.iterate(_position(job, done)), strict=False):
        with watch:
            values = stepper.step(step, rows)
        validates = step == last or _due(step, job.stage.validate_every_tokens, job)
        if validates or step % log_every == 0:
            values["train/tokens_per_s"] = job.stage.batch_tokens / watch.mean_and_reset()
            metrics.write(step, values | (validate(job, model, step) if validates else {}))
        if rank.rank == 0 and step < last and _due(step, job.cluster.checkpoint_every_tokens, job):
            metrics.sync()  # before the checkpoint: who resumes from it needs the points up to it
            state.save_checkpoint(job.out, model, optimizer, step)
    if rank.rank == 0:
        state.save(job.out, model, optimizer, last)
    return metrics.summary()


class _Stopwatch:
    """Mean seconds of the `with` blocks since the last reset: validation and saving are not a step's time."""

    def __init__(self) -> None:
        self.seconds, self.blocks = 0.0, 0

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self.started
        self.blocks += 1

    def mean_and_reset(self) -> float:
        mean = self.seconds / self.blocks
        self.seconds, self.blocks = 0.0, 0
        return mean


def _metrics_file(job: Job, resume_step: int, rank: Rank) -> MetricsFile:
    return MetricsFile(
        job.out / "metrics.jsonl",
        resume_step=resume_step,
        batch_tokens=job.stage.batch_tokens,
        flops_per_token=job.model.flops_per_token(job.stage.sequence_length),
        ancestor_tokens=job.ancestor_tokens,
        ancestor_flops=job.ancestor_flops,
        enabled=rank.rank == 0,
    )


def _restore(job: Job, device: torch.device) -> tuple[Decoder, optimizers.AnyOptimizer, int]:
    """Model, optimizer and step as the newest checkpoint of this stage holds them, or else as the stage begins."""
    model = Decoder(job.model)
    saved = state.checkpoints(job.out)
    if not saved and job.source is not None:
        state.load_weights(job.source, model)
    elif not saved:
        model.initialize(job.stage.seed)
    model.to(device)
    optimizer = optimizers.build(model, job.stage.optimizer, job.stage.learning_rate)
    if saved:
        return model, optimizer, state.load(saved[0], model, optimizer)
    if job.source is not None and job.stage.optimizer_state == "keep":
        state.load_moments(job.source, model, optimizer)
    return model, optimizer, 0


def _position(job: Job, step: int) -> int:
    """Sequence of the data at which the step after `step` begins."""
    return (job.ancestor_tokens + step * job.stage.batch_tokens) // job.stage.sequence_length


def _batches(job: Job, rank: Rank) -> Batches:
    stage = job.stage
    rows = stage.batch_tokens // stage.sequence_length
    return Batches(
        job.tokens, stage.mixture, stage.sequence_length, rows, stage.seed, rank=rank.rank, world_size=rank.world_size
    )


def _due(step: int, every_tokens: int, job: Job) -> bool:
    """Whether a multiple of `every_tokens` falls into this step."""
    batch = job.stage.batch_tokens
    return step * batch // every_tokens > (step - 1) * batch // every_tokens


def _micro_batch_rows(cluster: ClusterConfig, sequence_length: int) -> int:
    return max(1, cluster.micro_batch_tokens // sequence_length)


def validation_rows(cluster: ClusterConfig, sequence_length: int) -> int:
    """Sequences that go through a model at once when it is not trained."""
    return min(VALIDATION_ROWS, _micro_batch_rows(cluster, sequence_length))


class Stepper:
    """One optimizer step: micro-batches forward and backward, clip, update."""

    def __init__(self, job: Job, model: Decoder, optimizer: optimizers.AnyOptimizer, rank: Rank = FIRST) -> None:
        self.job, self.model, self.optimizer = job, model, optimizer
        self.device = next(model.parameters()).device
        self.rows = _micro_batch_rows(job.cluster, job.stage.sequence_length)
        router = job.stage.router
        self.coefficients = {
            "train/loss": 1.0,
            "train/balance_loss": router.balance_loss_coeff,
            "train/z_loss": router.z_loss_coeff,
        }
        if job.cluster.compile:
            for layer in model.model.layers:
                layer.compile()
        self.network = DistributedDataParallel(model) if rank.world_size > 1 else model

    def step(self, step: int, rows: np.ndarray) -> dict[str, float]:
        """Train on this rank's rows (rows, sequence_length + 1) and return the step's values."""
        stage = self.job.stage
        total = stage.num_steps * stage.batch_tokens
        learning_rate = stage.learning_rate * learning_rate_factor(step * stage.batch_tokens, total, stage.schedule)
        optimizers.set_learning_rate(self.optimizer, learning_rate)
        values = self.accumulate(rows)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), stage.optimizer.max_grad_norm)
        values |= {"train/grad_norm": norm.item(), "train/learning_rate": learning_rate}
        _require_finite(self.job, step, values, weights_of=step - 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return values

    def accumulate(self, rows: np.ndarray) -> dict[str, float]:
        """Leave the gradient of the global batch in the parameters; return its mean losses and the expert load."""
        router = RouterObjective(self.job.stage.router)
        chunks = torch.from_numpy(rows).to(self.device).split(self.rows)
        losses: dict[str, Tensor] = {}
        totals = torch.zeros((), dtype=torch.float64, device=self.device)
        for index, chunk_bt in enumerate(chunks):
            if isinstance(self.network, DistributedDataParallel):
                self.network.require_backward_grad_sync = index == len(chunks) - 1
            losses = self._losses(chunk_bt, router)
            share = chunk_bt.shape[0] / rows.shape[0]
            objective = sum(self.coefficients[name] * loss for name, loss in losses.items())
            (objective * share).backward()
            totals = totals + share * torch.stack([loss.detach().double() for loss in losses.values()])
        if dist.is_initialized():
            dist.all_reduce(totals)
            totals /= dist.get_world_size()
        values = dict(zip(losses, totals.tolist(), strict=True))
        return values | ({"router/load_max_over_mean": router.load_max_over_mean()} if self.job.model.is_moe else {})

    def _losses(self, tokens_bt: Tensor, router: RouterObjective) -> dict[str, Tensor]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.job.stage.precision == "bf16"):
            logits_btv, routings = self.network(tokens_bt[:, :-1])
        losses = {"train/loss": cross_entropy(logits_btv, tokens_bt[:, 1:])}
        if routings:
            losses["train/balance_loss"], losses["train/z_loss"] = router(routings)
        return losses


def _require_finite(job: Job, step: int, values: Mapping[str, float], weights_of: int) -> None:
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
    _require_finite(job, step, values, weights_of=step)
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
