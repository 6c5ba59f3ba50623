"""Experiments and runs in MLflow that may be there already, and may have been deleted in its pages."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aquilamoe.tracking.database import Repairs, database_file
from aquilamoe.tracking.places import artifacts, set_artifacts


class Experiments:
    """Experiments at one tracking URI, and their runs. What a pipeline needs of what was deleted is restored."""

    def __init__(self, client: Any, uri: str, root: Path, repairs: Repairs) -> None:
        self.client = client
        self.root = root
        self.database = database_file(uri)
        self.repairs = repairs

    def make(self, name: str, description: str, kept: Mapping[str, str]) -> str:
        """The number of an experiment. description: of a new one. kept: tags that are corrected where they differ."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            location = artifacts(self.root) if self.database else None
            tags = {"mlflow.note.content": description, "mlflow.experimentKind": "custom_model_development", **kept}
            return str(self.client.create_experiment(name, artifact_location=location, tags=tags))
        if found.lifecycle_stage == "deleted":
            self._restore_experiment(found)
        if self.database and found.artifact_location != artifacts(self.root):
            set_artifacts(self.database, found.experiment_id, self.root)
        for tag, value in kept.items():
            if found.tags.get(tag) != value:
                self.client.set_experiment_tag(found.experiment_id, tag, value)
        return str(found.experiment_id)

    def find_run(self, query: str) -> Any:
        """The first run that a query finds in any experiment, restored if it was deleted; None if no run matches."""
        from mlflow.entities import ViewType

        for view in (ViewType.ACTIVE_ONLY, ViewType.ALL):
            numbers = [each.experiment_id for each in self.client.search_experiments(view_type=view)]
            runs = self.client.search_runs(numbers, query, run_view_type=view, max_results=1)
            if runs:
                return self.restore(runs[0])
        return None

    def restore(self, run: Any) -> Any:
        """A run as it is, or as it is again after it or its experiment was deleted."""
        if run.info.lifecycle_stage == "active":
            return run
        experiment = self.client.get_experiment(run.info.experiment_id)
        if experiment.lifecycle_stage == "deleted":
            self._restore_experiment(experiment)
        if self.client.get_run(run.info.run_id).info.lifecycle_stage == "deleted":
            self.client.restore_run(run.info.run_id)
            self.repairs.restored.append(f"run '{run.info.run_name}'")
        return self.client.get_run(run.info.run_id)

    def _restore_experiment(self, experiment: Any) -> None:
        self.client.restore_experiment(experiment.experiment_id)
        self.repairs.restored.append(f"experiment '{experiment.name}'")
