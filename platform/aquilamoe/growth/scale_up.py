"""Scale-Up: a checkpoint becomes a wider (first) and deeper (then) one, block by block (METHODS 2, 3).

Of a Mixture of Experts the router is one more reader of the residual stream, and every expert a feed-forward with
neurons of its own: choices, shares and balance stay what they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aquilamoe.checkpoint import hf_config, tensor_names
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.config import plugins
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth import depth, rules
from aquilamoe.growth.dtypes import AS_SOURCE, DtypePolicy
from aquilamoe.growth.lazy_tensor import LazyTensor, as_rows, filled, scaled, stored
from aquilamoe.growth.stream import FILLER, Progress, Recipe, compute_dtype, rewrite, silent
from aquilamoe.growth.units import UnitMap, map_units
from aquilamoe.growth.width import Width

if TYPE_CHECKING:
    from torch import Tensor

ABOVE = " of the layer above"  # behind the labels of its tensors


def scale_up(
    source: Path,
    target: Path,
    target_config: ModelConfig,
    growth: GrowthConfig,
    seed: int,
    *,
    progress: Progress = silent,
    dtype_policy: DtypePolicy = AS_SOURCE,
) -> dict[str, str]:
    """Grow the checkpoint in `source` to `target_config` and write it to `target`, with its tokenizer files.

    The result depends only on the arguments. In memory there are some blocks of rows.

    Args:
        source: directory of a Hugging Face checkpoint with safetensors.
        target: directory to write.
        target_config: model of the target, with all of its sizes.
        growth: the method and its settings.
        seed: of all random numbers.
        progress: called with the number of tensors written, and of all tensors.
        dtype_policy: the types of the target's tensors; each as in the source by default.

    Returns:
        The SHA-256 of every tensor, in hexadecimal, by its name in the target.

    Raises:
        UserError: the growth cannot be done (see `rules.check`), or the source is damaged.
    """
    config = hf_config.read_checkpoint_config(source)
    rules.check(config.model, target_config, growth)
    grow = partial(recipes, source=config.model, target=target_config, growth=growth, seed=seed)
    layers = depth.map_layers(config.model, target_config, growth).sources
    return rewrite(
        source,
        target,
        (config, target_config),
        layers=layers,
        grow=grow,
        progress=progress,
        dtype_policy=dtype_policy,
    )


def recipes(
    reader: Reader, source: ModelConfig, target: ModelConfig, growth: GrowthConfig, seed: int
) -> Iterator[Recipe]:
    """Yield what every tensor of the target is made of: what is outside the layers, then a source layer at a time."""
    method = plugins.load("growth/methods", growth.method)
    layers = depth.map_layers(source, target, growth)
    outer = tensor_names.outer_shapes(target)
    width = Width(
        units=map_units(source, target, growth, seed),
        growth=growth,
        shapes=outer,
        tied=target.tie_word_embeddings,
        initializer_range=target.initializer_range,
        seed=seed,
        place="",
        dtype=compute_dtype(reader),
        divides_scores=source.particulars is None or source.particulars.attention_multiplier is None,
    )
    for name in outer:
        alone = {name: stored(reader, name)}
        yield Recipe([name], _traced(method.grow(alone, alone, width)[name], growth, alone[name]))
    for origin in range(source.num_hidden_layers):
        copies = [index for index, layer in enumerate(layers.sources) if layer == origin]
        upper = min(origin + 1, source.num_hidden_layers - 1)
        layer = _layer(reader, source, origin)
        # Beside a layer without experts one with experts has no namesakes: its own stand for them.
        above = _layer(reader, source, origin, ABOVE) | _layer(reader, source, upper, ABOVE)
        upper_layer = {role: above[role] for role in layer}
        shapes = tensor_names.role_shapes(target, copies[0]) | outer if copies else outer
        grown = {
            index: method.grow(layer, upper_layer, replace(width, shapes=shapes, place=f"model.layers.{index}."))
            for index in copies
        }
        for role in tensor_names.filler_roles(target) if copies and target.is_sparse(copies[0]) else ():
            names = [tensor_names.layer_name(target, index, role) for index in copies]
            yield Recipe(names, filled(shapes[role], 0.0).noted(FILLER))
        for role in layer:
            yield from _share(
                (
                    tensor_names.layer_name(target, index, role),
                    _traced(tensors[role], growth, layer[role], upper_layer[role]),
                    _softening(role, index, layers, growth),
                )
                for index, tensors in grown.items()
            )


def _traced(tensor: LazyTensor | Tensor, growth: GrowthConfig, *namesakes: LazyTensor) -> LazyTensor:
    """What a method returned; where it computed in memory, out of its namesakes as far as is known."""
    rows = as_rows(tensor)
    if not rows.in_memory:
        return rows
    parts = (*rows.parts, *(part for namesake in namesakes for part in namesake.parts))
    return replace(rows, parts=tuple(dict.fromkeys(parts))).noted(f"by method {growth.method}")


def _layer(reader: Reader, config: ModelConfig, index: int, where: str = "") -> dict[str, LazyTensor]:
    """Tensors of one source layer by role, without those that only the format demands. where: behind their labels."""
    fillers = tensor_names.filler_roles(config) if config.is_sparse(index) else []
    on_disk = tensor_names.layer_names(config, index)
    return {role: stored(reader, name, role + where) for role, name in on_disk.items() if role not in fillers}


def _softening(role: str, index: int, layers: UnitMap, growth: GrowthConfig) -> float:
    """The factor of what is written to the residual stream, by `new_layers`.

    `zero` silences all but the first copy of a layer (LLaMA-Pro: the function is kept); `scaled` lets the copies share.
    """
    if not tensor_names.writes_residual(role) or growth.new_layers == "copy":
        return 1.0
    if growth.new_layers == "scaled":
        return 1 / layers.copies[index]
    return 0.0 if layers.is_new[index] else 1.0


def _share(copies: Iterable[tuple[str, LazyTensor, float]]) -> Iterator[Recipe]:
    """Make one tensor of those copies of a layer that nothing random makes differ. Of each: name, tensor, factor."""
    equal: dict[float, list[str]] = {}
    tensors: dict[float, LazyTensor] = {}
    for name, tensor, factor in copies:
        if factor == 0:
            soft = filled(tensor.shape, 0.0).noted("zeros: a new layer is silent")
        elif factor == 1:
            soft = tensor
        else:
            soft = scaled(tensor, factor).noted(f"divided by {1 / factor:g}")
        if soft.is_random:
            yield Recipe([name], soft)
        else:
            equal.setdefault(factor, []).append(name)
            tensors.setdefault(factor, soft)
    for factor, sharers in equal.items():
        yield Recipe(sharers, tensors[factor])
