"""Paths as a user types them, in a configuration or on a command line."""

from pathlib import Path

from aquilamoe.config.messages import UserError


def local(text: str) -> Path:
    """A path of this machine: `~` is the home folder, wherever a path is typed; UserError for one of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{text}: there is no home folder for it; write the whole path, or ./{text}") from None
