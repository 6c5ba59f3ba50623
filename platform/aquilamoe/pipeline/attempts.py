"""How often a stage was started, and for how long it ran each time - also when it was killed.

`<root>/attempts/<stage>-<fingerprint>.json` lists the attempts. While one runs, its driver touches the file: the time
of the last touch is when it was last alive. The record takes the sum over, and the file goes.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aquilamoe.config.points import is_number, note
from aquilamoe.pipeline.cost import Cost, Rates

FOLDER = "attempts"


@dataclass(frozen=True)
class Attempt:
    """started: seconds since 1970. seconds: how long it ran, None for the last one, which may run still."""

    started: float
    seconds: float | None
    rates: Rates

    def cost(self, seconds: float) -> Cost:
        return self.rates.cost(seconds if self.seconds is None else self.seconds)


def _attempt(entry: dict[str, Any]) -> Attempt:
    """An entry of the file; ValueError, TypeError or KeyError for an invalid one."""
    attempt = Attempt(entry["started"], entry["seconds"], Rates(**entry["rates"]))
    figures = [attempt.started, *asdict(attempt.rates).values()]
    if not all(map(is_number, [*figures, *([] if attempt.seconds is None else [attempt.seconds])])):
        raise ValueError("an attempt that is none")
    return attempt


class Attempts:
    """The attempts at one recipe, in a file."""

    def __init__(self, root: Path, output: str) -> None:
        self.path = root / FOLDER / f"{output}.json"

    def read(self) -> list[Attempt]:
        """All attempts since the stage was last complete, the last as it was started."""
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
            return [_attempt(each) for each in entries]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:  # e.g. its machine went down
            note(f"{self.path}: cannot be read ({' '.join(str(error).split())}); earlier attempts are not counted")
            return []

    def last_alive(self) -> float | None:
        """When the driver of the last attempt last recorded a heartbeat (seconds since 1970)."""
        with suppress(FileNotFoundError):
            return self.path.stat().st_mtime
        return None

    def begin(self, rates: Rates) -> None:
        """Note that an attempt starts now; the one before ended when it was last alive."""
        ended = [
            Attempt(each.started, max(0.0, (self.last_alive() or each.started) - each.started), each.rates)
            if each.seconds is None
            else each
            for each in self.read()
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps([asdict(each) for each in [*ended, Attempt(time.time(), None, rates)]]))
        temporary.replace(self.path)

    def touch(self) -> None:
        """Record a heartbeat of the attempt."""
        with suppress(OSError):
            os.utime(self.path)

    def cost(self, seconds: float) -> Cost:
        """Of all attempts, the last of which took `seconds`."""
        return sum((each.cost(seconds) for each in self.read()), Cost())

    def forget(self) -> None:
        """The record has them."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.parent.rmdir()
