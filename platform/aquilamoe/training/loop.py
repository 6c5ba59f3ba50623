"""The training loop: a plain function of a job. It depends on none of Ray, MLflow and Hydra."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aquilamoe.checkpoint.allocator import keep_large_buffers
from aquilamoe.data.loader import Batches
from aquilamoe.model.transformer import Decoder
from aquilamoe.process import errors, interruption
from aquilamoe.training import checkpoint, spikes
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.job import FIRST, Job, Rank
from aquilamoe.training.metrics_logger import CHECKPOINT, STEP, VALIDATION, WAIT, MetricsLogger
from aquilamoe.training.parallel import ParallelContext, initialize
from aquilamoe.training.spikes import SpikeError, TrainProgress
from aquilamoe.training.step import TrainStep
from aquilamoe.training.validation import validate

LOG_POINTS = 200  # training points logged over a stage
log = logging.getLogger(__name__)


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
    group = ParallelContext(job.cluster, rank)
    with errors.at(job.out), checkpoint.only_writer(job.out) if group.is_first else nullcontext():
        group.wait()  # no process reads a checkpoint before the writer of this run is the only one
        try:
            return _train(job, group, rank)
        finally:
            checkpoint.wait()  # nothing is written here when another may be the only writer


def _train(job: Job, group: ParallelContext, rank: Rank) -> dict[str, Any]:
    if not job.cluster.gpus_per_worker:
        torch.set_num_threads(job.cluster.cpus_per_worker)
    if group.is_first:
        kernels = group.kernels.describe(group.device.type, job.stage.sequence_length, job.model.is_moe)
        log.info("stage %s: %s", job.name, kernels)
    batches = _batches(job, group)  # a mistake in the data shows before anything is built or exchanged
    back: TrainProgress | None = None
    while True:
        run = _Run(job, group, back, rank)
        try:
            return _finish(run, batches)
        except SpikeError as spike:
            back = spikes.roll_back(job, group, spike, run.progress)
        del run  # before another takes its memory


def _finish(run: "_Run", batches: Batches) -> dict[str, Any]:
    """From where the run is to the end of the stage."""
    job, last = run.job, run.job.stage.num_steps
    log_every = max(1, last // LOG_POINTS)
    if run.progress.step == 0:
        run.write(run.validate())
    ahead = batches.iterate(run.position)
    for step in range(run.progress.step + 1, last + 1):
        interruption.check()
        values = run.step(step, ahead)
        if step == last or _due(step, job.stage.validate_every_tokens, job):
            run.write(values | run.validate())
        elif step % log_every == 0:
            run.write(values)
        if step < last and (_due(step, job.cluster.checkpoint_every_tokens, job) or run.is_save_due()):
            run.save_checkpoint()
    return run.save()


class _Run:
    """A stage in progress: what changes with every step, and what is written about it.

    back: how far the stage was when it was rolled back, None if it was not.
    rank: this process, which may get a preemption notice.
    """

    def __init__(self, job: Job, group: ParallelContext, back: TrainProgress | None, rank: Rank) -> None:
        self.job, self.group, self.told = job, group, rank.is_save_due
        saved, self.passed_over = checkpoint.newest_intact(job.out, group)
        self.model, self.optimizer, step, extra = _restore(job, group, saved)
        self.progress = TrainProgress.of(step, extra if step else {})
        if back:
            self.progress = back.at(step, job.stage.batch_tokens // job.stage.sequence_length)
        self.journal = MetricsLogger(job, group, step, rank)
        self.stepper = TrainStep(job, self.model, self.optimizer, group, self.progress)
        self.stepper.restore(extra)

    @property
    def position(self) -> int:
        """Sequence of the data at which the next step begins."""
        tokens = self.job.ancestor_tokens + self.progress.step * self.job.stage.batch_tokens
        return tokens // self.job.stage.sequence_length + self.progress.skipped_sequences

    def step(self, step: int, ahead: Iterator[np.ndarray]) -> dict[str, float]:
        """Take an optimizer step with the batch that is next."""
        with self.journal.measure(WAIT):
            rows = next(ahead)
        self.progress.step = step
        with self.journal.measure(STEP):
            values = self.stepper.step(step, rows)
        self.journal.stepped(step, values)
        return values

    def validate(self) -> dict[str, float]:
        """Held-out losses of the model as it would be published."""
        with self.journal.measure(VALIDATION), self.stepper.as_published():
            return validate(self.job, self.model, self.progress.step, self.group)

    def write(self, values: dict[str, float]) -> None:
        counts = self.progress.counts() if self.job.stage.spikes.policy != "stop" else {}
        damaged = {"checkpoint/passed_over": self.passed_over} if self.passed_over else {}
        self.passed_over = 0
        self.journal.write(self.progress.step, values | counts | damaged, self.stepper.router_load)

    def is_save_due(self) -> bool:
        """Whether any of the processes has got a preemption notice: then all save together."""
        return self.group.any_(self.told())

    def save_checkpoint(self) -> None:
        if self.progress.step == self.progress.skipped_steps:
            return  # nothing has changed yet, and the optimizer has no state
        extra = self.stepper.extra()
        with self.journal.measure(CHECKPOINT):
            self.journal.sync()  # before the checkpoint: who resumes from it needs the points up to it
            checkpoint.save_checkpoint(self.job.out, self.model, self.optimizer, self.progress.step, extra, self.group)

    def save(self) -> dict[str, Any]:
        """Leave the result of the stage and return its metrics."""
        extra = self.stepper.extra()
        checkpoint.save(self.job.out, self.model, self.optimizer, self.progress.step, extra, self.group)
        return self.journal.metrics.summary() | self.progress.counts(prefix="")


def _restore(
    job: Job, group: ParallelContext, saved: Path | None
) -> tuple[Decoder, optimizers.AnyOptimizer, int, dict[str, Tensor]]:
    """Model, optimizer, step and the rest as a checkpoint of this stage has them, or as the stage begins."""
    model = group.build(job.model, job.stage.precision)
    if not saved and job.source is not None:
        checkpoint.load_weights(job.source, model)
    elif not saved:
        initialize(model, job.stage.seed)
    optimizer = optimizers.build(model, job.stage.optimizer, job.stage.learning_rate)
    if saved:
        return model, optimizer, checkpoint.load(saved, model, optimizer), checkpoint.load_extra(saved)
    if job.source is not None and job.stage.optimizer_state == "keep":
        checkpoint.load_moments(job.source, model, optimizer)
        return model, optimizer, 0, checkpoint.load_extra(job.source)
    return model, optimizer, 0, {}


def _batches(job: Job, group: ParallelContext) -> Batches:
    stage = job.stage
    rows = stage.batch_tokens // stage.sequence_length
    return Batches(
        job.tokens, stage.mixture, stage.sequence_length, rows, stage.seed, rank=group.rank, world_size=group.world_size
    )


def _due(step: int, every_tokens: int, job: Job) -> bool:
    """Whether a multiple of `every_tokens` falls into this step."""
    batch = job.stage.batch_tokens
    return step * batch // every_tokens > (step - 1) * batch // every_tokens
