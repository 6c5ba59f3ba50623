"""Which layer of the source each layer of the target copies (METHODS section 3).

Layers are units like any other: `copies` of the returned map are the multiplicities, and `is_new` marks the further
copies of a layer (the first stays in its place, so that the originals keep their order under every rule; an explicit
list of layers need not keep it).
"""

from collections.abc import Callable, Mapping

from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth.units import UnitMap, circular


def interpolate(num_sources: int, num_targets: int) -> UnitMap:
    """Spread the layers evenly, copies beside their originals: layer l copies `l * num_sources // num_targets`.

    The arithmetic is on integers, because the float form rounds to the wrong layer for many pairs, e.g. 14 -> 18.
    """
    return UnitMap(tuple(layer * num_sources // num_targets for layer in range(num_targets)), num_sources)


def stack(num_sources: int, num_targets: int) -> UnitMap:
    """Put the whole stack on top of itself; a remainder repeats the bottom layers."""
    return circular(num_sources, num_targets)


def stack_top(num_sources: int, num_targets: int) -> UnitMap:
    """Put the whole stack on top of itself; a remainder repeats the top layers, in their order."""
    remainder = num_targets % num_sources
    whole = circular(num_sources, num_targets - remainder).sources
    return UnitMap((*whole, *range(num_sources - remainder, num_sources)), num_sources)


RULES: Mapping[str, Callable[[int, int], UnitMap]] = {
    "interpolate": interpolate,
    "stack": stack,
    "stack_top": stack_top,
}


def map_layers(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> UnitMap:
    """The layers of a growth, by its rule or as it lists them; a list that fits is `rules.check`'s business."""
    if isinstance(growth.depth, str):
        return RULES[growth.depth](source.num_hidden_layers, target.num_hidden_layers)
    return UnitMap(growth.depth, source.num_hidden_layers)
