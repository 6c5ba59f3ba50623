"""The training loop: a plain function of a job. It knows nothing of Ray, MLflow or Hydra."""

import time
from contextlib import nullcontext
from typing import Any

import torch

from aquilamoe.data.loader import Batches
from aquilamoe.model import Decoder
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training import state
from aquilamoe.training.job import FIRST, Job, Rank
from aquilamoe.training.metrics import MetricsFile
from aquilamoe.training.parallel import Group, initialize
from aquilamoe.training.step import Stepper
from aquilamoe.training.validation import validate
from aquilamoe.weights.allocator import keep_large_buffers

LOG_POINTS = 200  # training points logged over a stage


def train(job: Job, rank: Rank = FIRST) -> dict[str, Any]:
    """Train the job to its end, from its last checkpoint if it has one; return the stage's metrics.

    The same bytes come out whether or not it was interrupted (CPU, same number of ranks and threads). UserError for
    what a user can repair, a loss that is not finite among it.
    """
    keep_large_buffers()
    group = Group(job.cluster, rank)
    with state.only_writer(job.out) if group.is_first else nullcontext():
        group.wait()  # nobody reads a checkpoint before the writer of this run is the only one
        return _train(job, group)


def _train(job: Job, group: Group) -> dict[str, Any]:
    if not job.cluster.gpus_per_worker:
        torch.set_num_threads(job.cluster.cpus_per_worker)
    batches = _batches(job, group)  # a mistake in the data shows before anything is built or exchanged
    model, optimizer, done = _restore(job, group)
    metrics = _metrics_file(job, done, group)
    stepper = Stepper(job, model, optimizer, group)
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
        if group.is_first and step < last and _due(step, job.cluster.checkpoint_every_tokens, job):
            metrics.sync()  # before the checkpoint: who resumes from it needs the points up to it
            state.save_checkpoint(job.out, model, optimizer, step)
    if group.is_first:
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


def _metrics_file(job: Job, resume_step: int, group: Group) -> MetricsFile:
    return MetricsFile(
        job.out / "metrics.jsonl",
        resume_step=resume_step,
        batch_tokens=job.stage.batch_tokens,
        flops_per_token=job.model.flops_per_token(job.stage.sequence_length),
        ancestor_tokens=job.ancestor_tokens,
        ancestor_flops=job.ancestor_flops,
        enabled=group.is_first,
    )


def _restore(job: Job, group: Group) -> tuple[Decoder, optimizers.AnyOptimizer, int]:
    """Model, optimizer and step as the newest checkpoint of this stage holds them, or else as the stage begins."""
    model = group.build(job.model, job.stage.precision)
    saved = state.checkpoints(job.out)
    if not saved and job.source is not None:
        state.load_weights(job.source, model)
    elif not saved:
        initialize(model, job.stage.seed)
    optimizer = optimizers.build(model, job.stage.optimizer, job.stage.learning_rate)
    if saved:
        return model, optimizer, state.load(saved[0], model, optimizer)
    if job.source is not None and job.stage.optimizer_state == "keep":
        state.load_moments(job.source, model, optimizer)
    return model, optimizer, 0


def _position(job: Job, step: int) -> int:
    """Sequence of the data at which the step after `step` begins."""
    return (job.ancestor_tokens + step * job.stage.batch_tokens) // job.stage.sequence_length


def _batches(job: Job, group: Group) -> Batches:
    stage = job.stage
    rows = stage.batch_tokens // stage.sequence_length
    return Batches(
        job.tokens, stage.mixture, stage.sequence_length, rows, stage.seed, rank=group.rank, world_size=group.world_size
    )


def _due(step: int, every_tokens: int, job: Job) -> bool:
    """Whether a multiple of `every_tokens` falls into this step."""
    batch = job.stage.batch_tokens
    return step * batch // every_tokens > (step - 1) * batch // every_tokens
