"""HyperCloning (arXiv 2409.12903): every size times an integer, by copies that noise makes differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth.methods.fpi import grow as copy_units
from aquilamoe.growth.units import Units

if TYPE_CHECKING:  # plans call `keeps_function`, and they do not wait for torch
    from aquilamoe.growth.width import Tensors, Width

SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def grow(layer: Tensors, upper_layer: Tensors, width: Width) -> Tensors:
    """Copy every unit of the layer in place as in `fpi`."""
    return copy_units(layer, upper_layer, width)


def keeps_function(units: Units, num_layers: int, growth: GrowthConfig) -> bool:  # noqa: ARG001
    return True


def check(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> None:  # noqa: ARG001
    """Refuse a size that is not a multiple of the source's."""
    for field in SIZES:
        old, new = getattr(source, field), getattr(target, field)
        if new % old:
            raise UserError(
                f"{field}: target {new}, source {old}; hypercloning grows by integer factors, use {new // old * old} "
                f"or {(new // old + 1) * old}, or method fpi"
            )
