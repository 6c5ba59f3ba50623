"""What a forward pass keeps for the backward pass, in bytes, read off `model.py` and `kernels/`.

Sizes of elements: `compute` bytes in products (2 in bf16), `stream` bytes on the residual stream (4 under autocast,
where the embedding is float32, 2 where the weights themselves are bf16), `weights` bytes of parameters that compute.
"""

from dataclasses import dataclass

from aquilamoe.config.network import ModelConfig
from aquilamoe.model.kernels.choice import Kernels

INDEX, FLOAT = 8, 4  # bytes of an index; of what is float32 in any precision
# The explicit attention takes blocks of queries: small ones up to sequences of LONG.
LONG = 512
SHORT_BLOCK = 64
LONG_BLOCK = 128


@dataclass(frozen=True)
class Precision:
    """Bytes of an element, by what it is; `casts` is whether products cast float32 weights, and keep the casts."""

    weights: int
    compute: int
    stream: int
    casts: bool


PRECISIONS = {
    "fp32": Precision(weights=4, compute=4, stream=4, casts=False),
    "bf16": Precision(weights=4, compute=2, stream=4, casts=True),
    "bf16_master": Precision(weights=2, compute=2, stream=2, casts=False),
}


@dataclass(frozen=True)
class Pass:
    """A forward pass of one device: `rows` sequences of `length` tokens on "cpu" or "cuda"."""

    rows: int
    length: int
    device: str
    precision: Precision
    kernels: Kernels

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def layer_bytes(model: ModelConfig, layer: int, run: Pass) -> int:
    """What one layer keeps of a pass, casts of weights included."""
    stream, compute = run.precision.stream, run.precision.compute
    # Both norms keep their inputs, which are the residual stream before and after attention, and a scale a token.
    norms = 2 * (stream * model.hidden_size + FLOAT)
    kept = (
        norms + _attention(model, layer, run) + compute * model.hidden_size
    )  # the first norm's output, which q, k, v read
    kept += _experts(model, run) if model.is_sparse(layer) else _feed_forward(model, model.intermediate_size, compute)
    return run.tokens * kept + cast_bytes(model, layer, run)


def _attention(model: ModelConfig, layer: int, run: Pass) -> int:
    """Bytes a token: queries, keys, values, the mixed values that o_proj reads, and what the softmax needs."""
    compute, window = run.precision.compute, model.window(layer)
    heads = model.num_attention_heads
    q, kv = heads * model.head_dim, model.num_key_value_heads * model.head_dim
    kept = compute * 2 * (q + kv)
    if model.qk_norm != "none":  # norms keep their inputs, and a scale for each head or for all
        scales = 2 if model.qk_norm == "projection" else heads + model.num_key_value_heads
        kept += compute * (q + kv) + FLOAT * scales
    if run.kernels.attention_on(run.device, run.length) == "sdpa":
        # Blocks of a window have copies of their keys and values, and those of the block before; the result is joined.
        copies = compute * (q + 2 * kv) if window is not None and window < run.length else 0
        return kept + copies + FLOAT * heads  # the logarithm of the sum
    return kept + compute * heads * _keys_seen(run.length, window or run.length) // run.length


def _keys_seen(length: int, window: int) -> int:
    """Pairs of a query and a key in the softmax that the explicit attention keeps: a block sees keys up to its end."""
    block = SHORT_BLOCK if length <= LONG else LONG_BLOCK
    ends = [(start, min(start + block, length)) for start in range(0, length, block)]
    return sum((end - start) * (end - max(0, start - window + 1)) for start, end in ends)


def _feed_forward(model: ModelConfig, neurons: int, compute: int) -> int:
    """Bytes a token: the second norm's output, gate, its silu, up, and their product, which down reads."""
    return compute * (model.hidden_size + 4 * neurons)


def _experts(model: ModelConfig, run: Pass) -> int:
    """Bytes a token: the router's input and output, and for each of its experts rows in, inner values and rows out."""
    compute, k = run.precision.compute, model.num_experts_per_tok
    routed = compute * (2 * model.hidden_size + 4 * model.moe_intermediate_size)
    # Logits and their softmax, for the router's losses; indices and slots, gates and the chosen logits.
    router = FLOAT * (model.hidden_size + 2 * model.num_experts) + k * (3 * INDEX + 3 * FLOAT)
    shared = model.shared_expert_intermediate_size
    return k * routed + router + (_feed_forward(model, shared, compute) + compute * model.hidden_size if shared else 0)


def cast_bytes(model: ModelConfig, layer: int, run: Pass) -> int:
    """What bf16 casts of a layer's float32 weights take: each product keeps its own for the backward pass."""
    if not run.precision.casts:
        return 0
    hidden, compute = model.hidden_size, run.precision.compute
    attention = 2 * hidden * model.head_dim * (model.num_attention_heads + model.num_key_value_heads)
    if not model.is_sparse(layer):
        return compute * (attention + 3 * hidden * model.intermediate_size)
    # The loop casts an expert's weights inside its product, and drops them.
    grouped = run.kernels.experts_on(run.device) == "grouped"
    experts = model.num_experts * model.moe_intermediate_size if grouped else 0
    return compute * (attention + 3 * hidden * (experts + model.shared_expert_intermediate_size))


def working_bytes(model: ModelConfig, layer: int, run: Pass) -> int:
    """What the backward pass of a layer adds to what is kept: gradients of gate and up, and of the stream."""
    neurons = (
        model.num_experts_per_tok * model.moe_intermediate_size if model.is_sparse(layer) else model.intermediate_size
    )
    return run.tokens * (2 * run.precision.compute * neurons + run.precision.stream * model.hidden_size)


def attention_working_bytes(model: ModelConfig, run: Pass) -> int:
    """What the explicit attention works on in a forward pass: which keys are later, for the heads of a group."""
    if run.kernels.attention_on(run.device, run.length) == "sdpa":
        return 0
    group = model.num_attention_heads // model.num_key_value_heads
    return run.precision.compute * run.length**2 * (group + 1)
