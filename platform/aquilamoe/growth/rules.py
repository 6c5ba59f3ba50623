"""What can be grown into what, and which growths keep the function: decided without torch, for plans and messages."""

import math
from collections.abc import Sequence

from aquilamoe.config import plugins
from aquilamoe.config.messages import UserError
from aquilamoe.config.particulars import Particulars
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth import rotary
from aquilamoe.growth.depth import map_layers
from aquilamoe.growth.units import map_units

_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")
_EXPERTS = ("num_experts", "num_experts_per_tok")
# What the first experts decide, and further ones keep.
_FEED_FORWARDS = (
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "mlp_only_layers",
)
# Neither is part of the function that is grown: how long a context may be, and what a fresh start would draw.
_FREE = ("max_position_embeddings", "initializer_range")
_ROTARY = ("rope_theta", "rope_scaling")  # checked by what follows from them


def check(source: ModelConfig, target: ModelConfig, growth: GrowthConfig | UpcyclingConfig) -> None:
    """Raise UserError when the source cannot become the target: larger and dense, or (upcycling) with experts."""
    if isinstance(growth, GrowthConfig):
        _check_scale_up(source, target, growth)
    else:
        _check_scale_out(source, target, growth)


def preserves(growth: GrowthConfig | UpcyclingConfig, source: ModelConfig, target: ModelConfig) -> bool:
    """Whether the growth claims that source and target compute the same function (METHODS sections 2, 3, 5).

    True means equal up to the rounding of the checkpoint's dtype; False means that some weights make them differ.
    """
    if isinstance(growth, UpcyclingConfig):
        if growth.method == "split":  # with one expert for a token there is no fence that a token could be at
            return target.norm_topk_prob and target.num_experts_per_tok == 1
        return growth.method in ("copy", "permute") and _keeps_shares(source, target)
    method = plugins.load("growth/methods", growth.method)
    # Plain copies change the mean square that a norm divides by, unless every channel has as many as the ratio.
    keeps_norms = growth.norm != "copy" or target.hidden_size % source.hidden_size == 0
    units = map_units(source, target, growth)
    keeps_width = keeps_norms and bool(method.keeps_function(units, source.num_hidden_layers, growth))
    return keeps_width and _keeps_depth(source, target, growth)


def warnings(growth: GrowthConfig | UpcyclingConfig, source: ModelConfig, target: ModelConfig) -> list[str]:
    """What can be done and will disappoint, a line each."""
    if not isinstance(growth, UpcyclingConfig) or not source.is_moe:
        return []
    copies = target.num_experts // source.num_experts
    old, new = source.num_experts_per_tok, target.num_experts_per_tok
    if growth.method not in ("copy", "permute") or new >= copies * old or preserves(growth, source, target):
        return []
    return [
        f"num_experts_per_tok: a token chooses {new} of {copies} equal copies of its {old} experts, so the function "
        "changes and the router gets no gradient that separates copies; use upcycling=split, "
        f"num_experts_per_tok {copies * old}, or upcycling=noise"
    ]


def _keeps_shares(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether tokens go through what they went through, by the same shares.

    Of a dense source they do, whatever the router does, when shares sum to 1 over experts of one function. Copies of
    experts have one score, so that a token chooses all copies of an expert before the next expert; where shares are
    probabilities among all experts, each copy has its part of the original's, and all of them must be chosen.
    """
    if not source.is_moe:
        return target.norm_topk_prob or target.num_experts_per_tok == target.num_experts
    copies = target.num_experts // source.num_experts
    old, new = source.num_experts_per_tok, target.num_experts_per_tok
    return new == copies * old or (target.norm_topk_prob and old == 1 and new <= copies)


def _keeps_depth(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> bool:
    """Whether the first copies of all layers are in order, and what is between them is silent."""
    layers = map_layers(source, target, growth)
    originals = [layer for layer, is_new in zip(layers.sources, layers.is_new, strict=True) if not is_new]
    if originals != list(range(source.num_hidden_layers)):
        return False
    return growth.new_layers == "zero" or not layers.has_new


def _check_scale_up(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> None:
    if source.num_experts != target.num_experts:
        raise UserError(
            f"num_experts: target {target.num_experts}, source {source.num_experts}; a scale-up keeps the experts, "
            "leave num_experts out and add experts in a scale_out stage"
        )
    grows = (*_WIDTHS, *_EXPERT_WIDTHS, "num_hidden_layers", "head_dim", "vocab_size", "max_position_embeddings")
    for field in grows:
        if field != "intermediate_size" or source.num_sparse_layers < source.num_hidden_layers:  # else no layer has it
            _check_not_smaller(field, source, target, "scale-up")
    for field in ModelConfig.model_fields:
        further = ("rms_norm_eps", "mlp_only_layers", "layer_types", "particulars", *_FREE, *_ROTARY)
        if field not in (*grows, *further):
            _check_kept(field, source, target, "a scale-up cannot change it, keep the source's")
    _check_eps(source, target, growth)
    _check_mean(source, target)
    _check_head_dim(source, target)
    rotary.check(source, target)
    _check_layers(source, target, growth)
    _check_windows(source, target, growth)
    _check_particulars(source, target, growth)
    _check_experts_of_layers(source, target, growth)
    if not map_units(source, target, growth).q_heads.is_surjective:
        _refuse_heads(source, target)
    method = plugins.load("growth/methods", growth.method)
    if hasattr(method, "check"):
        method.check(source, target, growth)


def _check_eps(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> None:
    expected = growth.grown_eps(source, target.hidden_size)
    if growth.norm != "zero_pad":
        _check_kept("rms_norm_eps", source, target, "a scale-up cannot change it, keep the source's")
    elif not math.isclose(target.rms_norm_eps, expected, rel_tol=1e-9):
        raise UserError(
            f"rms_norm_eps: target {target.rms_norm_eps}, source {source.rms_norm_eps}; norm zero_pad from hidden_size "
            f"{source.hidden_size} to {target.hidden_size} changes it, set rms_norm_eps to {expected!r}"
        )


def _check_mean(source: ModelConfig, target: ModelConfig) -> None:
    """Norms that subtract the mean of all channels need as many copies of each."""
    old, new = source.hidden_size, target.hidden_size
    if source.has_layer_norm and new % old:
        raise UserError(
            f"hidden_size: target {new}, source {old}; LayerNorm subtracts the mean of all channels, which stays at "
            f"integer ratios only, use {new // old * old} or {(new // old + 1) * old}"
        )


def _check_head_dim(source: ModelConfig, target: ModelConfig) -> None:
    old, new = source.head_dim, target.head_dim
    if new > old and source.qk_norm != "none":
        raise UserError(
            f"head_dim: target {new}, source {old}; a norm over each head (qk_norm {source.qk_norm}) would count the "
            f"new channels, keep {old} and grow num_attention_heads"
        )
    if new > old and source.rotary_dim < old:
        raise UserError(
            f"head_dim: target {new}, source {old}; of each head {source.rotary_dim} channels rotate, and others would "
            f"in a longer one, keep {old} and grow num_attention_heads"
        )
    if new % old:
        raise UserError(
            f"head_dim: target {new}, source {old}; rotary frequencies match at integer ratios only, use "
            f"{new // old * old} or {(new // old + 1) * old}"
        )


def _check_layers(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> None:
    if isinstance(growth.depth, str):
        return
    if len(growth.depth) != target.num_hidden_layers:
        raise UserError(
            f"growth.depth: {len(growth.depth)} layers in the list, num_hidden_layers is {target.num_hidden_layers}; "
            "list one layer of the source for each layer of the target"
        )
    if max(growth.depth) >= source.num_hidden_layers:
        raise UserError(
            f"growth.depth: layer {max(growth.depth)} in the list, the source has {source.num_hidden_layers} layers; "
            f"count them from 0 to {source.num_hidden_layers - 1}"
        )


def _check_windows(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> None:
    """A copy of a layer looks back as far as the layer."""
    layers = map_layers(source, target, growth).sources
    expected = [source.window(layer) for layer in layers]
    found = [target.window(layer) for layer in range(target.num_hidden_layers)]
    if found != expected:
        layer = next(layer for layer, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
        raise UserError(
            f"layer_types: window {_tokens(found[layer])} in layer {layer}, which copies layer {layers[layer]} with "
            f"{_tokens(expected[layer])}; leave layer_types and sliding_window out, they follow the source's"
        )


def _check_particulars(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> None:
    """A copy of a layer rotates as the layer does; all else stays."""
    layers, old = map_layers(source, target, growth).sources, source.particulars
    nope = tuple(layer for layer, origin in enumerate(layers) if old is not None and origin in old.nope_layers)
    _check_settings(source, target, old and old.model_copy(update={"nope_layers": nope}))


def _check_settings(source: ModelConfig, target: ModelConfig, expected: Particulars | None) -> None:
    if target.particulars != (expected if expected and expected.present else None):
        raise UserError(
            f"particulars: target {_settings(target)}, source {_settings(source)}; a growth keeps them, leave them out"
        )


def _settings(model: ModelConfig) -> str:
    return "none" if model.particulars is None else f"{model.particulars.model_dump(mode='json')}"


def _tokens(window: int | None) -> str:
    return "none" if window is None else f"{window} tokens"


def _check_experts_of_layers(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> None:
    """A copy of a layer has experts where the layer has them; a scale-up adds no shared expert."""
    dense = dense_layers(source, target, growth)
    if target.mlp_only_layers != dense:
        raise UserError(
            f"mlp_only_layers: target {list(target.mlp_only_layers)}, but the copies of the source's dense layers "
            f"{list(source.mlp_only_layers)} are {list(dense)}; set mlp_only_layers to that"
        )
    old, new = source.shared_expert_intermediate_size, target.shared_expert_intermediate_size
    if new and not old:
        raise UserError(
            f"shared_expert_intermediate_size: target {new}, the source has no shared expert; a scale-up adds "
            "none, remove the field"
        )


def dense_layers(source: ModelConfig, target: ModelConfig, growth: GrowthConfig) -> tuple[int, ...]:
    """Layers of the target that stay without experts: the copies of the source's."""
    copies = map_layers(source, target, growth).sources
    return tuple(layer for layer, origin in enumerate(copies) if origin in source.mlp_only_layers)


def num_shards(source: ModelConfig, target: ModelConfig) -> int:
    """Into how many experts each copy of the dense feed-forward is cut (METHODS 5, fine-grained): 1 leaves it whole."""
    return 1 if source.is_moe else source.intermediate_size // target.moe_intermediate_size


def _check_scale_out(source: ModelConfig, target: ModelConfig, upcycling: UpcyclingConfig) -> None:
    if not target.is_moe:
        raise UserError("num_experts: target 0; a scale-out makes experts, set num_experts to at least 2")
    _check_not_smaller("max_position_embeddings", source, target, "scale-out")
    for field in ModelConfig.model_fields:
        if field in (*_WIDTHS, "num_hidden_layers") and field != "intermediate_size":
            _check_kept(field, source, target, "a scale-out keeps the sizes, change them in a scale_up stage before it")
        elif field not in (*_EXPERTS, *_FEED_FORWARDS, *_FREE, *_ROTARY, "particulars"):
            _check_kept(field, source, target, "a scale-out cannot change it, keep the source's")
    _check_settings(source, target, source.with_experts)
    rotary.check(source, target)
    if upcycling.method == "mix":
        _check_mix(source, target, upcycling)
        return
    if source.is_moe:
        _check_more_experts(source, target)
    if upcycling.method == "split":
        _check_split(source, target)
    elif not source.is_moe:
        _check_shards(source, target, upcycling)


def _check_split(source: ModelConfig, target: ModelConfig) -> None:
    """Experts that exist part in as many copies each, and a token goes through as many as before."""
    if not source.is_moe:
        raise UserError(
            "upcycling.method: split of a source without experts; it parts copies of experts, use upcycling=copy first"
        )
    old, new = source.num_experts, target.num_experts
    if new == old:
        raise UserError(
            f"num_experts: target {new}, source {old}; a split makes several of each expert, use a multiple, e.g. "
            f"{2 * old}"
        )
    _check_kept("num_experts_per_tok", source, target, "a split keeps it, use upcycling=copy to raise it with experts")
    if new // old > source.hidden_size:
        raise UserError(
            f"num_experts: target {new} is {new // old} copies of each expert, which {source.hidden_size} channels "
            f"cannot separate; use at most {source.hidden_size * old}"
        )


def check_sources(sources: Sequence[tuple[str, ModelConfig]], target: ModelConfig) -> None:
    """Raise UserError unless these models, with what they are called, can become the experts of one."""
    if len(sources) < 2:
        raise UserError(f"sources: {len(sources)} checkpoint; a mix makes an expert of each, name 2 or more")
    (first, model), *others = sources
    for place, (name, other) in enumerate(others, 1):
        if name in [earlier for earlier, _ in sources[:place]]:
            raise UserError(f"sources: {name} is named twice; name as many checkpoints as there are to be experts")
        for field in ModelConfig.model_fields:
            one, another = getattr(model, field), getattr(other, field)
            if field not in _FREE and one != another:
                raise UserError(
                    f"sources: {field} is {one} in {first} and {another} in {name}; a mix is of checkpoints of one "
                    "shape, choose those that were trained from one checkpoint"
                )
    if target.num_experts != len(sources):
        raise UserError(
            f"num_experts: target {target.num_experts}, but {len(sources)} sources make as many experts; leave it out"
        )


def _check_mix(source: ModelConfig, target: ModelConfig, upcycling: UpcyclingConfig) -> None:
    """Experts are whole feed-forwards, and beside them is what a dense source has."""
    if upcycling.texts is None:
        raise UserError(
            "upcycling.texts: required but not set; name the text of each source of a mix, e.g. upcycling.texts=[zh,en]"
        )
    if source.is_moe:
        raise UserError(
            f"num_experts: the sources have {source.num_experts} experts; a mix makes an expert of each dense "
            "checkpoint, choose dense ones"
        )
    old = source.intermediate_size
    for field, expected in (("moe_intermediate_size", old), ("intermediate_size", old), (_EXPERT_WIDTHS[1], 0)):
        if (new := getattr(target, field)) != expected:
            raise UserError(
                f"{field}: target {new}, source {expected}; experts of a mix are whole feed-forwards and have no other "
                "beside them, leave it out"
            )


def _check_more_experts(source: ModelConfig, target: ModelConfig) -> None:
    """Experts out of experts: whole ones, each as often as the others."""
    for field in _FEED_FORWARDS:
        _check_kept(field, source, target, "a scale-out of experts copies whole ones, keep the source's")
    _check_not_smaller("num_experts_per_tok", source, target, "scale-out")
    if target.num_experts % source.num_experts:
        old, more = source.num_experts, target.num_experts // source.num_experts + 1
        raise UserError(
            f"num_experts: target {target.num_experts}, source {old}; every expert gets as many copies, use a multiple "
            f"of {old}, e.g. {more * old}"
        )


def _check_shards(source: ModelConfig, target: ModelConfig, upcycling: UpcyclingConfig) -> None:
    """Experts may be equal parts of the dense feed-forward, when a token always goes through whole ones."""
    old, new = source.intermediate_size, target.moe_intermediate_size
    if target.mlp_only_layers:
        _check_kept("intermediate_size", source, target, "dense layers are copied, set moe_intermediate_size instead")
    if target.shared_expert_intermediate_size not in (0, old):
        raise UserError(
            f"shared_expert_intermediate_size: target {target.shared_expert_intermediate_size}, the source's "
            f"feed-forward has {old} neurons; a shared expert is a copy of it, use {old} or 0"
        )
    if old % new:
        raise UserError(
            f"moe_intermediate_size: target {new}, source {old}; experts are the dense feed-forward or equal parts of "
            f"it, use {old} or a divisor of it"
        )
    shards = num_shards(source, target)
    for field in _EXPERTS:
        count = getattr(target, field)
        if count % shards:
            raise UserError(
                f"{field}: {count} experts, but moe_intermediate_size {new} cuts the source's {old} into {shards} "
                f"parts, and tokens go through whole ones; use a multiple of {shards}"
            )
    no_order = upcycling.router_init == "zero" or upcycling.router_std == 0
    if shards > 1 and no_order and target.num_experts_per_tok < target.num_experts:
        raise UserError(
            f"upcycling.router_init: {upcycling.router_init} with std {upcycling.router_std} scores all experts alike, "
            f"so that the {shards} parts of a feed-forward are routed separately; use normal or orthogonal with a std "
            "above 0"
        )


def _check_not_smaller(field: str, source: ModelConfig, target: ModelConfig, what: str) -> None:
    old, new = getattr(source, field), getattr(target, field)
    if new < old:
        raise UserError(
            f"{field}: target {new} is smaller than the source's {old}; a {what} never shrinks, use {old} or more"
        )


def _check_kept(field: str, source: ModelConfig, target: ModelConfig, remedy: str) -> None:
    old, new = getattr(source, field), getattr(target, field)
    if old != new:
        raise UserError(f"{field}: target {new}, source {old}; {remedy}")


def _refuse_heads(source: ModelConfig, target: ModelConfig) -> None:
    """More groups with fewer heads each can leave a query head without a place beside its own keys and values."""
    heads, groups = source.num_attention_heads, source.num_key_value_heads
    new_heads, new_groups = target.num_attention_heads, target.num_key_value_heads
    fewest_copies = new_groups // groups
    enough = -(-heads // groups // fewest_copies) * new_groups
    raise UserError(
        f"num_attention_heads: target {new_heads} in {new_groups} groups leaves out query heads of the source ({heads} "
        f"in {groups} groups); use {enough} or more heads, or num_key_value_heads {groups}"
    )
