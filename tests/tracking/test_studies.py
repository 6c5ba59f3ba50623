"""An ablation in MLflow: a parent, a child for every trial, sent once, and never the ablation's end."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.ablation.study import SUMMARY
from aquilamoe.reports import comparison
from aquilamoe.tracking import studies
from aquilamoe.tracking.connection import connect, tracking_uri
from aquilamoe.tracking.studies import TrackedStudy, publish
from aquilamoe.tracking.study_results import compared
from invented_study import invent
from ports import free_port


@pytest.fixture
def tracked(tmp_path: Path) -> Callable[..., TrackedStudy]:
    """A study as it is sent to MLflow, with small files in place of the page and a figure."""

    def made(**numbers: Any) -> TrackedStudy:
        folder = tmp_path / "study"
        (folder / comparison.FIGURES).mkdir(parents=True, exist_ok=True)
        for path in (folder / comparison.PAGE, folder / SUMMARY, folder / comparison.FIGURES / "ranking.png"):
            path.write_text("some bytes")
        return compared(invent(**numbers), folder)

    return made


def test_a_study_is_a_parent_with_its_findings_and_a_child_for_each_trial_and_is_sent_once(
    tracked: Callable[..., TrackedStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = tracked(ends={"fpi": 3.3, "aki": 3.2}, scratch={1.0: 3.5}, seeds=(1, 2), noise=0.002)
    found = publish(None, tmp_path, study)
    assert not found.notes and found.experiment_id is not None
    client = connect(tracking_uri(None, tmp_path))
    (parent,) = client.search_runs([found.experiment_id], "tags.kind = 'ablation'")
    assert "'aki' is best of 2" in parent.data.tags["mlflow.note.content"]
    assert {file.path for file in client.list_artifacts(parent.info.run_id)} == {"report.html", SUMMARY, "figures"}
    children = client.search_runs([found.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == 2 * 4
    (child,) = [run for run in children if run.info.run_name == "aki, seed 2"]
    assert child.data.params["method"] == "aki" and child.data.params["seed"] == "2" and child.data.tags["rank"] == "1"
    assert next(iter(child.data.metrics)) == "objective", "what MLflow's page of ticked runs shows first"
    assert -0.12 < child.data.metrics["minus_baseline"] < -0.08
    curve = client.get_metric_history(child.info.run_id, "loss_by_tokens")
    assert (curve[0].step, curve[-1].step) == (0, 1_000_000) and curve[-1].value == child.data.metrics["objective"]
    by_flops = client.get_metric_history(child.info.run_id, "loss_by_gflops")
    assert by_flops[-1].step == round(child.data.metrics["lineage_flops"] / 1e9) and len(by_flops) == len(curve)
    # Again: nothing is sent, and MLflow is not even queried.
    monkeypatch.setattr(studies, "connect", lambda _: pytest.fail("MLflow has it"))
    assert publish(None, tmp_path, study) == found


def test_what_is_computed_later_joins_its_study_and_what_another_recipe_computed_begins_a_new_one(
    tracked: Callable[..., TrackedStudy], tmp_path: Path
) -> None:
    whole = tracked(ends={"fpi": 3.3, "aki": 3.2})
    first = publish(None, tmp_path, replace(whole, trials=whole.trials[:3]))
    assert publish(None, tmp_path, whole).experiment_id == first.experiment_id
    client = connect(tracking_uri(None, tmp_path))
    (parent,) = client.search_runs([first.experiment_id], "tags.kind = 'ablation'")
    children = client.search_runs([first.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(children) == len(whole.trials)
    changed = [replace(trial, fingerprint=f"other{index}") for index, trial in enumerate(whole.trials)]
    publish(None, tmp_path, replace(whole, trials=changed))
    parents = client.search_runs([first.experiment_id], "tags.kind = 'ablation'")
    assert len(parents) == 2 and parent.info.run_id in {run.info.run_id for run in parents}


def test_a_server_that_is_away_costs_a_line_and_the_next_run_sends_it(
    tracked: Callable[..., TrackedStudy], tmp_path: Path
) -> None:
    study = tracked(ends={"fpi": 3.3, "aki": 3.2})
    found = publish(f"http://127.0.0.1:{free_port()}", tmp_path, study)
    assert found.experiment_id is None and "does not respond" in found.notes[0]
    assert len(found.notes) == 1 and "\n" not in found.notes[0]
    assert not list((tmp_path / "tracking").glob("*")), "it does not count as sent"
