"""Which output a name refers to: by a path, a stage's name, a fingerprint, or the SHA-256 of its weights."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from aquilamoe.config.messages import UserError, nearest
from aquilamoe.config.paths import local
from aquilamoe.lineage.artifacts import Artifact, read_artifact
from aquilamoe.lineage.graph import ArtifactGraph
from aquilamoe.pipeline.store import RECORD

SHOWN_DIGITS = 12
WAYS = "give a stage, a directory, a fingerprint, or a SHA-256 prefix"


def find(library: ArtifactGraph, expected: Mapping[str, str], text: str, latest: bool = False) -> Artifact:
    """The output that `text` names; UserError, one line, for none or several.

    expected: fingerprints of the experiment's stages, by name. latest: of a stage without an output as it is configured
    now, take the newest that there is.
    """
    if text in expected:
        return _of_stage(library, text, expected[text], latest)
    path = local(text)
    if path.exists() or os.sep in text:
        return _at(path)
    for directory, entry in library.entries.items():
        if directory.name == text:
            return entry
    for directory, reason in library.damaged.items():
        if text == directory.name or (len(text) >= 4 and directory.name.rpartition("-")[2].startswith(text)):
            raise UserError(reason)
    return _by_prefix(library, expected, text)


def _of_stage(library: ArtifactGraph, stage: str, fingerprint: str, latest: bool) -> Artifact:
    found = library.by_fingerprint(fingerprint)
    if found is not None:
        return found
    for directory, reason in library.damaged.items():
        if directory.name.endswith(f"-{fingerprint}"):
            raise UserError(reason)
    others = library.of_stage(stage)
    if others and latest:
        return others[0]
    there = f"there {'are' if len(others) > 1 else 'is'} {', '.join(other.directory.name for other in others)}"
    raise UserError(
        f"{stage}: has no output as it is configured now ({fingerprint}); run it first"
        + (f" ({there}; action=why shows the differences)" if others else "")
    )


def _at(path: Path) -> Artifact:
    """The output that a path leads to: its directory, or something in it."""
    if not path.exists():
        raise UserError(f"{path}: does not exist; {WAYS}")
    where = path.resolve()
    if ".partial" in (part[-8:] for part in where.parts):
        raise UserError(f"{path}: is not complete; the command that started it resumes it")
    inside = [where, *where.parents][: 3 if where.is_dir() else 4]
    directory = next((each for each in inside if (each / RECORD).is_file()), None)
    if directory is None:
        raise UserError(f"{path}: has no {RECORD}; without it, how the output was made is unknown")
    return read_artifact(directory)


def _by_prefix(library: ArtifactGraph, expected: Mapping[str, str], text: str) -> Artifact:
    """By the first digits of a fingerprint or of a SHA-256 of weights: of one file, or of all shards together."""
    if not re.fullmatch("[0-9a-fA-F]{4,64}", text):
        raise UserError(f"{text}: no such output; {WAYS}; {nearest(text, expected)}")
    digits = text.lower()
    found: dict[str, list[Artifact]] = {}
    for entry in library.entries.values():
        for identity in {entry.fingerprint, *entry.weights.values(), entry.weights_sha256 or entry.fingerprint}:
            if identity.startswith(digits):
                found.setdefault(identity, []).append(entry)
    if not found:
        raise UserError(f"{text}: no fingerprint and no SHA-256 of weights begins with this; {WAYS}")
    candidates = {entry.directory: entry for entries in found.values() for entry in entries}
    if len(candidates) > 1 and len(found) > 1:
        named = [f"{identity[:SHOWN_DIGITS]} ({entries[0].directory.name})" for identity, entries in found.items()]
        raise UserError(f"{text}: is the beginning of {' and of '.join(sorted(named))}; give more digits")
    # The same bytes under several names: the first that had them.
    return min(candidates.values(), key=lambda entry: str(entry.record.get("finished", "")))
