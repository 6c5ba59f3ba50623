"""Steps that must not be taken: their loss is not finite, or their gradient is out of all proportion."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from aquilamoe.config.messages import UserError
from aquilamoe.training import checkpoint
from aquilamoe.training.job import Job
from aquilamoe.training.parallel import ParallelContext

PROGRESS = "progress"  # among the tensors of a checkpoint


@dataclass
class TrainProgress:
    """How far a stage is, and what went wrong on the way: part of its checkpoints.

    step: optimizer steps behind it, the skipped ones included. skipped_steps: those without an update. rollbacks: how
    often it went back to a checkpoint. skipped_sequences: sequences of the data that it left out in doing so.
    """

    step: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0
    skipped_sequences: int = 0

    @classmethod
    def of(cls, step: int, extra: Mapping[str, Tensor]) -> Self:
        """As a checkpoint has it."""
        return cls(step, *extra[PROGRESS].tolist()) if PROGRESS in extra else cls(step)

    def extra(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the step: nothing, as long as nothing went wrong."""
        counts = [self.skipped_steps, self.rollbacks, self.skipped_sequences]
        return {PROGRESS: torch.tensor(counts)} if any(counts) else {}

    def at(self, step: int, batch_sequences: int) -> Self:
        """The progress after a rollback to `step`: the data continue, what the steps in between read is skipped."""
        left_out = (self.step - step) * batch_sequences
        return replace(self, step=step, skipped_sequences=self.skipped_sequences + left_out)

    def position(self, job: Job) -> int:
        """Sequence of the data at which the next step begins."""
        tokens = job.ancestor_tokens + self.step * job.stage.batch_tokens
        return tokens // job.stage.sequence_length + self.skipped_sequences

    def counts(self, prefix: str = "train/") -> dict[str, float]:
        """For metrics."""
        return {f"{prefix}skipped_steps": self.skipped_steps, f"{prefix}rollbacks": self.rollbacks}


class SpikeError(UserError):
    """A value that stops a stage, unless its policy knows better.

    progress: of the stage when it was measured. weights_of: the step that made the weights it was computed from.
    spoiled: whether those weights may be the cause: a checkpoint of them is then as bad as they are.
    """

    def __init__(
        self, job: Job, progress: TrainProgress, *, weights_of: int, name: str, value: float, reason: str = ""
    ) -> None:
        self.progress = progress
        self.weights_of = weights_of
        self.spoiled = not math.isfinite(value)
        good = next(iter(self.checkpoints_before(job)), None)
        super().__init__(
            f"stage {job.name}: {name} is {value}{reason} at step {progress.step} of {job.stage.num_steps} "
            f"({progress.step * job.stage.batch_tokens:,} tokens); "
            f"{f'last good checkpoint: {good}' if good else 'there is no good checkpoint before it'}; "
            f"lower its learning_rate ({job.stage.learning_rate}) or lengthen its schedule.warmup_tokens and run again"
        )

    @property
    def first_bad_checkpoint(self) -> int:
        """Checkpoints of this step and of those after it are not to be trusted."""
        return self.weights_of if self.spoiled else self.weights_of + 1

    def checkpoints_before(self, job: Job) -> list[str]:
        """Those that can be trusted, newest first."""
        return [
            str(path)
            for path in checkpoint.checkpoints(job.out)
            if checkpoint.step_of(path) < self.first_bad_checkpoint
        ]


def find(job: Job, progress: TrainProgress, values: Mapping[str, float], weights_of: int) -> SpikeError | None:
    """What is wrong with the values of a step or of a validation: the first that is NaN or Inf, or too large a norm.

    They were computed from the weights that the step `weights_of` made.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            return SpikeError(job, progress, weights_of=weights_of, name=name, value=value)
    limit, norm = job.stage.spikes.max_grad_norm, values.get("train/grad_norm", 0.0)
    if limit is not None and norm > limit:
        reason = f", over spikes.max_grad_norm ({limit}),"
        return SpikeError(job, progress, weights_of=weights_of, name="train/grad_norm", value=norm, reason=reason)
    return None


def count(job: Job, progress: TrainProgress, spike: SpikeError) -> None:
    """Allow one more event; raise the spike when there have been `spikes.max_events` in this stage."""
    allowed = job.stage.spikes.max_events
    if progress.skipped_steps + progress.rollbacks >= allowed:
        raise UserError(f"{spike} (skipped or rolled back {allowed} times before: spikes.max_events)")


def roll_back(job: Job, group: ParallelContext, spike: SpikeError) -> TrainProgress:
    """Leave as the newest checkpoint the last one that can be trusted; return the progress with one rollback more.

    Raises the spike if that is not the policy, or if the weights that the stage began with are the cause. Done again
    after an interruption at any place, it finds the same.
    """
    if job.stage.spikes.policy != "roll_back" or spike.progress.step == 0:
        raise spike
    count(job, spike.progress, spike)
    checkpoint.wait()
    group.wait()  # the checkpoint before is written, by all
    if group.is_first:
        for path in checkpoint.checkpoints(job.out):
            if checkpoint.step_of(path) >= spike.first_bad_checkpoint:
                checkpoint.discard(path)
    group.wait()
    return replace(spike.progress, rollbacks=spike.progress.rollbacks + 1)
