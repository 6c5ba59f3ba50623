"""Which unit of the source each unit of the target copies, in every space of the network (METHODS section 2).

A unit is a channel of the residual stream, a neuron of the feed-forward, an attention head, a channel of a head or a
whole layer. Everything here is arithmetic on integers; tensors are grown by these maps in `growth.width`.
"""

from dataclasses import dataclass
from functools import cached_property

from aquilamoe.config.schema import ModelConfig
from aquilamoe.weights import names


@dataclass(frozen=True)
class UnitMap:
    """A map g from target units to source units: target unit i copies source unit `sources[i]`."""

    sources: tuple[int, ...]
    num_sources: int

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Copies of each source unit, of length `num_sources`."""
        counts = [0] * self.num_sources
        for source in self.sources:
            counts[source] += 1
        return tuple(counts)

    @cached_property
    def copies(self) -> tuple[int, ...]:
        """Of each target unit: how many target units copy the same source unit, itself included."""
        return tuple(self.counts[source] for source in self.sources)

    @cached_property
    def is_new(self) -> tuple[bool, ...]:
        """Of each target unit: whether an earlier one is already the copy of its source unit."""
        seen: set[int] = set()
        fresh = []
        for source in self.sources:
            fresh.append(source in seen)
            seen.add(source)
        return tuple(fresh)

    @property
    def has_new(self) -> bool:
        return any(self.is_new)

    @cached_property
    def is_identity(self) -> bool:
        return self.sources == tuple(range(self.num_sources))

    @property
    def is_onto(self) -> bool:
        """Whether every source unit has a copy, without which no method keeps the function."""
        return all(self.counts)


def circular(num_sources: int, num_targets: int) -> UnitMap:
    """Target unit i copies source unit i mod `num_sources`."""
    return UnitMap(tuple(target % num_sources for target in range(num_targets)), num_sources)


def query_heads(source: tuple[int, int], target: tuple[int, int]) -> UnitMap:
    """Map query heads so that all heads of a target group come from the source group whose key and value it copies.

    `source` and `target` are (query heads, key-value heads), a multiple of each other. Groups are copied circularly.
    With as many groups as before, head (group j, slot s) copies head (j, s mod slots); a further copy of a group goes
    on counting slots where the previous copy of it stopped, so that copies with fewer slots cover the group together.
    """
    source_slots, target_slots = source[0] // source[1], target[0] // target[1]
    heads = []
    for group in range(target[1]):
        source_group, copy = group % source[1], group // source[1]
        first = copy * target_slots
        heads += [source_group * source_slots + (first + slot) % source_slots for slot in range(target_slots)]
    return UnitMap(tuple(heads), source[0])


def channels(heads: UnitMap, head_dim: int) -> UnitMap:
    """Expand a map of heads to the channels of their projections: a head is copied whole, channels in order."""
    sources = tuple(head * head_dim + channel for head in heads.sources for channel in range(head_dim))
    return UnitMap(sources, heads.num_sources * head_dim)


# The spaces that the rows (outputs) and the columns (inputs) of each tensor live in, by role: one map per space is what
# makes neighbouring tensors agree. Vocabulary rows never grow, so the head has columns only and the embedding is apart.
_ROWS = {
    names.Q_WEIGHT: "q_channels",
    names.Q_BIAS: "q_channels",
    names.K_WEIGHT: "kv_channels",
    names.K_BIAS: "kv_channels",
    names.V_WEIGHT: "kv_channels",
    names.V_BIAS: "kv_channels",
    names.O_WEIGHT: "residual",
    names.GATE: "ffn",
    names.UP: "ffn",
    names.DOWN: "residual",
}
_COLUMNS = {
    names.Q_WEIGHT: "residual",
    names.K_WEIGHT: "residual",
    names.V_WEIGHT: "residual",
    names.O_WEIGHT: "q_channels",
    names.GATE: "residual",
    names.UP: "residual",
    names.DOWN: "ffn",
    names.HEAD: "residual",
}


@dataclass(frozen=True)
class Units:
    """The unit maps of one growth in width. All layers share them."""

    residual: UnitMap
    ffn: UnitMap
    q_heads: UnitMap
    kv_heads: UnitMap
    head_dim: int

    @cached_property
    def q_channels(self) -> UnitMap:
        return channels(self.q_heads, self.head_dim)

    @cached_property
    def kv_channels(self) -> UnitMap:
        return channels(self.kv_heads, self.head_dim)

    def rows(self, role: str) -> UnitMap | None:
        """Map of the rows of a projection or the entries of its bias; None where rows do not grow (the head)."""
        return getattr(self, _ROWS[role]) if role in _ROWS else None

    def columns(self, role: str) -> UnitMap | None:
        """Map of the columns of a projection; None for a bias."""
        return getattr(self, _COLUMNS[role]) if role in _COLUMNS else None

    @property
    def is_identity(self) -> bool:
        """Whether nothing grows in width."""
        return all(space.is_identity for space in (self.residual, self.ffn, self.q_heads, self.kv_heads))


def map_units(source: ModelConfig, target: ModelConfig) -> Units:
    """All unit maps from one model to another with the same head_dim."""
    source_heads = (source.num_attention_heads, source.num_key_value_heads)
    target_heads = (target.num_attention_heads, target.num_key_value_heads)
    return Units(
        residual=circular(source.hidden_size, target.hidden_size),
        ffn=circular(source.intermediate_size, target.intermediate_size),
        q_heads=query_heads(source_heads, target_heads),
        kv_heads=circular(source.num_key_value_heads, target.num_key_value_heads),
        head_dim=source.head_dim,
    )
