"""Token files for tests that train: documents written at once, as the stage writes them in parts."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from aquilamoe.data.tokens import bin_file, token_dtype, write_ids, write_index


def write_token_file(prefix: Path, vocab_size: int, documents: Iterable[np.ndarray]) -> tuple[int, int]:
    """Write `.bin` and `.idx` of documents (1-D integers with their end); return how many tokens, and documents."""
    with tempfile.TemporaryFile(dir=prefix.parent) as lengths:
        with bin_file(prefix).open("wb") as out:
            tokens, count = write_ids(out, lengths, vocab_size, documents)
        lengths.seek(0)
        write_index(prefix, lengths, count, token_dtype(vocab_size))
    return tokens, count
