"""Which layer of the source each layer of the target copies (METHODS section 3).

Layers are units like any other: `copies` of the returned map are the multiplicities, and `is_new` tells the further
copies of a layer (the first stays in its place, so that the originals keep their order under every rule).
"""

from collections.abc import Callable, Mapping

from aquilamoe.growth.units import UnitMap, circular


def interpolate(num_sources: int, num_targets: int) -> UnitMap:
    """Spread the layers evenly, copies beside their originals: layer l copies `l * num_sources // num_targets`.

    The arithmetic is on integers, because the float form rounds to the wrong layer for many pairs, e.g. 14 -> 18.
    """
    return UnitMap(tuple(layer * num_sources // num_targets for layer in range(num_targets)), num_sources)


def stack(num_sources: int, num_targets: int) -> UnitMap:
    """Put the whole stack on top of itself; a remainder repeats the bottom layers."""
    return circular(num_sources, num_targets)


RULES: Mapping[str, Callable[[int, int], UnitMap]] = {"interpolate": interpolate, "stack": stack}
