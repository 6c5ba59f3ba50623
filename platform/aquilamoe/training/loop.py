"""The training loop: a plain function of a job. It depends on none of Ray, MLflow and Hydra."""

import gc
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from aquilamoe.checkpoint.allocator import keep_large_buffers
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import PretrainStage
from aquilamoe.data.loader import Batches
from aquilamoe.process import errors, interruption
from aquilamoe.training import checkpoint, fan_in, spikes
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.due import Clock
from aquilamoe.training.job import FIRST, Job, Rank
from aquilamoe.training.metrics_logger import CHECKPOINT, STEP, VALIDATION, WAIT, MetricsLogger
from aquilamoe.training.parallel import ParallelContext, initialize
from aquilamoe.training.parts import Parts
from aquilamoe.training.spikes import SpikeError, TrainProgress
from aquilamoe.training.step import TrainStep
from aquilamoe.training.validation import validate

LOG_POINTS = 200  # training points logged over a stage
log = logging.getLogger(__name__)


def fit(
    job: Job, group: ParallelContext, rank: Rank = FIRST, rolled_back: TrainProgress | None = None
) -> dict[str, Any]:
    """Train from the newest intact checkpoint, or else from the start, to the end of the stage.

    Args:
        job: the stage, its data and its directories.
        group: the processes that train together.
        rank: this process, which may get a preemption notice.
        rolled_back: how far the stage was when it was rolled back; None if it was not.

    Returns:
        The stage's metrics by name.

    Raises:
        SpikeError: a step or a validation has a value that its policy does not skip.
    """
    stage, cluster = job.stage, job.cluster
    batches = _batches(job, group)  # a mistake in the data shows before anything is built or exchanged
    saved, passed_over = checkpoint.newest_intact(job.out, group)
    train_step = _build(job, group, saved, rolled_back)
    progress = train_step.progress
    logger = MetricsLogger(train_step, rank, passed_over)
    log_every = max(1, stage.num_steps // LOG_POINTS)

    if progress.step == 0:
        logger.write(_validate(train_step, logger))
    clock = Clock(job, group, rank)
    ahead = batches.iterate(progress.position(job))
    for step in range(progress.step + 1, stage.num_steps + 1):
        interruption.check()
        with logger.measure(WAIT):
            rows = next(ahead)
        progress.step = step
        with logger.measure(STEP):
            values = train_step.step(step, rows)
        logger.stepped(step, values)

        is_last = step == stage.num_steps
        due = clock.look()
        if is_last or _is_due(step, stage.validate_every_tokens, stage):
            logger.write(values | _validate(train_step, logger))
            clock.pointed()
        elif step % log_every == 0 or due.point:
            logger.write(values)
            clock.pointed()

        # A worker with a preemption notice saves and continues; it ends by itself: see `training.preemption`.
        is_milestone = _is_due(step, cluster.keep_every_tokens, stage)
        if not is_last and (_is_due(step, cluster.checkpoint_every_tokens, stage) or is_milestone or due.saves):
            _save_checkpoint(train_step, logger, is_milestone)
            clock.saved()
        if due.stop and not is_last:
            _stop(train_step)

    checkpoint.save(
        job.out, train_step.model, train_step.optimizer, progress.step, extra=train_step.extra(), group=group
    )
    return logger.metrics.summary() | progress.counts(prefix="")


def train(job: Job, rank: Rank = FIRST) -> dict[str, Any]:
    """Train the job to its end, from its last checkpoint if it has one; return the stage's metrics.

    The output's bytes are identical whether or not it was interrupted (CPU, same number of ranks and threads).

    Args:
        job: the stage, its data and its directories.
        rank: this process among those that train together.

    Returns:
        The stage's metrics by name, for its record.

    Raises:
        UserError: what a user can repair, e.g. a loss that is not finite.
    """
    keep_large_buffers()
    if not job.cluster.gpus_per_worker:
        torch.set_num_threads(job.cluster.cpus_per_worker)
    group = ParallelContext(job.cluster, rank)
    with errors.at(job.out), checkpoint.only_writer(job.out) if group.is_first else nullcontext():
        group.wait()  # no process reads a checkpoint before the writer of this run is the only one
        if group.is_first:
            kernels = group.kernels.describe(group.device.type, job.stage.sequence_length, job.model.is_moe)
            log.info("stage %s: %s", job.name, kernels)
        rolled_back: TrainProgress | None = None
        try:
            while True:
                try:
                    return fit(job, group, rank, rolled_back)
                except SpikeError as spike:
                    rolled_back = spikes.roll_back(job, group, spike)
                gc.collect()  # the old model, which the error's frames kept, before another takes its memory
        finally:
            checkpoint.wait()  # nothing is written here when another may be the only writer


def _batches(job: Job, group: ParallelContext) -> Batches:
    stage = job.stage
    rows = stage.batch_tokens // stage.sequence_length
    return Batches(
        job.tokens, stage.mixture, stage.sequence_length, rows, stage.seed, rank=group.rank, world_size=group.world_size
    )


def _build(job: Job, group: ParallelContext, saved: Path | None, rolled_back: TrainProgress | None) -> TrainStep:
    """Model, optimizer and progress as a checkpoint of this stage has them, or as the stage begins."""
    stage = job.stage
    model = group.build(job.model, stage.precision)
    if saved is None and job.source is not None:
        checkpoint.load_weights(job.source, model)
    elif saved is None:
        initialize(model, stage.seed)
    groups = stage.optimizer.groups
    parts = None if groups.are_one or job.marks is None else Parts(model, job.marks(), groups)
    scales = {}
    if stage.optimizer.learning_rate_scale == "fan_in" and job.beginning is not None:
        scales = fan_in.scales(model, job.beginning)
    part_of = parts.part_of if parts else {}
    optimizer = optimizers.build(model, stage.optimizer, stage.learning_rate, part_of, scales)
    progress, extra = TrainProgress(), checkpoint.NOTHING
    if saved is not None:
        step, extra = checkpoint.load(saved, model, optimizer), checkpoint.load_extra(saved)
        progress = TrainProgress.of(step, extra)
    elif job.source is not None and stage.optimizer_state == "keep":
        checkpoint.load_moments(job.source, model, optimizer)
        extra = checkpoint.load_extra(job.source)
    if rolled_back is not None:
        progress = rolled_back.at(progress.step, stage.batch_tokens // stage.sequence_length)
    train_step = TrainStep(job, model, optimizer, group, progress, parts=parts)
    train_step.restore(extra)
    return train_step


def _validate(train_step: TrainStep, logger: MetricsLogger) -> dict[str, float]:
    """Held-out losses of the model as it would be published."""
    with logger.measure(VALIDATION), train_step.as_published():
        return validate(train_step.job, train_step.model, train_step.progress, train_step.group)


def _stop(train_step: TrainStep) -> None:
    """End with one line when the checkpoint of this step is complete."""
    checkpoint.wait()
    job, step = train_step.job, train_step.progress.step
    raise UserError(
        f"stage {job.name}: stopped on request, at {step * job.stage.batch_tokens:,} of "
        f"{job.stage.num_steps * job.stage.batch_tokens:,} tokens; the same command resumes from there"
    )


def _save_checkpoint(train_step: TrainStep, logger: MetricsLogger, is_milestone: bool = False) -> None:
    progress = train_step.progress
    if progress.step == progress.skipped_steps:
        return  # nothing has changed yet, and the optimizer has no state
    out = train_step.job.out
    group = train_step.group
    extra = train_step.extra()
    with logger.measure(CHECKPOINT):
        logger.sync()  # before the checkpoint: a run that resumes from it needs the points up to it
        checkpoint.save_checkpoint(
            out,
            train_step.model,
            train_step.optimizer,
            progress.step,
            extra=extra,
            group=group,
            keep_in=checkpoint.milestones(out) if is_milestone else None,
        )


def _is_due(step: int, every_tokens: int | None, stage: PretrainStage) -> bool:
    """Whether a multiple of `every_tokens` falls into this step; never without an interval."""
    batch = stage.batch_tokens
    return every_tokens is not None and step * batch // every_tokens > (step - 1) * batch // every_tokens
