"""The way back: a checkpoint becomes a smaller one, by merging copies and dropping what does nothing.

`find` decides what goes, by `growth.copies`; `shrink` writes the smaller checkpoint, a block of rows at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aquilamoe.checkpoint import hf_config
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.config.growth import ShrinkConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth.dtypes import AS_SOURCE, DtypePolicy
from aquilamoe.growth.reduction import Reduction, recipes
from aquilamoe.growth.stream import Progress, rewrite, silent

_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
# These follow from the layers that stay, or are no part of the function.
_FOLLOW = ("mlp_only_layers", "layer_types", "particulars", "max_position_embeddings", "initializer_range")


def shrink(
    source: Path,
    target: Path,
    target_config: ModelConfig,
    reduction: Reduction,
    *,
    progress: Progress = silent,
    dtype_policy: DtypePolicy = AS_SOURCE,
) -> dict[str, str]:
    """Write what stays of the checkpoint in `source` to `target`, with its tokenizer files.

    Args:
        source: directory of a Hugging Face checkpoint with safetensors.
        target: directory to write.
        target_config: model of the target, with all of its sizes.
        reduction: what stays, as `find` found it.
        progress: called with the number of tensors written, and of all tensors.
        dtype_policy: the types of the target's tensors; each as in the source by default.

    Returns:
        The SHA-256 of every tensor, in hexadecimal, by its name in the target.

    Raises:
        UserError: the source is damaged.
    """
    config = hf_config.read_checkpoint_config(source)
    return rewrite(
        source,
        target,
        (config, target_config),
        layers=[layer.origin for layer in reduction.layers],
        grow=partial(recipes, source=config.model, target=target_config, reduction=reduction),
        progress=progress,
        dtype_policy=dtype_policy,
    )


def find(
    source: Path, target_config: ModelConfig, shrinking: ShrinkConfig, *, progress: Progress = silent
) -> Reduction:
    """Decide what stays of the checkpoint in `source`.

    Raises:
        UserError: the checkpoint has more units that differ than the target has.
    """
    from aquilamoe.growth import copies

    config = hf_config.read_checkpoint_config(source).model
    with Reader(source) as reader:
        kept = kept_layers(reader, config, target_config.num_hidden_layers, shrinking)
        return copies.find(reader, config, target_config, kept, progress=progress)


def kept_layers(reader: Reader, source: ModelConfig, count: int | None, shrinking: ShrinkConfig) -> tuple[int, ...]:
    """The layers of the source that stay: as listed, or all but the last silent ones.

    count: of the target; None for what follows.
    """
    everything = tuple(range(source.num_hidden_layers))
    is_fewer = type(count) is int and 0 < count < len(everything)
    if shrinking.layers is None and not is_fewer:  # what is no number of layers is refused with all other sizes
        return everything
    from aquilamoe.growth import copies

    found = copies.silent_layers(reader, source)
    if shrinking.layers is not None:
        return _listed(source, shrinking.layers, count, found)
    assert count is not None
    going = len(everything) - count
    if len(found) < going:
        raise UserError(
            f"num_hidden_layers: target {count}, but {len(found)} of {len(everything)} layers of the source are "
            f"silent; use {len(everything) - len(found)} or more"
        )
    dropped = found[len(found) - going :]
    return tuple(layer for layer in everything if layer not in dropped)


def _listed(
    source: ModelConfig, layers: tuple[int, ...], count: int | None, silent_layers: Sequence[int]
) -> tuple[int, ...]:
    """Layers as the user lists them."""
    if layers[-1] >= source.num_hidden_layers:
        raise UserError(
            f"shrink.layers: layer {layers[-1]} in the list, the source has {source.num_hidden_layers} layers; count "
            f"them from 0 to {source.num_hidden_layers - 1}"
        )
    if count is not None and count != len(layers):
        raise UserError(
            f"shrink.layers: {len(layers)} layers in the list, num_hidden_layers is {count}; set one of them"
        )
    loud = [layer for layer in range(source.num_hidden_layers) if layer not in layers and layer not in silent_layers]
    if loud:
        raise UserError(
            f"shrink.layers: layer {loud[0]} is not in the list, and adds something to what it reads; list every layer "
            "that is not silent"
        )
    return layers


def followers(source: ModelConfig, layers: Sequence[int], named: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the target that follow from the layers that stay, and from the sizes that are named."""
    types = [source.layer_types[layer] for layer in layers] if source.layer_types else []
    dense = [place for place, layer in enumerate(layers) if layer in source.mlp_only_layers]
    found = {"num_hidden_layers": len(layers), "layer_types": types, "mlp_only_layers": dense}
    if source.particulars is not None:
        nope = tuple(place for place, layer in enumerate(layers) if layer in source.particulars.nope_layers)
        found["particulars"] = source.particulars.model_copy(update={"nope_layers": nope}).model_dump()
    experts = named.get("num_experts", source.num_experts)
    if not source.is_moe or experts == source.num_experts:
        return found
    if experts == 0:
        absent = dict.fromkeys(("num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"), 0)
        return {**found, **absent, "mlp_only_layers": [], "norm_topk_prob": True}
    if type(experts) is int and experts > 0 and source.num_experts % experts == 0:
        found["num_experts_per_tok"] = chosen_after(source, experts) or source.num_experts_per_tok
    return found


def check(source: ModelConfig, target: ModelConfig) -> None:
    """Raise UserError when the target is not the source with smaller sizes."""
    smaller = [field for field in _SIZES if getattr(target, field) < getattr(source, field)]
    is_dense = source.is_moe and not target.is_moe
    for field in ModelConfig.model_fields:
        old, new = getattr(source, field), getattr(target, field)
        if field in _SIZES:
            if new > old and not (is_dense and field == "intermediate_size"):
                raise UserError(
                    f"{field}: target {new} is larger than the source's {old}; a shrink never grows, use {old} or less"
                )
        elif field not in _FOLLOW and old != new and not (is_dense and field == "norm_topk_prob"):
            raise UserError(f"{field}: target {new}, source {old}; a shrink cannot change it, keep the source's")
    if not smaller:
        raise UserError(
            "num_hidden_layers: no size of the target is smaller than the source's; set at least one of "
            f"{', '.join(_SIZES[:5])}, ..."
        )
    _check_positions(source, target)
    _check_experts(source, target)


def _check_positions(source: ModelConfig, target: ModelConfig) -> None:
    old, new = source.max_position_embeddings, target.max_position_embeddings
    if new > old or (new < old and source.rope_scaling is not None):
        raise UserError(f"max_position_embeddings: target {new}, source {old}; keep the source's")
    if source.has_layer_norm and target.hidden_size != source.hidden_size:
        raise UserError(
            f"hidden_size: target {target.hidden_size}, source {source.hidden_size}; LayerNorm subtracts the mean of "
            f"all channels, keep {source.hidden_size}"
        )
    old, new = source.head_dim, target.head_dim
    if new == old:
        return
    is_plain = source.rope_scaling is None and source.qk_norm == "none" and source.particulars is None
    if old % new or not is_plain:
        why = f"{old} is no multiple of it" if old % new else "other frequencies or norms would follow from it"
        raise UserError(f"head_dim: target {new}, source {old}; {why}, keep {old}")


def _check_experts(source: ModelConfig, target: ModelConfig) -> None:
    if not target.is_moe:
        return
    old, new = source.num_experts, target.num_experts
    if (source.shared_expert_intermediate_size == 0) != (target.shared_expert_intermediate_size == 0):
        raise UserError(
            f"shared_expert_intermediate_size: target {target.shared_expert_intermediate_size}, source "
            f"{source.shared_expert_intermediate_size}; a shared expert stays or goes with all experts, keep it"
        )
    if old == new and target.num_experts_per_tok != source.num_experts_per_tok:
        raise UserError(
            f"num_experts_per_tok: target {target.num_experts_per_tok}, source {source.num_experts_per_tok}; tokens "
            "choose fewer only where experts are fewer, keep the source's"
        )
    if old == new:
        return
    if old % new or target.num_experts_per_tok != chosen_after(source, new):
        if old % new:
            raise UserError(
                f"num_experts: target {new}, source {old}; copies are as many of each expert, use a divisor of {old}"
            )
        raise UserError(
            f"num_experts_per_tok: target {target.num_experts_per_tok}, but of {old // new} copies of each expert a "
            f"token chooses {source.num_experts_per_tok}; leave it out, or keep num_experts"
        )


def chosen_after(source: ModelConfig, num_experts: int) -> int | None:
    """Experts that a token chooses once copies are merged; None where that is no number of whole experts."""
    copies, chosen = source.num_experts // num_experts, source.num_experts_per_tok
    if chosen % copies == 0:
        return chosen // copies
    return 1 if source.norm_topk_prob and chosen < copies else None
