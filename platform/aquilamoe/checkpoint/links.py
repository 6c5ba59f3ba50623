"""Symbolic links in a checkpoint: followed inside it and into a hub cache's `blobs/`, nowhere else.

What is read from a checkpoint ends up in its outputs, and may be published: a link in a downloaded archive must not
bring a file of this machine there. Caches of the hub consist of links: `snapshots/<revision>/config.json` leads to
`../../blobs/<digest>`.
"""

import os
from pathlib import Path

from aquilamoe.config.messages import UserError

SNAPSHOTS, BLOBS = "snapshots", "blobs"


def check(path: Path, checkpoint: Path) -> None:
    """UserError, naming link and target, where `path` in the directory `checkpoint` is led out of it by a link."""
    problem = outside(path, checkpoint)
    if problem is not None:
        raise UserError(
            f"{path}: {problem}; put the file itself there, or download the checkpoint again with huggingface_hub"
        )


def outside(path: Path, checkpoint: Path) -> str | None:
    """Why a path in a checkpoint is not followed; None for what is inside it, also where nothing is."""
    home = Path(os.path.realpath(checkpoint))
    # The checkpoint is what the user named, by whatever links; what is inside it came with it.
    place = home / os.path.relpath(path, checkpoint)
    try:
        end = place.resolve(strict=True)
    except FileNotFoundError:
        return f"is a link to {_target(place)}, which is not there" if _has_link(place, home) else None
    except (OSError, RuntimeError):  # links in a circle
        return f"is a link to {_target(place)}, which leads nowhere"
    if end.is_relative_to(home) or _is_blob(end, home):
        return None
    return f"is a link to {end}, outside of the checkpoint"


def _is_blob(end: Path, home: Path) -> bool:
    """Whether a file is among the blobs of the hub cache that has `home` as a snapshot."""
    return home.parent.name == SNAPSHOTS and end.parent == home.parent.parent / BLOBS and end.is_file()


def _has_link(place: Path, home: Path) -> bool:
    return any(part.is_symlink() for part in (place, *place.parents) if part.is_relative_to(home) and part != home)


def _target(place: Path) -> str:
    return str(place.readlink()) if place.is_symlink() else str(place)
