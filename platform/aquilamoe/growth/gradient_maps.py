"""How the gradient of a grown model follows from that of its source (METHODS section 4).

One rule gives every factor. Where a growth preserves the function, the gradient of a weight of the source is the sum
over its copies, each times what its value was multiplied by; and the copies take equal parts. A weight that has `c`
copies of value `a * w` passes on `1 / (a * c)` of its gradient: c_q for query rows, `alpha * c` for what writes into
the residual stream, 1 for the head, whose columns are divided among copies and add up again.

Noise and routers make copies differ. What is passed on is then their mean, which stays exact; each differs from it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config import plugins
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth import depth, rules
from aquilamoe.growth.expert_diversity import neuron_order
from aquilamoe.growth.units import UnitMap, map_units
from aquilamoe.model.transformer import Decoder

_NORMS = (tensor_names.INPUT_NORM, tensor_names.POST_ATTENTION_NORM, tensor_names.FINAL_NORM)
_LAYERS = "model.layers."


@dataclass(frozen=True)
class Axis:
    """How one dimension of a gradient follows from the source's.

    index: the source's position at every position, None for the same.
    share: the factor at every position, None for 1.
    unknown: where the gradient is none of the source's, or is zero: values from elsewhere, silent inputs.
    padding: positions behind these that copy nothing; their gradient is unknown too.
    unseen: whether padding gets no gradient until the data change (tokens that do not occur).
    """

    index: Tensor | None = None
    share: Tensor | None = None
    unknown: Tensor | None = None
    padding: int = 0
    unseen: bool = False


@dataclass(frozen=True, kw_only=True)
class GradientMap:
    """Where the gradient of a parameter, or of one expert of a stack, comes from.

    name: the parameter of the source. expert: its slice of a stack of experts, None for the whole.
    share: a factor of the whole.
    known: False where the whole gradient is none of the source's.
    spread: how much more of the variance than `share ** 2` is passed on. An expert sees a part of the tokens: the mean
        of a sum falls as its terms become fewer, its deviation only as their square root.
    """

    name: str
    expert: int | None = None
    rows: Axis = Axis()
    columns: Axis = Axis()
    share: float = 1.0
    known: bool = True
    spread: float = 1.0


GradientMaps = Iterator[tuple[str, list[GradientMap]]]  # by parameter of the target; without one: initialized


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a `Decoder`, in its order; experts are stacked."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Decoder(config).named_parameters()}


def gradient_maps(
    source: ModelConfig, target: ModelConfig, growth: GrowthConfig | UpcyclingConfig, seed: int
) -> GradientMaps:
    """Yield every parameter of the target with its gradient maps: one, or one for each expert of a stack, or none."""
    if isinstance(growth, GrowthConfig):
        return _scale_up(source, target, growth, seed)
    return _scale_out(source, target, growth, seed)


def _scale_up(source: ModelConfig, target: ModelConfig, growth: GrowthConfig, seed: int) -> GradientMaps:
    method = plugins.load("growth/methods", growth.method)
    units = map_units(source, target, growth, seed)
    layers = depth.map_layers(source, target, growth)
    carries = hasattr(method, "from_above") or method.keeps_function(units, source.num_hidden_layers, growth)
    width = _Width(source, target, growth, seed)
    for name in parameter_shapes(target):
        if not carries:
            yield name, []
            continue
        layer, role = split(name)
        if layer is None:
            yield name, [width.gradient_map(name, name)]
            continue
        origin = layers.sources[layer]
        on_disk = f"{role}.weight" if role.startswith("mlp.experts.") else role
        gradient_map = width.gradient_map(
            on_disk, f"{_LAYERS}{origin}.{role}", has_upper=origin + 1 < source.num_hidden_layers
        )
        # A further copy of a layer has another input, or is silent.
        gradient_map = replace(gradient_map, known=not layers.is_new[layer])
        experts = range(target.num_experts) if on_disk != role else (None,)
        yield name, [replace(gradient_map, expert=expert) for expert in experts]


def split(name: str) -> tuple[int | None, str]:
    """Layer and role of a parameter; outside the layers None and its name."""
    if not name.startswith(_LAYERS):
        return None, name
    layer, role = name.removeprefix(_LAYERS).split(".", 1)
    return int(layer), role


class _Width:
    """The axes of every role of a growth in width."""

    def __init__(self, source: ModelConfig, target: ModelConfig, growth: GrowthConfig, seed: int) -> None:
        self.source = source
        self.target = target
        self.growth = growth
        self.method = plugins.load("growth/methods", growth.method)
        self.units = map_units(source, target, growth, seed)

    def gradient_map(self, role: str, name: str, has_upper: bool = False) -> GradientMap:
        """The gradient map of a tensor that copies `name`; `has_upper`: whether new units can be of the layer above."""
        if role in _NORMS:
            return GradientMap(name=name, rows=self._gain(role))
        if role in (tensor_names.EMBEDDING, tensor_names.HEAD):
            more = self.target.vocab_size - self.source.vocab_size
            unseen = role == tensor_names.EMBEDDING and not self.target.tie_word_embeddings
            columns = self._writing() if role == tensor_names.EMBEDDING else self._reading(self.units.residual, False)
            return GradientMap(name=name, rows=Axis(padding=more, unseen=unseen), columns=columns)
        if role in (tensor_names.Q_NORM, tensor_names.K_NORM):
            return GradientMap(name=name, rows=self._head_gain(role))
        if role in (tensor_names.ROUTER, tensor_names.SHARED_ROUTER):
            return GradientMap(name=name, columns=self._reading(self.units.residual, False))
        above_rows, above_columns = False, False
        if has_upper and hasattr(self.method, "from_above"):
            above_rows, above_columns = self.method.from_above(role, self.growth)
        rows = self._rows(role)
        row_units = self.units.rows(role)
        column_units = self.units.columns(role)
        if above_rows and row_units is not None:
            rows = _forget(rows, row_units)
        columns = Axis() if column_units is None else self._reading(column_units, above_columns)
        return GradientMap(name=name, rows=rows, columns=columns)

    def _rows(self, role: str) -> Axis:
        units = self.units
        if tensor_names.writes_residual(role):
            return self._writing()
        if role.startswith("mlp."):
            neurons = units.rows(role)
            assert neurons is not None, role
            return Axis(_index(neurons), 1 / _copies(neurons))
        if role in (tensor_names.Q_WEIGHT, tensor_names.Q_BIAS):
            # Attention divides by the root of head_dim, which queries compensate. Their further channels are silent,
            # but what they would be multiplied with is not.
            ratio = len(units.rotary.sources) / units.rotary.num_sources
            share = 1 / _copies(units.q_heads) / ratio**0.5 / self._normed() / self._head_factor(units.q_heads)
            share = _each(share, self.target.head_dim)
            return _forget_inside(Axis(_index(units.q_channels), share), units.rotary, units.q_heads)
        heads = self._key_value_share()
        if role in (tensor_names.K_WEIGHT, tensor_names.K_BIAS):
            share = _each(heads / self._normed() / self._head_factor(units.kv_heads), self.target.head_dim)
            return _forget_inside(Axis(_index(units.k_channels), share), units.rotary, units.kv_heads)
        return Axis(
            _index(units.v_channels), _each(heads, self.target.head_dim) / _copies(units.plain).repeat(len(heads))
        )

    def _head_factor(self, heads: UnitMap) -> Tensor:
        """What the copies of a head carry for the sake of a norm over all heads (OLMoE); 1 for every other network."""
        if self.source.qk_norm != "projection":
            return torch.ones(len(heads.sources), dtype=torch.float64)
        return (len(heads.sources) / heads.num_sources / _copies(heads)).sqrt()

    def _head_gain(self, role: str) -> Axis:
        """Of the norm of each head its gradient stays, the sum over heads; the gains of all heads are divided."""
        if self.source.qk_norm != "projection":
            return Axis()
        heads = self.units.q_heads if role == tensor_names.Q_NORM else self.units.kv_heads
        channels = self.units.q_channels if role == tensor_names.Q_NORM else self.units.k_channels
        parts = 1 / _copies(heads) if role == tensor_names.Q_NORM else self._key_value_share()
        return Axis(_index(channels), _each(parts * self._head_factor(heads), self.target.head_dim))

    def _normed(self) -> float:
        """What queries and keys with norms of their own are multiplied by, for an epsilon that padding changes."""
        residual = self.units.residual
        return 1.0 if self.source.qk_norm == "none" else (len(residual.sources) / residual.size) ** 0.5

    def _key_value_share(self) -> Tensor:
        """Of each key-value head: its part of the queries that read the copies of one.

        Where copies are read by different queries (their slots are uneven), it is the mean over these.
        """
        slots_of_target = self.target.num_attention_heads // self.target.num_key_value_heads
        slots_of_source = self.source.num_attention_heads // self.source.num_key_value_heads
        parts = (1 / _copies(self.units.q_heads)).view(-1, slots_of_target)
        return parts.sum(dim=1) / slots_of_source

    def _writing(self) -> Axis:
        residual = self.units.residual
        share = 1 / (self._alpha() * _copies(residual))
        return Axis(_index(residual), share, padding=residual.padding)

    def _reading(self, units: UnitMap, above: bool) -> Axis:
        axis = Axis(_index(units), padding=units.padding)
        return _forget(axis, units) if above else axis

    def _gain(self, role: str) -> Axis:
        """Gains are multiplied so that readers see equal copies, and of a tied head's divided by their number."""
        residual = self.units.residual
        factor = (len(residual.sources) / residual.size) ** 0.5 / self._alpha()
        if role == tensor_names.FINAL_NORM and self.target.tie_word_embeddings:
            factor = factor / (self._alpha() * _copies(residual))
        return Axis(_index(residual), 1 / (factor * _copies(residual)), padding=residual.padding)

    def _alpha(self) -> Tensor:
        """What the copies of a channel are multiplied by."""
        residual = self.units.residual
        copies = _copies(residual)
        if self.growth.norm != "exact":
            return torch.ones_like(copies)
        return (len(residual.sources) / residual.num_sources / copies).sqrt()


def _index(units: UnitMap) -> Tensor | None:
    return None if units.is_identity else torch.tensor(units.sources)


def _copies(units: UnitMap) -> Tensor:
    return torch.tensor(units.copies, dtype=torch.float64)


def _each(of_head: Tensor, head_dim: int) -> Tensor:
    return of_head.repeat_interleave(head_dim)


def _forget(axis: Axis, units: UnitMap) -> Axis:
    return replace(axis, unknown=torch.tensor(units.is_new)) if units.has_new else axis


def _forget_inside(axis: Axis, inside: UnitMap, heads: UnitMap) -> Axis:
    """Drop the further channels of every head."""
    if not inside.has_new:
        return axis
    return replace(axis, unknown=torch.tensor(inside.is_new).repeat(len(heads.sources)))


def _scale_out(source: ModelConfig, target: ModelConfig, upcycling: UpcyclingConfig, seed: int) -> GradientMaps:
    for name in parameter_shapes(target):
        layer, role = split(name)
        if layer is None or not target.is_sparse(layer) or not role.startswith("mlp."):
            yield name, [GradientMap(name=name)]
        elif role.startswith("mlp.experts."):
            yield name, _experts(name, source, target, upcycling, seed)
        elif source.is_moe:
            copies = target.num_experts // source.num_experts
            rows = torch.arange(source.num_experts).repeat_interleave(copies)
            # Split copies see a part of the tokens each; equal ones a part of the gradient of every token.
            router = GradientMap(
                name=name, rows=Axis(rows), share=1 / copies, spread=copies if upcycling.method == "split" else 1.0
            )
            yield name, [router if role == tensor_names.ROUTER else GradientMap(name=name)]
        elif role in (tensor_names.SHARED_GATE, tensor_names.SHARED_UP, tensor_names.SHARED_DOWN):
            # The shared expert begins with a share of one half.
            yield name, [GradientMap(name=name.replace("mlp.shared_expert.", "mlp."), share=0.5)]
        else:
            yield name, []


def _experts(
    name: str, source: ModelConfig, target: ModelConfig, upcycling: UpcyclingConfig, seed: int
) -> list[GradientMap]:
    """Experts share the gradient of what they copy, by the tokens that come to them and by their gates.

    At balance the parts are equal on average; of the tokens of one batch they are not, and they cannot be known here.
    """
    layer, role = split(name)
    dense_role = f"{role.replace('mlp.experts.', 'mlp.')}.weight"
    shards = rules.num_shards(source, target)
    copies = target.num_experts // ((source.num_experts or 1) * shards)
    share = 1 / copies
    if shards > 1 and dense_role != tensor_names.GATE:  # multiplied by the root of their number
        share /= shards**0.5
    if not source.is_moe and target.shared_expert_intermediate_size and dense_role != tensor_names.DOWN:
        share /= 2  # what reads them is halved
    chosen = target.num_experts_per_tok / ((source.num_experts_per_tok or 1) * shards)
    gradient_map = GradientMap(
        name=name if source.is_moe else f"{_LAYERS}{layer}.{dense_role}", share=share, spread=copies / chosen
    )
    found = []
    for expert in range(target.num_experts):
        copy, shard = divmod(expert, shards)
        order = torch.from_numpy(neuron_order(target.moe_intermediate_size * shards, seed, f"{_LAYERS}{layer}.", copy))
        neurons = _neurons(order, shards, shard, upcycling)
        own = (
            replace(gradient_map, columns=neurons)
            if dense_role == tensor_names.DOWN
            else replace(gradient_map, rows=neurons)
        )
        found.append(replace(own, expert=expert // copies if source.is_moe else None))
    return found


def _neurons(order: Tensor, shards: int, shard: int, upcycling: UpcyclingConfig) -> Axis:
    """The neurons of an expert, `order` being that in which those of the whole copy are permuted or dropped."""
    neurons, dropped = torch.arange(len(order)), torch.zeros(len(order), dtype=torch.bool)
    if upcycling.method == "permute":
        neurons = order
    if upcycling.method == "drop":
        dropped[order[: math.ceil(upcycling.drop_ratio * len(order))]] = True
    size = len(order) // shards
    part = slice(shard * size, (shard + 1) * size)
    return Axis(neurons[part], unknown=dropped[part])
