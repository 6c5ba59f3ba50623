"""What there is to send to MLflow, and what has been sent already.

Everything worth sending is on disk first (`record.json`, `metrics.jsonl`), so nothing has to be queued while MLflow is
away: a receipt per stage and per pipeline in `<root>/tracking/` has what MLflow has; the rest is read from the stage's
directory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from aquilamoe.config.messages import without_passwords
from aquilamoe.files import write_atomically
from aquilamoe.pipeline.store import METRICS, RECORD, read_points
from aquilamoe.tracking import places
from aquilamoe.tracking.database import NAME, database_file, runs

Point = dict[str, Any]
FOLDER = "tracking"
STAGES = "stages"
OWN = "sqlite:///mlflow.db"  # in receipts: the database in the store's root


class SyncState:
    """What MLflow has of one stage or pipeline: a small JSON file, void when another tracking URI gave it.

    Passwords in the URI do not count, and are not kept. The store's own database is the same wherever the store is.
    """

    def __init__(self, root: Path, name: str, uri: str) -> None:
        self.path = root / FOLDER / f"{name}.json"
        values, own = read_json(self.path), database_file(uri) == (root / NAME).absolute()
        uri = OWN if own else without_passwords(uri)
        same = values.get("uri") == uri or (own and _was_own(values))
        self.values: dict[str, Any] = {**values, "uri": uri} if same else {"uri": uri}

    def __getitem__(self, key: str) -> Any:
        return self.values.get(key)

    def update(self, **values: Any) -> None:
        changed = {**self.values, **values}
        if changed != self.values:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps(changed, indent=1, ensure_ascii=False))
            self.values = changed


def _was_own(values: dict[str, Any]) -> bool:
    """Whether a receipt with an absolute URI is about the database that lay beside its stages."""
    directories = [values.get("directory"), *(values.get("stages") or {}).values()]
    path = database_file(str(values.get("uri")))
    return path is not None and any(path == Path(each).parent.parent / NAME for each in directories if each)


@dataclass(kw_only=True)
class Pipeline:
    """An experiment's graph of stages. Running it again, or continuing it, is the same pipeline.

    stages: directories by name, as far as they were announced. dirty: its run in MLflow is out of date. latest_ms: when
    this attempt began, None if it is not this driver's.
    """

    receipt: SyncState
    status: str = "RUNNING"
    report: Path | None = None
    stages: dict[str, Path] = field(default_factory=dict)
    dirty: bool = False
    latest_ms: int | None = None

    @property
    def recipe(self) -> str:
        """A hash of the stages' configuration."""
        return self.receipt.path.stem.removeprefix("pipeline-")

    def records(self) -> dict[str, dict[str, Any]]:
        """Records of the stages that are complete."""
        read = {name: read_json(directory / RECORD) for name, directory in self.stages.items()}
        return {name: record for name, record in read.items() if record}

    def save(self, **values: Any) -> None:
        self.receipt.update(stages={name: key_of(path) for name, path in self.stages.items()}, **values)


@dataclass(kw_only=True)
class Stage:
    """A stage as the driver announced it.

    dirty: there may be something that MLflow does not have.
    assumed: a receipt claims that MLflow has all of it; worth a query only when MLflow is called anyway.
    reread: points are not kept in memory (any more), `metrics.jsonl` has them.
    """

    name: str
    directory: Path
    recipe: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    fingerprint: str
    pipeline: Pipeline
    receipt: SyncState
    started_ms: int
    record: dict[str, Any] | None = None
    status: str = "RUNNING"
    message: str = ""
    points: list[Point] = field(default_factory=list)
    reread: bool = False
    dirty: bool = True
    assumed: bool = False

    @property
    def key(self) -> str:
        return key_of(self.directory)

    @property
    def kind(self) -> str:
        return str(self.recipe["kind"])

    @property
    def makes_model(self) -> bool:
        return (self.directory / "model" / "config.json").is_file()

    def input_directory(self, role: str) -> Path:
        return self.directory.parent / self.inputs[role]["directory"]

    def add(self, points: list[Point]) -> None:
        if not self.reread:
            self.points += points

    def take_points(self) -> list[Point]:
        """Points that were not taken before; after a loss, all there are."""
        points, self.points = self.points, []
        path = self.directory / METRICS
        if self.reread and path.exists():
            points, self.reread = read_points(path), False
        return points

    def count_unsent(self) -> int:
        """Points on disk after the last step that MLflow confirmed."""
        sent = -1 if self.receipt["step"] is None else self.receipt["step"]
        return sum(point.get("step", -1) > sent for point in read_points(self.directory / METRICS))


def key_of(directory: Path) -> str:
    """`<stage>-<fingerprint>` of a stage's directory, finished or partial."""
    return directory.name.removesuffix(".partial")


def fingerprint_of(directory: Path) -> str:
    return key_of(directory).rpartition("-")[2]


def finished_stage(
    directory: Path,
    record: dict[str, Any],
    name: str,
    *,
    pipeline: Pipeline,
    receipt: SyncState,
    known: Mapping[str, bool] | None = None,
) -> Stage:
    """A stage that is complete on disk; dirty unless MLflow has it by its receipt, and by the runs that are known."""
    delivered = bool(receipt["delivered"]) and (known is None or known.get(receipt["run_id"], False))
    return Stage(
        name=name,
        directory=directory,
        recipe=record["recipe"],
        inputs=record["inputs"],
        fingerprint=record["fingerprint"],
        pipeline=pipeline,
        receipt=receipt,
        started_ms=milliseconds(record["started"]),
        record=record,
        status="FINISHED",
        reread=True,
        dirty=not delivered,
        assumed=delivered,
    )


def undelivered(root: Path, uri: str, known: Mapping[str, bool] | None) -> tuple[dict[str, Pipeline], list[Stage]]:
    """What MLflow does not have of earlier runs: their pipelines by recipe, and complete stages, oldest first.

    known: runs of the database; what a receipt lists as delivered, and is not among them, is lost.
    """
    receipts = [SyncState(root, path.stem, uri) for path in sorted((root / FOLDER).glob("*.json"))]
    lost = {each.path for each in receipts if known is not None and each["run_id"] and each["run_id"] not in known}
    pipelines = {}
    for receipt in receipts:
        if receipt["experiment"] is not None:
            stages = {
                name: root / STAGES / Path(directory).name for name, directory in (receipt["stages"] or {}).items()
            }
            report = root / receipt["report"] if receipt["report"] else None
            pipeline = Pipeline(
                receipt=receipt, status=receipt["wanted_status"] or "RUNNING", report=report, stages=stages
            )
            if pipeline.status == "RUNNING" and receipt["run_id"]:
                pipeline.status = "KILLED"  # without a record of its end: one driver at a time uses a store
            pipeline.dirty = pipeline.status != (receipt["status"] or "RUNNING")
            pipelines[pipeline.recipe] = pipeline
    found = []
    for receipt in receipts:
        waits = receipt["delivered"] is False or (receipt["delivered"] and receipt.path in lost)
        if waits and receipt["pipeline"] in pipelines:
            directory, pipeline = root / STAGES / receipt.path.stem, pipelines[receipt["pipeline"]]
            record = read_json(directory / RECORD)
            if record:
                pipeline.dirty = True
                found.append(
                    finished_stage(directory, record, receipt["stage"], pipeline=pipeline, receipt=receipt, known={})
                )
    return pipelines, sorted(found, key=lambda stage: str(stage.record and stage.record["finished"]))


def milliseconds(iso: str) -> int:
    """An ISO date as MLflow counts time."""
    return round(datetime.fromisoformat(iso).timestamp() * 1000)


def still_known(uri: str, root: Path) -> dict[str, bool] | None:
    """The runs of a SQLite database and whether MLflow shows them, once its places are those of the store.

    None for a server, which is believed. An empty one for a database that is absent or broken.
    """
    path = database_file(uri)
    if path is None:
        return None
    if path.exists():
        places.correct(path, root)
    return runs(path) or {}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none (or half of one, after a disk was full)."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
