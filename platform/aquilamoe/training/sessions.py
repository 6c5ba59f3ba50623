"""The folders of Ray sessions that this process starts: they are removed when it ends, but for logs that it names."""

import atexit
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aquilamoe.config.messages import UserError, one_line

LATEST, MACHINES = "session_latest", "prom_metrics_service_discovery.json"  # what Ray keeps beside sessions
REMOVE_S = 2.0  # for processes of the session that write their last lines
_LOW_MEMORY = re.compile(r"running low on memory|due to memory pressure")
_USED = re.compile(r"was ([\d.]+) ?GB(?: used)? / ([\d.]+) ?GB")

_started: list[Path] = []  # sessions of this process
_kept: set[Path] = set()


@contextmanager
def removed_at_exit(folder: Path) -> Iterator[None]:
    """Around the start of a session below this folder. UserError where it does not start."""
    before = set(_sessions(folder))
    if not _started:
        atexit.register(_remove_all, os.getpid())  # before Ray registers its own end, so that this comes after it
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        made = set(_sessions(folder)) - before
        logs = f"see {min(made) / 'logs'}, " if made else ""
        raise UserError(f"Ray: no session starts on this machine ({_first(error)}); {logs}and run again") from error
    _started.extend(path for path in _sessions(folder) if path not in before and path.name.endswith(f"_{os.getpid()}"))


def lost(name: str, what: str, error: BaseException) -> UserError:
    """The line for a stage whose workers Ray has lost. what: e.g. `worker 1`."""
    text = str(error)
    again = "the same command resumes from the last checkpoint"
    if _LOW_MEMORY.search(text) or type(error).__name__.startswith("OutOfMemory"):
        used = _USED.search(text)
        amount = f"{used[1]} of {used[2]} GB of the machine were in use" if used else "the machine has no more"
        return UserError(
            f"stage {name}: {what} was ended for memory: {amount}; reduce cluster.micro_batch_tokens or "
            f"cluster.workers, or end other programs; {again}"
        )
    _kept.update(_started)
    logs = f"see {_started[-1] / 'logs'}" if _started else "see the logs of the Ray cluster"
    return UserError(f"stage {name}: {what} was lost ({_first(error)}); {logs}; {again}")


def gone(process: str) -> UserError:
    """The line for a session that one of Ray's own processes no longer holds together."""
    _kept.update(_started)
    logs = f"see {_started[-1] / 'logs'}; " if _started else ""
    return UserError(f"Ray: its process {process} has ended, and with it the session; {logs}the same command resumes")


def _first(error: BaseException) -> str:
    """The message of an error, on one line that is not too long."""
    return one_line(error)[:300]


def _sessions(folder: Path) -> list[Path]:
    return [path for path in folder.glob("session_*") if not path.is_symlink()]


def _remove_all(owner: int) -> None:
    if os.getpid() != owner:
        return
    if ray := sys.modules.get("ray"):
        ray.shutdown()
    for session in _started:
        if session not in _kept:
            _remove(session)


def _remove(session: Path) -> None:
    """Remove a session's folder, and what Ray keeps beside sessions if this was the last."""
    end = time.monotonic() + REMOVE_S
    while session.exists() and time.monotonic() < end:
        shutil.rmtree(session, ignore_errors=True)
    folder = session.parent
    with suppress(OSError):
        if (folder / LATEST).is_symlink() and not (folder / LATEST).exists():
            (folder / LATEST).unlink()
        if not _sessions(folder):
            (folder / MACHINES).unlink(missing_ok=True)
            folder.rmdir()  # unless something else is there
