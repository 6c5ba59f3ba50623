"""Qwen3: a norm of each head's queries and keys."""

from aquilamoe.checkpoint.families.family import Family

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    computes=lambda model: not model.is_moe and model.qk_norm == "head",
    qk_norm="head",
    fixed={"attention_bias": False},
    windows="each",
    window_switch=True,
    default_window=4096,
    default_head_dim=128,
)
