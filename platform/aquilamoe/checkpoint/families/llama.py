"""Llama, without biases."""

from aquilamoe.checkpoint.families.family import Family
from aquilamoe.config.network import ModelConfig


def is_plain(model: ModelConfig) -> bool:
    """Whether a network is dense, without biases and without norms of queries and keys."""
    return not (model.is_moe or model.qkv_bias or model.qk_norm != "none")


FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    computes=lambda model: (
        is_plain(model) and model.sliding_window is None and not model.hidden_size % model.num_attention_heads
    ),
    fixed={"mlp_bias": False, "attention_bias": False},
    default_kv_heads=True,
    default_tokens=(1, 2, None),
)
