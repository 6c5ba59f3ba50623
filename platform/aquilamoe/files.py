"""Files and directories that are whole or absent: written atomically, made durable, hashed, locked; and free space."""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TextIO

POLL_S = 0.05


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part.

    A symbolic link in its place is replaced: nothing is written where it leads.
    """
    unfinished = temporary(path)
    unfinished.unlink(missing_ok=True)
    with unfinished.open("xb") as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def temporary(path: Path) -> Path:
    """What a file is called until all of it is written; a process that is killed may leave it."""
    return path.with_name(f".{path.name}.tmp")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable; of a file, its bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def complete(directory: Path, content: Iterable[Path], record: Path, text: str) -> None:
    """Make what is in a directory durable, and only then write the record that states it: from now on it is complete.

    Args:
        directory: that grows under a name of its own until `give_name`.
        content: its files and directories.
        record: file in it.
        text: of the record.
    """
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(sync_directory, content):
            pass
    write_atomically(record, text)
    sync_directory(directory)


def give_name(directory: Path, name: Path) -> None:
    """Rename what is complete: the name exists from this moment, with all that belongs to it.

    Raises:
        OSError: something else has the name.
    """
    sync_directory(directory)
    directory.rename(name)
    sync_directory(name.parent)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_lock(file: IO[Any], wait_s: float) -> bool:
    """Lock an open file for its holder alone; the kernel releases it when the file is closed or the process ends.

    Args:
        file: an open file. Only over NFS it has to be open for writing.
        wait_s: seconds to wait for another holder; `math.inf` waits without end.

    Returns:
        Whether the file is locked; False where another process, or another open file of this one, still holds it.

    Raises:
        OSError: the file system has no locks.
    """
    from filelock import lock_descriptor  # as slow to import as a plan is to print

    deadline = time.monotonic() + wait_s
    while not lock_descriptor(file.fileno(), blocking=False):
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)
    return True


def sign_lock(file: TextIO, more: str = "") -> None:
    """Write into a locked file which process holds it, for the message of another that finds it locked."""
    file.truncate(0)
    file.write(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}{more}")
    file.flush()


def lock_holder(path: Path) -> str | None:
    """What the holder of a lock file wrote into it; None if it is free, or if the file system has no locks.

    The lock is taken for a moment to find out, since locks that can be shared are not portable: who locks waits for
    `POLL_S` at least.
    """
    try:
        file = path.open("r+" if os.access(path, os.W_OK) else "r")
    except FileNotFoundError:
        return None
    with file:
        try:
            return None if take_lock(file, POLL_S) else file.read() or "another run"
        except OSError:  # a file system without locks
            return None


def free_bytes(path: Path) -> int:
    """Room on the disk on which `path` is, or will be: that of the nearest folder that exists."""
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    return shutil.disk_usage(existing).free
