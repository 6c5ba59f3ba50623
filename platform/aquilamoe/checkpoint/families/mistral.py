"""Mistral: the network of Llama, but with windows, and heads that need not divide the hidden size."""

from aquilamoe.checkpoint.families.family import Family
from aquilamoe.config.network import ModelConfig


def _computes(model: ModelConfig) -> bool:
    is_plain = not (model.is_moe or model.qkv_bias or model.qk_norm != "none")
    return is_plain and (model.sliding_window is not None or model.hidden_size % model.num_attention_heads > 0)


FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    computes=_computes,
    same_as="LlamaForCausalLM",
    windows="all",
    default_window=4096,
    default_tokens=(1, 2, None),
)
