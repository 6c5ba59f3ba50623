"""The training loop: a plain function of a job. It knows nothing of Ray, MLflow or Hydra."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig, ModelConfig, PretrainStage
from aquilamoe.data.loader import Batches, validation_batches
from aquilamoe.model import Decoder
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training import state
from aquilamoe.training.allocator import keep_large_buffers
from aquilamoe.training.metrics import MetricsFile
from aquilamoe.training.objective import RouterObjective, cross_entropy
from aquilamoe.training.schedules import learning_rate_factor
from aquilamoe.training.state import Progress

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

    The same bytes come out whether or not it was interrupted (CPU, same number of ranks and threads).
    """
    keep_large_buffers()
    if not job.cluster.gpus_per_worker:
        torch.set_num_threads(job.cluster.cpus_per_worker)
    model, optimizer, progress = _restore(job, state.device_of(job.cluster.gpus_per_worker, rank.local_rank))
    metrics = _metrics_file(job, progress, rank)
    stepper = _Stepper(job, model, optimizer, rank)
    if progress.step == 0:
        metrics.write(0, validate(job, model))
    last = job.stage.num_steps
    log_every = max(1, last // LOG_POINTS)
    watch = _Stopwatch()
    batches = _batches(job, rank).iterate(_position(job, progress.step))
    for step, rows in zip(range(progress.step + 1, last + 1), batches, strict=False):
        with watch:
            values = stepper.step(step, rows)
        validates = step == last or _due(step, job.stage.validate_every_tokens, job)
        if validates or step % log_every == 0:
            values["train/tokens_per_s"] = job.stage.batch_tokens / watch.mean_and_reset()
            metrics.write(step, values | (validate(job, model) if validates else {}))
        if rank.rank == 0 and step < last and _due(step, job.cluster.checkpoint_every_tokens, job):
            state.save_checkpoint(job.out, model, optimizer, _progress(job, step))
    if rank.rank == 0:
        state.save(job.out, model, optimizer, _progress(job, last))
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


def _progress(job: Job, step: int) -> Progress:
    return Progress(step, step * job.stage.batch_tokens)


def _metrics_file(job: Job, progress: Progress, rank: Rank) -> MetricsFile:
    return MetricsFile(
        job.out / "metrics.jsonl",
        resume_step=progress.step,
        batch_tokens=job.stage.batch_tokens,
        flops_per_token=job.model.flops_per_token(job.stage.sequence_length),
        ancestor_tokens=job.ancestor_tokens,
        ancestor_flops=job.ancestor_flops,
        enabled=rank.rank == 0,
    )


def _restore(job: Job, device: torch.device) -> tuple[Decoder, Optimizer, Progress]:
    model = Decoder(job.model)
    saved = state.checkpoints(job.out)
    if job.source is None:
        model.initialize(job.stage.seed)
    elif not saved:
        state.load_state(model, job.source / state.WEIGHTS)
    model.to(device)
    optimizer = optimizers.build(model, job.stage.optimizer, job.stage.learning_rate)
    if saved:
        return model, optimizer, state.load(saved[0], model, optimizer)
    if job.source is not None and job.stage.optimizer_state == "keep":
        state.load_moments(job.source, model, optimizer)
    return model, optimizer, Progress(0, 0)


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


class _Stepper:
    """One optimizer step: micro-batches forward and backward, clip, update."""

    def __init__(self, job: Job, model: Decoder, optimizer: Optimizer, rank: Rank) -> None:
        self.job, self.model, self.optimizer = job, model, optimizer
        if job.cluster.compile:
            for layer in model.model.layers:
                layer.compile()
        self.network = DistributedDataParallel(model) if rank.world_size > 1 else model
        self.rows = max(1, job.cluster.micro_batch_tokens // job.stage.sequence_length)

    def step(self, step: int, rows: np.ndarray) -> dict[str, float]:
        """Train on this rank's rows (rows, sequence_length + 1) and return the step's values."""
        stage = self.job.stage
        tokens = step * stage.batch_tokens
        learning_rate = stage.learning_rate * learning_rate_factor(
            tokens, stage.num_steps * stage.batch_tokens, stage.schedule
        )
        optimizers.set_learning_rate(self.optimizer, learning_rate)
        router = RouterObjective(stage.router)
        sums = self._accumulate(rows, router)
        loss = sums["train/loss"]
        if not math.isfinite(loss):
            raise self._diverged(step, loss)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), stage.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        values = {**sums, "train/grad_norm": norm.item(), "train/learning_rate": learning_rate}
        if self.model.config.is_moe:
            values["router/load_max_over_mean"] = router.load_max_over_mean().item()
        return values

    def _accumulate(self, rows: np.ndarray, router: RouterObjective) -> dict[str, float]:
        device = next(self.model.parameters()).device
        chunks = torch.from_numpy(rows).to(device).split(self.rows)
        total = torch.zeros(3, device=device)
        for index, chunk in enumerate(chunks):
            share = chunk.shape[0] / rows.shape[0]
            if isinstance(self.network, DistributedDataParallel):
                self.network.require_backward_grad_sync = index == len(chunks) - 1
            with torch.autocast(device.type, torch.bfloat16, enabled=self.job.stage.precision == "bf16"):
                logits, routings = self.network(chunk[:, :-1])
            loss = cross_entropy(logits, chunk[:, 1:])
            parts = [loss, *(router(routings) if routings else (torch.zeros(()), torch.zeros(())))]
            coefficients = (1.0, self.job.stage.router.balance_loss_coeff, self.job.stage.router.z_loss_coeff)
            objective = sum(weight * part for weight, part in zip(coefficients, parts, strict=True))
            (objective * share).backward()
            total += torch.stack([part.detach().to(device) for part in parts]) * share
        if dist.is_initialized():
            dist.all_reduce(total, op=dist.ReduceOp.SUM)
            total /= dist.get_world_size()
        loss, balance, z = total.tolist()
        extra = {"train/balance_loss": balance, "train/z_loss": z} if self.model.config.is_moe else {}
        return {"train/loss": loss, **extra}

    def _diverged(self, step: int, loss: float) -> UserError:
        saved = state.checkpoints(self.job.out)
        good = f"last good checkpoint: {saved[0]}" if saved else "no checkpoint was written before"
        return UserError(
            f"stage {self.job.name}: the loss is {loss} at step {step} of {self.job.stage.num_steps} "
            f"({step * self.job.stage.batch_tokens:,} tokens); {good}; lower its learning_rate "
            f"({self.job.stage.learning_rate}) or lengthen its warmup_tokens and run again"
        )


def validate(job: Job, model: Decoder) -> dict[str, float]:
    """Held-out loss by language, and their mean weighted as the training mixture, in nats per token."""
    stage = job.stage
    losses = {
        source: evaluate(
            model,
            validation_batches(job.tokens, source, stage.sequence_length, stage.validation_tokens, VALIDATION_ROWS),
            stage.precision,
        )
        for source in stage.mixture
    }
    weights = sum(stage.mixture.values())
    mean = sum(losses[source] * weight for source, weight in stage.mixture.items()) / weights
    return {"val/loss": mean, **{f"val/loss/{source}": loss for source, loss in losses.items()}}


@torch.no_grad()
def evaluate(model: Decoder, batches: Iterable[np.ndarray], precision: str) -> float:
    """Mean next-token loss in nats over batches of (rows, length + 1) token ids."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for rows in batches:
        tokens = torch.from_numpy(rows).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits, _ = model(tokens[:, :-1])
        targets: Tensor = tokens[:, 1:]
        total += cross_entropy(logits, targets).item() * targets.numel()
        count += targets.numel()
    if not count:
        raise UserError("validation: the split is shorter than one sequence; lower sequence_length or add text")
    return total / count
