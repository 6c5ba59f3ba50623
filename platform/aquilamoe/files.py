"""Files that are whole or absent: written atomically, made durable, hashed; and room for them."""

import hashlib
import os
import shutil
from pathlib import Path


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


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(path: Path) -> int:
    """Room on the disk on which `path` is, or will be: that of the nearest folder that exists."""
    existing = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    return shutil.disk_usage(existing).free
