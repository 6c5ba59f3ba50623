"""Whether a head is the embedding: of a file that has both, their bytes decide, as in transformers 5. Torch-free."""

from pathlib import Path

from aquilamoe.weights import names
from aquilamoe.weights.headers import INDEX_FILE, SINGLE_FILE
from aquilamoe.weights.source import Source

PIECE_BYTES = 2**20


def has_own_head(directory: Path) -> bool:
    """Whether the weights have a head that is not the embedding once more; what is read ends at the first difference.

    Older files repeat a tied head. One with other numbers was trained apart from the embedding, whatever
    `tie_word_embeddings` says. UserError for damaged weights; none at all have no head.
    """
    if not any((directory / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
        return False
    with Source(directory) as source:
        if not {names.EMBEDDING, names.HEAD} <= source.tensors.keys():
            return False
        embedding, head = source.info(names.EMBEDDING), source.info(names.HEAD)
        if (embedding.shape, embedding.dtype) != (head.shape, head.dtype):
            return True
        pieces = [memoryview(bytearray(min(PIECE_BYTES, head.num_bytes))) for _ in range(2)]
        for position in range(0, head.num_bytes, PIECE_BYTES):
            ours, theirs = (piece[: head.num_bytes - position] for piece in pieces)
            source.read_into(names.EMBEDDING, position, ours)
            source.read_into(names.HEAD, position, theirs)
            if ours != theirs:
                return True
    return False
