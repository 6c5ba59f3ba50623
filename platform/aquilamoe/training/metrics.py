"""metrics.jsonl: what a training stage measures, one point a line, one line a step - the truth for every curve.

Beside it, for a Mixture of Experts, router.jsonl: the load of each expert of each layer.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aquilamoe.config.points import read_points

Point = Mapping[str, Any]

# Nats/token above the source's loss at which it counts as reached again: far above what float32 rounds in a mean over
# thousands of tokens (1e-6), and below what the third decimal of a table shows.
RECOVERED = 1e-3


class PointsFile:
    """Appends points as they are measured, one a line.

    path: the file. resume_step: points after it are dropped, they will be computed again; 0 starts from the beginning.
    batch_tokens: tokens of a step. enabled: False on all ranks but the first, which keep points but write none.
    """

    def __init__(self, path: Path, resume_step: int, batch_tokens: int, enabled: bool) -> None:
        self.path = path
        self.batch_tokens = batch_tokens
        self.enabled = enabled
        kept = read_points(path) if resume_step else []
        self.points = [point for point in kept if "step" in point and point["step"] <= resume_step]
        if enabled:
            # A new file, not a shorter one: a reader that follows the old one notices.
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".tmp")
            with temporary.open("w") as file:
                file.writelines(map(_line, self.points))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        point = {"step": step, "tokens": step * self.batch_tokens, **values}
        self.points.append(point)
        if self.enabled:
            with self.path.open("a") as file:
                file.write(_line(point))

    def sync(self) -> None:
        """Wait until every point is on disk."""
        if self.enabled:
            with self.path.open("a") as file:
                os.fsync(file.fileno())


class MetricsFile(PointsFile):
    """The points of metrics.jsonl, which also count what the checkpoint has behind it.

    flops_per_token: model FLOPs. ancestor_tokens, ancestor_flops: of the stages before.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_step: int,
        batch_tokens: int,
        flops_per_token: int,
        ancestor_tokens: int,
        ancestor_flops: int,
        enabled: bool,
    ) -> None:
        super().__init__(path, resume_step, batch_tokens, enabled)
        self.flops_per_token = flops_per_token
        self.ancestor_tokens, self.ancestor_flops = ancestor_tokens, ancestor_flops

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        tokens = step * self.batch_tokens
        behind = {
            "lineage_tokens": self.ancestor_tokens + tokens,
            "lineage_flops": self.ancestor_flops + tokens * self.flops_per_token,
            "time": time.time(),
        }
        super().write(step, behind | {name: value for name, value in values.items() if _is_number(value)})

    def summary(self) -> dict[str, Any]:
        """The stage's metrics for its record; losses are validation losses in nats per token."""
        validated = [point for point in self.points if "val/loss" in point]
        last = validated[-1]
        languages = [key for key in last if key.startswith("val/loss/")]
        return {
            "steps": last["step"],
            "tokens": last["tokens"],
            "flops": last["tokens"] * self.flops_per_token,
            "lineage_tokens": last["lineage_tokens"],
            "lineage_flops": last["lineage_flops"],
            "loss_start": validated[0]["val/loss"],
            "loss_end": last["val/loss"],
            **{f"loss_end/{key.removeprefix('val/loss/')}": last[key] for key in languages},
            "tokens_per_s": statistics.median(p["train/tokens_per_s"] for p in self.points if p["step"]),
        }


def _is_number(value: Any) -> bool:
    """JSON has no NaN and no Inf; the loss of a step that was skipped may be one."""
    return not isinstance(value, float) or math.isfinite(value)


def _line(point: Point) -> str:
    return json.dumps(point) + "\n"


def recovery_tokens(points: Iterable[Point], source_loss: float, batch_tokens: int) -> int | None:
    """Tokens until the validation loss is first at the source's, within `RECOVERED`; None if it never is.

    Interpolated between validations, and then whole steps: with less than a step nothing has changed.

    Args:
        points: of metrics.jsonl, in their order.
        source_loss: what the source ended with, in nats/token, on the same held-out tokens.
        batch_tokens: tokens of a step.
    """
    threshold = source_loss + RECOVERED
    before: tuple[float, float] | None = None
    for point in points:
        if "val/loss" not in point:
            continue
        tokens, loss = float(point["tokens"]), float(point["val/loss"])
        if loss <= threshold:
            if before is None:
                return round(tokens)
            share = (before[1] - threshold) / (before[1] - loss)
            steps = (before[0] + share * (tokens - before[0])) / batch_tokens
            return math.ceil(round(steps, 6)) * batch_tokens
        before = (tokens, loss)
    return None
