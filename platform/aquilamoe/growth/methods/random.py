"""Ignore the source: every tensor is initialized at random. The control that every other method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aquilamoe.config.schema import GrowthConfig
from aquilamoe.growth.units import Units

if TYPE_CHECKING:  # plans call `keeps_function`, and they do not wait for torch
    from aquilamoe.growth.width import Tensors, Width


def grow(layer: Tensors, upper_layer: Tensors, width: Width) -> Tensors:  # noqa: ARG001
    """Return tensors of the target's shapes, distributed as in a model that starts from scratch."""
    return {role: width.draw(role) for role in layer}


def keeps_function(units: Units, num_layers: int, growth: GrowthConfig) -> bool:  # noqa: ARG001
    return False
