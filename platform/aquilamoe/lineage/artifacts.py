"""What is known of an output: its record, read as it is, whichever tool wrote it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from aquilamoe.pipeline import records
from aquilamoe.pipeline.fingerprint import Recipe
from aquilamoe.pipeline.records import Record

WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Artifact:
    """A complete output and its record.

    directory: where it is; of the growth tool that is the checkpoint itself, of a stage the checkpoint is in `model/`.
    """

    directory: Path
    record: Record

    @property
    def is_stage(self) -> bool:
        """Whether a stage of a pipeline made it, and not the growth tool."""
        return "stage" in self.record

    @property
    def stage(self) -> str:
        """The stage's name; of a growth by hand the directory's."""
        return str(self.record.get("stage", self.directory.name))

    @property
    def fingerprint(self) -> str:
        return str(self.record["fingerprint"])

    @property
    def recipe(self) -> Recipe:
        return cast(Recipe, self.record["recipe"])

    @property
    def kind(self) -> str:
        return str(self.recipe["kind"])

    @property
    def inputs(self) -> dict[str, dict[str, str]]:
        """Outputs that it was made from, by role: stage, fingerprint, directory. Nothing for a growth by hand."""
        return cast(dict[str, dict[str, str]], self.record.get("inputs", {}))

    @property
    def metrics(self) -> dict[str, Any]:
        """What its stage measured; of a growth by hand its sizes and its certificate."""
        if self.is_stage:
            return cast(dict[str, Any], self.record["metrics"])
        sizes = {key: self.record.get(key) for key in ("params_total", "params_active", "preserving")}
        return {**sizes, **(self.record.get("certificate") or {})}

    @property
    def files(self) -> dict[str, tuple[int, str | None]]:
        """Bytes and SHA-256 of every file; the growth tool notes the SHA-256 of tensors instead, see `tensors`."""
        entries = self.record["files"].items()
        return {name: (at["bytes"], at["sha256"]) if isinstance(at, dict) else (at, None) for name, at in entries}

    @property
    def tensors(self) -> dict[str, str]:
        """SHA-256 by tensor, where the growth tool made it."""
        return cast(dict[str, str], self.record.get("tensors", {}))

    @property
    def weights(self) -> dict[str, str]:
        """SHA-256 of the files of its checkpoint's weights, by their names in the checkpoint."""
        return {
            Path(name).name: digest
            for name, (_, digest) in self.files.items()
            if digest and name.startswith("model/") and name.endswith(WEIGHTS)
        }

    @property
    def weights_sha256(self) -> str | None:
        return weights_sha256(self.weights) if self.weights else None


def weights_sha256(digests: Mapping[str, str]) -> str:
    """Of one weight file its SHA-256; of shards that of what `sha256sum *.safetensors` prints in their directory."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_artifact(directory: Path) -> Artifact:
    """The output in a directory; UserError when its record is missing, damaged, or of something else."""
    return Artifact(directory, records.read(directory))
