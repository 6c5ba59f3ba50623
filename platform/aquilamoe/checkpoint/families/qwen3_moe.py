"""Qwen3-MoE: experts of a size of their own, a norm of each head's queries and keys."""

from aquilamoe.checkpoint.families.family import Family

FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    computes=lambda model: model.is_moe and model.qk_norm == "head",
    experts_key="num_experts",
    is_mixed=True,
    qk_norm="head",
    fixed={"attention_bias": False},
    windows="all",
    window_switch=True,
    default_window=4096,
)
