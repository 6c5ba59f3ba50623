"""Files of a checkpoint in another directory, with the bytes they have now, whatever happens to the originals.

A file system that can (Btrfs, XFS, overlays of these) shares the blocks until one side changes: no time and no room.
Where it cannot, a file that is never written in place gets a second name, a hard link: one that is read-only, and
the blobs of a hub's cache, which are called by their contents. Any other file is copied: a program that saves a
checkpoint there once more writes into the same file, and a link would follow.
"""

import fcntl
import os
import shutil
import stat
from pathlib import Path
from typing import Literal

from aquilamoe.checkpoint.links import BLOBS, SNAPSHOTS

FICLONE = 0x40049409  # of Linux: share the blocks of a file
Placed = Literal["shared", "linked", "copied"]


def place(source: Path, target: Path) -> Placed:
    """Give `target`, which does not exist, the bytes of `source`.

    Args:
        source: a file, or a link to one, which is followed.
        target: a path in a directory that exists.

    Returns:
        How: blocks that are shared, a hard link, or a copy.

    Raises:
        OSError: the file cannot be read, or the disk is full.
    """
    original = source.resolve()
    if _shares_blocks(original, target):
        return "shared"
    if _is_never_written(original):
        try:
            os.link(original, target)
        except OSError:  # another disk, or a file system without links
            pass
        else:
            return "linked"
    shutil.copyfile(original, target)
    return "copied"


def _shares_blocks(original: Path, target: Path) -> bool:
    with original.open("rb") as read, target.open("xb") as written:
        try:
            fcntl.ioctl(written.fileno(), FICLONE, read.fileno())
        except OSError:
            shared = False
        else:
            shared = True
    if not shared:
        target.unlink()
    return shared


def _is_never_written(original: Path) -> bool:
    writable = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
    is_blob = original.parent.name == BLOBS and (original.parent.parent / SNAPSHOTS).is_dir()
    return is_blob or not original.stat().st_mode & writable
