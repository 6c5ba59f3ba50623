"""AKI-Pro (AquilaMoE, arXiv 2408.06567): AKI inside each group of query heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aquilamoe.growth.units import Units
from aquilamoe.weights import names

if TYPE_CHECKING:  # plans ask `keeps_function`, and they do not wait for torch
    from aquilamoe.growth.width import Tensors, Width

# Keys and values stay the layer's own: they grow on the input side, and further groups are copies.
OWN = (names.K_WEIGHT, names.K_BIAS, names.V_WEIGHT, names.V_BIAS)


def grow(layer: Tensors, upper_layer: Tensors, width: Width) -> Tensors:
    """Take new rows from the layer above, as in `aki`, but for keys and values."""
    return {role: width.copy(role, layer[role], None if role in OWN else upper_layer[role]) for role in layer}


def keeps_function(units: Units, num_layers: int) -> bool:
    """Only where no row outside keys and values is new, or where there is no layer above: then it is `fpi`."""
    takes_new_rows = units.residual.has_new or units.ffn.has_new or units.q_heads.has_new
    return num_layers == 1 or not takes_new_rows
