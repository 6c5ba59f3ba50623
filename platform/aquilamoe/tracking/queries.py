"""Queries to MLflow: where a checkpoint comes from, and where to look at it all."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquilamoe.config.messages import UserError, without_passwords
from aquilamoe.tracking.connection import connect, shown, tracking_uri
from aquilamoe.tracking.database import NAME, database_uri
from aquilamoe.tracking.view import VIEW

LOCAL_MLFLOW = "http://127.0.0.1:5000"  # where `ui_command` serves a database


@dataclass(frozen=True)
class LoggedCheckpoint:
    """A checkpoint as MLflow knows it; `params` are text: directory, sha256, params_total, tokens, flops, ..."""

    stage: str
    fingerprint: str
    model_id: str
    run_id: str
    params: dict[str, str]


def lineage(uri: str, checkpoint: str) -> list[LoggedCheckpoint]:
    """The ancestors of a checkpoint - a fingerprint or a model id - nearest first, by queries to MLflow alone.

    A checkpoint is the output of its stage's run; the checkpoints that this run has as inputs are its parents.
    """
    client = connect(uri)
    model = _find(client, checkpoint)
    if model is None:
        raise UserError(
            f"{checkpoint}: {shown(uri)} has no such checkpoint; give the fingerprint of a stage's directory"
        )
    found: dict[str, LoggedCheckpoint] = {}
    waiting = [str(model.model_id)]
    while waiting:
        model = client.get_logged_model(waiting.pop(0))
        inputs = client.get_run(model.source_run_id).inputs.model_inputs
        tags, params = model.tags, dict(model.params)
        found[model.model_id] = LoggedCheckpoint(
            tags["stage"], tags["fingerprint"], model.model_id, model.source_run_id, params
        )
        waiting += [each.model_id for each in inputs if each.model_id not in found]
    return list(found.values())[1:]


def _find(client: Any, checkpoint: str) -> Any:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    if re.fullmatch(r"m-[0-9a-f]{32}", checkpoint):
        query = f"model_id = '{checkpoint}'"
    else:
        query = f"tags.fingerprint = '{re.sub(r'[^0-9A-Za-z]', '', checkpoint)}'"
    return next(iter(client.search_logged_models(experiments, query)), None)


def ui_command(uri: str | None, root: Path) -> str:
    """What to type to see the runs in a browser; for a server, its address is all it takes."""
    if uri is not None and uri.startswith(("http://", "https://")):
        return without_passwords(uri)
    folder = Path(os.path.relpath(root)) if root.absolute().is_relative_to(Path.cwd()) else root
    store = without_passwords(tracking_uri(uri, root)) if uri else database_uri(folder / NAME)
    command = f"mlflow ui --backend-store-uri {shlex.quote(store)} --port 5000 --workers 1"
    return f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {command}"  # two processes instead of thirteen


def comparison_url(server: str, experiment_id: str, view: str = VIEW) -> str:
    """The page that overlays the loss of an experiment's training stages against the FLOPs of their lineage.

    view: of an ablation also PARAMETERS, parallel coordinates from what is varied to the objective.
    """
    query = f"viewStateShareKey={view}&compareRunsMode=CHART&workflowType=machine_learning"
    return f"{without_passwords(server).rstrip('/')}/#/experiments/{experiment_id}/runs?{query}"
