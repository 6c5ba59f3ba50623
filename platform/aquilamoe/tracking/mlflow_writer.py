"""Writes stages and pipelines into MLflow. Every step may be repeated: it looks for existing entries before it adds.

One MLflow experiment per experiment; a parent run per pipeline; a child run per stage, found by its fingerprint; every
checkpoint an external LoggedModel that points to its directory, output of its stage and input of those that read it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aquilamoe.pipeline import cost
from aquilamoe.pipeline.fingerprint import flatten
from aquilamoe.pipeline.store import RECORD
from aquilamoe.tracking import notes
from aquilamoe.tracking.connection import LatencyMonitor, connect
from aquilamoe.tracking.database import Repairs
from aquilamoe.tracking.experiments import Experiments
from aquilamoe.tracking.models import MAX_TAG, Models, search_tags
from aquilamoe.tracking.sync_state import (
    Pipeline,
    Point,
    Stage,
    SyncState,
    fingerprint_of,
    finished_stage,
    key_of,
    milliseconds,
    read_json,
)
from aquilamoe.tracking.view import VIEW_TAG, run_color, saved_view

# MLflow's limits: entities per call, characters.
BATCH_METRICS = 1000
BATCH_PARAMS = 100
MAX_KEY = 250
MAX_PARAM = 6000
NOT_METRICS = frozenset({"step", "time", "done", "total", "unit"})
NOT_RECIPE = frozenset(
    {"action", "checkpoint", "cluster", "description", "name", "other", "paths", "tracking", "watch"}
)
# Figures that were measured on the tokens that a stage reads.
MEASURED = re.compile(r"loss|nats|bits|kl$|dlogit")
MAX_REPORT_BYTES = 20_000_000
PAGES = frozenset({"samples.md"})  # what stages write for people to read


class MlflowWriter:
    """A connection to MLflow and what it is known to hold; closed after the first error and opened again."""

    def __init__(self, uri: str, root: Path, watch: LatencyMonitor, repairs: Repairs) -> None:
        self.uri, self.root = uri, root
        self.client = connect(uri, watch, repairs)
        self.models = Models(self.client, uri)
        self.experiments = Experiments(self.client, uri, root, repairs)
        self.parents: dict[str, Any] = {}  # pipeline's recipe -> run
        self.sent: dict[str, dict[str, int]] = {}  # stage's key -> metric -> last step

    def sync_stage(self, stage: Stage) -> None:
        """Let MLflow have all there is of a stage."""
        if stage.key not in self.sent:
            if stage.assumed and self._exists(stage.receipt["run_id"]):
                return
            self._open(stage)
        self._send_points(stage)
        if stage.record is not None:
            self._finish(stage, stage.record)
        elif stage.status != "RUNNING":
            run_id = stage.receipt["run_id"]
            self.client.set_tag(run_id, "failure", stage.message[:MAX_TAG])
            self.client.set_terminated(run_id, stage.status)

    def finish_pipeline(self, pipeline: Pipeline) -> None:
        """Describe a pipeline on its run: a table of its stages, their last losses, status and report."""
        from mlflow.entities import Metric, RunTag

        run = self._parent(pipeline)
        records = pipeline.records()
        runs = {name: self._receipt(directory)["run_id"] for name, directory in pipeline.stages.items()}
        tags = {f"stage.{name}": fingerprint_of(directory) for name, directory in pipeline.stages.items()}
        tags["mlflow.note.content"] = notes.pipeline(pipeline, records, runs, _pages_of(pipeline.report))
        metrics = [
            Metric(_name(f"final.loss_end.{name}"), value, milliseconds(record["finished"]), 0)
            for name, record in records.items()
            if (value := _number(record["metrics"].get("loss_end"))) is not None
        ]
        if pipeline.status == "FINISHED":
            end_ms = max((milliseconds(record["finished"]) for record in records.values()), default=0)
            spent = asdict(cost.total(records.values()))
            metrics += [Metric(f"final.cost.{name}", value, end_ms, 0) for name, value in spent.items() if value]
        self.client.log_batch(run.info.run_id, metrics=metrics, tags=[RunTag(*_cut(*tag)) for tag in tags.items()])
        for page in _pages_of(pipeline.report):
            self.client.log_artifact(run.info.run_id, str(page))
        if pipeline.status == "RUNNING":
            self.client.update_run(run.info.run_id, status="RUNNING")
        else:
            self.client.set_terminated(run.info.run_id, pipeline.status)
        if pipeline.status == "KILLED":
            self._kill(pipeline, [directory for name, directory in pipeline.stages.items() if name not in records])
        pipeline.receipt.update(status=pipeline.status)

    def _kill(self, pipeline: Pipeline, unfinished: list[Path]) -> None:
        """End the runs of a killed pipeline's unfinished stages, but for those that another pipeline continues."""
        for receipt in map(self._receipt, unfinished):
            if receipt["run_id"] and receipt["pipeline"] == pipeline.recipe:
                self.client.set_terminated(receipt["run_id"], "KILLED")

    def _experiment(self, pipeline: Pipeline) -> str:
        name, description = pipeline.receipt["experiment"], pipeline.receipt["description"]
        return self.experiments.make(name, description, {VIEW_TAG: saved_view()})

    def _parent(self, pipeline: Pipeline) -> Any:
        """The run of a pipeline: the latest with this recipe whose stages, as far as both are known, are the same."""
        from mlflow.entities import ViewType

        run = self.parents.get(pipeline.recipe)
        if run is None or not _agree(run, pipeline):
            experiment = self._experiment(pipeline)
            runs = self.client.search_runs(
                [experiment], "tags.kind = 'pipeline'", ViewType.ALL, order_by=["start_time DESC"]
            )
            own = [run for run in runs if run.data.tags.get("recipe") == pipeline.recipe]
            same = [run for run in own if _agree(run, pipeline)]
            # The first parent began with the pipeline, even if MLflow was away then; another begins with this attempt.
            started_ms = (pipeline.latest_ms if own else None) or pipeline.receipt["started_ms"]
            run = (
                self.experiments.restore(same[0])
                if same
                else self._create_parent(pipeline, experiment, len(runs) + 1, started_ms)
            )
            config = {key: value for key, value in pipeline.receipt["config"].items() if key not in NOT_RECIPE}
            self._log_recipe(run, pipeline.receipt["config"], config)
            if run.info.status != "RUNNING":
                self.client.update_run(run.info.run_id, status="RUNNING")
            self.parents[pipeline.recipe] = run
            pipeline.receipt.update(run_id=run.info.run_id, experiment_id=experiment, status="RUNNING")
        return run

    def _create_parent(self, pipeline: Pipeline, experiment: str, number: int, started_ms: int) -> Any:
        name = f"{pipeline.receipt['experiment']} #{number}"
        tags = {"kind": "pipeline", "recipe": pipeline.recipe, "number": str(number)}
        return self.client.create_run(experiment, started_ms, tags, run_name=name)

    def _open(self, stage: Stage) -> None:
        """Find or make a stage's run, and learn how far its curves go."""
        run = self.experiments.find_run(f"tags.fingerprint = '{stage.fingerprint}' AND tags.stage LIKE '%'")
        if run is None:
            parent = self._parent(stage.pipeline)
            number = int(parent.data.tags["number"])
            position = [*stage.pipeline.stages, stage.name].index(stage.name)
            known = {"stage": stage.name, "kind": stage.kind, "fingerprint": stage.fingerprint}
            tags = {
                **search_tags(stage.directory, {**known, "recipe": stage.recipe, "inputs": stage.inputs}),
                "directory": str(stage.directory.absolute()).removesuffix(".partial"),
                "mlflow.parentRunId": parent.info.run_id,
                "mlflow.runColor": run_color(position, number),
                "mlflow.note.content": notes.stage(stage),
            }
            name = f"{stage.name} #{number}"
            run = self.client.create_run(parent.info.experiment_id, stage.started_ms, tags, run_name=name)
        else:
            if stage.record is None and run.info.status != "RUNNING":
                self.client.update_run(run.info.run_id, status="RUNNING")
            if "failure" in run.data.tags:  # of an earlier attempt
                self.client.delete_tag(run.info.run_id, "failure")
        self._log_recipe(run, stage.recipe, stage.recipe["config"])
        self._log_inputs(run.info.run_id, stage)
        sent = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self.sent[stage.key] = sent
        stage.receipt.update(run_id=run.info.run_id, step=_last_step(sent))

    def _receipt(self, directory: Path) -> SyncState:
        return SyncState(self.root, key_of(directory), self.uri)

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return str(self.client.get_run(run_id).info.lifecycle_stage) == "active"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _log_recipe(self, run: Any, recipe: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """All of a recipe as an artifact, and flat as parameters, which MLflow can compare and search."""
        from mlflow.entities import Param

        run_id = run.info.run_id
        self.client.log_dict(run_id, dict(recipe), "recipe.json")  # again, as the folder may have been removed
        if run.data.params:
            return
        params = [Param(_name(key), _text(value)) for key, value in flatten(config).items() if value is not None]
        for start in range(0, len(params), BATCH_PARAMS):
            self.client.log_batch(run_id, params=params[start : start + BATCH_PARAMS])

    def _log_inputs(self, run_id: str, stage: Stage) -> None:
        """Checkpoints that a stage reads become model inputs, other stages' outputs dataset inputs."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

        models, datasets = [], []
        for role, entry in stage.inputs.items():
            directory = stage.input_directory(role)
            if (directory / "model" / "config.json").is_file():
                models.append(LoggedModelInput(self._input_model(stage, role)))
            else:
                source = json.dumps({"uri": str(directory.absolute())})
                profile = json.dumps(read_json(directory / RECORD).get("metrics"))
                dataset = Dataset(entry["stage"], entry["fingerprint"], "local", source, profile=profile)
                datasets.append(DatasetInput(dataset, [InputTag("mlflow.data.context", role)]))
        if models or datasets:
            self.client.log_inputs(run_id, datasets=datasets, models=models)

    def _input_model(self, stage: Stage, role: str) -> str:
        """The model that a stage reads; its stage is delivered first where MLflow lacks it."""
        entry, directory = stage.inputs[role], stage.input_directory(role)
        model = self.models.find(entry["fingerprint"])
        if model is None:
            receipt = self._receipt(directory)
            receipt.update(delivered=False)
            self.sync_stage(
                finished_stage(
                    directory, read_json(directory / RECORD), entry["stage"], pipeline=stage.pipeline, receipt=receipt
                )
            )
            model = self.models.find(entry["fingerprint"])
        return str(model.model_id)

    def _send_points(self, stage: Stage) -> None:
        """Send what is new of the curves, a batch at a time; a step that MLflow has of a metric is not sent again."""
        sent = self.sent[stage.key]
        batch: list[Any] = []
        for point in stage.take_points():
            metrics = _metrics_of(point, sent)
            if len(batch) + len(metrics) > BATCH_METRICS:
                self._send_batch(stage, batch)
                batch = []
            batch += metrics
        self._send_batch(stage, batch)

    def _send_batch(self, stage: Stage, metrics: list[Any]) -> None:
        if metrics:
            self.client.log_batch(stage.receipt["run_id"], metrics=metrics)
            sent = self.sent[stage.key]
            sent.update({metric.key: metric.step for metric in metrics})
            stage.receipt.update(step=_last_step(sent))

    def _finish(self, stage: Stage, record: dict[str, Any]) -> None:
        """Final figures, the checkpoint, the record; then the run is over and the receipt is complete."""
        from mlflow.entities import RunTag

        run_id = stage.receipt["run_id"]
        model_id = None
        if stage.makes_model:
            model_id = self.models.log(stage, record, run_id, _last_step(self.sent[stage.key]) or 0)
            self.models.register(stage, record, run_id, model_id)
        texts = {f"result.{key}": value for key, value in record["metrics"].items() if isinstance(value, str)}
        tags = {**texts, "mlflow.note.content": notes.stage(stage)}
        if record["git_commit"]:
            tags |= {"git_commit": record["git_commit"], "mlflow.source.git.commit": record["git_commit"]}
        metrics = self._final_metrics(stage, record, model_id)
        for start in range(0, len(metrics), BATCH_METRICS):
            self.client.log_batch(run_id, metrics=metrics[start : start + BATCH_METRICS])
        self.client.log_batch(run_id, tags=[RunTag(*_cut(*tag)) for tag in tags.items()])
        self.client.log_dict(run_id, record, RECORD)
        for name in sorted(PAGES & record["files"].keys()):
            self.client.log_artifact(run_id, str(stage.directory / name))
        self.client.set_terminated(run_id, "FINISHED", milliseconds(record["finished"]))
        stage.receipt.update(model_id=model_id, delivered=True)

    def _final_metrics(self, stage: Stage, record: dict[str, Any], model_id: str | None) -> list[Any]:
        """The record's figures as `final.<figure>`, linked to the checkpoint, and to the tokens that they are about.

        An evaluation's `<role>/<figure>` is also linked to the checkpoint it is about, as `heldout.<figure>`, a name
        that all checkpoints share; its step is the position of the role. Dots instead of slashes, as each slash makes
        a section of charts, and curves come first in MLflow where the rest is in none.
        """
        from mlflow.entities import Metric

        run_id, time_ms = stage.receipt["run_id"], milliseconds(record["finished"])
        roles = [role for role in stage.inputs if (stage.input_directory(role) / "model" / "config.json").is_file()]
        models = {role: self._input_model(stage, role) for role in roles}
        found = []
        for key, raw in {**record["metrics"], **cost.figures(record)}.items():
            value = _number(raw)
            if value is None:
                continue
            about = {"run_id": run_id, **_measured_on(stage, key)}
            found.append(Metric(_dotted(f"final.{key}"), value, time_ms, 0, model_id=model_id, **about))
            role, _, rest = key.partition("/")
            if rest and role in models:
                step = roles.index(role)
                found.append(Metric(_dotted(f"heldout.{rest}"), value, time_ms, step, model_id=models[role], **about))
        seconds = Metric("final.seconds", float(record["seconds"]), time_ms, 0, run_id=run_id)
        return [metric for metric in [*found, seconds] if metric.key not in self.sent[stage.key]]


def _pages_of(report: Path | None) -> list[Path]:
    """A report's pages and the figure that describes its run, as far as they are not too large."""
    if report is None:
        return []
    found = [*sorted(report.parent.glob("*.html")), report.with_name(notes.FIGURE)]
    return [path for path in found if path.exists() and path.stat().st_size < MAX_REPORT_BYTES]


def _measured_on(stage: Stage, figure: str) -> dict[str, str]:
    """The dataset of a figure, as MLflow links it: the tokens that the stage reads, where it was measured on them."""
    tokens = stage.inputs.get("tokens")
    if tokens is None or not MEASURED.search(figure):
        return {}
    return {"dataset_name": tokens["stage"], "dataset_digest": tokens["fingerprint"]}


def _metrics_of(point: Point, sent: Mapping[str, int]) -> list[Any]:
    from mlflow.entities import Metric

    if "step" not in point:
        return []
    step, time_ms = int(point["step"]), round(float(point.get("time", 0)) * 1000)
    values = {_name(key): _number(value) for key, value in point.items() if key not in NOT_METRICS}
    return [
        Metric(key, value, time_ms, step)
        for key, value in values.items()
        if value is not None and step > sent.get(key, -1)
    ]


def _agree(run: Any, pipeline: Pipeline) -> bool:
    """Whether no stage that both know has two fingerprints."""
    tags = run.data.tags
    return all(
        tags.get(f"stage.{name}") in (None, fingerprint_of(directory)) for name, directory in pipeline.stages.items()
    )


def _last_step(sent: Mapping[str, int]) -> int | None:
    """The last step of any curve; final figures are no curves."""
    return max((step for key, step in sent.items() if not key.startswith(("final.", "heldout."))), default=None)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:MAX_PARAM]


def _name(key: str) -> str:
    """A key in the letters and length that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", key)[:MAX_KEY]


def _dotted(key: str) -> str:
    return _name(key.replace("/", "."))


def _cut(key: str, value: str) -> tuple[str, str]:
    return _name(key), value[:MAX_TAG]
