import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, current_thread
from typing import Any

import pytest

from aquilamoe.config.messages import UserError
from aquilamoe.pipeline import fingerprint as identity
from aquilamoe.pipeline.store import Store
from aquilamoe.tracking import connection, observer, view
from aquilamoe.tracking.observer import Tracker
from aquilamoe.tracking.queries import comparison_url, lineage, ui_command
from ports import free_port
from waiting import PATIENCE_S, until

pytestmark = pytest.mark.process

DESCRIPTION = "A small model, grown."
CONFIG = {"name": "demo", "stages": {"prepare": {"kind": "pretrain"}}, "growth": {"method": "aki_pro"}}


@dataclass
class Driver:
    """Stands for the runner: writes a stage's files as the stages do, and notifies a tracker as the runner does."""

    root: Path
    uri: str | None = None
    config: dict[str, Any] = field(default_factory=lambda: dict(CONFIG))
    inputs: dict[str, dict[str, str]] = field(default_factory=dict)
    version: int = 1
    loss: float = 7.7
    growths: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.store = Store(self.root)
        self.tracker = Tracker(self.uri, self.root)
        self.tracker.pipeline_started("demo", DESCRIPTION, self.config, self.root)

    def recipe(self, name: str, kind: str, inputs: dict[str, str]) -> dict[str, Any]:
        config = {"kind": kind, "learning_rate": 0.001, "model": {"hidden_size": 64}, "label": name}
        config |= self.growths.get(kind, {})
        fingerprints = {role: self.inputs[stage]["fingerprint"] for role, stage in inputs.items()}
        return identity.recipe(kind, self.version, config, fingerprints)

    def start(self, name: str, kind: str = "pretrain", **inputs: str) -> Path:
        recipe = self.recipe(name, kind, inputs)
        digest = identity.fingerprint(recipe)
        partial = self.store.partial(name, digest)
        partial.mkdir(parents=True, exist_ok=True)
        references = {role: self.inputs[stage] for role, stage in inputs.items()}
        self.tracker.stage_started(name, digest, partial, recipe, references)
        return partial

    def train(self, partial: Path, steps: range, report_from: int | None = None) -> None:
        """Append points for `steps`; report them, and as after a resume, earlier ones from `report_from`."""
        points = [point_at(step) for step in range(steps.start if report_from is None else report_from, steps.stop)]
        with (partial / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(point) + "\n" for point in points if point["step"] in steps)
        self.tracker.stage_progress(stage_name(partial), points)

    def finish(self, partial: Path, kind: str = "pretrain", model: bool = True, **inputs: str) -> dict[str, Any]:
        name = stage_name(partial)
        if model:
            write_model(partial)
        recipe = self.recipe(name, kind, inputs)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {
            "stage": name,
            "kind": kind,
            "fingerprint": identity.fingerprint(recipe),
            "recipe": recipe,
            "inputs": {role: self.inputs[stage] for role, stage in inputs.items()},
            "metrics": {key: self.loss if key == "loss_end" else value for key, value in metrics_of(kind).items()},
            "versions": {},
            "git_commit": "0123abc",
            "started": now,
            "finished": now,
            "seconds": 1.5,
            "resumed": False,
        }
        record = self.store.publish(partial, record)
        directory = partial.with_suffix("")
        seconds = len(list(self.store.stages.glob("*/record.json")))
        os.utime(directory / "record.json", (seconds, seconds))  # two may be finished within a tick of the clock
        self.tracker.stage_finished(name, directory, record, cached=False)
        self.remember(directory, record)
        return record

    def remember(self, directory: Path, record: dict[str, Any]) -> None:
        reference = {"stage": record["stage"], "fingerprint": record["fingerprint"], "directory": directory.name}
        self.inputs[record["stage"]] = reference

    def run(self, name: str, kind: str = "pretrain", steps: int = 0, **inputs: str) -> dict[str, Any]:
        partial = self.start(name, kind, **inputs)
        if steps:
            self.train(partial, range(steps))
        return self.finish(partial, kind, kind in ("pretrain", "scale_up", "scale_out"), **inputs)

    def run_all(self) -> None:
        """The graph of an experiment: two growths, training between them, and an evaluation."""
        self.run("tokens", "tokenize")
        self.run("prepare", steps=30, tokens="tokens")
        self.run("grow", "scale_up", source="prepare", tokens="tokens")
        self.run("continue", steps=20, source="grow", tokens="tokens")
        self.run("upcycle", "scale_out", source="continue", tokens="tokens")
        self.run("evaluate", "evaluate", tokens="tokens", small="prepare", large="continue")

    def notify_cached(self) -> None:
        for directory, record in in_order(self.store.stages):
            self.tracker.stage_finished(record["stage"], directory, record, cached=True)
            self.remember(directory, record)

    def end(self, succeeded: bool = True, report: Path | None = None) -> str | None:
        return self.tracker.pipeline_finished(succeeded, report)


def in_order(stages: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Directories and records of the outputs in a store, in the order in which they were finished.

    Of several within one tick of the file system's clock, in the order of the graph.
    """
    graph = ("tokens", "prepare", "grow", "continue", "upcycle", "evaluate")

    def finished(path: Path) -> tuple[int, int]:
        stage = stage_name(path.parent)
        return path.stat().st_mtime_ns, graph.index(stage) if stage in graph else -1

    paths = sorted(stages.glob("*/record.json"), key=finished)
    return [(path.parent, json.loads(path.read_text())) for path in paths]


def stage_name(partial: Path) -> str:
    return partial.name.rpartition("-")[0]


def point_at(step: int) -> dict[str, Any]:
    point: dict[str, Any] = {"step": step, "tokens": step * 512, "lineage_tokens": step * 512, "time": 1.7e9 + step}
    point |= {"lineage_flops": step * 1e9, "train/loss": 8 - step / 100, "train/learning_rate": 1e-3}
    return point | ({"val/loss": 8 - step / 100, "val/loss/zh": 9 - step / 100} if step % 5 == 0 else {})


def metrics_of(kind: str) -> dict[str, Any]:
    if kind == "evaluate":
        return {"small/zh/nats_per_token": 6.5, "large/zh/nats_per_token": 5.5, "tokens/unrelated": 1}
    if kind == "tokenize":
        return {"documents": 120}
    sizes = {"params_total": 1000, "params_active": 400, "note/en": "as expected"}
    if kind == "pretrain":
        return sizes | {"tokens": 15360, "flops": 2.5e11, "loss_start": 8.3, "loss_end": 7.7, "recovery_tokens": None}
    return sizes | {"kl": 0.0, "passed": True}


def write_model(partial: Path) -> None:
    model = partial / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (model / "model.safetensors").write_bytes(partial.name.encode() * 1000)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: the migrations take seconds."""
    root = tmp_path_factory.mktemp("template")
    driver = Driver(root)
    assert driver.end() is None
    database = root / "mlflow.db"
    with observer_database(database) as connection:
        for table in ("runs", "experiments"):
            connection.execute(f"DELETE FROM {table} WHERE experiment_id > 0")
        for table in ("tags", "params", "latest_metrics", "metrics", "experiment_tags"):
            connection.execute(f"DELETE FROM {table}")
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return database


@contextmanager
def observer_database(path: Path) -> Iterator[Any]:
    import sqlite3

    connection = sqlite3.connect(path)
    yield connection
    connection.close()


@pytest.fixture
def root(tmp_path: Path, empty_database: Path) -> Path:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def client_of(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(uri)


def runs_by_stage(uri: str) -> dict[str, Any]:
    """All runs of the database, by stage; the pipelines' by their name."""
    client = client_of(uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments)
    names = [run.data.tags.get("stage", run.info.run_name) for run in runs]
    assert max(Counter(names).values(), default=1) == 1, names
    return dict(zip(names, runs, strict=True))


def steps_of(uri: str, run: Any, key: str) -> list[int]:
    return [metric.step for metric in client_of(uri).get_metric_history(run.info.run_id, key)]


def everything(uri: str) -> dict[str, Any]:
    """All that MLflow holds, in a form that can be compared: ids of runs replaced by their names."""
    client = client_of(uri)
    runs = runs_by_stage(uri)

    def readable(text: str) -> str:
        for name, run in runs.items():
            text = text.replace(run.info.run_id, name)
        return text

    return {
        name: (
            run.info.status,
            run.data.params,
            {key: readable(value) for key, value in run.data.tags.items()},
            {key: sorted(steps_of(uri, run, key)) for key in run.data.metrics},
            len(client.get_run(run.info.run_id).inputs.model_inputs),
            len(client.get_run(run.info.run_id).outputs.model_outputs),
            sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        )
        for name, run in runs.items()
    }


def test_a_pipeline_is_a_parent_run_and_every_stage_a_child_with_its_curves(root: Path) -> None:
    driver = Driver(root)
    driver.run_all()
    report = root / "report" / "index.html"
    report.parent.mkdir()
    for name in ("index.html", "lineage.html", "loss.png", "loss.svg"):
        (report.parent / name).write_text("<html></html>")
    assert driver.end(report=report) is None

    runs = runs_by_stage(driver.tracker.uri)
    assert set(runs) == {"demo #1", "tokens", "prepare", "grow", "continue", "upcycle", "evaluate"}
    parent = runs.pop("demo #1")
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {run.info.status for run in [parent, *runs.values()]} == {"FINISHED"}
    assert parent.info.start_time <= min(run.info.start_time for run in runs.values())
    assert {run.info.experiment_id for run in [parent, *runs.values()]} == {driver.tracker.experiment_id}
    prepare = runs["prepare"]
    for key in ("train/loss", "tokens", "lineage_flops", "lineage_tokens"):
        assert steps_of(driver.tracker.uri, prepare, key) == list(range(30))
    assert steps_of(driver.tracker.uri, prepare, "val/loss/zh") == [0, 5, 10, 15, 20, 25]
    history = client_of(driver.tracker.uri).get_metric_history(prepare.info.run_id, "train/loss")
    assert [(metric.value, metric.timestamp) for metric in history][:2] == [(8.0, 1700000000000), (7.99, 1700000001000)]
    assert prepare.data.metrics["final.loss_end"] == 7.7
    assert "final.recovery_tokens" not in prepare.data.metrics  # null: never recovered
    assert prepare.data.params["model.hidden_size"] == "64"
    expected = {"kind": "pretrain", "git_commit": "0123abc", "result.note/en": "as expected"}
    assert expected.items() <= prepare.data.tags.items()
    assert parent.data.tags["stage.prepare"] == prepare.data.tags["fingerprint"]
    note = parent.data.tags["mlflow.note.content"]
    assert DESCRIPTION in note
    assert "prepare **7.700**" in note.splitlines()[2]
    assert f"(get-artifact?path=loss.svg&run_uuid={parent.info.run_id})" in note
    assert "`index.html`, `lineage.html`" in note
    assert parent.data.metrics["final.loss_end.prepare"] == 7.7
    artifacts = client_of(driver.tracker.uri).list_artifacts(parent.info.run_id)
    assert {file.path for file in artifacts} == {"recipe.json", "index.html", "lineage.html", "loss.svg"}


def test_checkpoints_are_models_that_point_to_directories_and_nothing_is_copied(root: Path) -> None:
    driver = Driver(root)
    driver.run("tokens", "tokenize")
    record = driver.run("prepare", steps=3, tokens="tokens")
    assert driver.end() is None

    client = client_of(driver.tracker.uri)
    (model,) = client.search_logged_models([driver.tracker.experiment_id])
    weights = root / "stages" / f"prepare-{record['fingerprint']}" / "model" / "model.safetensors"
    assert model.params["directory"] == str(weights.parent)
    assert model.params["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    figures = {"params_total": "1000", "params_active": "400", "tokens": "15360", "flops": "250000000000.0"}
    assert figures.items() <= model.params.items()
    assert model.tags["fingerprint"] == record["fingerprint"]
    assert (model.name, model.model_type, model.status) == ("prepare", "LlamaForCausalLM", "READY")
    assert ("final.loss_end", 7.7) in [(metric.key, metric.value) for metric in model.metrics]
    run = runs_by_stage(driver.tracker.uri)["prepare"]
    assert [(output.model_id, output.step) for output in run.outputs.model_outputs] == [(model.model_id, 2)]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("tokens", driver.inputs["tokens"]["fingerprint"])
    assert sum(path.stat().st_size for path in (root / "mlartifacts").rglob("*")) < weights.stat().st_size * 10
    assert not list((root / "mlartifacts").rglob("*.safetensors"))


def test_lineage_is_a_query(root: Path) -> None:
    driver = Driver(root)
    driver.run_all()
    assert driver.end() is None
    shutil.rmtree(root / "stages")  # what is on disk is not read

    upcycled = driver.inputs["upcycle"]["fingerprint"]
    ancestors = lineage(driver.tracker.uri, upcycled)
    assert [ancestor.stage for ancestor in ancestors] == ["continue", "grow", "prepare"]
    assert ancestors[0].fingerprint == driver.inputs["continue"]["fingerprint"]
    assert ancestors[0].params["directory"].endswith("model")
    by_id = lineage(driver.tracker.uri, ancestors[0].model_id)
    assert by_id == ancestors[1:]
    assert lineage(driver.tracker.uri, ancestors[-1].fingerprint) == []
    with pytest.raises(UserError, match=r"000000000000: database .* has no such checkpoint; give the fingerprint"):
        lineage(driver.tracker.uri, "000000000000")


def test_held_out_losses_are_found_at_the_checkpoints_they_are_about(root: Path) -> None:
    driver = Driver(root)
    driver.run_all()
    assert driver.end() is None
    models = client_of(driver.tracker.uri).search_logged_models(
        [driver.tracker.experiment_id], "metrics.`heldout.zh.nats_per_token` < 6"
    )
    assert [model.name for model in models] == ["continue"]
    assert runs_by_stage(driver.tracker.uri)["evaluate"].data.metrics["final.small.zh.nats_per_token"] == 6.5


def test_a_killed_run_is_continued_without_a_step_sent_twice(root: Path) -> None:
    first = Driver(root)
    first.run("tokens", "tokenize")
    partial = first.start("prepare", tokens="tokens")
    first.train(partial, range(20))
    until(lambda: receipt(root, partial)["step"] == 19)  # and then the driver is gone without a word

    second = Driver(root)
    second.notify_cached()
    second.start("prepare", tokens="tokens")
    # The worker resumes at its checkpoint: steps from 12 are computed again, at another time.
    lines = (partial / "metrics.jsonl").read_text().splitlines(keepends=True)
    (partial / "metrics.jsonl").write_text("".join(lines[:12]))
    second.train(partial, range(12, 40), report_from=0)
    second.finish(partial, tokens="tokens")
    assert second.end() is None

    runs = runs_by_stage(second.tracker.uri)
    assert set(runs) == {"demo #1", "tokens", "prepare"}
    for key in ("train/loss", "tokens"):
        assert steps_of(second.tracker.uri, runs["prepare"], key) == list(range(40))
    assert runs["prepare"].info.status == "FINISHED"
    assert len(client_of(second.tracker.uri).search_logged_models([second.tracker.experiment_id])) == 1


def test_steps_lost_from_the_receipt_are_not_sent_twice(root: Path) -> None:
    first = Driver(root)
    partial = first.start("prepare")
    first.train(partial, range(10))
    assert first.end(succeeded=False) is None
    shutil.rmtree(root / "tracking")

    second = Driver(root)
    second.start("prepare")
    second.train(partial, range(10, 12), report_from=0)
    second.finish(partial)
    assert second.end() is None
    runs = runs_by_stage(second.tracker.uri)
    assert set(runs) == {"demo #1", "prepare"}
    assert steps_of(second.tracker.uri, runs["prepare"], "train/loss") == list(range(12))


def test_a_killed_run_that_is_not_continued_is_ended_by_the_next(root: Path) -> None:
    first = Driver(root)
    partial = first.start("prepare")
    first.train(partial, range(5))
    until(lambda: receipt(root, partial)["step"] == 4)

    second = Driver(root, config={**CONFIG, "stages": {"something": "else"}})
    assert second.end() is None
    status = {name: run.info.status for name, run in runs_by_stage(second.tracker.uri).items()}
    assert status == {"demo #1": "KILLED", "prepare": "KILLED", "demo #2": "FINISHED"}

    third = Driver(root)
    third.start("prepare")
    third.finish(partial)
    assert third.end() is None
    status = {name: run.info.status for name, run in runs_by_stage(third.tracker.uri).items()}
    assert set(status.values()) == {"FINISHED"}


@pytest.mark.parametrize(
    ("message", "status"), [("loss is NaN at step 7", "FAILED"), ("KeyboardInterrupt", "KILLED"), (None, "KILLED")]
)
def test_an_ended_stage_shows_how_it_ended_until_it_is_continued(root: Path, message: str | None, status: str) -> None:
    driver = Driver(root)
    partial = driver.start("prepare")
    driver.train(partial, range(3))
    if message:
        driver.tracker.stage_failed("prepare", message)
    assert driver.end(succeeded=False) is None
    runs = runs_by_stage(driver.tracker.uri)
    assert (runs["prepare"].info.status, runs["demo #1"].info.status) == (status, "FAILED")
    assert runs["prepare"].data.tags["failure"] == (message or "interrupted")
    assert steps_of(driver.tracker.uri, runs["prepare"], "train/loss") == [0, 1, 2]

    again = Driver(root)
    again.start("prepare")
    again.finish(partial)
    assert again.end() is None
    runs = runs_by_stage(driver.tracker.uri)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert "failure" not in runs["prepare"].data.tags


def test_a_cached_run_adds_nothing(root: Path) -> None:
    driver = Driver(root)
    driver.run_all()
    assert driver.end() is None
    before, files = everything(driver.tracker.uri), modified(root / "tracking")
    again = Driver(root)
    again.notify_cached()
    assert again.end() is None
    assert everything(driver.tracker.uri) == before
    assert modified(root / "tracking") == files


def test_a_cached_run_does_not_import_mlflow_unless_the_database_lost_it(root: Path, empty_database: Path) -> None:
    driver = Driver(root)
    driver.run_all()
    assert driver.end() is None
    before = everything(driver.tracker.uri)
    outputs = json.dumps([str(directory) for directory, _ in in_order(root / "stages")])
    script = f"""
        import json, shutil, sys
        from pathlib import Path
        from aquilamoe.tracking.observer import Tracker
        root = Path({str(root)!r})
        for known in (True, False):
            tracker = Tracker(None, root)
            tracker.pipeline_started("demo", {DESCRIPTION!r}, {CONFIG!r}, root)
            for directory in map(Path, {outputs}):
                record = json.loads((directory / "record.json").read_text())
                tracker.stage_finished(record["stage"], directory, record, cached=True)
            assert tracker.pipeline_finished(True, None) is None
            assert ("mlflow" in sys.modules) is not known
            if known:
                for file in root.glob("mlflow.db*"):
                    file.unlink()
                shutil.copy({str(empty_database)!r}, root / "mlflow.db")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    shutil.copy(root / "mlflow.db", root / "restored.db")  # this process still has the deleted file open
    assert everything(f"sqlite:///{root / 'restored.db'}") == before


def test_cached_stages_are_replayed_into_a_database_that_does_not_know_them(
    root: Path, empty_database: Path, tmp_path: Path
) -> None:
    driver = Driver(root)
    driver.run_all()
    assert driver.end() is None
    shutil.copy(empty_database, tmp_path / "other.db")
    again = Driver(root, uri=f"sqlite:///{tmp_path / 'other.db'}")
    again.notify_cached()
    assert again.end() is None
    assert everything(again.tracker.uri) == everything(driver.tracker.uri)
    ancestors = lineage(again.tracker.uri, again.inputs["upcycle"]["fingerprint"])
    assert [ancestor.stage for ancestor in ancestors] == ["continue", "grow", "prepare"]


def test_other_fingerprints_under_the_same_configuration_are_another_pipeline(root: Path) -> None:
    first = Driver(root)
    first.run("tokens", "tokenize")
    first.run("prepare", tokens="tokens")
    assert first.end() is None
    second = Driver(root, version=2)  # a stage's code changed, not its configuration
    second.inputs = dict(first.inputs)
    second.tracker.stage_finished(
        "tokens",
        root / "stages" / first.inputs["tokens"]["directory"],
        json.loads((root / "stages" / first.inputs["tokens"]["directory"] / "record.json").read_text()),
        cached=True,
    )
    second.run("prepare", tokens="tokens")
    assert second.end() is None
    client = client_of(second.tracker.uri)
    runs = client.search_runs([second.tracker.experiment_id], order_by=["start_time ASC"])
    parents = [run for run in runs if run.data.tags["kind"] == "pipeline"]
    assert [run.info.run_name for run in parents] == ["demo #1", "demo #2"]
    prepared = [run for run in runs if run.data.tags.get("stage") == "prepare"]
    assert [run.info.run_name for run in prepared] == ["prepare #1", "prepare #2"]
    assert [run.data.tags["mlflow.parentRunId"] for run in prepared] == [run.info.run_id for run in parents]


def test_what_mlflow_refuses_is_cut_or_renamed(root: Path) -> None:
    driver = Driver(root, config={**CONFIG, "data": {"path": "x" * 10_000, "größe=%": None, "glob*": [1, 2]}})
    partial = driver.start("prepare")
    strange: dict[str, Any] = {"step": 0, "time": 1.0, "train/loss": 1e300, "load (max)": 2, "list": [1], "none": None}
    points = [strange, *({"step": step, "time": 1.0, "train/loss": 1.0} for step in range(1, 2500))]
    (partial / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    driver.tracker.stage_progress("prepare", points)
    driver.finish(partial)
    assert driver.end() is None
    runs = runs_by_stage(driver.tracker.uri)
    assert steps_of(driver.tracker.uri, runs["prepare"], "train/loss") == list(range(2500))
    assert "load _max_" in runs["prepare"].data.metrics
    params = runs["demo #1"].data.params
    assert (len(params["data.path"]), params["data.glob_"]) == (6000, "[1, 2]")


def test_an_error_of_mlflow_is_reported_and_made_good_by_the_next_run(root: Path) -> None:
    (root / "mlartifacts").write_text("in the way")
    driver = Driver(root)
    driver.run("prepare", steps=5)
    note = driver.end()
    assert note is not None
    assert note.startswith(
        f"tracking: 5 points of 1 stage kept in {root / 'tracking'}, will be sent by the next run (pre"
    )
    assert "mlartifacts" in note
    (root / "mlartifacts").unlink()
    other = Driver(root, config={**CONFIG, "stages": {"something": "else"}})
    assert other.end() is None
    runs = runs_by_stage(other.tracker.uri)
    assert steps_of(other.tracker.uri, runs["prepare"], "train/loss") == list(range(5))
    assert runs["prepare"].data.tags["mlflow.parentRunId"] == runs["demo #1"].info.run_id
    assert runs["demo #1"].info.status == "FINISHED"


def test_checkpoints_are_versions_of_their_stage_the_newest_is_latest_and_the_lowest_loss_best(root: Path) -> None:
    for version, loss in ((1, 7.7), (2, 7.5), (3, 7.6)):
        driver = Driver(root, version=version, loss=loss)
        driver.run("tokens", "tokenize")
        driver.run("prepare", steps=3, tokens="tokens")
        driver.run("export", source="prepare")
        assert driver.end() is None
    client = client_of(driver.tracker.uri)
    for stage in ("prepare", "export"):
        versions = client.search_model_versions(f"name = 'demo.{stage}'")
        assert [float(each.tags["loss"]) for each in sorted(versions, key=lambda each: int(each.version))] == [
            7.7,
            7.5,
            7.6,
        ]
        assert client.get_model_version_by_alias(f"demo.{stage}", "best").version in (2, "2")
        latest = client.get_model_version_by_alias(f"demo.{stage}", "latest")
        assert latest.tags["fingerprint"] == driver.inputs[stage]["fingerprint"]
        (model,) = client.search_logged_models(
            [driver.tracker.experiment_id], f"tags.fingerprint = '{latest.tags['fingerprint']}'"
        )
        assert latest.source == f"models:/{model.model_id}"
        assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": f"demo.{stage}", "version": 3}]
    assert "[prepare](#/experiments/" in model.tags["mlflow.note.content"].split(" → ")[0]


def test_a_line_is_searched_by_its_growth_and_its_losses_by_their_tokens(root: Path) -> None:
    driver = Driver(
        root, growths={"scale_up": {"growth": {"method": "lemon"}}, "scale_out": {"upcycling": {"method": "drop"}}}
    )
    driver.run_all()
    assert driver.end() is None
    client, experiment = client_of(driver.tracker.uri), driver.tracker.experiment_id
    for query, expected in {
        "tags.`growth.method` = 'lemon'": {"grow", "continue", "upcycle"},
        "tags.`upcycling.method` = 'drop'": {"upcycle"},
    }.items():
        assert {run.data.tags["stage"] for run in client.search_runs([experiment], query)} == expected
        assert {model.name for model in client.search_logged_models([experiment], query)} == expected
    (model,) = client.search_logged_models([experiment], "tags.stage = 'continue'")
    assert model.tags["git_commit"] == "0123abc"
    tokens = ("tokens", driver.inputs["tokens"]["fingerprint"])
    about = {metric.key: (metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
    assert {about[key] for key in ("final.loss_end", "heldout.zh.nats_per_token")} == {tokens}
    assert about["final.params_total"] == (None, None)
    found = client.search_logged_models(
        [experiment], datasets=[{"dataset_name": tokens[0], "dataset_digest": tokens[1]}], order_by=[]
    )
    assert {model.name for model in found} >= {"prepare", "continue"}


def test_a_server_that_comes_and_goes_loses_nothing_and_delays_no_run(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "SEND_EVERY_S", 0.1)
    monkeypatch.setattr(observer, "QUIET_S", 0.5)
    shutil.copy(empty_database, tmp_path / "server.db")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    reaching = holding(monkeypatch, "is_reachable")
    first = Driver(tmp_path / "runs", uri=uri)  # nothing responds yet
    first.run("tokens", "tokenize")
    first.run("prepare", steps=30, tokens="tokens")
    reaching.set()
    expected = f"30 points of 2 stages kept in {tmp_path}/runs/tracking, will be sent by the next run (server {uri} "
    assert first.end() == f"tracking: {expected}does not respond)"

    with server(tmp_path, port):
        second = Driver(tmp_path / "runs", uri=uri)
        second.notify_cached()
        partial = second.start("continue", source="prepare", tokens="tokens")
        second.train(partial, range(10))
        until(lambda: receipt(tmp_path / "runs", partial)["step"] == 9)
    second.train(partial, range(10, 20))  # the server died; points come, and go nowhere
    until(lambda: second.tracker._problem)
    with server(tmp_path, port):
        second.train(partial, range(20, 30))
        second.finish(partial, source="prepare", tokens="tokens")
        assert second.end() is None
        runs = runs_by_stage(uri)
        assert set(runs) == {"demo #1", "tokens", "prepare", "continue"}
        assert {run.info.status for run in runs.values()} == {"FINISHED"}
        for stage in ("prepare", "continue"):
            assert steps_of(uri, runs[stage], "train/loss") == list(range(30))
        ancestors = lineage(uri, second.inputs["continue"]["fingerprint"])
        assert [ancestor.stage for ancestor in ancestors] == ["prepare"]


def holding(monkeypatch: pytest.MonkeyPatch, name: str) -> Event:
    """Have the tracker wait where it calls a function, until the event is set."""
    event, function = Event(), getattr(observer, name)

    def held(*arguments: Any) -> Any:
        assert event.wait(PATIENCE_S)
        return function(*arguments)

    monkeypatch.setattr(observer, name, held)
    return event


def test_curves_are_sent_the_less_often_the_more_of_the_processor_it_takes(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "SEND_EVERY_S", 0.01)
    monkeypatch.setattr(observer, "SEND_SHARE", 0.05)
    driver, sent = Driver(root), list[float]()
    send = observer.Tracker._deliver

    def busy(tracker: observer.Tracker) -> None:
        began_s = time.thread_time()
        send(tracker)
        while time.thread_time() - began_s < 0.05:  # so that a second lies between two
            pass
        sent.append(time.monotonic())

    partial = driver.start("prepare")
    until(lambda: receipt(root, partial).get("run_id"))
    monkeypatch.setattr(observer.Tracker, "_deliver", busy)
    step = itertools.count()

    def trained_until_sent() -> bool:
        driver.train(partial, range(at := next(step), at + 1))
        return len(sent) > 2

    until(trained_until_sent)
    assert min(later - earlier for earlier, later in itertools.pairwise(sent)) > 0.9  # what comes between is not sent
    driver.finish(partial)
    assert driver.end() is None


def test_a_server_that_takes_calls_but_never_responds_delays_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PROBE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        driver = Driver(tmp_path, uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        driver.run("prepare", steps=3)
        note = driver.end()  # much sooner than FLUSH_S
    assert note is not None
    assert "3 points of 1 stage kept" in note
    assert "does not respond" in note


def test_a_slow_and_a_full_server_delay_no_run_and_miss_nothing_in_the_end(
    tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "SEND_EVERY_S", 0.1)
    monkeypatch.setattr(observer, "QUIET_S", 0.2)
    monkeypatch.setattr(observer, "SLOW_FLUSH_S", 0.5)
    called_by = set[str]()
    monkeypatch.setattr(connection.LatencyMonitor, "call", watching(connection.LatencyMonitor.call, called_by))
    shutil.copy(empty_database, tmp_path / "server.db")
    real, port = free_port(), free_port()
    uri, root = f"http://127.0.0.1:{port}", tmp_path / "runs"
    with server(tmp_path, real):
        with proxy(port, real, "0", "507"):
            full = Driver(root, uri=uri)
            partial = full.start("prepare")
            full.train(partial, range(10))
            until(lambda: full.tracker._problem)
            full.train(partial, range(10, 20))
            full.finish(partial)
            note = full.end()
            assert note is not None
            assert note.startswith(f"tracking: 20 points of 1 stage kept in {root / 'tracking'}")
        with proxy(port, real, "1"):
            monkeypatch.setattr(connection, "PROMPT_S", 0.6)
            slow = Driver(root, uri=uri)
            slow.notify_cached()
            partial = slow.start("continue", source="prepare")
            slow.train(partial, range(10))
            slow.finish(partial, source="prepare")
            note = slow.end()  # what is left takes much longer at a second a call
            assert note is not None
            assert f"(server {uri} is slow: waited " in note
        with proxy(port, real, "0"):
            monkeypatch.setattr(connection, "PROMPT_S", PATIENCE_S)
            well = Driver(root, uri=uri)
            assert well.end() is None
            runs = runs_by_stage(uri)
            assert {run.info.status for run in runs.values()} == {"FINISHED"}
            for stage, steps in {"prepare": 20, "continue": 10}.items():
                assert steps_of(uri, runs[stage], "train/loss") == list(range(steps))
            client = client_of(uri)
            assert len(client.search_logged_models([well.tracker.experiment_id])) == 2
            assert len(client.search_model_versions("name = 'demo.continue'")) == 1
    assert called_by == {"tracking"}, "only the tracker's own thread waits for the server"


def watching(call: Callable[..., Any], called_by: set[str]) -> Callable[..., Any]:
    """A watched call to a server that notes the name of the thread that makes it."""

    def watched(monitor: connection.LatencyMonitor) -> Any:
        called_by.add(current_thread().name)
        return call(monitor)

    return watched


def test_the_comparison_page_finds_its_view_in_the_experiment(root: Path) -> None:
    driver = Driver(root)
    driver.run("prepare", steps=3)
    assert driver.end() is None
    assert driver.tracker.experiment_id is not None
    url = comparison_url("http://127.0.0.1:5000/", driver.tracker.experiment_id)
    assert url.startswith(f"http://127.0.0.1:5000/#/experiments/{driver.tracker.experiment_id}/runs?")
    key = dict(part.split("=") for part in url.partition("?")[2].split("&"))["viewStateShareKey"]
    tags = client_of(driver.tracker.uri).get_experiment(driver.tracker.experiment_id).tags
    view = json.loads(tags[f"mlflow.sharedViewState.{key}"])
    shown = {
        name for chart in view["compareRunCharts"] for name in (chart["metricKey"], chart["selectedXAxisMetricKey"])
    }
    assert shown <= set(runs_by_stage(driver.tracker.uri)["prepare"].data.metrics)


def test_the_curves_of_two_pipelines_have_their_own_colors() -> None:
    colors = [view.run_color(position, pipeline) for position in range(12) for pipeline in (1, 2, 3)]
    assert all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
    assert len(set(colors)) == len(colors)


def test_importing_tracking_imports_no_mlflow() -> None:
    script = "import sys, aquilamoe.tracking; print({'mlflow', 'torch', 'ray', 'pandas'} & set(sys.modules) or 'none')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "none\n"


def test_a_path_is_no_tracking_uri(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking.uri: 'runs/mlruns' is not the address .*; use http://HOST:PORT"):
        Tracker("runs/mlruns", tmp_path)
    with pytest.raises(UserError, match="did you mean 'http'"):
        Tracker("htpp://server:5000", tmp_path)


def test_the_ui_command_opens_the_database_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ui_command(None, tmp_path / "runs")
    assert "mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --port 5000 --workers 1" in command
    assert ui_command("http://server:5000", tmp_path) == "http://server:5000"
    assert "'postgresql://me@host/my db'" in ui_command("postgresql://me@host/my db", tmp_path)


def test_a_password_is_not_shown() -> None:
    assert connection.shown("http://me:secret@server:5000/x") == "server http://server:5000/x"
    assert connection.shown("sqlite:////data/runs/mlflow.db") == "database sqlite:////data/runs/mlflow.db"


def receipt(root: Path, partial: Path) -> dict[str, Any]:
    path = root / "tracking" / f"{partial.name.removesuffix('.partial')}.json"
    return {"step": None} | (json.loads(path.read_text()) if path.exists() else {})


def modified(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """A tracking server on loopback, killed without warning at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder / 'server.db'}",
        "--artifacts-destination",
        str(folder / "art"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        until(lambda: responds(port))
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def proxy(port: int, upstream: int, *words: str) -> Iterator[None]:
    """The server at `upstream` behind one that is slow or full, on another port."""
    script = Path(__file__).parents[2] / "benchmarks" / "slow_proxy.py"
    process = subprocess.Popen([sys.executable, str(script), str(port), str(upstream), *words])
    try:
        until(lambda: responds(port))
        yield
    finally:
        process.kill()
        process.wait()


def responds(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as response:
            return response.status == 200
    except OSError:
        return False
