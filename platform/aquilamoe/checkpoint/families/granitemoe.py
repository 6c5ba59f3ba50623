"""GraniteMoE: Granite with experts in every layer, in one tensor for all of them."""

from aquilamoe.checkpoint.families import granite, mixtral
from aquilamoe.checkpoint.families.family import Family

FAMILY = Family(
    architecture="GraniteMoeForCausalLM",
    model_type="granitemoe",
    computes=lambda model: mixtral.computes(model) and granite.has_constants(model) and model.sliding_window is None,
    experts_key="num_local_experts",
    norm_topk_prob=True,
    fixed={"attention_bias": False},
    default_kv_heads=True,
    default_tokens=(1, 2, None),
    particulars=frozenset(granite.CONSTANTS),
    read_particulars=granite.read,
    spell_particulars=granite.spell,
    spelling={"mlp.": "block_sparse_moe.", ".gate.": ".router.layer."},
    joined_experts={
        "block_sparse_moe.input_linear.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "block_sparse_moe.output_linear.weight": ("mlp.down_proj.weight",),
    },
)
