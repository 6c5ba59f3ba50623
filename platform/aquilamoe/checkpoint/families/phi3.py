"""Phi-3 and Phi-4: Llama whose files join q, k and v, and gate and up; of a head, a part may rotate."""

from typing import Any

from aquilamoe.checkpoint.families import llama
from aquilamoe.checkpoint.families.family import Family, Values, rotated_part
from aquilamoe.config.network import ModelConfig


def _read(values: Values) -> dict[str, Any]:
    return {"joined_projections": True, "partial_rotary_factor": rotated_part(values, 1.0)}


def _spell(model: ModelConfig) -> dict[str, Any]:
    assert model.particulars is not None
    return {"partial_rotary_factor": model.particulars.partial_rotary_factor}


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    computes=lambda model: (
        llama.is_plain(model) and model.particulars is not None and model.particulars.joined_projections
    ),
    windows="all",
    rope_types={"su": "longrope", "yarn": "longrope"},
    default_kv_heads=True,
    default_tokens=(1, 32000, 32000),
    particulars=frozenset({"joined_projections", "partial_rotary_factor"}),
    read_particulars=_read,
    spell_particulars=_spell,
    joined={
        "self_attn.qkv_proj.weight": (
            "self_attn.q_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.v_proj.weight",
        ),
        "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    },
)
