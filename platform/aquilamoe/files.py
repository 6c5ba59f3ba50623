"""Files that are whole or absent: written atomically, made durable, hashed; and room for them."""

import os
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
