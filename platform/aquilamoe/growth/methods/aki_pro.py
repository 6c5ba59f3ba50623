"""AKI-Pro (AquilaMoE, arXiv 2408.06567): AKI inside each group of query heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.schema import GrowthConfig
from aquilamoe.growth.methods import aki
from aquilamoe.growth.methods.aki import advance
from aquilamoe.growth.units import Units

if TYPE_CHECKING:  # plans call `keeps_function`, and they do not wait for torch
    from aquilamoe.growth.width import Tensors, Width

# Keys and values stay the layer's own: they grow on the input side, and further groups are copies.
OWN = (tensor_names.K_WEIGHT, tensor_names.K_BIAS, tensor_names.V_WEIGHT, tensor_names.V_BIAS)


def grow(layer: Tensors, upper_layer: Tensors, width: Width) -> Tensors:
    """Take what is new from the layer above, as in `aki` and by the same scopes, but for keys and values."""
    return {
        role: width.copy(role, tensor) if role in OWN else advance(role, tensor, upper_layer, width)
        for role, tensor in layer.items()
    }


def keeps_function(units: Units, num_layers: int, growth: GrowthConfig) -> bool:
    """Only where nothing outside keys and values is new, or where there is no layer above: then it is `fpi`."""
    spaces = [*units.feed_forwards, units.q_heads]
    if growth.scope == "all":
        spaces.append(units.residual)
    if growth.scope == "transplant":
        spaces.append(units.mixed_channels)
    return num_layers == 1 or not any(space.has_new for space in spaces)


def from_above(role: str, growth: GrowthConfig) -> tuple[bool, bool]:
    """Whether the new rows and the new columns of a tensor are the layer above's: as in `aki`, but for `OWN`."""
    return (False, False) if role in OWN else aki.from_above(role, growth)
