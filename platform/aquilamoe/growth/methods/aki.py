"""Advanced knowledge initialisation (bert2BERT, arXiv 2110.07143): new units are copies from the layer above."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aquilamoe.growth.units import Units

if TYPE_CHECKING:  # plans ask `keeps_function`, and they do not wait for torch
    from aquilamoe.growth.width import Tensors, Width


def grow(layer: Tensors, upper_layer: Tensors, width: Width) -> Tensors:
    """Take old rows of every projection from the layer, new rows from the layer above; the rest as in `fpi`."""
    return {role: width.copy(role, tensor, new_rows=upper_layer[role]) for role, tensor in layer.items()}


def keeps_function(units: Units, num_layers: int) -> bool:
    """Only where there are no new rows to take, or no layer above: then it is `fpi`."""
    return units.is_identity or num_layers == 1
