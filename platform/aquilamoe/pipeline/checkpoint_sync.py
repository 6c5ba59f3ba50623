"""Checkpoints of a stage in progress on the remote, so that another machine can resume it.

While a stage trains, its newest complete checkpoint is copied to `progress/<fingerprint>/`, with what lies beside it
(the points that were measured, how often the stage was started); the copies before it go. It is fetched where the stage
runs next, if there is no checkpoint there. Training does not wait for any of it.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from aquilamoe.config.messages import UserError
from aquilamoe.config.paths import contents
from aquilamoe.pipeline.remote import Record, Remote, UnwantedError
from aquilamoe.pipeline.store import SCRATCH

if TYPE_CHECKING:
    from aquilamoe.pipeline.attempts import Attempts

COMPLETE = f"{SCRATCH}/step-*"  # a checkpoint gets such a name when all of it is on the disk
ATTEMPTS = "attempts.json"
POLL_S = 1.0
log = logging.getLogger(__name__)


def place_of(fingerprint: str) -> str:
    return f"progress/{fingerprint}"


def newest(remote: Remote, fingerprint: str) -> str | None:
    """The newest checkpoint that the remote has of an unfinished stage, by its name."""
    return next((name for name, _ in remote.saved(place_of(fingerprint))), None)


class CheckpointSync:
    """One unfinished stage in its directory, and what the remote has of it."""

    def __init__(self, remote: Remote, partial: Path, fingerprint: str, attempts: "Attempts") -> None:
        self.remote = remote
        self.partial = partial
        self.place = place_of(fingerprint)
        self.attempts = attempts
        self._copied: str | None = None
        self._ended = Event()

    def fetch(self) -> None:
        """Bring the newest checkpoint of the remote here, if there is none here. One that is damaged is passed over."""
        if any(self.partial.glob(COMPLETE)):
            return
        for name, record in self.remote.saved(self.place):
            try:
                self._restore(name, record)
            except UserError as error:
                log.warning("%s: is passed over for the checkpoint before it, if there is one: %s", name, error)
            else:
                self._copied = name
                return

    def _restore(self, name: str, record: Record) -> None:
        growing = self.partial.with_name(f"{self.partial.stem}.fetched.partial")
        self.remote.restore(f"{self.place}/{name}", record, growing)
        shutil.rmtree(self.partial, ignore_errors=True)  # without a checkpoint it is worth less
        if (found := growing / ATTEMPTS).is_file():
            self.attempts.path.parent.mkdir(parents=True, exist_ok=True)
            alive = (growing / SCRATCH / name).stat().st_mtime
            found.replace(self.attempts.path)
            os.utime(self.attempts.path, (alive, alive))
        growing.rename(self.partial)

    @contextmanager
    def follow(self) -> Iterator[None]:
        """Copy every checkpoint that is written meanwhile, unless a newer one comes before its turn."""
        thread = Thread(target=self._work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()

    def _work(self) -> None:
        warned = False
        while not self._ended.wait(POLL_S):
            found = max(self.partial.glob(COMPLETE), default=None)
            if found is None or found.name == self._copied:
                continue
            try:
                self.copy(found)
            except UnwantedError:
                return
            except UserError as error:
                if found.exists() and not warned:  # else training has removed it for a newer one
                    log.warning("%s: the next checkpoint will be tried again; training goes on", error)
                    warned = True

    def copy(self, checkpoint: Path) -> None:
        """Copy a checkpoint and what lies beside it; then remove the ones before. UserError if that fails."""
        paths = [path for path in [*contents(checkpoint), *self.partial.glob("[!.]*")] if path.is_file()]
        files = {str(path.relative_to(self.partial)): path for path in paths}
        if self.attempts.path.is_file():
            files[ATTEMPTS] = self.attempts.path
        self.remote.save(f"{self.place}/{checkpoint.name}", files, lambda: not self._ended.is_set())
        self._copied = checkpoint.name
        for name, _ in self.remote.saved(self.place):
            if name < checkpoint.name:
                self.remote.remove(f"{self.place}/{name}")

    def forget(self) -> None:
        """The stage is finished: nothing resumes from its checkpoints. Those that cannot be removed only take space."""
        try:
            self.remote.remove(self.place)
        except UserError as error:
            log.warning("%s: %s stays there; the stage is finished, remove it when you can", error, self.place)
