"""The architectures of transformers that are read and written, a file for each. Torch-free."""

from collections.abc import Mapping
from typing import Any

from aquilamoe.checkpoint.families import (
    granite,
    granitemoe,
    llama,
    mistral,
    mixtral,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
    stablelm,
)
from aquilamoe.checkpoint.families.family import Family
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig

# By the name of the class in transformers.
FAMILIES = {
    module.FAMILY.architecture: module.FAMILY
    for module in (
        llama,
        mistral,
        qwen2,
        qwen3,
        mixtral,
        qwen2_moe,
        qwen3_moe,
        olmoe,
        smollm3,
        granite,
        granitemoe,
        phi3,
        stablelm,
    )
}


def of(model: ModelConfig) -> Family:
    """The family as which a network is written.

    Raises:
        UserError: no architecture computes it.
    """
    present = model.particulars.present if model.particulars else frozenset()
    families = (family for family in FAMILIES.values() if present <= family.particulars and family.computes(model))
    found = next(families, None)
    if found is None:
        raise UserError(
            f"architecture: {', '.join(sorted(present))} with these sizes is no known architecture; keep the source's"
        )
    return found


def stated(values: Mapping[str, Any]) -> Family | None:
    """The family that a config.json states, by its class or else by its model_type; None where it is no known one."""
    names = values.get("architectures") or [
        family.architecture for family in FAMILIES.values() if family.model_type == values.get("model_type")
    ]
    is_one = isinstance(names, list) and len(names) == 1 and isinstance(names[0], str)
    return FAMILIES.get(names[0]) if is_one else None
