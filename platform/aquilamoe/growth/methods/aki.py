"""Advanced knowledge initialisation (bert2BERT, arXiv 2110.07143): new units are copies from the layer above.

`growth.scope` sets how far it goes. `all`: every new row of every projection, which is the paper's formula; `inner`:
new heads and neurons only, while the rows that write to the residual stream stay the layer's own; `transplant`: as
`inner`, and what reads the new heads and neurons comes from the layer above with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aquilamoe.checkpoint.tensor_names import writes_residual
from aquilamoe.config.schema import GrowthConfig
from aquilamoe.growth.units import Units

if TYPE_CHECKING:  # plans call `keeps_function`, and they do not wait for torch
    from aquilamoe.growth.lazy_tensor import LazyTensor
    from aquilamoe.growth.width import Tensors, Width


def grow(layer: Tensors, upper_layer: Tensors, width: Width) -> Tensors:
    """Take what is old from the layer, what is new from the layer above; the rest as in `fpi`."""
    return {role: advance(role, tensor, upper_layer, width) for role, tensor in layer.items()}


def advance(role: str, tensor: LazyTensor, upper_layer: Tensors, width: Width) -> LazyTensor:
    """Grow one tensor with its namesake in the layer above, by `scope`."""
    if width.units.rows(role) is None:
        return width.copy(role, tensor)
    if not writes_residual(role) or width.growth.scope == "all":
        return width.copy(role, tensor, new_rows=upper_layer[role])
    return width.copy(role, tensor, new_columns=upper_layer[role] if width.growth.scope == "transplant" else None)


def keeps_function(units: Units, num_layers: int, growth: GrowthConfig) -> bool:
    """Only where there is nothing new to take, or no layer above: then it is `fpi`."""
    spaces = [*units.feed_forwards, units.q_heads, units.v_channels]
    if growth.scope == "all":
        spaces.append(units.residual)
    return num_layers == 1 or not any(space.has_new for space in spaces)


def from_above(role: str, growth: GrowthConfig) -> tuple[bool, bool]:
    """Whether the new rows and the new columns of a tensor are the layer above's: they bring no optimizer state."""
    if not writes_residual(role) or growth.scope == "all":
        return True, False
    return False, growth.scope == "transplant"
