"""Whether a finished output still has the bytes that its record names: checked before a stage or a person reads it.

Outputs of up to `WHOLE_BYTES` are hashed whole. Of a larger one, files that have a `sample` in their record are hashed
in `BLOCKS` blocks at fixed places, which takes a moment whatever their size; `action=verify` always reads every byte.
"""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.points import METRICS
from aquilamoe.files import sha256
from aquilamoe.pipeline import records
from aquilamoe.pipeline.records import RECORD, Record

WHOLE_BYTES = 8_000_000_000
BLOCKS, BLOCK_BYTES = 64, 1 << 20
HASHED_AT_ONCE = 4
SHOWN_DIGITS = 12
OUTPUT = re.compile(".+-[0-9a-f]{12}")  # the name of a stage's directory


def check(directory: Path, record: Record, reader: str, names: Iterable[str] | None = None) -> None:
    """UserError, one line, for the first file that does not match the record.

    reader: what is going to read it. names: the files that are read; None: all.
    """
    files = {name: record["files"][name] for name in (record["files"] if names is None else names)}
    whole = sum(entry["bytes"] for entry in files.values()) <= WHOLE_BYTES
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        found = pool.map(lambda name: _problem(directory / name, files[name], whole), files)
        problem = next(((name, each) for name, each in zip(files, found, strict=True) if each), None)
    if problem is not None:
        raise UserError(
            f"{directory / problem[0]}: {problem[1]} since stage {record['stage']} finished, and {reader} does not "
            f"read it; remove {directory} and run again to rebuild it"
        )


def check_checkpoint(directory: Path, reader: str) -> None:
    """The same of a checkpoint that is given by its path, if it is the output of a stage."""
    where = directory.resolve()
    output = where.parent
    if where.name == "model" and OUTPUT.fullmatch(output.name) and (output / RECORD).is_file():
        check(output, records.read(output), reader)


def check_sizes(directory: Path, record: Record) -> None:
    """UserError, one line, for the first file that is missing or has another size."""
    for name, entry in record["files"].items():
        problem = _size_problem(directory / name, entry["bytes"])
        if problem:
            raise UserError(f"{directory / name}: {problem}; remove {directory} and run again to rebuild it")


def entry(path: Path) -> dict[str, Any]:
    """A record's entry of a file: SHA-256 and bytes; of a large one, the SHA-256 of a sample, too."""
    size = path.stat().st_size
    sampled = {"sample": sample(path)} if size > BLOCKS * BLOCK_BYTES else {}
    return {"sha256": sha256(path), "bytes": size, **sampled}


def sample(path: Path) -> str:
    """SHA-256 of `BLOCKS` blocks of a file, at equal distances, the first and the last among them."""
    digest, last = hashlib.sha256(), path.stat().st_size - BLOCK_BYTES
    with path.open("rb", buffering=0) as file:
        for index in range(BLOCKS):
            file.seek(last * index // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def files_sha256(record: Record) -> str:
    """Of all files together: of the lines that `sha256sum` prints for them by their names, without the curves."""
    entries = sorted((name, entry["sha256"]) for name, entry in record["files"].items() if name != METRICS)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in entries).encode()).hexdigest()


def _problem(path: Path, noted: dict[str, Any], whole: bool) -> str | None:
    if problem := _size_problem(path, noted["bytes"]):
        return problem
    sampled = not whole and "sample" in noted
    try:
        found = sample(path) if sampled else sha256(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    expected = str(noted["sample" if sampled else "sha256"])
    if found == expected:
        return None
    what = "SHA-256 of a sample" if sampled else "SHA-256"
    return f"has changed (its {what} is {found[:SHOWN_DIGITS]}, its record states {expected[:SHOWN_DIGITS]})"


def _size_problem(path: Path, expected: int) -> str | None:
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        return f"is missing, its record states {expected} bytes"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if actual == expected else f"has {actual} bytes, its record states {expected} bytes"
