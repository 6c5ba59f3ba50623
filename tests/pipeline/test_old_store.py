"""A store that was written when rooms, modules and classes were called otherwise: it is served as it was."""

import json
import sqlite3
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from aquilamoe.cli import commands
from aquilamoe.config import graph
from aquilamoe.estimates.duration import Speed
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.store import Store

ARCHIVE = Path(__file__).parents[1] / "support" / "store_of_old_rooms.tar.xz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/`, the corpus it was made of, and the words of the command that made it."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def values(
    folder: Path, compose: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, Any]]]:
    monkeypatch.chdir(folder)
    words = json.loads((folder / "words.json").read_text())
    yield lambda *more: compose(*words, *more)


def test_every_output_is_cached(values: Callable[..., dict[str, Any]]) -> None:
    experiment = graph.parse(values())
    plan = planning.make(graph.build(experiment), Store.of(experiment.paths), Speed(1e9))
    assert {planned.name: planned.reason for planned in plan if planned.state != "cached"} == {}
    assert len(plan) > 5


@pytest.mark.parametrize("words", [["action=status"], ["action=lineage", "checkpoint=moe"], ["action=verify"]])
def test_every_query_of_it_has_a_result(
    values: Callable[..., dict[str, Any]], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    commands.execute(values(*words), "a command")
    assert "prepare" in capsys.readouterr().out


@pytest.mark.process
def test_a_run_computes_nothing_and_mlflow_gets_no_second_run_of_a_stage(
    values: Callable[..., dict[str, Any]], folder: Path
) -> None:
    before = runs(folder)
    commands.execute(values(), "a command")
    assert len(before) > 5
    assert set(before) <= set(runs(folder))
    new = {name for run, name in runs(folder).items() if run not in before}
    stages = {path.name.rpartition("-")[0] for path in (folder / "runs" / "stages").iterdir()}
    assert not new & stages


def runs(folder: Path) -> dict[str, str]:
    """Names of the runs in MLflow's database, by their ids."""
    with closing(sqlite3.connect(folder / "runs" / "mlflow.db")) as database:
        return dict(database.execute("SELECT run_uuid, name FROM runs").fetchall())
