"""StableLM: norms that subtract the mean and add a bias, heads that rotate in part; q, k and v may have biases."""

from typing import Any

from aquilamoe.checkpoint.families.family import Family, Values, rotated_part
from aquilamoe.config.network import ModelConfig


def _computes(model: ModelConfig) -> bool:
    is_dense = not model.is_moe and model.qk_norm == "none" and model.sliding_window is None
    return is_dense and model.has_layer_norm


def _read(values: Values) -> dict[str, Any]:
    return {"layer_norm": True, "partial_rotary_factor": rotated_part(values, 0.25)}


def _spell(model: ModelConfig) -> dict[str, Any]:
    assert model.particulars is not None
    return {"partial_rotary_factor": model.particulars.partial_rotary_factor}


FAMILY = Family(
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    computes=_computes,
    qkv_bias_key="use_qkv_bias",
    norm_key="layer_norm_eps",
    fixed={"use_parallel_residual": False, "qk_layernorm": False},
    default_tokens=(0, 0, None),
    particulars=frozenset({"layer_norm", "partial_rotary_factor"}),
    read_particulars=_read,
    spell_particulars=_spell,
)
