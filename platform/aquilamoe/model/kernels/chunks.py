"""Into how large chunks the head's loss is divided: known to what computes it and to what plans its memory."""

# Bytes of a chunk's float32 logits. A CPU keeps such a chunk in its cache, and its C library keeps the buffer: one of
# tens of MB is mapped and zeroed page by page at every step where training runs in a thread. An accelerator needs
# large products.
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 1 << 30}
# Every chunk reads the head and adds to its gradient, which few tokens would not pay for.
FEWEST_ROWS = 256


def chunk_rows(num_rows: int, vocab_size: int, device_type: str) -> int:
    """Tokens of a chunk: within CHUNK_BYTES, but for FEWEST_ROWS, and about equal chunks, whose products repeat."""
    most = max(FEWEST_ROWS, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))
    return -(-num_rows // -(-num_rows // most))
