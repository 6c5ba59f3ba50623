"""Which layer of the source each layer of the target copies, as a map of units (METHODS section 3).

Layers are units like any other: `copies` of the returned map are the multiplicities, and `is_new` marks the further
copies of a layer (the first stays in its place, so that the originals keep their order under every rule; an explicit
list of layers need not keep it).
"""

from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth.units import UnitMap


def map_layers(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> UnitMap:
    """The layers of a growth, by its rule or as it lists them; a list that fits is `rules.check`'s business."""
    layers = growth.layer_sources(source.num_hidden_layers, target.num_hidden_layers)
    return UnitMap(layers, source.num_hidden_layers)
