"""Where MLflow's database locates files, kept true when a store is moved or copied.

MLflow keeps absolute locations. A folder that was renamed would be made again under its old name, and what is in the
new one not be found.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from aquilamoe.tracking import database

ARTIFACTS = "mlartifacts"
# Columns with the location of a folder of artifacts: table, key, column.
LOCATIONS = (
    ("experiments", "experiment_id", "artifact_location"),
    ("runs", "run_uuid", "artifact_uri"),
    ("logged_models", "model_id", "artifact_location"),
)
# Columns with text that names the directories of stages.
TEXTS = (
    ("tags", "value"),
    ("logged_model_tags", "tag_value"),
    ("logged_model_params", "param_value"),
    ("model_version_tags", "value"),
    ("datasets", "dataset_source"),
)


def artifacts(root: Path) -> str:
    """Where the small files of MLflow are that belong to a store."""
    return (root / ARTIFACTS).absolute().as_uri()


def correct(path: Path, root: Path) -> None:
    """Let a database name the places of `root` in the place of those that the store had before.

    A folder of artifacts counts as moved if it is in this store, or neither here nor where it was. In a database that
    lies elsewhere, which other stores may use too, what is where it was stays.
    """
    with suppress(sqlite3.Error), closing(database.open_file(path, "rw")) as opened, opened:
        before = {found for table in LOCATIONS for found in _moved(opened, *table, path=path, root=root)}
        for old in sorted(before):
            _rename(opened, f"{old}/stages/", f"{root.absolute()}/stages/")


def set_artifacts(path: Path, experiment: str, root: Path) -> None:
    """Let the artifacts of an experiment's further runs go to a store."""
    with closing(database.open_file(path, "rw")) as opened, opened:
        opened.execute(
            "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (artifacts(root), experiment)
        )


def _moved(opened: sqlite3.Connection, table: str, key: str, column: str, *, path: Path, root: Path) -> Iterator[Path]:
    """Correct the locations of one table; returns the roots that they had."""
    new, marker = artifacts(root), f"/{ARTIFACTS}"
    rows = opened.execute(
        f"SELECT {key}, {column} FROM {table} WHERE {column} LIKE 'file:///%{marker}%' AND instr({column}, ?) != 1",
        (new,),
    ).fetchall()
    for row, location in rows:
        old_root, _, inside = location.rpartition(marker)
        old, here = database.local(location), database.local(f"{new}{inside}")
        if inside[:1] not in ("", "/") or old is None or here is None:
            continue
        own, is_here = path.parent == root.absolute(), inside and here.exists()
        if (is_here and (own or not old.exists())) or (own and not old.exists()):
            opened.execute(f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (f"{new}{inside}", row))
            before = database.local(old_root)
            assert before is not None, "a file URI"
            yield before


def _rename(opened: sqlite3.Connection, old: str, new: str) -> None:
    for table, column in TEXTS:
        opened.execute(
            f"UPDATE {table} SET {column} = REPLACE({column}, ?, ?) WHERE instr({column}, ?)", (old, new, old)
        )
