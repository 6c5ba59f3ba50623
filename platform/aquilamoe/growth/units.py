"""Which unit of the source each unit of the target copies, in every space of the network (METHODS section 2).

A unit is a channel of the residual stream, a neuron of the feed-forward, an attention head, a channel of a head or a
whole layer. Everything here is arithmetic on integers; tensors are grown by these maps in `growth.width`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.schema import GrowthConfig, ModelConfig

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class UnitMap:
    """A map g from target units to source units: target unit i copies source unit `sources[i]`.

    Behind the copies come `padding` units that copy nothing. They are always zero, until training finds a use for them.
    """

    sources: tuple[int, ...]
    num_sources: int
    padding: int = 0

    @property
    def size(self) -> int:
        """Number of target units."""
        return len(self.sources) + self.padding

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Copies of each source unit, of length `num_sources`."""
        counts = [0] * self.num_sources
        for source in self.sources:
            counts[source] += 1
        return tuple(counts)

    @cached_property
    def copies(self) -> tuple[int, ...]:
        """Of each copy: how many target units copy the same source unit, itself included."""
        return tuple(self.counts[source] for source in self.sources)

    @cached_property
    def index(self) -> np.ndarray:
        """`sources` as an array, int64."""
        import numpy as np

        return np.array(self.sources, np.int64)

    @cached_property
    def multiplicity(self) -> np.ndarray:
        """`copies` as an array, float64."""
        import numpy as np

        return np.array(self.copies, np.float64)

    @cached_property
    def is_new(self) -> tuple[bool, ...]:
        """Of each copy: whether an earlier one already copies the same source unit."""
        seen: set[int] = set()
        fresh = []
        for source in self.sources:
            fresh.append(source in seen)
            seen.add(source)
        return tuple(fresh)

    @cached_property
    def further(self) -> np.ndarray:
        """`is_new` as an array."""
        import numpy as np

        return np.array(self.is_new, bool)

    @property
    def has_new(self) -> bool:
        return any(self.is_new)

    @cached_property
    def is_identity(self) -> bool:
        return not self.padding and self.sources == tuple(range(self.num_sources))

    @property
    def is_surjective(self) -> bool:
        """Whether every source unit has a copy, without which no method keeps the function."""
        return all(self.counts)


def circular(num_sources: int, num_targets: int) -> UnitMap:
    """Target unit i copies source unit i mod `num_sources`."""
    return UnitMap(tuple(target % num_sources for target in range(num_targets)), num_sources)


def sampled(num_sources: int, num_targets: int, random: Random) -> UnitMap:
    """Target unit i copies source unit i; further units copy random ones, as evenly as in `circular`.

    Every round of further units is drawn without replacement, so that what depends on the numbers of copies alone (is a
    norm exact, does every head have a place) depends on the sizes and not on the seed.
    """
    sources = list(range(num_sources))
    while len(sources) < num_targets:
        sources += random.sample(range(num_sources), num_sources)
    return UnitMap(tuple(sources[:num_targets]), num_sources)


Spread = Callable[[int, int], UnitMap]


def query_heads(
    source: tuple[int, int], target: tuple[int, int], groups: UnitMap, spread: Spread = circular
) -> UnitMap:
    """Map query heads so that all heads of a target group come from the source group whose key and value it copies.

    `source` and `target` are (query heads, key-value heads), a multiple of each other; `groups` maps the latter. The
    slots of a source group are spread over all slots of its copies: with as many groups as before, head (group j, slot
    s) copies head (j, s mod slots) by the circular spread, and copies with fewer slots cover the group together.
    """
    source_slots, target_slots = source[0] // source[1], target[0] // target[1]
    slots = [list(spread(source_slots, count * target_slots).sources) for count in groups.counts]
    heads = []
    for group in groups.sources:
        heads += [group * source_slots + slot for slot in slots[group][:target_slots]]
        del slots[group][:target_slots]
    return UnitMap(tuple(heads), source[0])


def channels(heads: UnitMap, inside: UnitMap) -> UnitMap:
    """Expand a map of heads to the channels of their projections; `inside` maps the channels of one head."""
    sources = tuple(head * inside.num_sources + channel for head in heads.sources for channel in inside.sources)
    return UnitMap(sources, heads.num_sources * inside.num_sources)


def rotary_channels(head_dim: int, ratio: int) -> UnitMap:
    """Map the channels of a query or key head that grows `ratio` times, in Hugging Face's half-split pairing.

    Pair i turns at the frequency that pair `ratio * i` of the target has, and goes there. The pairs between are its
    further copies: queries leave them silent, so that keys may have anything there (METHODS section 2).
    """
    pairs = head_dim // 2
    sources = tuple(half * pairs + pair // ratio for half in (0, 1) for pair in range(pairs * ratio))
    return UnitMap(sources, head_dim)


# The spaces that the rows (outputs) and the columns (inputs) of each tensor are in, by role: one map per space is what
# makes neighbouring tensors agree. Vocabulary rows never grow, so the head has columns only and the embedding is apart.
_ROWS = {
    tensor_names.Q_WEIGHT: "q_channels",
    tensor_names.Q_BIAS: "q_channels",
    tensor_names.K_WEIGHT: "k_channels",
    tensor_names.K_BIAS: "k_channels",
    tensor_names.V_WEIGHT: "v_channels",
    tensor_names.V_BIAS: "v_channels",
    tensor_names.O_WEIGHT: "residual",
    tensor_names.GATE: "ffn",
    tensor_names.UP: "ffn",
    tensor_names.DOWN: "residual",
    tensor_names.EXPERT_GATE: "expert_ffn",
    tensor_names.EXPERT_UP: "expert_ffn",
    tensor_names.EXPERT_DOWN: "residual",
    tensor_names.SHARED_GATE: "shared_ffn",
    tensor_names.SHARED_UP: "shared_ffn",
    tensor_names.SHARED_DOWN: "residual",
}
_COLUMNS = {
    tensor_names.Q_WEIGHT: "residual",
    tensor_names.K_WEIGHT: "residual",
    tensor_names.V_WEIGHT: "residual",
    tensor_names.O_WEIGHT: "mixed_channels",
    tensor_names.GATE: "residual",
    tensor_names.UP: "residual",
    tensor_names.DOWN: "ffn",
    tensor_names.HEAD: "residual",
    tensor_names.ROUTER: "residual",
    tensor_names.EXPERT_GATE: "residual",
    tensor_names.EXPERT_UP: "residual",
    tensor_names.EXPERT_DOWN: "expert_ffn",
    tensor_names.SHARED_GATE: "residual",
    tensor_names.SHARED_UP: "residual",
    tensor_names.SHARED_DOWN: "shared_ffn",
    tensor_names.SHARED_ROUTER: "residual",
}


@dataclass(frozen=True, kw_only=True)
class Units:
    """The unit maps of one growth in width. All layers share them.

    `ffn` maps the neurons of a dense feed-forward, `expert_ffn` those of every expert, `shared_ffn` those of a shared
    expert; what the network does not have is an empty map. `rotary` maps the channels inside a query or key head,
    `plain` those inside a value head.
    """

    residual: UnitMap
    ffn: UnitMap
    expert_ffn: UnitMap
    shared_ffn: UnitMap
    q_heads: UnitMap
    kv_heads: UnitMap
    rotary: UnitMap
    plain: UnitMap

    @cached_property
    def q_channels(self) -> UnitMap:
        return channels(self.q_heads, self.rotary)

    @cached_property
    def k_channels(self) -> UnitMap:
        return channels(self.kv_heads, self.rotary)

    @cached_property
    def v_channels(self) -> UnitMap:
        return channels(self.kv_heads, self.plain)

    @cached_property
    def mixed_channels(self) -> UnitMap:
        """Of the values, mixed by every query head: what o_proj reads."""
        return channels(self.q_heads, self.plain)

    def rows(self, role: str) -> UnitMap | None:
        """Map of the rows of a projection or the entries of its bias; None where rows are no units (the head)."""
        space = _ROWS.get(tensor_names.general(role))
        return getattr(self, space) if space else None

    def columns(self, role: str) -> UnitMap | None:
        """Map of the columns of a projection; None for a bias."""
        space = _COLUMNS.get(tensor_names.general(role))
        return getattr(self, space) if space else None

    @property
    def feed_forwards(self) -> tuple[UnitMap, ...]:
        """The neurons of everything between attention and the next layer."""
        return self.ffn, self.expert_ffn, self.shared_ffn

    @property
    def named(self) -> dict[str, UnitMap]:
        """The spaces by what a reader calls them."""
        return {
            "channels": self.residual,
            "neurons": self.ffn,
            "experts' neurons": self.expert_ffn,
            "shared neurons": self.shared_ffn,
            "query heads": self.q_heads,
            "KV heads": self.kv_heads,
            "channels of a head": self.rotary,
        }

    def describe(self, space: UnitMap) -> str:
        """How one of these spaces grows: `channels 8 -> 12`. Others may have its sizes, so it is known by identity."""
        inside = "" if self.rotary.is_identity else f" of {self.rotary.num_sources} -> {self.rotary.size}"
        if space is self.q_channels or space is self.mixed_channels:
            return f"query heads {_sizes(self.q_heads)}{inside}"
        if space is self.k_channels or space is self.v_channels:
            return f"KV heads {_sizes(self.kv_heads)}{inside}"
        name = next(name for name, named in self.named.items() if named is space)
        return f"{name} {_sizes(space)}" + (f", {space.padding} of them zero" if space.padding else "")

    @property
    def is_identity(self) -> bool:
        """Whether nothing grows in width."""
        spaces = (self.residual, *self.feed_forwards, self.q_heads, self.kv_heads, self.rotary)
        return all(space.is_identity for space in spaces)


def _sizes(space: UnitMap) -> str:
    return f"{space.num_sources} -> {space.size}"


def map_units(source: ModelConfig, target: ModelConfig, growth: GrowthConfig, seed: int = 0) -> Units:
    """All unit maps of a growth in width. The seed decides sampled maps, and nothing that a claim depends on.

    head_dim grows by an integer, all else to any larger size.
    """

    def spread(space: str) -> Spread:
        if growth.maps == "circular":
            return circular
        random = Random(f"{seed}/{space}")
        return lambda old, new: sampled(old, new, random)

    source_heads = (source.num_attention_heads, source.num_key_value_heads)
    target_heads = (target.num_attention_heads, target.num_key_value_heads)
    copied = target.hidden_size
    if growth.norm == "zero_pad":
        copied -= target.hidden_size % source.hidden_size
    residual = spread("residual")(source.hidden_size, copied)
    kv_heads = spread("kv_heads")(source_heads[1], target_heads[1])
    return Units(
        residual=replace(residual, padding=target.hidden_size - copied),
        ffn=spread("ffn")(*_neurons(source, target, "intermediate_size") if _has_dense(source) else (0, 0)),
        expert_ffn=spread("expert_ffn")(*_neurons(source, target, "moe_intermediate_size")),
        shared_ffn=spread("shared_ffn")(*_neurons(source, target, "shared_expert_intermediate_size")),
        q_heads=query_heads(source_heads, target_heads, kv_heads, spread("q_heads")),
        kv_heads=kv_heads,
        rotary=rotary_channels(source.head_dim, target.head_dim // source.head_dim),
        plain=circular(source.head_dim, target.head_dim),
    )


def _has_dense(config: ModelConfig) -> bool:
    """Whether a layer has a feed-forward without experts."""
    return config.num_sparse_layers < config.num_hidden_layers


def _neurons(source: ModelConfig, target: ModelConfig, field: str) -> tuple[int, int]:
    """Neurons of the source and of the target."""
    return getattr(source, field), getattr(target, field)
