"""Where the progress of a growth is shown: a terminal, or nowhere."""

import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, Self

from aquilamoe.growth.tool.request import CheckpointFiles
from aquilamoe.process import interruption


class Step(Protocol):
    """One step of the work, while it runs."""

    @property
    def seconds(self) -> float:
        """Since it began."""
        ...

    def update(self, done: int, total: int) -> None:
        """How far it is."""
        ...

    def end(self, text: str) -> None:
        """What stays to be read of it."""
        ...


class Reporter(Protocol):
    """Receives progress events. Nothing of the engine prints."""

    def step(self, name: str, unit: str, total_bytes: int = 0) -> AbstractContextManager[Step]:
        """A step begins. total_bytes: what it writes, for a rate."""
        ...

    def note(self, step: str, text: str) -> None:
        """A step that needs no work."""
        ...

    def cached(self, target: Path) -> None:
        """The target is complete, by this very recipe."""
        ...

    def comparing(self, source: CheckpointFiles, target: CheckpointFiles) -> None:
        """Two checkpoints are about to be compared."""
        ...


class Silent:
    """A reporter for callers that need results and no output."""

    def step(self, name: str, unit: str, total_bytes: int = 0) -> "SilentStep":  # noqa: ARG002
        return SilentStep()

    def note(self, step: str, text: str) -> None:
        pass

    def cached(self, target: Path) -> None:
        pass

    def comparing(self, source: CheckpointFiles, target: CheckpointFiles) -> None:
        pass


class SilentStep:
    """A step that is not shown; a signal ends it as well."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def update(self, done: int, total: int) -> None:  # noqa: ARG002
        interruption.check()

    def end(self, text: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass
