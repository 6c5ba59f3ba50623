"""Whether outputs still match their records: every file is re-hashed."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from aquilamoe.checkpoint import safetensors_header
from aquilamoe.checkpoint.safetensors_header import TensorInfo
from aquilamoe.config.messages import UserError
from aquilamoe.files import sha256
from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.lineage.graph import ArtifactGraph
from aquilamoe.pipeline import integrity
from aquilamoe.pipeline.fingerprint import fingerprint
from aquilamoe.pipeline.integrity import files_sha256
from aquilamoe.pipeline.store import RECORD

BESIDE = frozenset({RECORD, "run.json"})  # what lies beside the files that a record names
BUFFER_BYTES = 8 * 2**20
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Verified:
    """An output whose files were re-hashed; without `problems` it matches its record."""

    entry: Artifact
    files: int
    num_bytes: int
    problems: list[str]


def verify(entry: Artifact, library: ArtifactGraph | None = None) -> Verified:
    """Hash every file of an output and compare it with its record.

    library: if set, what the output was made from has to be in it.
    """
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda item: _file_problem(entry.directory, item[0], *item[1]), entry.files.items())
        problems = [*_record_problems(entry), *filter(None, found)]
        problems += _tensor_problems(entry, pool)
    problems += [f"{name}: is not in its record" for name in _strangers(entry)]
    if library and entry.is_stage:
        problems += _parent_problems(entry, library)
    return Verified(entry, len(entry.files), sum(size for size, _ in entry.files.values()), problems)


def check_unchanged(entry: Artifact, reader: str) -> None:
    """UserError, one line, if a checkpoint does not match its record. reader: what is going to read it."""
    if entry.is_stage:
        integrity.check(entry.directory, entry.record, reader)
    elif sum(size for size, _ in entry.files.values()) <= integrity.WHOLE_BYTES:
        problems = verify(entry).problems
        if problems:
            raise UserError(
                f"{entry.directory / problems[0]}, and {reader} does not read it; restore it or grow it again"
            )


def _record_problems(entry: Artifact) -> Iterator[str]:
    """Whether the record agrees with itself: recipe, fingerprint, name and inputs."""
    computed = fingerprint(entry.recipe)
    if computed != entry.fingerprint:
        yield f"{RECORD}: its recipe has the fingerprint {computed}, the record states {entry.fingerprint}"
    if entry.is_stage:
        if entry.directory.name.rpartition("-")[2] != entry.fingerprint:
            yield f"{RECORD}: is of {entry.fingerprint}, the directory is {entry.directory.name}"
        if {role: each["fingerprint"] for role, each in entry.inputs.items()} != entry.recipe["inputs"]:
            yield f"{RECORD}: names other inputs than its recipe"


def _parent_problems(entry: Artifact, library: ArtifactGraph) -> Iterator[str]:
    """Whether what the output was made from is there, and has the bytes that it was made from."""
    for parent in library.parents(entry):
        made_from = f"{RECORD}: was made from {parent.stage} {parent.fingerprint}"
        if parent.entry is None:
            yield f"{made_from}; {parent.problem}"
            continue
        reference = entry.inputs[parent.role]
        # Of several outputs of one recipe, in stores beside each other, the one that it names.
        read = library.entries.get(entry.directory.parent / reference["directory"], parent.entry)
        noted, found = reference.get("sha256"), files_sha256(read.record)
        if noted is not None and noted != found:
            yield f"{made_from} when its files had SHA-256 {noted[:SHOWN_DIGITS]}, now {found[:SHOWN_DIGITS]}"


def _file_problem(directory: Path, name: str, size: int, digest: str | None) -> str | None:
    try:
        actual = (directory / name).stat().st_size
        if actual != size:
            return f"{name}: has {actual:,} bytes, its record states {size:,}"
        found = None if digest is None else sha256(directory / name)
    except FileNotFoundError:
        return f"{name}: is missing"
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"
    return None if found == digest else _other_bytes(name, found, digest)


def _other_bytes(name: str, digest: str | None, noted: str | None) -> str:
    return f"{name}: has SHA-256 {str(digest)[:SHOWN_DIGITS]}, its record states {str(noted)[:SHOWN_DIGITS]}"


def _tensor_problems(entry: Artifact, pool: ThreadPoolExecutor) -> list[str]:
    """Of a growth by hand, which notes the SHA-256 of every tensor."""
    if not entry.tensors:
        return []
    try:
        tensors = safetensors_header.read(entry.directory)
    except UserError as error:
        return [str(error)]
    missing = [f"{name}: the tensor is missing" for name in entry.tensors.keys() - tensors.keys()]
    known = [name for name in entry.tensors if name in tensors]
    found = pool.map(lambda name: _tensor_sha256(entry.directory, tensors[name]), known)
    pairs = zip(known, found, strict=True)
    return missing + [_other_bytes(name, has, entry.tensors[name]) for name, has in pairs if has != entry.tensors[name]]


def _tensor_sha256(directory: Path, tensor: TensorInfo) -> str:
    digest, left = hashlib.sha256(), tensor.num_bytes
    with (directory / tensor.file).open("rb") as file:
        file.seek(tensor.start)
        while left and (block := file.read(min(left, BUFFER_BYTES))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _strangers(entry: Artifact) -> list[str]:
    """Files in the directory that the record does not name."""
    inside = (path for path in entry.directory.rglob("*") if path.is_file())
    names = {str(path.relative_to(entry.directory)) for path in inside}
    return sorted(names - BESIDE - entry.files.keys())
