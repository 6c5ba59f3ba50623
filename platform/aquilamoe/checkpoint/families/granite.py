"""Granite: Llama with four constants, on the embedding, on attention, on what layers add, and on the logits."""

from typing import Any

from aquilamoe.checkpoint.families import llama
from aquilamoe.checkpoint.families.family import Family, Values
from aquilamoe.config.network import ModelConfig

CONSTANTS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


def read(values: Values) -> dict[str, Any]:
    """The constants of a config.json, 1 where it has none."""
    return {key: 1.0 if values.get(key) is None else values[key] for key in CONSTANTS}


def spell(model: ModelConfig) -> dict[str, Any]:
    """The constants as config.json has them."""
    return {key: getattr(model.particulars, key) for key in CONSTANTS}


def has_constants(model: ModelConfig) -> bool:
    """Whether a network is of this family: attention by a constant in the place of a head's size."""
    return model.particulars is not None and model.particulars.attention_multiplier is not None


FAMILY = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    computes=lambda model: llama.is_plain(model) and has_constants(model) and model.sliding_window is None,
    fixed={"mlp_bias": False, "attention_bias": False},
    default_kv_heads=True,
    default_tokens=(1, 2, None),
    particulars=frozenset(CONSTANTS),
    read_particulars=read,
    spell_particulars=spell,
)
