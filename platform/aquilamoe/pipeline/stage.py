"""What a stage is to the pipeline: a module `stages/<kind>.py` with a VERSION, an `estimate` and a `run`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

from aquilamoe.config import plugins
from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.pipeline.store import METRICS, Record

Metrics = dict[str, float | int | str | None]


@dataclass(frozen=True)
class Input:
    """A finished stage that another reads."""

    stage: str
    directory: Path
    record: Record

    @property
    def metrics(self) -> Metrics:
        return cast(Metrics, self.record["metrics"])


@dataclass(frozen=True)
class Context:
    """All that a stage's `run` is given.

    out: the directory to fill; what an interrupted run left in it is still there.
    inputs: finished stages by role.
    """

    node: Node
    inputs: Mapping[str, Input]
    out: Path
    cluster: ClusterConfig
    root: Path

    @property
    def metrics_file(self) -> Path:
        return self.out / METRICS

    def progress(self, done: int, total: int, unit: str) -> None:
        """Report the progress of a stage that does not train."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"done": done, "total": total, "unit": unit}) + "\n")


@dataclass(frozen=True)
class Estimate:
    """What is known of a stage before it runs.

    seconds: by a formula, where no run of the stage was measured. work: what its time grows with, in a unit of its own
    kind (`estimates.work`). grows_with: roles of inputs with whose bytes, together, it grows too; several groups
    multiply. warnings: of what is allowed and will disappoint, a line each, that begins with the stage's field.
    """

    disk_bytes: int = 0
    seconds: float | None = None
    work: float | None = None
    grows_with: tuple[tuple[str, ...], ...] = ()
    warnings: tuple[str, ...] = ()


class StageModule(Protocol):
    """The face of `stages/<kind>.py`. Importing it imports no torch: `action=plan` reads versions and estimates."""

    VERSION: int
    RESUMES: bool  # keeps what an interrupted run left in its directory

    def estimate(self, node: Node) -> Estimate: ...

    def run(self, context: Context) -> Metrics: ...


def module(kind: str) -> StageModule:
    return cast(StageModule, plugins.load("stages", kind))
