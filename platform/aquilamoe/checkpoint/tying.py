"""Whether a head is the embedding: of a file that has both, their bytes decide, as in transformers 5. Torch-free."""

from pathlib import Path

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.raw_reader import RawReader
from aquilamoe.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE

PIECE_BYTES = 2**20


def has_own_head(directory: Path) -> bool:
    """Whether the weights have a head that is not the embedding once more; what is read ends at the first difference.

    Older files repeat a tied head. One with other numbers was trained apart from the embedding, whatever
    `tie_word_embeddings` is. UserError for damaged weights; none at all have no head.
    """
    if not any((directory / file).is_file() for file in (SINGLE_FILE, INDEX_FILE)):
        return False
    with RawReader(directory) as source:
        if not {tensor_names.EMBEDDING, tensor_names.HEAD} <= source.tensors.keys():
            return False
        embedding, head = source.info(tensor_names.EMBEDDING), source.info(tensor_names.HEAD)
        if (embedding.shape, embedding.dtype) != (head.shape, head.dtype):
            return True
        pieces = [memoryview(bytearray(min(PIECE_BYTES, head.num_bytes))) for _ in range(2)]
        for position in range(0, head.num_bytes, PIECE_BYTES):
            ours, theirs = (piece[: head.num_bytes - position] for piece in pieces)
            source.read_into(tensor_names.EMBEDDING, position, ours)
            source.read_into(tensor_names.HEAD, position, theirs)
            if ours != theirs:
                return True
    return False
