"""SmolLM3: layers without rotary embedding between those of Llama. Without any, it is a Llama."""

from typing import Any

from aquilamoe.checkpoint.families import llama
from aquilamoe.checkpoint.families.family import Family, Values
from aquilamoe.config.network import ModelConfig


def _rotated(values: Values) -> list[bool]:
    """Whether each layer has a rotary embedding: 1 in a list, or all layers but every fourth."""
    interval, layers = values.get("no_rope_layer_interval"), values["num_hidden_layers"]
    listed = values.get("no_rope_layers")
    if listed is None:
        return [(layer + 1) % (interval or 4) != 0 for layer in range(layers)]
    return [bool(each) for each in listed[:layers]]


def _read(values: Values) -> dict[str, Any]:
    return {"nope_layers": tuple(layer for layer, is_rotated in enumerate(_rotated(values)) if not is_rotated)}


def _spell(model: ModelConfig) -> dict[str, Any]:
    nope = model.particulars.nope_layers if model.particulars else ()
    return {"no_rope_layers": [int(layer not in nope) for layer in range(model.num_hidden_layers)]}


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    computes=lambda model: llama.is_plain(model) and model.particulars is not None,
    same_as="LlamaForCausalLM",
    fixed={"mlp_bias": False, "attention_bias": False},
    windows="each",
    window_switch=True,
    slides=lambda values, layer, _first: not _rotated(values)[layer],
    default_theta=2e6,
    default_kv_heads=True,
    default_tokens=(128000, 128001, 128004),
    default_tied=True,
    particulars=frozenset({"nope_layers"}),
    read_particulars=_read,
    spell_particulars=_spell,
)
