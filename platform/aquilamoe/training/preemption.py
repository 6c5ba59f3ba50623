"""Whether this worker has got a preemption notice, so that it can save before it does."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE_S = 20.0  # from SIGTERM to the end of a worker that is at work; Kubernetes kills after 30
SIGTERM_STATUS = 128 + signal.SIGTERM

_due = threading.Event()
_reported = threading.Event()
_busy = threading.Event()


def listen() -> None:
    """Let SIGTERM during work mean: save, and end `GRACE_S` later. Main thread only.

    A second SIGTERM, or one while there is nothing to save, does what it did before.
    """
    before = signal.getsignal(signal.SIGTERM)

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        if _busy.is_set() and not _reported.is_set():
            notify()
            end = threading.Timer(GRACE_S, os._exit, (SIGTERM_STATUS,))
            end.daemon = True
            end.start()
        elif callable(before):
            before(number, frame)
        else:
            os._exit(SIGTERM_STATUS)

    signal.signal(signal.SIGTERM, on_sigterm)


def notify() -> None:
    """This process will end soon."""
    _reported.set()
    _due.set()


def is_due() -> bool:
    """Whether to save now: once for every preemption notice of this process. It costs nothing to call at every step."""
    due = _due.is_set()
    if due:
        _due.clear()
    return due


@contextmanager
def at_work() -> Iterator[None]:
    """While there is something that would be lost."""
    _busy.set()
    try:
        yield
    finally:
        _busy.clear()
