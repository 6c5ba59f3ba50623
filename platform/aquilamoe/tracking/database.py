"""MLflow's SQLite database as a file: complete or absent, where it locates its artifacts, what it still holds.

MLflow itself makes its tables one after the other in place, and opens no database that was left between two of them.
"""

import errno
import math
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from aquilamoe.files import take_lock

NAME = "mlflow.db"
# Errors that mean that the disk, or another process, is in the way: nothing is wrong with the file.
NOT_ITS_FAULT = ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_READONLY", "SQLITE_IOERR", "SQLITE_CANTOPEN")
COMPANIONS = ("-wal", "-shm", "-journal")  # of SQLite, beside a database
SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?!file:)([^?]*)")


@dataclass
class Repairs:
    """What had to be done to MLflow's data, for messages. replaced: lines. restored: names of what had been deleted."""

    replaced: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        if not self.restored:
            return self.replaced
        more = f" and {len(self.restored) - 1} more" if len(self.restored) > 1 else ""
        restored = f"tracking: {self.restored[0]}{more} had been deleted in MLflow; restored, as this run belongs to it"
        return [*self.replaced, restored]


def database_uri(path: Path) -> str:
    """The URI of a SQLite file, relative if the path is.

    What would mean something else in it is encoded, and then so are slashes: MLflow makes the folder of what it takes
    for a path before it decodes it.
    """
    text = str(path)
    plain = "?" not in text and unquote(text) == text
    return f"sqlite:///{text if plain else quote(text, safe='')}"


def database_file(uri: str) -> Path | None:
    """The file of a SQLite URI, absolute; None for a server."""
    found = SQLITE.match(uri)
    return Path(unquote(found[1])).absolute() if found else None


def prepare(path: Path) -> str | None:
    """Let there be a database that MLflow opens; return a line about one that was moved aside.

    A new one, and the new tables of an older MLflow's, are made under a name of their own, and renamed when complete.
    """
    if path.exists() and _defect(path) is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        defect = _defect(path) if path.exists() else "is absent"  # looked at again: another may have repaired it
        if defect is None:
            return None
        made = path.with_name(f".{path.name}.new")
        try:
            if path.exists() and _upgraded(path, made):
                _replace(path, made)
                return None
            _remove(made)
            _write_tables(made)
            aside = _move_aside(path) if path.exists() else None
            _replace(path, made)
        finally:
            _remove(made)
    return f"tracking: {path} {defect}; it was moved to {aside.name} and is rebuilt from the stages" if aside else None


def runs(path: Path) -> dict[str, bool] | None:
    """The runs of a database, and whether MLflow shows them: neither deleted, nor without their artifacts' folder.

    Read without MLflow, whose import takes seconds. None for what is no database of MLflow.
    """
    query = (
        "SELECT run_uuid, runs.lifecycle_stage, experiments.lifecycle_stage, artifact_uri "
        "FROM runs JOIN experiments USING (experiment_id)"
    )
    try:
        with closing(open_file(path)) as database:
            return {
                run: {own, experiment} == {"active"} and _has_folder(location)
                for run, own, experiment, location in database.execute(query)
            }
    except sqlite3.Error:
        return None


def _has_folder(location: str | None) -> bool:
    folder = local(location or "")
    return folder is None or folder.is_dir()


def local(location: str) -> Path | None:
    """The path of a file URI."""
    return Path(unquote(location.removeprefix("file://"))) if location.startswith("file:///") else None


def open_file(path: Path, mode: str = "ro") -> sqlite3.Connection:
    """A connection to a database that is there; `mode` as in URIs of SQLite."""
    if mode == "ro" and not os.access(path.parent, os.W_OK):  # where SQLite cannot make its companions
        mode = "ro&immutable=1"
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Among processes that make the same database."""
    with path.with_name(f".{path.name}.lock").open("a") as file:
        take_lock(file, math.inf)
        yield


def _engine(path: Path, *pragmas: str) -> Any:
    import sqlalchemy

    def connection() -> sqlite3.Connection:
        opened = sqlite3.connect(path, check_same_thread=False)
        for pragma in pragmas:
            opened.execute(f"PRAGMA {pragma}")
        return opened

    return sqlalchemy.create_engine("sqlite://", creator=connection, poolclass=sqlalchemy.pool.NullPool)


def _defect(path: Path) -> str | None:
    """Why MLflow does not open a database as it is, None if it does."""
    from mlflow.store.db import utils

    if path.stat().st_size == 0:
        return "is empty"
    try:
        with closing(open_file(path)) as database:
            result = database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if result != "ok":
            return f"is damaged ({' '.join(str(result).split())[:80]})"
        engine = _engine(path)
        if not utils._all_tables_exist(engine):
            return "lacks tables of MLflow"
        utils._verify_schema(engine)
    except Exception as error:
        _raise_unless_its_fault(error)
        return f"cannot be opened by MLflow ({' '.join(str(error).split())[:80]})"
    return None


def _upgraded(path: Path, made: Path) -> bool:
    """Whether the tables of an older MLflow became those of this one, in a copy."""
    _remove(made)
    try:
        with closing(open_file(path)) as old, closing(sqlite3.connect(made)) as new:
            known = old.execute("SELECT version_num FROM alembic_version").fetchone()
            if known is None:
                return False
            old.backup(new)
        _write_tables(made)
    except Exception as error:  # SQLite's, SQLAlchemy's, Alembic's and MLflow's
        _raise_unless_its_fault(error)
        if "Can't locate revision" in str(error):
            raise RuntimeError(f"{path.name} was written by a newer MLflow; install that one again") from None
        return False
    return True


def _write_tables(made: Path) -> None:
    """MLflow's tables in a file of ours. It is synced when it is complete, not after each of hundreds of statements."""
    from mlflow.store.db import utils

    engine = _engine(made, "journal_mode=MEMORY", "synchronous=OFF")
    utils._initialize_tables(engine)
    utils._verify_schema(engine)


def _replace(path: Path, made: Path) -> None:
    """Give a complete database its name."""
    with made.open("rb") as file:
        os.fsync(file.fileno())
    if path.exists():
        with closing(open_file(path, "rw")) as old:  # so that nothing of it is left beside it
            old.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for suffix in COMPANIONS:
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    made.replace(path)


def _move_aside(path: Path) -> Path:
    """Rename what is no database, and what SQLite left beside it; nothing is removed."""
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in range(1, 1000))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    for suffix in COMPANIONS:
        with suppress(FileNotFoundError):
            Path(f"{path}{suffix}").rename(f"{aside}{suffix}")
    return aside


def _remove(made: Path) -> None:
    """What a killed process left of one that it was making."""
    for suffix in ("", *COMPANIONS):
        Path(f"{made}{suffix}").unlink(missing_ok=True)


def _raise_unless_its_fault(error: BaseException) -> None:
    """Raise an error again that does not come from what is in the file."""
    cause: BaseException | None = error
    while cause is not None:
        original = getattr(cause, "orig", cause)
        name = str(getattr(original, "sqlite_errorname", ""))
        if name.startswith(NOT_ITS_FAULT) or (isinstance(cause, OSError) and cause.errno != errno.ENOENT):
            raise error
        cause = cause.__cause__ or cause.__context__
