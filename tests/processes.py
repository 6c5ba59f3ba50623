"""Processes that tests start, and all that those start. Others get the numbers of ended ones: psutil knows."""

import time
from collections.abc import Iterable
from contextlib import suppress

from psutil import STATUS_ZOMBIE, NoSuchProcess, Process


def descendants(pid: int | None = None) -> set[Process]:
    """What this process has started, or the one of this number, and what those have."""
    with suppress(NoSuchProcess):
        return set(Process(pid).children(recursive=True))
    return set()


def left_after(seconds: float, started: Iterable[Process]) -> list[str]:
    """The command lines of those that are still there so long from now; returns as soon as none is."""
    deadline = time.monotonic() + seconds
    while (left := [process for process in started if _is_running(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [said for process in left if (said := command(process))]


def _is_running(process: Process) -> bool:
    with suppress(NoSuchProcess):
        return bool(process.is_running() and process.status() != STATUS_ZOMBIE)
    return False


def command(process: Process) -> str:
    """Its command line, empty if it has ended."""
    with suppress(NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
