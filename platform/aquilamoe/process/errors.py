"""What the operating system refuses, in one line, whichever library met it: a full disk, a missing right, no memory."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aquilamoe.config.messages import UserError, one_line
from aquilamoe.files import free_bytes
from aquilamoe.format import size

# The error of a full disk does not name the disk.
OF_DISKS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO),
}
# What trying again, on another machine or later, does not change.
LASTING = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.ELOOP),
}
READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}

_ROOM = "make room there, or write to another disk, and run again"
_RIGHTS = "allow this user to write there, or name another place, and run again"
_ANOTHER = "move what is there, or name another place"
_DISK = "check the disk and its server (`dmesg`), then run again"
_LIMIT = "raise the limit (`ulimit -n 65536`), and run again"
_MEMORY = "end other programs, or reduce the sizes, and run again"
REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EEXIST: _ANOTHER,
    errno.ENOTDIR: _ANOTHER,
    errno.EISDIR: _ANOTHER,
    errno.ENOTEMPTY: _ANOTHER,
    errno.ELOOP: _ANOTHER,
    errno.ENAMETOOLONG: "use shorter names",
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ENODEV: _DISK,
    errno.ENXIO: _DISK,
    errno.EMFILE: _LIMIT,
    errno.ENFILE: _LIMIT,
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _MEMORY,
}
# Libraries in other languages raise errors of their own, with a number or with the system's words in their text.
_NUMBER = re.compile(r"\(os error (\d+)\)|\berrno:? (\d+)\b", re.IGNORECASE)
_WORDS = {
    **{os.strerror(number).lower(): number for number in (*OF_DISKS, errno.EMFILE, errno.ENOMEM)},
    "database or disk is full": errno.ENOSPC,
    "attempt to write a readonly database": errno.EROFS,
}


def described(error: BaseException) -> str | None:
    """`<path>: <what is wrong>; <what to do>` for an error of the system, None for any other."""
    found = of_system(error)
    if found is None:
        return "memory: this process cannot allocate more; " + _MEMORY if isinstance(error, MemoryError) else None
    remedy = REMEDIES.get(found.errno or 0, "fix the cause, then run again")
    paths = [str(path) for path in (found.filename, found.filename2) if path is not None]
    return f"{': '.join([*paths[:1], _reason(found)])}; {remedy}"


def of_system(error: BaseException | None) -> OSError | None:
    """The error of the system that this is, wraps, or names in its text."""
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError):
            return error
        if isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
            continue
        text = " ".join(str(error).split())
        if (number := _number(text)) is not None:
            return OSError(number, os.strerror(number))
        error = error.__cause__
    return None


@contextmanager
def at(path: Path) -> Iterator[None]:
    """Name the path in errors of disks that name none, and make those of libraries errors of the system."""
    try:
        yield
    except Exception as error:
        found = of_system(error)
        if found is None or found.errno not in OF_DISKS or found.filename is not None:
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error


def _number(text: str) -> int | None:
    if found := _NUMBER.search(text):
        return int(found[1] or found[2])
    return next((number for words, number in _WORDS.items() if words in text.lower()), None)


def _reason(error: OSError) -> str:
    reason = error.strerror or one_line(error)
    if not isinstance(error.filename, str | bytes):
        return reason
    path = Path(os.fsdecode(error.filename))
    with suppress(OSError):
        if error.errno in (errno.EEXIST, errno.ENOENT) and path.is_symlink():
            return f"is a link to {path.readlink()}, which does not exist"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{reason}, {size(free_bytes(path))} are free"
    return reason
