"""Waiting for other threads and processes: until something holds, and never for a time."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")

PATIENCE_S = 600.0  # for what never comes; no test passes or fails by it on a slow machine
POLL_S = 0.01


def until(poll: Callable[[], Found], by: "subprocess.Popen[str] | subprocess.Popen[bytes] | None" = None) -> Found:
    """Wait until `poll` returns something true, and return it.

    Args:
        poll: is called again and again.
        by: the process that is to bring it about; if it ends before, the test has failed.
    """
    deadline_s = time.monotonic() + PATIENCE_S
    while not (result := poll()):
        assert by is None or by.poll() is None or poll(), f"ended before, with status {by.returncode}"
        assert time.monotonic() < deadline_s, "it did not happen"
        time.sleep(POLL_S)
    return result
