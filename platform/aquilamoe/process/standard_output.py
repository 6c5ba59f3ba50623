"""Standard output that may be lost - a full disk, a reader that has gone - without what is computed being lost."""

import logging
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from aquilamoe.config.passwords import without_passwords

GOES_ON = "the command continues without it"


class Masked:
    """A stream on which no password of the configuration appears, whichever library writes it."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(without_passwords(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Output(Masked):
    """A stream whose first failure is reported on standard error; what is written later goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.is_lost = False

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.is_lost = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.stream.fileno())  # also what the stream still holds
        os.close(nowhere)
        reason = "its reader has closed it" if isinstance(error, BrokenPipeError) else error.strerror
        print(f"error: standard output: {reason}; {GOES_ON}", file=sys.stderr)


def guard() -> None:
    """Have standard output be such a stream, and nowhere if the caller has closed it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    if not isinstance(sys.stdout, Output):
        sys.stdout = Output(sys.stdout)
    if not isinstance(sys.stderr, Masked):
        sys.stderr = Masked(sys.stderr)
    logging.raiseExceptions = False  # a log that cannot be written is not worth a traceback for each of its lines


def is_lost() -> bool:
    """Whether there is no reader any more, after all has been written."""
    sys.stdout.flush()
    return isinstance(sys.stdout, Output) and sys.stdout.is_lost
