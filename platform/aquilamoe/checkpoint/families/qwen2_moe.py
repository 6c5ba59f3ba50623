"""Qwen2-MoE: experts of a size of their own beside a shared one, a QKV bias, layers without experts."""

from aquilamoe.checkpoint.families import mixtral
from aquilamoe.checkpoint.families.family import Family

FAMILY = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    computes=lambda model: model.is_moe and model.qk_norm == "none" and not mixtral.computes(model),
    experts_key="num_experts",
    is_mixed=True,
    has_shared_expert=True,
    qkv_bias=True,
    qkv_bias_key="qkv_bias",
    windows="each",
    window_switch=True,
    slides=lambda _values, layer, first: layer % 2 == 0 and layer < first,
    default_window=4096,
)
