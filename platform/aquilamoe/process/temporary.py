"""Temporary files of a run, and of all that it starts, are in a folder of its own, which goes when the run ends.

Libraries leave behind what is not needed: folders of multiprocessing, caches that are empty. A killed run leaves its
folder to the next one, which removes those whose lock is free.
"""

import atexit
import getpass
import math
import os
import pwd
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from aquilamoe.config.messages import UserError
from aquilamoe.files import take_lock

PREFIX, LOCK = "efficientscale-", ".lock-of-efficientscale"
# Sockets have paths of 107 bytes at most. Longest are those of Ray's sessions and those of multiprocessing in a folder
# of ours, which together with a slash add up to 72 bytes to this.
SHORT = 35
ELSEWHERE = (Path("/tmp"), Path("/dev/shm"), Path("/var/tmp"))

_lock: TextIO | None = None


def use(short: bool = False, keep_compiled: bool = False) -> None:
    """Have this process, and all that it starts, put temporary files into a folder that goes with it.

    short: with a path that sockets may have. keep_compiled: torch.compile's cache stays where it is, for runs to come.
    """
    global _lock
    if _lock is not None:
        return
    place = for_sockets() if short else Path(tempfile.gettempdir())
    for left in place.glob(f"{PREFIX}*"):
        _remove_left(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    _lock = (folder / LOCK).open("w")
    take_lock(_lock, math.inf)
    atexit.register(_remove, folder, os.getpid())
    os.environ.setdefault("RAY_TMPDIR", str(place))  # where other sessions of Ray are found
    if keep_compiled:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(place / f"torchinductor_{getpass.getuser()}"))
    if not os.access(Path.home(), os.W_OK):
        os.environ.setdefault("MPLCONFIGDIR", str(folder / "matplotlib"))
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def for_sockets() -> Path:
    """A folder for temporary files whose path is short enough for sockets in it; from now on the one of this process.

    UserError where there is none.
    """
    place = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    if len(os.fsencode(place)) <= SHORT and os.access(place, os.W_OK):
        return place
    found = next((other for other in ELSEWHERE if os.access(other, os.W_OK | os.X_OK)), None)
    if found is None:
        raise UserError(
            f"TMPDIR: {place} has {len(os.fsencode(place))} bytes, sockets in it allow {SHORT}, and neither "
            f"{' nor '.join(map(str, ELSEWHERE))} can be written; set TMPDIR to a shorter path"
        )
    os.environ["RAY_TMPDIR"] = os.environ["TMPDIR"] = tempfile.tempdir = str(found)
    return found


def name_user() -> None:
    """Give a user without a name, as containers have them, the one that libraries look for."""
    with suppress(KeyError):
        pwd.getpwuid(os.getuid())
        return
    os.environ.setdefault("USER", f"uid-{os.getuid()}")
    os.environ.setdefault("HOME", "/nonexistent")  # as Debian writes it: who needs a home is refused


def _remove_left(folder: Path) -> None:
    """Remove a folder that a killed run has left: one that has our lock, which is free."""
    with suppress(OSError), (folder / LOCK).open("r+") as lock:
        if take_lock(lock, 0.0):
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        if _lock is not None:
            _lock.close()
