"""Writes an ablation into MLflow: a parent run for the study, a child for every variant or control and seed.

Names are chosen for MLflow's own views: what is varied is a parameter, so that runs can be grouped by it and parallel
coordinates drawn; the curve is there twice, its steps in tokens and in billions of cumulative FLOPs. Everything may be
repeated: existing entries are found by their fingerprint.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aquilamoe.tracking.connection import connect, first_line, is_away, is_reachable, shown, tracking_uri
from aquilamoe.tracking.database import Repairs
from aquilamoe.tracking.experiments import Experiments
from aquilamoe.tracking.sync_state import SyncState, still_known
from aquilamoe.tracking.view import comparison_views

MAX_NOTE = 60_000  # characters
BATCH = 900


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A variant or control with one seed.

    fingerprint: of its last stage. curves: by metric, (step, value). colour: of its curves.
    """

    name: str
    fingerprint: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    curves: Mapping[str, Sequence[tuple[int, float]]]
    colour: str


@dataclass(frozen=True, kw_only=True)
class TrackedStudy:
    """A study as it is sent to MLflow.

    note: Markdown for the page of the parent run. axes: the parameters that are varied. files: artifacts, by the folder
    that they go to ("" is the top).
    """

    name: str
    description: str
    note: str
    axes: Sequence[str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    trials: Sequence[Trial]
    files: Mapping[str, Sequence[Path]]

    @property
    def digest(self) -> str:
        """Of all that is sent to MLflow, but for files, which are made from the same numbers."""
        content = json.dumps({key: value for key, value in asdict(self).items() if key != "files"}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PublishResult:
    """How sending went. experiment_id: MLflow's, if it is known. notes: lines about what MLflow did not get, or what
    had to be done to its data.
    """

    experiment_id: str | None
    notes: tuple[str, ...] = ()


def publish(uri: str | None, root: Path, comparison: TrackedStudy) -> PublishResult:
    """Let MLflow have a study; never fails, and imports MLflow only for one that it does not have yet.

    uri: as `tracking.uri`; None is the database in `root`. What could not be sent is sent by the next run.
    """
    address, repairs = tracking_uri(uri, root), Repairs()
    receipt = SyncState(root, f"ablation-{comparison.name}", address)
    known = still_known(address, root)
    if receipt["digest"] == comparison.digest and (known is None or known.get(receipt["run_id"])):
        return PublishResult(receipt["experiment_id"])
    try:
        if not is_reachable(address):
            raise ConnectionError(address)
        client = connect(address, repairs=repairs)
        experiment_id, run_id = _StudyWriter(client, Experiments(client, address, root, repairs)).sync(comparison)
    except Exception as error:  # nothing that MLflow raises is the end of an ablation
        problem = f"{shown(address)} does not respond" if is_away(error) else first_line(error)
        return PublishResult(
            None, (*repairs.lines(), f"tracking: MLflow did not receive this study ({problem}); the next run sends it")
        )
    receipt.update(digest=comparison.digest, run_id=run_id, experiment_id=experiment_id)
    return PublishResult(experiment_id, tuple(repairs.lines()))


class _StudyWriter:
    """One study on its way into MLflow."""

    def __init__(self, client: Any, experiments: Experiments) -> None:
        self.client, self.experiments = client, experiments

    def sync(self, comparison: TrackedStudy) -> tuple[str, str]:
        """Returns MLflow's names of the experiment and of the parent run."""
        experiment_id = self._experiment(comparison)
        parent, children = self._parent(comparison, experiment_id)
        runs = {}
        for trial in comparison.trials:
            run = children.get(trial.fingerprint)
            run = self.experiments.restore(run) if run is not None else None
            run_id = run.info.run_id if run is not None else self._create(trial, parent, experiment_id)
            # Before the curves: MLflow's comparison of ticked runs begins with the metric that it received first.
            self._update(run_id, trial.metrics, trial.tags, run.data if run is not None else None)
            if run is None or run.info.status != "FINISHED":
                self._finish(run_id, trial)
            runs[trial.name] = run_id
        links = [f"[{name}](#/experiments/{experiment_id}/runs/{run_id})" for name, run_id in runs.items()]
        note = f"{comparison.note}\n\n**Runs:** {', '.join(links)}"[:MAX_NOTE]
        own = self.client.get_run(parent).data
        self._update(parent, comparison.metrics, {"mlflow.note.content": note}, own)
        for folder, files in comparison.files.items():
            for path in files:
                self.client.log_artifact(parent, str(path), folder or None)
        self.client.set_terminated(parent, "FINISHED")
        return experiment_id, parent

    def _experiment(self, comparison: TrackedStudy) -> str:
        return self.experiments.make(comparison.name, comparison.description, comparison_views(comparison.axes))

    def _parent(self, comparison: TrackedStudy, experiment_id: str) -> tuple[str, dict[str, Any]]:
        """The newest run of this study, none of whose trials another recipe has computed since; and its children."""
        from mlflow.entities import ViewType

        runs = self.client.search_runs(
            [experiment_id], "tags.kind = 'ablation'", ViewType.ALL, order_by=["start_time DESC"]
        )
        expected = {trial.name: trial.fingerprint for trial in comparison.trials}
        for run in runs:
            children = self._children(experiment_id, run.info.run_id)
            names = {child.info.run_name: fingerprint for fingerprint, child in children.items()}
            if run.data.params == dict(comparison.params) and all(
                expected.get(name, fingerprint) == fingerprint for name, fingerprint in names.items()
            ):
                self.experiments.restore(run)
                return run.info.run_id, children
        tags = {"kind": "ablation", "number": str(len(runs) + 1)}
        run = self.client.create_run(experiment_id, _now_ms(), tags, run_name=f"{comparison.name} #{len(runs) + 1}")
        self._log_params(run.info.run_id, comparison.params)
        return run.info.run_id, {}

    def _children(self, experiment_id: str, parent: str) -> dict[str, Any]:
        """By fingerprint."""
        from mlflow.entities import ViewType

        query = f"tags.`mlflow.parentRunId` = '{parent}'"
        found: dict[str, Any] = {}
        token: str | None = None
        while token != "":
            page = self.client.search_runs([experiment_id], query, ViewType.ALL, page_token=token)
            found |= {run.data.tags.get("fingerprint", ""): run for run in page}
            token = page.token or ""
        return found

    def _create(self, trial: Trial, parent: str, experiment_id: str) -> str:
        """A child with its parameters, which never change."""
        tags = {"mlflow.parentRunId": parent, "mlflow.runColor": trial.colour, "fingerprint": trial.fingerprint}
        run_id = str(self.client.create_run(experiment_id, _now_ms(), tags, run_name=trial.name).info.run_id)
        self._log_params(run_id, trial.params)
        return run_id

    def _finish(self, run_id: str, trial: Trial) -> None:
        """The curves, which never change either; a run that has them is finished."""
        from mlflow.entities import Metric

        now_ms = _now_ms()
        points = [Metric(key, v, now_ms, step) for key, curve in trial.curves.items() for step, v in curve]
        for start in range(0, len(points), BATCH):
            self.client.log_batch(run_id, metrics=points[start : start + BATCH])
        self.client.set_terminated(run_id, "FINISHED")

    def _log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        self.client.log_batch(run_id, params=[Param(key, value) for key, value in params.items()])

    def _update(self, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str], known: Any) -> None:
        """Figures and tags that depend on the other trials: those that are new or have changed."""
        from mlflow.entities import Metric, RunTag

        before = known.metrics if known is not None else {}
        figures = [Metric(key, value, _now_ms(), 0) for key, value in metrics.items() if before.get(key) != value]
        self.client.log_batch(run_id, metrics=figures, tags=[RunTag(key, value) for key, value in tags.items()])


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
