"""Checkpoints in MLflow: a LoggedModel for each, a registered model for each stage, and tags to search for."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.pipeline.store import RECORD
from aquilamoe.tracking import notes
from aquilamoe.tracking.sync_state import Stage, SyncState, read_json

MAX_TAG = 5000  # characters that MLflow takes
MODEL_FIGURES = ("params_total", "params_active", "tokens", "flops", "lineage_tokens", "lineage_flops", "loss_end")
METHODS = ("growth", "upcycling")
BEST = "best"  # MLflow itself takes the newest version for `latest`


class Models:
    """Checkpoints at one tracking URI. Everything may be repeated: existing entries are found by their fingerprint."""

    def __init__(self, client: Any, uri: str) -> None:
        self.client, self.uri = client, uri

    def find(self, fingerprint: str) -> Any:
        """The LoggedModel of a recipe, wherever it is filed, or None."""
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        found = self.client.search_logged_models(experiments, f"tags.fingerprint = '{fingerprint}'")
        return found[0] if found else None

    def log(self, stage: Stage, record: dict[str, Any], run_id: str, step: int) -> str:
        """The checkpoint as an external LoggedModel, output of the stage's run: weights stay where they are."""
        import mlflow
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        directory = stage.directory / "model"
        tags = {**search_tags(stage.directory, record), **where(stage.directory, record)}
        run = self.client.get_run(run_id)
        note = f"{self._linked_line(stage, record, run.info.experiment_id)}\n\n{notes.stage(stage)}"[:MAX_TAG]
        model = self.find(stage.fingerprint)
        if model is None:
            metrics = record["metrics"]
            figures = {key: str(metrics[key]) for key in MODEL_FIGURES if isinstance(metrics.get(key), (int, float))}
            architectures = read_json(directory / "config.json").get("architectures") or [None]
            mlflow.set_tracking_uri(self.uri)
            model = mlflow.create_external_model(
                re.sub(r"[^\w-]", "_", stage.name),
                run_id,
                tags | {"mlflow.note.content": note},
                tags | figures,
                architectures[0],
                run.info.experiment_id,
            )
        else:
            self.client.set_logged_model_tags(model.model_id, tags)
            if model.status != LoggedModelStatus.READY:
                self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        if model.model_id not in [output.model_id for output in run.outputs.model_outputs]:
            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        return str(model.model_id)

    def register(self, stage: Stage, record: dict[str, Any], run_id: str, model_id: str) -> None:
        """Make the checkpoint a version of `<experiment>.<stage>`, and `best` that of the lowest held-out loss."""
        if self.uri.startswith("databricks"):  # where names have other parts, and catalogs their own owners
            return
        name = re.sub(r"[/:]", "_", f"{stage.pipeline.receipt['experiment']}.{stage.name}")
        versions = self._versions(name, f"Checkpoints of stage {stage.name}, by the date they were made.")
        known = next((each for each in versions if each.tags.get("fingerprint") == stage.fingerprint), None)
        if known is None:
            loss = held_out_loss(stage.directory, record)
            tags = {"loss": str(loss)} if loss is not None else {}
            tags |= {**search_tags(stage.directory, record), **where(stage.directory, record)}
            known = self.client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id,
                tags,
                description=" → ".join(map(step_of, line(stage.directory, record))),
                model_id=model_id,
                await_creation_for=0,
            )
            versions = [*versions, known]
        # What MLflow's own `register_model` notes on the LoggedModel, for its page.
        link = json.dumps([{"name": name, "version": int(known.version)}])
        self.client.set_logged_model_tags(model_id, {"mlflow.modelVersions": link})
        rated = [each for each in versions if "loss" in each.tags]
        if rated:
            best = min(rated, key=lambda each: (float(each.tags["loss"]), int(each.version)))
            self.client.set_registered_model_alias(name, BEST, best.version)

    def _linked_line(self, stage: Stage, record: dict[str, Any], experiment_id: str) -> str:
        """The line of a checkpoint, each ancestor a link to its page."""
        parts = []
        for own in line(stage.directory, record)[:-1]:
            key = f"{own['stage']}-{own['fingerprint']}"
            known = SyncState(stage.receipt.path.parent.parent, key, self.uri)["model_id"]
            parts.append(f"[{step_of(own)}](#/experiments/{experiment_id}/models/{known})" if known else step_of(own))
        return " → ".join([*parts, f"**{step_of(record)}**"])

    def _versions(self, name: str, description: str) -> list[Any]:
        """All versions of a registered model, which is made if it is not there."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found, token = [], None
        while token != "":
            page = self.client.search_model_versions(f"name = '{name}'", page_token=token)
            found += page
            token = page.token or ""
        return found


def search_tags(directory: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """What checkpoints and runs are searched by: stage, kind, fingerprint, commit, and how their line was grown.

    record: of a stage that runs still it has no commit.
    """
    tags = {key: str(record[key]) for key in ("stage", "kind", "fingerprint", "git_commit") if record.get(key)}
    return tags | {f"{group}.method": method for group, method in _methods(directory, record).items()}


def where(directory: Path, record: dict[str, Any]) -> dict[str, str]:
    """Where the weights are, and their SHA-256."""
    sha256 = Artifact(directory, record).weights_sha256
    return {"directory": str((directory / "model").absolute())} | ({"sha256": sha256} if sha256 else {})


def held_out_loss(directory: Path, record: Mapping[str, Any]) -> float | None:
    """Nats per token at the end of training; of a growth on its certificate's tokens; of an export its source's."""
    for own in (record, *_sources(directory, record)):
        for key in ("loss_end", "target_loss"):
            if isinstance(own["metrics"].get(key), float):
                return float(own["metrics"][key])
    return None


def line(directory: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of a checkpoint and of those that it was made from, oldest first."""
    return [*reversed(_sources(directory, record)), record]


def step_of(record: Mapping[str, Any]) -> str:
    """A checkpoint in a line: its stage, and by which method it was grown."""
    own = record["recipe"]["config"]
    methods = [str(own[group]["method"]) for group in METHODS if isinstance(own.get(group), dict)]
    return f"{record['stage']} ({', '.join(methods)})" if methods else str(record["stage"])


def _methods(directory: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The methods of the last growth and of the last upcycling on the line of a checkpoint."""
    found: dict[str, str] = {}
    for own in (record, *_sources(directory, record)):
        for group in METHODS:
            settings = own["recipe"]["config"].get(group)
            if isinstance(settings, dict) and "method" in settings:
                found.setdefault(group, str(settings["method"]))
    return found


def _sources(directory: Path, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Records of the checkpoints before this one, nearest first, as far as they are there."""
    found: list[dict[str, Any]] = []
    source = record["inputs"].get("source")
    while source is not None:
        own = read_json(directory.parent / source["directory"] / RECORD)
        if not own:
            break
        found.append(own)
        source = own["inputs"].get("source")
    return found
