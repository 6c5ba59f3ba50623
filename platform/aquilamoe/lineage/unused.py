"""What a store holds that nothing refers to any more, and how it goes."""

import re
import shutil
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from aquilamoe.config.paths import contents
from aquilamoe.lineage.graph import ArtifactGraph
from aquilamoe.pipeline.store import Store

# What keeps an output: reports of pipelines, summaries of ablations. They name outputs by their fingerprints.
REFERRING = ("reports/*.stages", "ablations/*/summary.json")
FINGERPRINT = re.compile(r"\b[0-9a-f]{12}\b")
REMOVED = ".removed.partial"  # ends like unfinished work: nothing takes it for an output


@dataclass(frozen=True)
class Unused:
    """A directory of the store that may go.

    Attributes:
        path: the directory.
        bytes: the sizes of its files together.
        reason: why nothing needs it.
    """

    path: Path
    bytes: int
    reason: str


def unused(store: Store, graph: ArtifactGraph, planned: Set[str]) -> list[Unused]:
    """List what no report, no ablation and none of the planned outputs refers to or was made from.

    Damaged outputs are not listed: a newer version may be able to read them.

    Args:
        store: where to look; its remote is not touched.
        graph: all complete outputs of the store.
        planned: fingerprints of the outputs that the present experiment needs or continues.

    Returns:
        The largest first.
    """
    named = planned | _named(store.root)
    kept = {entry.directory for entry in graph.entries.values() if entry.fingerprint in named}
    kept |= {each.directory for directory in kept for each in graph.ancestors(graph.entries[directory])}
    found = [
        _entry(directory, "no report, ablation or stage of this experiment needs it")
        for directory in graph.entries
        if directory not in kept
    ]
    for path in store.stages.glob("*.partial"):
        if path.name.endswith(REMOVED):
            found.append(_entry(path, "left by an interrupted action=clean"))
        elif path.stem.rpartition("-")[2] not in planned:
            found.append(_entry(path, "interrupted, and not continued by this experiment"))
    return sorted(found, key=lambda each: (-each.bytes, each.path))


def remove(output: Unused) -> None:
    """Remove a directory. An interruption leaves nothing that could be taken for an output."""
    path = output.path
    if not path.name.endswith(REMOVED):
        path = path.rename(path.with_name(path.name.removesuffix(".partial") + REMOVED))
    shutil.rmtree(path)


def _named(root: Path) -> set[str]:
    """Fingerprints in the files that keep outputs."""
    return {match for path in _referring(root) for match in FINGERPRINT.findall(path.read_text("utf-8", "replace"))}


def _referring(root: Path) -> Iterator[Path]:
    for pattern in REFERRING:
        yield from root.glob(pattern)


def _entry(path: Path, reason: str) -> Unused:
    files = (file for file in contents(path) if file.is_file())
    return Unused(path, sum(file.stat().st_size for file in files), reason)
