"""Where a target grows: `<target>.partial/`, locked, and renamed when it is whole. Nothing in between is ever seen."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from aquilamoe.config.messages import UserError
from aquilamoe.config.paths import contents
from aquilamoe.files import complete, free_bytes, give_name, sign_lock, take_lock, temporary
from aquilamoe.format import size
from aquilamoe.pipeline import records
from aquilamoe.pipeline.store import RECORD

LOCK = ".lock"
GROWN = ".grown.json"  # the weights are complete: what is missing is their certificate
RUN = "run.json"
ATTEMPTS = 10


class TargetFolder:
    """The directory in which a target grows, held for one process.

    target: where it will be.
    partial: where it is now, beside it.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.partial = partial_of(target)

    def grown(self) -> dict[str, Any] | None:
        """What a run that was cut off during its certificate noted about the weights, if they are all there."""
        try:
            note = records.parse((self.partial / GROWN).read_bytes())
        except (OSError, ValueError):
            return None
        return note if _has_sizes(self.partial, note["files"]) else None

    def note_grown(self, note: dict[str, Any]) -> None:
        """Mark all files but card and record as complete, and note what they are."""
        self._complete(GROWN, note)

    def finished(self) -> dict[str, Any] | None:
        """The record of what was complete when its run was killed, between the record and the name."""
        with suppress(UserError):
            found = record(self.partial)
            return found if found is not None and _has_sizes(self.partial, found["files"]) else None
        return None

    def discard(self) -> None:
        """Remove all that has grown, but not the lock."""
        for path in self.partial.iterdir():
            if path.name == LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def check_space(self, needed: int) -> None:
        """UserError unless the disk has room for `needed` bytes."""
        free = free_bytes(self.partial)
        if needed > free:
            raise UserError(
                f"target: {self.target} needs {size(needed)}, {size(free)} are free on its disk; "
                "make room, or name a target on another disk"
            )

    def publish(self, record: dict[str, Any]) -> None:
        """Write the record, make everything durable, rename: the target exists from this moment, whole."""
        self._complete(RECORD, record)
        self.rename()

    def _complete(self, name: str, content: dict[str, Any]) -> None:
        text = records.seal({**content, "files": sizes(self.partial)}, str(self.target))
        complete(self.partial, contents(self.partial), self.partial / name, text)

    def rename(self) -> None:
        """Give what is complete its name."""
        (self.partial / GROWN).unlink(missing_ok=True)
        try:
            give_name(self.partial, self.target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise _foreign(self.target) from None
        (self.target / LOCK).unlink(missing_ok=True)


def partial_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


@contextmanager
def locked(target: Path) -> Iterator[TargetFolder]:
    """Hold `<target>.partial/` for this process; the kernel lets go when the process ends, however it ends.

    An empty directory is removed at the end. UserError when another run holds it, or when it is not of this tool.
    """
    output = TargetFolder(target)
    with _lock(output.partial) as lock:
        sign_lock(lock)
        try:
            yield output
        finally:
            _remove_empty(output.partial)


def _remove_empty(partial: Path) -> None:
    with suppress(FileNotFoundError):
        if {path.name for path in partial.iterdir()} <= {LOCK}:
            (partial / LOCK).unlink(missing_ok=True)
            partial.rmdir()


def _lock(partial: Path) -> TextIO:
    """The open lock file of the directory, which is made if it is not there."""
    for _ in range(ATTEMPTS):
        _make(partial)
        try:
            lock = (partial / LOCK).open("a+")
        except FileNotFoundError:  # another run removed it meanwhile
            continue
        try:
            is_locked = take_lock(lock, 0.0)
        except OSError:  # a file system without locks
            lock.close()
            _remove_empty(partial)
            raise
        if not is_locked:
            lock.seek(0)
            holder = lock.read() or "another run"
            lock.close()
            raise UserError(f"{partial}: in use by {holder}; wait for it, or name another target")
        if _is_at(lock, partial / LOCK):
            return lock
        lock.close()
    raise UserError(f"{partial}: another run keeps starting and ending there; try again, or name another target")


def _is_at(lock: TextIO, path: Path) -> bool:
    """Whether the locked file still has its name: a run that ends renames or removes it."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _make(partial: Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
        content = [path.name for path in partial.iterdir()]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"target: {partial} cannot be made ({error.strerror}); name another target") from None
    if content and LOCK not in content:
        raise UserError(
            f"{partial}: is where the target grows, and holds something else; move it, or name another target"
        )


def published(target: Path) -> dict[str, Any] | None:
    """The record of a complete target, None where there is none; UserError for what this tool did not make."""
    if not target.exists() and not target.is_symlink():
        return None
    if os.path.ismount(target):
        raise UserError(f"target: {target} is where a disk is mounted and cannot be renamed to; name a directory in it")
    if target.is_dir() and not any(target.iterdir()):
        return None
    found = record(target) if target.is_dir() else None
    if found is None:
        raise _foreign(target)
    for name, expected in found["files"].items():
        file = target / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != expected:
            what = "is missing" if actual is None else f"has {actual} bytes"
            raise UserError(
                f"{file}: {what}, its record states {expected} bytes; remove {target} and run again to rebuild it"
            )
    (target / LOCK).unlink(missing_ok=True)
    return found


def record(directory: Path) -> dict[str, Any] | None:
    """A checkpoint's record, None if it has none of this tool; UserError for one that has been changed."""
    path = directory / RECORD
    if not path.is_file():
        return None
    with suppress(ValueError, RecursionError):  # of this name, but no JSON: that is not for us to judge
        found = json.loads(path.read_bytes())
        if isinstance(found, dict) and "recipe" in found and "stage" not in found:
            return records.read(directory)
    return None


def _foreign(target: Path) -> UserError:
    return UserError(
        f"target: {target} exists and is not a growth by this tool; name a new directory, nothing was changed"
    )


def sizes(directory: Path) -> dict[str, int]:
    """Bytes of every file that belongs to a target; its record and notes on the run do not."""
    inside = (path for path in contents(directory) if path.is_file())
    names = {str(path.relative_to(directory)): path.stat().st_size for path in inside}
    # The last is of a run that was killed while it wrote the record.
    others = (LOCK, GROWN, RECORD, RUN, temporary(directory / RECORD).name)
    return {name: size for name, size in names.items() if name not in others}


def _has_sizes(directory: Path, expected: Any) -> bool:
    if not isinstance(expected, dict):
        return False
    found = sizes(directory)
    return all(found.get(name) == size for name, size in expected.items())
