"""Which of all documents of a source have a text that came before, by 64-bit hashes, in bounded memory.

Two different texts have one hash with a chance of one in 10^19 each: among a billion documents, about one in forty that
any document is taken for another.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Hashes that are sorted at a time: 8 bytes each, and about three times that for their order.
SORTED_AT_ONCE = 1 << 24


def first_occurrences(files: Sequence[Path], out: Path) -> np.ndarray:
    """Of each hash in `files` (arrays of uint64, in order) whether it is the first of its value: bool, on the disk.

    out: the file that holds the result, which is mapped into memory. The hashes are taken in turns by their last bits,
    so many at a time that they fit into memory.
    """
    lengths = [np.load(path, mmap_mode="r").size for path in files]
    total = sum(lengths)
    is_first = np.lib.format.open_memmap(out, mode="w+", dtype=bool, shape=(total,))
    is_first[:] = True
    turns = max(1, -(-total // SORTED_AT_ONCE))
    for turn in range(turns):
        hashes = []
        positions = []
        before = 0
        for path, length in zip(files, lengths, strict=True):
            found = np.load(path, mmap_mode="r")
            here = np.flatnonzero(found % turns == turn) if turns > 1 else np.arange(length)
            hashes.append(found[here])
            positions.append(here + before)
            before += length
        _mark(np.concatenate(hashes), np.concatenate(positions), is_first)
    return is_first


def _mark(hashes: np.ndarray, positions: np.ndarray, is_first: np.ndarray) -> None:
    order = np.argsort(hashes, kind="stable")  # equal hashes stay in the order of the documents
    ordered = hashes[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
    is_first[positions[order[again]]] = False
