"""The store of outputs: `<stage>-<fingerprint>/`, complete or absent, each with a record of how it was made."""

import math
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from aquilamoe.config.messages import UserError, without_passwords
from aquilamoe.config.paths import contents, local
from aquilamoe.config.points import METRICS, note, read_points
from aquilamoe.config.schema import PathsConfig
from aquilamoe.files import complete, give_name, lock_holder, sign_lock, take_lock, temporary, write_atomically
from aquilamoe.pipeline import integrity, records
from aquilamoe.pipeline.records import RECORD, Record, to_json
from aquilamoe.pipeline.remote import Remote

__all__ = ["METRICS", "RECORD", "SCRATCH", "Record", "Store", "read_points", "temporary", "to_json", "write_atomically"]
SCRATCH = "checkpoints"  # what only an unfinished stage needs: no part of its output
LOCK_WAIT_S = 0.15  # the moments in which other processes look for its holder


class Store:
    """A directory of stage outputs.

    An output grows in `<stage>-<fingerprint>.partial/`, which is also where an interrupted stage resumes, and is
    renamed when it is complete. `record.json`, with the SHA-256 of every other file, is written last. With a remote,
    complete outputs are copied there, and those that another machine has copied there are fetched.
    """

    def __init__(self, root: Path, remote: Remote | None = None) -> None:
        self.root, self.remote = root, remote
        self.stages = root / "stages"

    @classmethod
    def of(cls, paths: PathsConfig) -> Self:
        """The store at the configured paths."""
        return cls(local(paths.root).absolute(), Remote(paths.remote) if paths.remote else None)

    def directory(self, stage: str, fingerprint: str) -> Path:
        return self.stages / f"{stage}-{fingerprint}"

    def partial(self, stage: str, fingerprint: str) -> Path:
        return self.stages / f"{stage}-{fingerprint}.partial"

    def find(self, stage: str, fingerprint: str) -> tuple[Path, Record] | None:
        """The complete output of a recipe, whatever its stage was called.

        Checks the sizes of its files; callers that read them check their bytes, too: see `integrity.check`.

        Args:
            stage: name of the stage, looked up first.
            fingerprint: of the recipe.

        Returns:
            Its directory and record; None if the store has no such output.

        Raises:
            UserError: the record is another recipe's, or a file has not the recorded size in bytes.
        """
        named = self.directory(stage, fingerprint)
        others = [path for path in self.stages.glob(f"*-{fingerprint}") if path != named]
        for path in [named, *others]:
            if path.is_dir():
                record = records.read(path)
                if record["fingerprint"] != fingerprint:
                    raise UserError(
                        f"{path / RECORD}: is of {record['fingerprint']}, the directory is {path.name}; remove {path} "
                        "and run again to rebuild it"
                    )
                integrity.check_sizes(path, record)
                return path, record
        return None

    def fetch(self, stage: str, fingerprint: str) -> tuple[Path, Record] | None:
        """Copy the output of a recipe from the remote into this store.

        Returns:
            Its directory and record; None without a remote, or where the remote lacks the output.

        Raises:
            UserError: the remote cannot be read, or a file does not match its record.
        """
        target = self.directory(stage, fingerprint)
        self.stages.mkdir(parents=True, exist_ok=True)
        record = self.remote.fetch(fingerprint, target) if self.remote else None
        return (target, record) if record else None

    def push(self, directory: Path, record: Record) -> None:
        """Copy a complete output to the remote, if there is one that lacks it."""
        if self.remote:
            self.remote.push(directory, record)

    def history(self, stage: str | None = None) -> list[Record]:
        """Records of all complete outputs (of one stage), newest first; damaged ones are ignored with a note."""
        found = []
        for path in self.stages.glob(f"{stage or ''}*/{RECORD}"):
            if path.parent.suffix == ".partial":
                continue
            try:
                record = records.read(path.parent)
            except UserError as error:
                note(f"{error} (it is ignored)")
                continue
            if "stage" in record and stage in (None, record["stage"]):
                found.append(record)
        return sorted(found, key=lambda record: str(record["finished"]), reverse=True)

    def publish(self, partial: Path, record: Record) -> Record:
        """Hash every file, write the record, make all durable, rename: the output is complete from then on.

        Args:
            partial: directory of the stage's files, `<stage>-<fingerprint>.partial`.
            record: how the output was made, without `files`.

        Returns:
            The record as it was written, with SHA-256 and bytes of every file.
        """
        not_kept = (RECORD, temporary(partial / RECORD).name, SCRATCH)
        everything = contents(partial)
        kept = [path for path in everything if path.relative_to(partial).parts[0] not in not_kept]
        files = [path for path in kept if path.is_file()]
        with ThreadPoolExecutor() as pool:
            entries = list(pool.map(integrity.entry, files))
        names = [str(path.relative_to(partial)) for path in files]
        sealed = records.seal({**record, "files": dict(zip(names, entries, strict=True))}, partial.stem)
        complete(partial, kept, partial / RECORD, sealed)
        published = records.read(partial)
        self._rename(partial)
        return published

    def finish_publishing(self, partial: Path) -> Record | None:
        """Publish an output whose run was killed between record and rename; None if it is incomplete."""
        if not self.is_complete(partial):
            return None
        record = records.read(partial)
        self._rename(partial)
        return record

    def is_complete(self, partial: Path) -> bool:
        """Whether an output only has to be renamed. A damaged record counts as none."""
        if not (partial / RECORD).is_file():
            return False
        try:
            integrity.check_sizes(partial, records.read(partial))
        except UserError as error:
            note(f"{error} (the stage is taken for unfinished)")
            return False
        return True

    def _rename(self, partial: Path) -> None:
        # Only now: a run killed while its files were hashed resumes from its checkpoints.
        shutil.rmtree(partial / SCRATCH, ignore_errors=True)
        give_name(partial, partial.with_suffix(""))

    def discard(self, partial: Path) -> None:
        """Remove what an interrupted stage left, for stages that start from the beginning."""
        if partial.exists():
            shutil.rmtree(partial)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the store for one driver; the kernel releases it when the process ends, however it ends.

        Raises:
            UserError: another run holds it.
        """
        self.stages.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a+") as file:
            if not take_lock(file, LOCK_WAIT_S):
                raise UserError(
                    f"{self.root}: in use by {self.holder() or 'another run'}; wait for it, "
                    "or give this run a directory of its own with paths.root=DIR"
                )
            command = without_passwords(" ".join(" ".join(sys.argv).split()))
            sign_lock(file, f" ({command[:200]})")
            yield
            file.truncate(0)

    @contextmanager
    def stage_lock(self, fingerprint: str) -> Iterator[None]:
        """Wait until no other process of this driver works on a recipe, and keep it so."""
        path = self.root / "locks" / fingerprint
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            take_lock(file, math.inf)
            yield

    def holder(self) -> str | None:
        """The holder of the lock, as text; None if it is free."""
        return lock_holder(self.root / ".lock")
