"""What a training stage writes down while it runs, and the seconds that each part of it takes."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from statistics import fmean
from typing import Any

from aquilamoe.training.job import FIRST, Rank
from aquilamoe.training.metrics import MetricsFile, PointsFile
from aquilamoe.training.step import TrainStep

WAIT = "wait"
STEP = "step"
VALIDATION = "validation"
CHECKPOINT = "checkpoint"


class MetricsLogger:
    """metrics.jsonl, router.jsonl of a Mixture of Experts, and a stopwatch between two points of them."""

    def __init__(self, train_step: TrainStep, rank: Rank = FIRST, passed_over: int = 0) -> None:
        """Drop what was written after the step that training resumes at.

        Args:
            train_step: the stage in progress.
            rank: its meter is notified as well.
            passed_over: damaged checkpoints, for the first point.
        """
        job, resume_step = train_step.job, train_step.progress.step
        self.batch_tokens = job.stage.batch_tokens
        self.progress = train_step.progress
        self.router_load = train_step.router_load
        self.counts_events = job.stage.spikes.policy != "stop"
        self.passed_over = passed_over
        self.takes_means = job.cluster.metrics_every_s is not None
        self.interval: dict[str, list[float]] = defaultdict(list)  # values of the steps since the last point
        enabled = train_step.group.is_first
        self.metrics = MetricsFile(
            job.out / "metrics.jsonl",
            resume_step=resume_step,
            batch_tokens=self.batch_tokens,
            flops_per_token=job.model.flops_per_token(job.stage.sequence_length),
            ancestor_tokens=job.ancestor_tokens,
            ancestor_flops=job.ancestor_flops,
            enabled=enabled,
        )
        self.router: PointsFile | None = None
        if job.model.is_moe:
            self.router = PointsFile(job.out / "router.jsonl", resume_step, self.batch_tokens, enabled)
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self.meter = rank.meter
        if self.meter:
            self.meter.begins(job, rank, train_step.group.device, resume_step)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Count the seconds of a `with` block to a part."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self.seconds[part] += seconds
        self.steps += part == STEP
        if self.meter:
            self.meter.spent(part, seconds)

    def stepped(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step, which the host has."""
        if self.takes_means:
            for name in values.keys() - {"train/learning_rate"}:
                if isfinite(values[name]):
                    self.interval[name].append(values[name])
        if self.meter:
            self.meter.stepped(step, values)

    def write(self, values: Mapping[str, float]) -> None:
        """Add a point: the values of this step, and what was measured since the point before."""
        step, table = self.progress.step, None
        means = {name: fmean(found) for name, found in self.interval.items()}
        self.interval.clear()
        point: dict[str, Any] = {**values, **means, **self._events(), **self._speeds()}
        if self.router_load and not self.router_load.is_empty:
            assert self.router is not None
            loads, table = self.router_load.read_and_reset()
            point |= loads
            self.router.write(step, table)
        self.metrics.write(step, point)
        if self.meter:
            self.meter.measured(step, point, table)
        self.seconds.clear()
        self.steps = 0

    def _events(self) -> dict[str, float]:
        """Spikes so far, and once the damaged checkpoints."""
        found = self.progress.counts() if self.counts_events else {}
        if self.passed_over:
            found["checkpoint/passed_over"] = self.passed_over
            self.passed_over = 0
        return found

    def _speeds(self) -> dict[str, Any]:
        """Speed in the steps themselves: validating and saving have seconds of their own."""
        found = {}
        if self.steps:
            busy = self.seconds[WAIT] + self.seconds[STEP]
            found["train/tokens_per_s"] = self.steps * self.batch_tokens / busy
            found["train/data_wait_share"] = self.seconds[WAIT] / busy
        for part, name in ((VALIDATION, "val/seconds"), (CHECKPOINT, "checkpoint/seconds")):
            if part in self.seconds:
                found[name] = self.seconds[part]
        return found

    def sync(self) -> None:
        """Wait until every point is on disk."""
        for file in (self.metrics, self.router):
            if file:
                file.sync()
