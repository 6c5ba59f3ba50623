"""What can be grown into what, and which growths keep the function: answers without torch, for plans and messages."""

from aquilamoe.config import plugins
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth.units import map_units

_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_EXPERTS = ("num_experts", "num_experts_per_tok")
# Neither is part of the function that is grown: how long a context may be, and what a fresh start would draw.
_FREE = ("max_position_embeddings", "initializer_range")


def check(source: ModelConfig, target: ModelConfig, growth: GrowthConfig | UpcyclingConfig) -> None:
    """Raise UserError when the source cannot become the target: larger and dense, or (upcycling) with experts."""
    if isinstance(growth, GrowthConfig):
        _check_scale_up(source, target)
    else:
        _check_scale_out(source, target)


def preserves(growth: GrowthConfig | UpcyclingConfig, source: ModelConfig, target: ModelConfig) -> bool:
    """Whether the growth claims that source and target compute the same function (METHODS sections 2, 3, 5).

    True means equal up to the rounding of the checkpoint's dtype; False means that some weights make them differ.
    """
    if isinstance(growth, UpcyclingConfig):
        # Gates that sum to 1 over equal experts, whatever the router says.
        return growth.method == "copy"
    units = map_units(source, target)
    method = plugins.load("growth/methods", growth.method)
    # Plain copies change the mean square that a norm divides by, unless every channel has as many as the ratio says.
    keeps_norms = growth.norm == "exact" or target.hidden_size % source.hidden_size == 0
    keeps_depth = growth.new_layers == "zero" or target.num_hidden_layers == source.num_hidden_layers
    return keeps_norms and keeps_depth and bool(method.keeps_function(units, source.num_hidden_layers))


def _check_scale_up(source: ModelConfig, target: ModelConfig) -> None:
    if source.is_moe or target.is_moe:
        raise UserError(
            f"num_experts: target {target.num_experts}, source {source.num_experts}; a scale-up makes dense models of "
            "dense models, leave num_experts out and add experts in a scale_out stage"
        )
    grows = (*_WIDTHS, "num_hidden_layers", "max_position_embeddings")
    for field in grows:
        _check_not_smaller(field, source, target, "scale-up")
    for field in ModelConfig.model_fields:
        if field not in grows and field not in _FREE:
            _check_kept(field, source, target, "a scale-up cannot change it, keep the source's")
    if not map_units(source, target).q_heads.is_onto:
        _refuse_heads(source, target)


def _check_scale_out(source: ModelConfig, target: ModelConfig) -> None:
    if source.is_moe:
        raise UserError(
            f"num_experts: target {target.num_experts}, but the source already has {source.num_experts} experts; a "
            "scale-out starts from a dense checkpoint, choose one as its source"
        )
    if not target.is_moe:
        raise UserError("num_experts: target 0, source 0; a scale-out makes experts, set num_experts to at least 2")
    _check_not_smaller("max_position_embeddings", source, target, "scale-out")
    for field in ModelConfig.model_fields:
        if field in (*_WIDTHS, "num_hidden_layers"):
            _check_kept(field, source, target, "a scale-out keeps the sizes, change them in a scale_up stage before it")
        elif field not in _EXPERTS and field not in _FREE:
            _check_kept(field, source, target, "a scale-out cannot change it, keep the source's")


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
