"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from aquilamoe.checkpoint.families.family import Family

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    computes=lambda model: not model.is_moe and model.qkv_bias,
    qkv_bias=True,
    windows="each",
    window_switch=True,
    default_window=4096,
)
