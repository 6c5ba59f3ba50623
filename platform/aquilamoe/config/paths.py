"""Paths as a user types them, in a configuration or on a command line."""

import os
from pathlib import Path
from typing import NoReturn

from aquilamoe.config.messages import UserError


def local(text: str) -> Path:
    """A path of this machine: `~` is the home folder, wherever a path is typed; UserError for an unknown user's.

    Records, cards and pages are UTF-8 and name the path: one that is not would fail when all the work is done.
    """
    if "\0" in text or (not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)):
        raise UserError(f"{text}: is not UTF-8, which names of files have to be here; rename it")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no home folder for it; write the whole path, or ./{text}") from None


def shown(path: Path) -> str:
    """A path as messages print it: relative to the working directory where it is inside."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def contents(directory: Path) -> list[Path]:
    """All files and directories inside, in order; unlike `rglob`, it raises what the system refuses to list."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    walked = os.walk(directory, onerror=refuse)
    return sorted(Path(folder, name) for folder, folders, files in walked for name in (*folders, *files))
