"""What a growth and its certificate take, and what it allows, by dtype and sizes: known without torch or reading."""

from aquilamoe.config.schema import ModelConfig

# What a growth keeps to beside its largest tensor; see the measured table in the documentation.
_FIXED = 256 * 2**20
# Activations are made for so many tokens at once: enough that products run at full speed, few enough that those of the
# widest feed-forward are smaller than its weights. Sequences are not split.
TOKENS_AT_ONCE = 1024
# Logits are made for so many tokens, and so many of the vocabulary, at once: they are read many times, and fit into a
# processor's cache.
LOGIT_ROWS, LOGIT_COLUMNS = 256, 2048
# Rows of an embedding that are looked up at once: each brings its neighbours in the file into memory.
LOOKUPS = 128
# Every layer is compared on so many tokens, if there are as many.
COMPARED_TOKENS = 1024

# What is computed in float32 or float64: a trained model of 30 layers was grown by 1.25 and 1.75 in width, with exact
# norms or padding, by 4/3 in depth, with noise and without; logits differed by up to 3.3e-5 of their spread, layers by
# up to 2.7e-6. Files of fewer bits are measured before they are rounded, so that this holds for them too.
_TOLERANCE, _TOLERANCE_F64 = 1e-3, 1e-6
# By safetensors' name of a dtype, for files whose growth is not known: of the same model, rounding moved logits by up
# to 0.022 of their spread in F16 and 0.11 in BF16, whose weights have 10 and 7 bits.
_FILE_TOLERANCES = {"F16": 0.1, "BF16": 0.5}

# Most standard deviations by which a split moves rows of 16 bits, which keep of the original's what M u leaves.
MOST_IN_16_BITS = 5.0
# A growth that claims nothing is nearly function-preserving within these: nats/token.
NEARLY_KL, NEARLY_LOSS = 0.01, 0.01
# Fewest tokens on which that is measured: of most tokens a split changes nothing, and few decide its KL and its shares.
NEARLY_TOKENS = 2048

# Bytes of a file that come into memory with a page that is looked at.
_AROUND = 2**16
# Copies of a stream that a block holds at once: before and behind each half, normalised, and its experts' share.
_STREAMS = 8
# Of the activations inside a feed-forward or an attention, the same.
_ACTIVATIONS = 5
# Allocators keep some freed memory; matrix libraries load their code and allocate workspaces.
_ALLOCATOR, _LIBRARIES = 1.5, 2**26
# Blocks of rows that are computed again, to be compared with files that are rounded.
_COMPUTED_AGAIN = 2**23


def default_tolerance(dtype: str) -> float:
    """The `tolerance` of a certificate by the weights' dtype (F64, F32, F16, BF16): that of what they are computed in.

    Several times what rounding in the computation was measured to do, and a fraction of what a fault does: a layer may
    be off by an eighth of it, and one that computes anything else is off by about 1.
    """
    return _TOLERANCE_F64 if dtype == "F64" else _TOLERANCE


def file_tolerance(dtype: str) -> float:
    """The same for a target whose growth is not known, so that a fault cannot be distinguished from rounding."""
    return _FILE_TOLERANCES.get(dtype, default_tolerance(dtype))


def growth_bytes(largest: int) -> int:
    """Most memory that a growth takes, over that of the libraries; `largest` are the bytes of a tensor."""
    return _FIXED + 2 * largest


def calibration_bytes(model: ModelConfig, sequences: int, sequence_length: int, item_bytes: int = 4) -> int:
    """Most memory that finding the directions of a split takes, over that of a process that has imported torch."""
    tokens, hidden = sequences * sequence_length, model.hidden_size
    search = (_STREAMS + 4) * tokens * hidden + 4 * hidden**2 + 4 * tokens * model.num_experts
    return (
        int(_ALLOCATOR * item_bytes * (search + _part(model, sequence_length, item_bytes) // item_bytes)) + _LIBRARIES
    )


def certificate_bytes(
    source: ModelConfig, target: ModelConfig, sequences: int, sequence_length: int, item_bytes: int = 4
) -> int:
    """Most memory that a certificate takes, over that of a process that has imported torch; weights are not all of it.

    sequences, sequence_length: of the tokens on which it is made. item_bytes: of the dtype of the computation.
    """
    tokens = sequences * sequence_length
    compared = min(tokens, max(COMPARED_TOKENS, sequence_length))
    streams = 2 * tokens * source.hidden_size + _STREAMS * (tokens + compared) * target.hidden_size
    rooms = [_part(model, sequence_length, item_bytes) for model in (source, target)]
    return int(_ALLOCATOR * (streams * item_bytes + max(rooms))) + _COMPUTED_AGAIN + _LIBRARIES


def _part(model: ModelConfig, sequence_length: int, item_bytes: int) -> int:
    """The largest of what is read at once, as read and as computed with, and the activations around it."""
    hidden = model.hidden_size
    q, kv = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    rows = max(TOKENS_AT_ONCE, sequence_length)
    attention = 2 * hidden * (q + kv) + hidden * q + _ACTIVATIONS * rows * (q + 2 * kv)
    neurons = max(
        model.intermediate_size if model.num_sparse_layers < model.num_hidden_layers else 0,
        model.moe_intermediate_size,
        model.shared_expert_intermediate_size,
    )
    feed_forward = 4 * hidden * neurons + _ACTIVATIONS * TOKENS_AT_ONCE * neurons
    scored = 4 * TOKENS_AT_ONCE * model.num_experts
    logits = 2 * (LOGIT_ROWS + hidden) * LOGIT_COLUMNS + 6 * LOGIT_ROWS * LOGIT_COLUMNS
    looked_up = LOOKUPS * (2 * hidden + _AROUND // item_bytes)
    return item_bytes * max(attention, feed_forward + scored, logits, looked_up)
