"""LEMON (arXiv 2310.07999): channels padded with zeros, new layers silent; the function is kept at any ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth.methods.fpi import grow as copy_units
from aquilamoe.growth.units import Units

if TYPE_CHECKING:  # plans call `keeps_function`, and they do not wait for torch
    from aquilamoe.growth.width import Tensors, Width


def grow(layer: Tensors, upper_layer: Tensors, width: Width) -> Tensors:
    """Copy every unit of the layer in place as in `fpi`; what is LEMON's own are the norms and the new layers."""
    return copy_units(layer, upper_layer, width)


def keeps_function(units: Units, num_layers: int, growth: GrowthConfig) -> bool:  # noqa: ARG001
    return True


def check(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> None:  # noqa: ARG001
    """Refuse what would not be LEMON."""
    if (growth.norm, growth.new_layers) != ("zero_pad", "zero"):
        raise UserError(
            f"growth: method lemon with norm {growth.norm} and new_layers {growth.new_layers}, LEMON is norm zero_pad "
            "and new_layers zero; set both, or method fpi"
        )
