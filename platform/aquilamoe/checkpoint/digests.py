"""SHA-256 of a checkpoint's files, computed once: a file of the same size and time of change is not read again.

What was found is kept in a small JSON file, by the checkpoint's path: one that has been removed since is still known.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquilamoe.files import sha256, write_atomically

HASHED_AT_ONCE = 4


@dataclass(frozen=True)
class KnownCheckpoint:
    """What is noted of a checkpoint.

    Attributes:
        files: SHA-256 in hexadecimal, by name in the checkpoint's directory.
        stamps: size in bytes and time of the last change in nanoseconds, by name, when the file was hashed.
        facts: whatever else was found, as JSON holds it.
    """

    files: Mapping[str, str]
    stamps: Mapping[str, Sequence[int]]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class DigestCache:
    """The file in which digests are kept; one that cannot be read or written only costs time.

    Attributes:
        path: of the file.
    """

    path: Path

    def find(self, directory: Path) -> KnownCheckpoint | None:
        """What was noted of a checkpoint last, whether or not it is still there."""
        entry = self._read().get(str(directory))
        try:
            return KnownCheckpoint(**entry) if isinstance(entry, dict) and all(map(_is_map, entry.values())) else None
        except TypeError:
            return None

    def look(self, directory: Path, files: Sequence[Path]) -> KnownCheckpoint:
        """The digests of files in `directory`; those that have changed, or are new, are read. Nothing is noted."""
        stamps = {str(path.relative_to(directory)): _stamp(path) for path in files}
        found = self.find(directory) or KnownCheckpoint({}, {}, {})
        known = {name: found.files[name] for name in found.files if stamps.get(name) == found.stamps.get(name)}
        unread = [name for name in stamps if name not in known]
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            read = dict(zip(unread, pool.map(lambda name: sha256(directory / name), unread), strict=True))
        return KnownCheckpoint({name: read[name] if name in read else known[name] for name in stamps}, stamps, {})

    def note(self, directory: Path, checkpoint: KnownCheckpoint) -> None:
        """Keep what is known of a checkpoint; nothing is written where nothing is new."""
        entry = {"files": dict(checkpoint.files), "stamps": dict(checkpoint.stamps), "facts": dict(checkpoint.facts)}
        everything = self._read()
        if everything.get(str(directory)) != entry:
            with suppress(OSError):  # e.g. a store that may only be read
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self.path, json.dumps({**everything, str(directory): entry}, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return values if isinstance(values, dict) else {}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)
