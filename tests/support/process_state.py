"""The process in which tests run, and what programs that they run in it change: signals, streams, logs, places."""

import logging
import os
import random
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquilamoe.process import interruption

PLACES = ("TMPDIR", "RAY_TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR")
# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
HANDLERS = {number: signal.getsignal(number) for number in interruption.HANDLED}


@dataclass(frozen=True)
class ProcessState:
    """What is put back after a test, and after a fixture that several tests share."""

    folder: str
    places: Mapping[str, str | None]
    temporary: str | None
    streams: tuple[Any, Any, Any, Any]
    handlers: tuple[logging.Handler, ...]
    raises_of_logs: bool
    disabled: frozenset[str]

    @classmethod
    def now(cls) -> "ProcessState":
        return cls(
            str(Path.cwd()),
            {name: os.environ.get(name) for name in PLACES},
            tempfile.tempdir,
            (sys.stdin, sys.stdout, sys.stderr, sys.unraisablehook),
            tuple(logging.root.handlers),
            logging.raiseExceptions,
            frozenset(logger.name for logger in _loggers() if logger.disabled),
        )

    def restore(self) -> None:
        """Put everything back; no signal counts as received, and pytest handles them."""
        for number, handler in HANDLERS.items():
            signal.signal(number, handler)
        interruption._received.clear()
        interruption._is_ending = False
        os.chdir(self.folder)
        for name, place in self.places.items():
            os.environ.pop(name, None)
            os.environ |= {} if place is None else {name: place}
        tempfile.tempdir = self.temporary
        sys.stdin, sys.stdout, sys.stderr, sys.unraisablehook = self.streams
        logging.root.handlers[:] = self.handlers
        logging.raiseExceptions = self.raises_of_logs
        for logger in _loggers():
            logger.disabled = logger.name in self.disabled  # logging.config disables those that it does not name


def _loggers() -> list[logging.Logger]:
    return [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]


def begin() -> None:
    """Draw the same numbers, on one thread, whatever other tests have drawn and set."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
