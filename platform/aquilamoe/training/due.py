"""What a training does at a step by the clock, or on request: a point, a checkpoint, a stop. All ranks agree on it."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from aquilamoe.process.stopping import is_requested
from aquilamoe.training.job import FIRST, Job, Rank
from aquilamoe.training.parallel import ParallelContext


@dataclass(frozen=True)
class Due:
    """What is due after a step."""

    point: bool
    checkpoint: bool
    stop: bool

    @property
    def saves(self) -> bool:
        return self.checkpoint or self.stop


class Clock:
    """Decides after every step; the first rank's clock and files count, and preemption notices of all ranks.

    job: whose cluster has the intervals. now: seconds of a clock that never goes back.
    """

    def __init__(
        self, job: Job, group: ParallelContext, rank: Rank = FIRST, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.out = job.out
        self.every_s = (job.cluster.metrics_every_s, job.cluster.checkpoint_every_s)
        self.group = group
        self.rank = rank
        self.now = now
        self.since = [now(), now()]  # of the last point and the last checkpoint

    def look(self) -> Due:
        """What is due; all ranks call it together after a step."""
        flags = [False, self.rank.is_save_due(), False]
        if self.group.is_first:
            point, checkpoint = map(self._is_over, self.every_s, self.since)
            flags = [point, flags[1] or checkpoint, is_requested(self.out)]
        return Due(*self.group.any_of(flags))

    def _is_over(self, interval: float | None, since: float) -> bool:
        return interval is not None and self.now() - since >= interval

    def pointed(self) -> None:
        """A point was written, for whatever reason."""
        self.since[0] = self.now()

    def saved(self) -> None:
        """A checkpoint was started, for whatever reason."""
        self.since[1] = self.now()
