"""Mixtral: experts in every layer, with names of its own."""

from aquilamoe.checkpoint.families.family import Family
from aquilamoe.config.network import ModelConfig


def computes(model: ModelConfig) -> bool:
    """Whether this architecture has all that a mixture without norms of queries and keys has."""
    further = (model.qkv_bias, model.shared_expert_intermediate_size, model.mlp_only_layers, model.layer_types)
    return model.is_moe and model.qk_norm == "none" and model.norm_topk_prob and not any(further)


FAMILY = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    computes=computes,
    experts_key="num_local_experts",
    norm_topk_prob=True,
    windows="all",
    default_theta=1e6,
    default_tokens=(1, 2, None),
    spelling={"mlp.": "block_sparse_moe.", ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."},
)
