"""Processes that tests start, and all that those start. Others get the numbers of ended ones: psutil knows."""

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress

from psutil import STATUS_ZOMBIE, NoSuchProcess, Process

from waiting import PATIENCE_S, POLL_S

# Of raylets. They outlive these by a minute, in which their last word to a server that has ended waits for an answer.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def descendants(pid: int | None = None) -> set[Process]:
    """What this process has started, or the one of this number, and what those have."""
    with suppress(NoSuchProcess):
        return set(Process(pid).children(recursive=True))
    return set()


def of(pids: Iterable[int]) -> Iterator[Process]:
    """Those of these that still are."""
    for pid in pids:
        with suppress(NoSuchProcess):
            yield Process(pid)


def left(started: Iterable[Process]) -> list[str]:
    """The command lines of those that do not end, however long one waits, but for agents; returns when all have."""
    started, deadline_s = list(started), time.monotonic() + PATIENCE_S
    while (there := [process for process in started if _is_at_work(process)]) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    return [line for process in there if (line := command(process))]


def _is_at_work(process: Process) -> bool:
    with suppress(NoSuchProcess):
        alive = process.is_running() and process.status() != STATUS_ZOMBIE
        return bool(alive and not command(process).startswith(AGENTS))
    return False


def command(process: Process) -> str:
    """Its command line, empty if it has ended."""
    with suppress(NoSuchProcess):
        return " ".join(process.cmdline())
    return ""
