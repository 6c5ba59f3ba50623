"""OLMoE: experts in every layer, one norm over all heads of queries, and one of keys."""

from aquilamoe.checkpoint.families.family import Family

FAMILY = Family(
    architecture="OlmoeForCausalLM",
    model_type="olmoe",
    computes=lambda model: model.is_moe and model.qk_norm == "projection",
    experts_key="num_experts",
    qk_norm="projection",
    fixed={"attention_bias": False, "clip_qkv": None},
    default_balance=0.01,
    default_kv_heads=True,
    default_tokens=(None, 50279, 1),
)
