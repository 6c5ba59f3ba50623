"""All outputs beside each other, and what each of them was made from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from aquilamoe.ancestors import ancestors
from aquilamoe.config.messages import UserError
from aquilamoe.files import sha256
from aquilamoe.lineage.artifacts import WEIGHTS, Artifact, read_artifact
from aquilamoe.pipeline.store import RECORD

CONFIG, CARD = "config.json", "README.md"


@dataclass(frozen=True)
class Parent:
    """What an output was made from, in one role; `entry` is None where it is gone, and `problem` is what is wrong."""

    role: str
    stage: str
    fingerprint: str | None
    entry: Artifact | None
    problem: str = ""


@dataclass(frozen=True)
class ArtifactGraph:
    """Complete outputs by directory, and directories whose record is damaged, each with the reason."""

    entries: Mapping[Path, Artifact]
    damaged: Mapping[Path, str]

    def by_fingerprint(self, fingerprint: str) -> Artifact | None:
        found = [entry for entry in self.entries.values() if entry.fingerprint == fingerprint]
        return min(found, key=_age) if found else None

    def of_stage(self, stage: str) -> list[Artifact]:
        """Outputs of a stage, newest first."""
        found = [entry for entry in self.entries.values() if entry.is_stage and entry.stage == stage]
        return sorted(found, key=_age, reverse=True)

    def newest_first(self) -> list[Artifact]:
        """All outputs."""
        return sorted(self.entries.values(), key=_age, reverse=True)

    def with_neighbours(self, entry: Artifact) -> "ArtifactGraph":
        """This library and what lies beside an output: its ancestors, if it is in another store."""
        neighbours = read_graph(entry.directory.parent)
        own = {entry.directory: entry}
        return replace(
            self,
            entries={**neighbours.entries, **self.entries, **own},
            damaged={**neighbours.damaged, **self.damaged},
        )

    def parents(self, entry: Artifact) -> list[Parent]:
        """What an output was made from: checkpoints first."""
        if not entry.is_stage:
            return [self._grown_from(entry, role, name) for role, name in _sources(entry).items()]
        found = [self._parent(role, reference) for role, reference in entry.inputs.items()]
        return sorted(found, key=lambda parent: (parent.role != "source", not (parent.entry and parent.entry.weights)))

    def ancestors(self, entry: Artifact) -> list[Artifact]:
        """Everything that an output was made from, each once, nearest first."""
        known = {entry.directory: entry}

        def parents(directory: Path) -> list[Path]:
            found = [parent.entry for parent in self.parents(known[directory]) if parent.entry is not None]
            known.update({each.directory: each for each in found if each.directory not in known})
            return [each.directory for each in found]

        return [known[directory] for directory in ancestors(entry.directory, parents)]

    def _parent(self, role: str, reference: Mapping[str, str]) -> Parent:
        fingerprint, name = reference["fingerprint"], reference["directory"]
        found = self.by_fingerprint(fingerprint)
        damage = next((reason for path, reason in self.damaged.items() if path.name == name), None)
        problem = "" if found else damage or f"{name} is no longer in the store"
        return Parent(role, reference["stage"], fingerprint, found, problem)

    def _grown_from(self, entry: Artifact, role: str, name: str) -> Parent:
        """A source of a growth by hand: the stage's output whose weights have the bytes that it noted.

        Of another growth by hand no digest of whole files is known; its card, which names its own source and recipe by
        digests, stands for it.
        """
        noted = entry.recipe.get("inputs", {}).get(role, {})
        for other in self.entries.values():
            same_weights = other.weights and all(noted.get(file) == digest for file, digest in other.weights.items())
            if same_weights or (not other.is_stage and _has_card(other.directory, noted)):
                return Parent(role, other.stage, other.fingerprint, other)
        digest = next((noted[file] for file in sorted(noted) if file.endswith(WEIGHTS)), "unknown")
        return Parent(role, name, None, None, f"no output here has its weights (SHA-256 {digest[:12]})")


def _sources(entry: Artifact) -> dict[str, str]:
    """What a growth by hand was made from, names by role: `source`, and of a mix also `source_2` and so on."""
    source = entry.record.get("source", {})
    others = {f"source_{place}": name for place, name in enumerate(source.get("others", ()), start=2)}
    return {"source": source.get("name", "source"), **others}


def read_graph(stages: Path) -> ArtifactGraph:
    """Read every record beside another; what is still growing is left out."""
    entries, damaged = {}, {}
    for path in sorted(stages.glob(f"*/{RECORD}")):
        if path.parent.suffix == ".partial":
            continue
        try:
            entries[path.parent] = read_artifact(path.parent)
        except UserError as error:
            damaged[path.parent] = str(error)
    for path in sorted(stages.glob("*-????????????")):
        if path.is_dir() and path not in entries:
            damaged.setdefault(path, f"{path / RECORD}: is missing")
    return ArtifactGraph(entries, damaged)


def _has_card(directory: Path, noted: Mapping[str, str]) -> bool:
    cards = {name: directory / name for name in (CONFIG, CARD)}
    return all(path.is_file() and noted.get(name) == sha256(path) for name, path in cards.items())


def _age(entry: Artifact) -> str:
    return str(entry.record.get("finished", ""))
