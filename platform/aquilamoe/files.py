"""Files that are whole or absent: written atomically, made durable, hashed; and room for them."""

import hashlib
import os
import shutil
from pathlib import Path


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
