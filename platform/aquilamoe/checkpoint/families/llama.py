"""Llama, without biases."""

from aquilamoe.checkpoint.families.family import Family
from aquilamoe.config.network import ModelConfig


def _computes(model: ModelConfig) -> bool:
    is_plain = not (model.is_moe or model.qkv_bias or model.qk_norm != "none")
    return is_plain and model.sliding_window is None and not model.hidden_size % model.num_attention_heads


FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    computes=_computes,
    fixed={"mlp_bias": False, "attention_bias": False},
    default_kv_heads=True,
    default_tokens=(1, 2, None),
)
