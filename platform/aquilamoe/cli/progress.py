"""How far a pipeline is: what the live view and `action=status` both show, from plans, points and records."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Point = dict[str, Any]


@dataclass(kw_only=True)
class StageProgress:
    """One stage. tokens: its budget, 0 if it does not train. expected_s: by the plan, None if unknown. Times: s, 1970.

    done, total: in `unit`. losses: of training, as measured. resumed_at: tokens that earlier attempts had done.
    """

    name: str
    tokens: int
    flops: float
    expected_s: float | None
    state: Literal["waiting", "running", "run", "cached"] = "waiting"
    started: float = 0.0
    seconds: float = 0.0
    done: float = 0.0
    total: float = 0.0
    unit: str = ""
    losses: list[float] = field(default_factory=list)
    held_out: float | None = None
    tokens_per_s: float | None = None
    resumed_at: int = 0
    _first: tuple[float, float] | None = None
    _last: tuple[float, float] | None = None

    def start(self, now: float) -> None:
        """It runs from `now` on."""
        self.state, self.started = "running", now
        self.total, self.unit = self.tokens, "tokens" if self.tokens else ""

    def add(self, points: Iterable[Point]) -> None:
        """Take over what was measured; points from before this attempt are those that it resumes from."""
        for point in points:
            if {"done", "total", "unit"} <= point.keys():
                self.done = point["done"]
                self.total = point["total"]
                self.unit = point["unit"]
                continue
            if not {"tokens", "time"} <= point.keys():
                continue
            self.done = point["tokens"]
            self.held_out = point.get("val/loss", self.held_out)
            self.tokens_per_s = point.get("train/tokens_per_s", self.tokens_per_s)
            if "train/loss" in point:
                self.losses.append(point["train/loss"])
            at = (float(point["time"]), self.done)
            if at[0] < self.started:
                self.resumed_at = int(self.done)
            else:
                self._first, self._last = self._first or at, at

    def seconds_left(self, now: float) -> float | None:
        """By the pace of this attempt, or else what the plan expects; None if neither is known."""
        if self._first is not None and self._last is not None and self._last[1] > self._first[1]:
            pace = (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
            return max(0.0, (self.total - self._last[1]) * pace - (now - self._last[0]))
        if self.expected_s is None:
            return None
        return max(0.0, self.expected_s - (now - self.started))


@dataclass
class PipelineProgress:
    """All stages of a pipeline, in their order."""

    name: str
    stages: Sequence[StageProgress]

    def __getitem__(self, name: str) -> StageProgress:
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def running(self) -> StageProgress | None:
        return next((stage for stage in self.stages if stage.state == "running"), None)

    @property
    def waiting(self) -> list[StageProgress]:
        return [stage for stage in self.stages if stage.state == "waiting"]

    def seconds_left(self, now: float) -> float:
        """Of the stage that runs and of all that wait, as far as something is known of them."""
        speed = self._flops_per_s()
        left = self.running.seconds_left(now) or 0.0 if self.running else 0.0
        for stage in self.waiting:
            left += stage.flops / speed if stage.flops and speed else stage.expected_s or 0.0
        return left

    def _flops_per_s(self) -> float | None:
        """The speed of this run's own training, once one stage has finished: better than what a plan could know."""
        trained = [stage for stage in self.stages if stage.state == "run" and stage.flops and not stage.resumed_at]
        seconds = sum(stage.seconds for stage in trained)
        return sum(stage.flops for stage in trained) / seconds if seconds else None
