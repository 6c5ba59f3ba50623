"""Outputs on storage that other machines reach: an S3-compatible one, or a shared file system.

An output is there or it is not, as in the store: its files are copied first and `record.json` last, and a record that
cannot be read is none. What is fetched is compared with the SHA-256 that its record gives each file, before it gets its
name. So it is with what an unfinished stage needs to resume (`checkpoint_sync.py`). Credentials are the environment's
(AWS_ACCESS_KEY_ID, ...) or the machine's, never the configuration's.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.passwords import has_password, login
from aquilamoe.config.paths import local
from aquilamoe.pipeline import records
from aquilamoe.pipeline.records import RECORD, Record

if TYPE_CHECKING:
    from pyarrow import fs

CHUNK_BYTES = 1 << 22
COPIES_AT_ONCE = 4


class Remote:
    """Where outputs are copied to: `s3://bucket/prefix?endpoint_override=host:port&scheme=http`, or a directory."""

    def __init__(self, address: str) -> None:
        self.address = address
        user = login(address)[1] if "://" in address else None
        if user or has_password(address):
            raise UserError(
                "paths.remote: holds a key; leave it out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead"
            )
        self._opened: tuple[fs.FileSystem, str] | None = None

    def __reduce__(self) -> tuple[type["Remote"], tuple[str]]:
        return Remote, (self.address,)  # another process connects itself

    def __str__(self) -> str:
        return self.address.partition("?")[0]

    def push(self, directory: Path, record: Record) -> None:
        """Copy an output, its record last, unless it is there. UserError if the storage does not take it."""
        files, root = self._open()
        target = f"{root}/stages/{directory.name}"
        try:
            if _read_record(files, f"{target}/{RECORD}") is None:
                copied = _upload_all(files, {name: directory / name for name in record["files"]}, target)
                _check_copied(copied, directory, record)
                _upload(files, directory / RECORD, f"{target}/{RECORD}")
        except OSError as error:
            raise self._failed(f"cannot write {directory.name}", error) from None

    def fetch(self, fingerprint: str, target: Path) -> Record | None:
        """Copy the output of a recipe to `target`, which exists afterwards, whole; None if it is not there.

        UserError if the storage does not respond, or a file does not match the record.
        """
        try:
            found = self._look_for(fingerprint)
            if found is None:
                return None
            source, record = found
            # Not the directory in which an interrupted stage resumes; what is in it is not served, either.
            growing = target.with_name(f"{target.name}.fetched.partial")
            self._bring(source, record, growing)
        except OSError as error:
            raise self._failed(f"cannot read the output {fingerprint}", error) from None
        with (growing / RECORD).open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, ensure_ascii=False)  # the text that was read, see `records.seal`
            file.flush()
            os.fsync(file.fileno())
        growing.rename(target)
        return record

    def save(self, place: str, paths: Mapping[str, Path], is_needed: Callable[[], bool]) -> None:
        """Copy files, by the names that they get, and last a record of them. UserError if that fails.

        is_needed: called before every block; a copy not needed any more is left incomplete, without a record.
        """
        files, root = self._open()
        try:
            entries = _upload_all(files, paths, f"{root}/{place}", is_needed)
            with files.open_output_stream(f"{root}/{place}/{RECORD}") as out:
                out.write(json.dumps({"files": entries}).encode())
        except OSError as error:
            raise self._failed(f"cannot write {place}", error) from None

    def saved(self, place: str) -> list[tuple[str, Record]]:
        """What `save` has finished below a place, by the last parts of their places, the last in the alphabet first."""
        from pyarrow import fs

        files, root = self._open()
        try:
            entries = files.get_file_info(fs.FileSelector(f"{root}/{place}", allow_not_found=True))
            names = sorted((entry.base_name for entry in entries), reverse=True)
            found = [(name, _read_saved(files, f"{root}/{place}/{name}/{RECORD}")) for name in names]
        except OSError as error:
            raise self._failed(f"cannot read {place}", error) from None
        return [(name, record) for name, record in found if record is not None]

    def restore(self, place: str, record: Record, target: Path) -> None:
        """Copy what was saved into the directory `target`, which is emptied before. UserError if it is not whole."""
        try:
            self._bring(f"{self._open()[1]}/{place}", record, target)
        except OSError as error:
            raise self._failed(f"cannot read {place}", error) from None

    def remove(self, place: str) -> None:
        """Take away everything below a place, if there is anything."""
        from pyarrow import fs

        files, root = self._open()
        try:
            if files.get_file_info(f"{root}/{place}").type != fs.FileType.NotFound:
                files.delete_dir(f"{root}/{place}")
        except OSError as error:
            raise self._failed(f"cannot remove {place}", error) from None

    def _bring(self, source: str, record: Record, target: Path) -> None:
        """Fill a directory with the files of a record; UserError for one whose bytes are others."""
        files, _ = self._open()
        names = [_checked(name, source) for name in record["files"]]
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
            digests = list(pool.map(lambda name: _download(files, f"{source}/{name}", target / name), names))
        for name, digest in zip(names, digests, strict=True):
            if digest != record["files"][name]["sha256"]:
                raise UserError(
                    f"{self}: {source}/{name} has SHA-256 {digest}, its record states "
                    f"{record['files'][name]['sha256']}; remove {source} there, and run again to compute it"
                )

    def find(self, fingerprint: str) -> tuple[str, Record] | None:
        """The name and the record of an output that is there, whole; nothing is fetched."""
        try:
            found = self._look_for(fingerprint)
        except OSError as error:
            raise self._failed(f"cannot look for the output {fingerprint}", error) from None
        return (PurePosixPath(found[0]).name, found[1]) if found else None

    def _look_for(self, fingerprint: str) -> tuple[str, Record] | None:
        from pyarrow import fs

        files, root = self._open()
        for entry in files.get_file_info(fs.FileSelector(f"{root}/stages", allow_not_found=True)):
            if entry.base_name.endswith(f"-{fingerprint}"):
                record = _read_record(files, f"{entry.path}/{RECORD}")
                if record is not None:
                    return entry.path, record
        return None

    def _open(self) -> "tuple[fs.FileSystem, str]":
        """The file system, and the path in it."""
        if self._opened is None:
            from pyarrow import fs

            if "://" not in self.address:
                self._opened = fs.LocalFileSystem(), str(local(self.address).absolute())
            else:
                try:
                    files, path = fs.FileSystem.from_uri(self.address)
                except (ValueError, OSError) as error:
                    raise self._failed("cannot be opened", error) from None
                self._opened = files, path.rstrip("/")
        return self._opened

    def _failed(self, what: str, error: Exception) -> UserError:
        reason = str(error).strip().partition("\n")[0]
        return UserError(
            f"paths.remote: {self}: {what} ({reason}); check the address, the network and the credentials in the "
            "environment, and run again: nothing is lost"
        )


def _read_record(files: "fs.FileSystem", path: str) -> Record | None:
    """The record of an output, or None where there is none, or one that is damaged."""
    try:
        with files.open_input_stream(path) as stream:
            return records.parse(stream.read())
    except (FileNotFoundError, ValueError):
        return None


def _read_saved(files: "fs.FileSystem", path: str) -> Record | None:
    """What `save` wrote last, or None where there is nothing, or something damaged."""
    try:
        with files.open_input_stream(path) as stream:
            record = json.loads(stream.read())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and records.has_digests(record.get("files")) else None


def _check_copied(copied: Mapping[str, Mapping[str, Any]], directory: Path, record: Record) -> None:
    """UserError for a file that does not match its record: others would fetch it."""
    for name, entry in copied.items():
        if entry["sha256"] != record["files"][name]["sha256"]:
            raise UserError(
                f"{directory / name}: has changed since stage {record['stage']} finished, and is not copied to the "
                f"remote; remove {directory} and run again to rebuild it"
            )


def _checked(name: str, source: str) -> str:
    """A file's name as another machine has written it; refused if it leads out of its directory."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or name in ("", "."):
        raise UserError(f"{source}/{RECORD}: names the file '{name}', which is not inside it; remove {source} there")
    return name


class UnwantedError(Exception):
    """What was being copied is no longer needed."""


def _upload_all(
    files: "fs.FileSystem", paths: Mapping[str, Path], target: str, is_needed: Callable[[], bool] = lambda: True
) -> dict[str, dict[str, Any]]:
    """Copy files under their names; return SHA-256 and size of each, as they were copied."""
    for folder in sorted({str(PurePosixPath(target, name).parent) for name in paths}):
        files.create_dir(folder)
    with ThreadPoolExecutor(COPIES_AT_ONCE) as pool:
        copies = {
            name: pool.submit(_upload, files, path, f"{target}/{name}", is_needed) for name, path in paths.items()
        }
        return {name: copy.result() for name, copy in copies.items()}


def _upload(
    files: "fs.FileSystem", source: Path, target: str, is_needed: Callable[[], bool] = lambda: True
) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as file, files.open_output_stream(target) as out:
        for chunk in _chunks(file):
            if not is_needed():
                raise UnwantedError(target)
            digest.update(chunk)
            size += len(chunk)
            out.write(chunk)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _download(files: "fs.FileSystem", source: str, target: Path) -> str:
    """Copy a file, durably; return its SHA-256."""
    digest = hashlib.sha256()
    target.parent.mkdir(parents=True, exist_ok=True)
    with files.open_input_stream(source) as stream, target.open("wb") as out:
        for chunk in _chunks(stream):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()


def _chunks(stream: Any) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk
