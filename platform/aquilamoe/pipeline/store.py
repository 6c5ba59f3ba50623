"""Where outputs live: `<stage>-<fingerprint>/`, complete or absent, each with a record of how it was made."""

import fcntl
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TextIO, cast

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import PathsConfig
from aquilamoe.pipeline.remote import RECORD, Record, Remote

METRICS = "metrics.jsonl"
SCRATCH = "checkpoints"  # what only an unfinished stage needs: no part of its output
LOCK_ATTEMPTS, LOCK_WAIT_S = 4, 0.05


class Store:
    """A directory of stage outputs.

    An output grows in `<stage>-<fingerprint>.partial/`, which is also where an interrupted stage resumes, and is
    renamed when it is complete. `record.json`, with the SHA-256 of every other file, is written last. With a remote,
    what is complete is copied there, and what another machine has copied there is fetched.
    """

    def __init__(self, root: Path, remote: Remote | None = None) -> None:
        self.root, self.remote = root, remote
        self.stages = root / "stages"

    @classmethod
    def of(cls, paths: PathsConfig) -> Self:
        """As it is configured."""
        return cls(Path(paths.root).absolute(), Remote(paths.remote) if paths.remote else None)

    def directory(self, stage: str, fingerprint: str) -> Path:
        return self.stages / f"{stage}-{fingerprint}"

    def partial(self, stage: str, fingerprint: str) -> Path:
        return self.stages / f"{stage}-{fingerprint}.partial"

    def find(self, stage: str, fingerprint: str) -> tuple[Path, Record] | None:
        """The complete output of a recipe, whatever name made it; UserError if files differ from the record."""
        named = self.directory(stage, fingerprint)
        others = [path for path in self.stages.glob(f"*-{fingerprint}") if path != named]
        for path in [named, *others]:
            if path.is_dir():
                record = _read_record(path)
                _check_sizes(path, record)
                return path, record
        return None

    def fetch(self, stage: str, fingerprint: str) -> tuple[Path, Record] | None:
        """The output of a recipe from the remote, here from now on; None without a remote, or without the output."""
        target = self.directory(stage, fingerprint)
        self.stages.mkdir(parents=True, exist_ok=True)
        record = self.remote.fetch(fingerprint, target) if self.remote else None
        return (target, record) if record else None

    def push(self, directory: Path, record: Record) -> None:
        """Copy a complete output to the remote, if there is one and it has it not."""
        if self.remote:
            self.remote.push(directory, record)

    def history(self, stage: str | None = None) -> list[Record]:
        """Records of all complete outputs (of one stage), newest first."""
        paths = [path for path in self.stages.glob(f"{stage or ''}*/{RECORD}") if path.parent.suffix != ".partial"]
        records = [_read_record(path.parent) for path in paths]
        own = [record for record in records if stage in (None, record["stage"])]
        return sorted(own, key=lambda record: str(record["finished"]), reverse=True)

    def publish(self, partial: Path, record: Record) -> Record:
        """Hash every file, write the record, make all durable, rename: the output exists from this moment, whole."""
        not_kept = (RECORD, temporary(partial / RECORD).name, SCRATCH)
        everything = sorted(partial.rglob("*"))
        kept = [path for path in everything if path.relative_to(partial).parts[0] not in not_kept]
        files = [path for path in kept if path.is_file()]
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(_digest_and_sync, files))
        for directory in (path for path in kept if path.is_dir()):
            _sync_directory(directory)
        record = {
            **record,
            "files": {
                str(path.relative_to(partial)): {"sha256": digest, "bytes": path.stat().st_size}
                for path, digest in zip(files, digests, strict=True)
            },
        }
        write_atomically(partial / RECORD, to_json(record, partial.stem))
        self._rename(partial)
        return record

    def finish_publishing(self, partial: Path) -> Record | None:
        """Publish what was complete when its run was killed, between the record and the name; None if it was not."""
        if not (partial / RECORD).is_file():
            return None
        record = _read_record(partial)
        self._rename(partial)
        return record

    def _rename(self, partial: Path) -> None:
        _sync_directory(partial)
        # Only now: a run killed while its files were hashed resumes from its checkpoints.
        shutil.rmtree(partial / SCRATCH, ignore_errors=True)
        partial.rename(partial.with_suffix(""))
        _sync_directory(self.stages)

    def discard(self, partial: Path) -> None:
        """Remove what an interrupted stage left, for stages that start anew."""
        if partial.exists():
            shutil.rmtree(partial)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one driver; the kernel lets go when the process ends, however it ends."""
        self.stages.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a+") as file:
            if not _locked(file):
                raise UserError(
                    f"{self.root}: in use by {self.holder() or 'another run'}; wait for it, "
                    "or give this run a directory of its own with paths.root=DIR"
                )
            file.truncate(0)
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            command = " ".join(" ".join(sys.argv).split())
            file.write(f"process {os.getpid()} since {started} ({command[:200]})")
            file.flush()
            yield
            file.truncate(0)

    @contextmanager
    def stage_lock(self, fingerprint: str) -> Iterator[None]:
        """Wait until no other process of this driver works on a recipe, and keep it so."""
        path = self.root / "locks" / fingerprint
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def holder(self) -> str | None:
        """Who holds the lock, as text, or None when nobody does."""
        path = self.root / ".lock"
        if not path.exists():
            return None
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read() or "another run"
        return None


def _locked(file: TextIO) -> bool:
    """Take the lock unless another run has it. Who asks for the holder has it for a moment: that is not a run."""
    for _ in range(LOCK_ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_WAIT_S)
        else:
            return True
    return False


def to_json(values: Mapping[str, Any], what: str) -> str:
    """The text of a record, which every reader of JSON can parse; UserError, naming the key, for NaN and infinity.

    what: whose record it is, for the message.
    """
    for key, value in _numbers(values):
        if not math.isfinite(value):
            raise UserError(
                f"{what}: {key} is {value}, which is no measurement and no JSON; look for weights, or a step, whose "
                "numbers became too large"
            )
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every float inside, by where it is: `certificate.layers.3`."""
    if isinstance(value, float):
        yield key, value
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, each in inner:
        yield from _numbers(each, f"{key}.{name}" if key else str(name))


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new, never a part."""
    unfinished = temporary(path)
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def temporary(path: Path) -> Path:
    """What a file is called until all of it is written; a process that is killed may leave it."""
    return path.with_name(f".{path.name}.tmp")


def read_points(path: Path) -> list[dict[str, Any]]:
    """The points of a metrics.jsonl; a half-written last line is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _read_record(path: Path) -> Record:
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path / RECORD}: cannot be read ({error}); remove {path} and run again to rebuild it"
        ) from None
    return cast(Record, record)


def _check_sizes(path: Path, record: Record) -> None:
    for name, expected in record["files"].items():
        file = path / name
        actual = file.stat().st_size if file.exists() else None
        if actual != expected["bytes"]:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise UserError(
                f"{file}: {found}, its record says {expected['bytes']} bytes; remove {path} and run again to rebuild it"
            )


def _digest_and_sync(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
