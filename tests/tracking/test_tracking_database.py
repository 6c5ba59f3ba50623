# ruff: noqa: F811 - fixtures of another file are imported
"""What becomes of MLflow's database when it is killed, damaged, moved or edited by hand; kept small in one store."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from aquilamoe.tracking import database
from aquilamoe.tracking.observer import Tracker
from aquilamoe.tracking.queries import ui_command
from test_tracking import Driver, client_of, empty_database, runs_by_stage, steps_of  # noqa: F401

pytestmark = pytest.mark.process

DAMAGES: dict[str, Callable[[Path], object]] = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "no database": lambda path: path.write_bytes(b"not a database at all\n" * 100),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 3]),
    "a page of zeros": lambda path: path.write_bytes(overwritten(path.read_bytes())),
    "30 tables": lambda path: fewer_tables(path, 30),
    "half migrated": lambda path: execute(path, "UPDATE alembic_version SET version_num = '181f10493468'"),
}


def overwritten(content: bytes) -> bytes:
    return content[:40_960] + bytes(40_960) + content[81_920:]


def execute(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as opened:
        for statement in statements:
            opened.execute(statement)
    opened.close()


def fewer_tables(path: Path, kept: int) -> None:
    """As a process that was killed in the first seconds leaves it."""
    with sqlite3.connect(path) as opened:
        opened.execute("PRAGMA foreign_keys=off")
        names = [name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in names[kept:]:
            opened.execute(f"DROP TABLE {name}")
        opened.execute("DELETE FROM alembic_version")
    opened.close()


def shown(uri: str) -> dict[str, str]:
    return {name: run.info.status for name, run in runs_by_stage(uri).items()}


def artifacts_of(uri: str) -> dict[str, list[str]]:
    return {
        name: sorted(file.path for file in client_of(uri).list_artifacts(run.info.run_id))
        for name, run in runs_by_stage(uri).items()
    }


def forget_engines(path: Path) -> None:
    """MLflow keeps connections to a file that another process would not have open."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Registry
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service.utils import _artifact_repos_cache

    for store in (SqlAlchemyStore, Registry):
        if engine := store._engine_map.pop(database.database_uri(path), None):
            engine.dispose()
    _artifact_repos_cache.clear()


@pytest.fixture(scope="module")
def delivered_once(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """A store with two pipelines in its database, nothing connected."""
    root = tmp_path_factory.mktemp("delivered")
    shutil.copy(empty_database, root / "mlflow.db")
    first = Driver(root)
    first.run("tokens", "tokenize")
    first.run("prepare", steps=5, tokens="tokens")
    page = root / "reports" / "demo" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("<html></html>")
    assert first.end(report=page) is None
    second = Driver(root, config={"name": "other", "stages": {"something": "else"}}, version=2)
    second.run("other", steps=3)
    assert second.end() is None
    forget_engines(root / "mlflow.db")
    return root


@pytest.fixture
def delivered(delivered_once: Path, tmp_path: Path) -> Path:
    """A copy, in which everything has its new place."""
    shutil.copytree(delivered_once, tmp_path, dirs_exist_ok=True)
    settle(tmp_path)
    forget_engines(delivered_once / "mlflow.db")
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_database_is_moved_aside_and_everything_is_delivered_again(delivered: Path, damage: str) -> None:
    path = delivered / "mlflow.db"
    DAMAGES[damage](path)
    content = path.read_bytes()
    driver = Driver(delivered, config={"stages": {"a": "third"}})
    driver.run("more", "tokenize")
    note = driver.end()
    assert note is not None and note.startswith(f"tracking: {path} ") and "\n" not in note
    assert note.endswith("; it was moved to mlflow.db.damaged-1 and is rebuilt from the stages")
    assert (delivered / "mlflow.db.damaged-1").read_bytes() == content
    runs = client_of(driver.tracker.uri).search_runs([driver.tracker.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert sorted(run.data.tags.get("stage", "") for run in runs) == ["", "", "", "more", "other", "prepare", "tokens"]
    (parent,) = [run for run in runs if "stage.prepare" in run.data.tags]
    names = {file.path for file in client_of(driver.tracker.uri).list_artifacts(parent.info.run_id)}
    assert "index.html" in names
    assert not list(delivered.glob(".mlflow.db.new*"))


KILLED = """
    import os, signal
    from pathlib import Path
    from mlflow.store.db import utils
    from aquilamoe.tracking import connection, database

    def die(*_): os.kill(os.getpid(), signal.SIGKILL)

    {where} = die
    connection.connect(database.database_uri(Path({path!r})))
"""


@pytest.mark.parametrize("where", ["utils._upgrade_db", "database._replace"])
def test_a_process_killed_while_it_makes_the_tables_leaves_no_database(tmp_path: Path, where: str) -> None:
    path = tmp_path / "mlflow.db"
    script = textwrap.dedent(KILLED.format(where=where, path=str(path)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not path.exists() and list(tmp_path.glob(".mlflow.db.new*"))
    driver = Driver(tmp_path)
    driver.run("tokens", "tokenize")
    assert driver.end() is None
    assert shown(driver.tracker.uri) == {"demo #1": "FINISHED", "tokens": "FINISHED"}
    assert not list(tmp_path.glob(".mlflow.db.new*"))


def test_a_full_disk_while_the_tables_are_made_loses_nothing(delivered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = delivered / "mlflow.db"
    fewer_tables(path, 30)
    content = path.read_bytes()

    def full(made: Path) -> None:
        made.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(database, "_write_tables", full)
        driver = Driver(delivered)
        driver.run("more", "tokenize")
        note = driver.end()
    assert note is not None and "No space left on device" in note and "will be sent by the next run" in note
    assert path.read_bytes() == content and not list(delivered.glob("*damaged*"))
    again = Driver(delivered)
    assert "is rebuilt from the stages" in str(again.end())
    assert shown(again.tracker.uri)["more"] == "FINISHED"


def test_two_processes_that_make_a_database_at_once_make_one(tmp_path: Path) -> None:
    script = f"""
        from pathlib import Path
        from aquilamoe.tracking import connection, database
        client = connection.connect(database.database_uri(Path({str(tmp_path / "mlflow.db")!r})))
        print(client.create_experiment(str(__import__("os").getpid())))
    """
    both = [subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) for _ in range(2)]
    assert sorted(process.communicate()[0] for process in both) == [b"1\n", b"2\n"]
    assert not list(tmp_path.glob("*damaged*"))


def test_the_tables_of_an_older_mlflow_become_those_of_this_one_and_keep_what_is_in_them(delivered: Path) -> None:
    from mlflow.store.db import utils

    path = delivered / "mlflow.db"
    old = delivered / "older.db"
    engine = database._engine(old)
    utils.InitialBase.metadata.create_all(engine)
    config = utils._get_alembic_config("sqlite://")
    from alembic import command

    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "bd07f7e963c5")  # of MLflow 1.20, before experiments had a time
    execute(old, "INSERT INTO experiments VALUES (7, 'kept', 'file:///nowhere', 'active')")
    shutil.copy(old, path)
    driver = Driver(delivered)
    driver.run("more", "tokenize")
    assert driver.end() is None
    assert client_of(driver.tracker.uri).get_experiment("7").name == "kept"
    assert set(shown(driver.tracker.uri).values()) == {"FINISHED"}


def test_the_database_of_a_newer_mlflow_stays_as_it_is(delivered: Path) -> None:
    path = delivered / "mlflow.db"
    execute(path, "UPDATE alembic_version SET version_num = 'fffffffffffe'")
    driver = Driver(delivered)
    driver.run("more", "tokenize")
    assert "mlflow.db was written by a newer MLflow; install that one again" in str(driver.end())
    assert not list(delivered.glob("*damaged*"))


@pytest.mark.parametrize("is_copied", [False, True], ids=["moved", "copied"])
def test_a_store_that_was_moved_writes_nothing_where_it_was_and_shows_what_it_had(
    delivered: Path, is_copied: bool
) -> None:
    old, new = delivered / "runs", delivered / "else where"
    old.mkdir()
    for path in [path for path in delivered.iterdir() if path not in (old, new)]:
        path.rename(old / path.name)
    settle(old)
    (shutil.copytree if is_copied else shutil.move)(str(old), str(new))
    before = sorted(old.rglob("*"))
    cached = Driver(new)
    cached.notify_cached()
    assert cached.end() is None
    driver = Driver(new, version=3)
    driver.run("prepare", steps=4)
    assert driver.end() is None
    assert sorted(old.rglob("*")) == before
    found = client_of(driver.tracker.uri)
    runs = found.search_runs([driver.tracker.experiment_id])
    assert {run.info.artifact_uri.startswith((new / "mlartifacts").as_uri()) for run in runs} == {True}
    for run in runs:
        assert "recipe.json" in {file.path for file in found.list_artifacts(run.info.run_id)}, run.info.run_name
    models = found.search_logged_models([driver.tracker.experiment_id])
    assert {Path(model.params["directory"]).parents[2] for model in models} == {new}
    assert str(old) not in json.dumps([run.data.tags for run in runs])


def settle(store: Path) -> None:
    """Let a store that a test has put together be as if it had always been where it is."""
    from aquilamoe.tracking.sync_state import still_known

    still_known(database.database_uri(store / "mlflow.db"), store)


def test_what_was_not_delivered_before_a_move_is_delivered_after_it(tmp_path: Path, empty_database: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copy(empty_database, old / "mlflow.db")
    (old / "mlartifacts").write_text("in the way")
    driver = Driver(old)
    driver.run("prepare", steps=5)
    assert "5 points of 1 stage kept" in str(driver.end())
    forget_engines(old / "mlflow.db")
    (old / "mlartifacts").unlink()
    old.rename(new)
    other = Driver(new, config={"name": "other", "stages": {"something": "else"}})
    assert other.end() is None
    runs = runs_by_stage(other.tracker.uri)
    assert steps_of(other.tracker.uri, runs["prepare"], "train/loss") == list(range(5))
    assert not old.exists()


def test_receipts_with_absolute_places_of_before_count_after_a_move(delivered: Path) -> None:
    settle(delivered)
    for path in (delivered / "tracking").glob("*.json"):  # as they were written before
        values = json.loads(path.read_text())
        values["uri"] = "sqlite:////before/runs/mlflow.db"
        if "directory" in values:
            values["directory"] = f"/before/runs/stages/{values['directory']}"
        if "stages" in values:
            values["stages"] = {name: f"/before/runs/stages/{each}" for name, each in values["stages"].items()}
        path.write_text(json.dumps(values))
    driver = Driver(delivered)
    driver.notify_cached()
    assert driver.end() is None
    assert driver.tracker._writer is None  # there was nothing to send


NAMES = ["q?x", "a#b 50%", "p%20q", "it's 结果", 'x;y&z=1[a]{b}(c),d\\e"f']


@pytest.mark.parametrize("name", NAMES)
def test_the_database_and_the_artifacts_are_in_the_root_whatever_it_is_called(
    tmp_path: Path,
    empty_database: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, away = tmp_path / name, tmp_path / "away"
    store.mkdir()
    away.mkdir()
    monkeypatch.chdir(away)
    shutil.copy(empty_database, store / "mlflow.db")
    before = set(tmp_path.rglob("*"))
    driver = Driver(store)
    driver.run("prepare", steps=2)
    assert driver.end() is None
    assert {path for path in set(tmp_path.rglob("*")) - before if store not in path.parents} == set()
    assert artifacts_of(driver.tracker.uri)["prepare"] == ["recipe.json", "record.json"]
    assert database.database_file(driver.tracker.uri) == store / "mlflow.db"
    script = f"mlflow() {{ printf '%s\\n' \"$@\"; }}; {ui_command(None, store)}"
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True).stdout.splitlines()
    assert words[:2] == ["ui", "--backend-store-uri"]
    assert database.database_file(words[2]) == store / "mlflow.db"


def test_the_tables_are_made_in_a_root_with_any_name(tmp_path: Path) -> None:
    store = tmp_path / "a?b#c%20d'e 结"
    store.mkdir()
    driver = Driver(store)
    driver.run("prepare", steps=2)
    assert driver.end() is None
    assert (store / "mlflow.db").stat().st_size > 100_000
    assert {path.name for path in tmp_path.iterdir()} == {store.name}


def deleted(delivered: Path, what: str) -> Tracker:
    """Delete something as a user does in MLflow's pages, or by hand."""
    uri = database.database_uri(delivered / "mlflow.db")
    client = client_of(uri)
    experiment = client.get_experiment_by_name("demo").experiment_id
    run = next(run for run in client.search_runs([experiment]) if run.info.run_name.startswith("prepare #1"))
    parent = next(run for run in client.search_runs([experiment]) if run.info.run_name == "demo #1")
    if what == "experiment":
        client.delete_experiment(experiment)
    elif what == "run":
        client.delete_run(run.info.run_id)
    elif what == "parent":
        client.delete_run(parent.info.run_id)
    elif what == "registered model":
        client.delete_registered_model("demo.prepare")
    elif what == "model":
        (model, *_) = client.search_logged_models([experiment])
        client.delete_logged_model(model.model_id)
    else:
        shutil.rmtree(delivered / "mlartifacts")
    return experiment


@pytest.mark.parametrize("what", ["experiment", "run", "parent", "registered model", "model", "artifacts"])
@pytest.mark.parametrize("is_cached", [True, False], ids=["cached", "computing"])
def test_what_was_deleted_in_mlflow_is_there_again_once_and_no_run_fails(
    delivered: Path, what: str, is_cached: bool
) -> None:
    experiment = deleted(delivered, what)
    driver = Driver(delivered, inputs={})
    driver.notify_cached()
    if not is_cached:
        driver.run("more", source="prepare")
    note = driver.end()
    expected = {"experiment": "experiment 'demo'", "run": "run 'prepare #1'", "parent": "run 'demo #1'"}
    if what in expected:
        assert note == f"tracking: {expected[what]} had been deleted in MLflow; restored, as this run belongs to it"
    else:
        assert note is None
    client = client_of(driver.tracker.uri)
    runs = client.search_runs([experiment])
    names = [run.info.run_name for run in runs if run.info.run_name != "demo #2"]
    assert sorted(set(names)) == sorted(names) and {"demo #1", "tokens #1", "prepare #1"} <= set(names)
    own = [run for run in runs if run.info.run_name in ("demo #1", "tokens #1", "prepare #1")]
    for run in own:
        assert "recipe.json" in {file.path for file in client.list_artifacts(run.info.run_id)}, run.info.run_name
    if not is_cached:
        assert client.search_model_versions("name = 'demo.more'")
