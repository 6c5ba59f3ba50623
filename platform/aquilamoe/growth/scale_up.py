"""Scale-Up: a dense checkpoint becomes a wider (first) and deeper (then) one, a layer at a time (METHODS 2, 3)."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from aquilamoe.config import plugins
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth import depth, rules
from aquilamoe.growth.stream import Progress, Stream, compute_dtype, rewrite, silent
from aquilamoe.growth.units import UnitMap, map_units
from aquilamoe.growth.width import Width
from aquilamoe.weights import configuration, names
from aquilamoe.weights.store import Reader


def scale_up(
    source: Path,
    target: Path,
    target_config: ModelConfig,
    growth: GrowthConfig,
    seed: int,
    progress: Progress = silent,
) -> None:
    """Grow the dense checkpoint in `source` to `target_config` and write it to `target`, with its tokenizer files.

    The result depends on the arguments alone and keeps the source's dtype. In memory there is one grown layer, or the
    embedding. Raises UserError for a growth that cannot be done (see `rules.check`) and for a damaged source.
    """
    source_config = configuration.read_config(source)
    rules.check(source_config, target_config, growth)

    def grow(reader: Reader) -> Stream:
        return _grow(reader, source_config, target_config, growth, seed)

    rewrite(source, target, (source_config, target_config), grow, progress)


class _Source(Mapping[str, Tensor]):
    """Tensors of one source layer (or outside the layers) by role; each is read when it is asked for, and not kept."""

    def __init__(self, reader: Reader, names_by_role: Mapping[str, str], dtype: torch.dtype) -> None:
        self._reader, self._names, self._dtype = reader, names_by_role, dtype

    def __getitem__(self, role: str) -> Tensor:
        return self._reader.get(self._names[role]).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _grow(reader: Reader, source: ModelConfig, target: ModelConfig, growth: GrowthConfig, seed: int) -> Stream:
    """Yield every tensor of the target in file order."""
    method = plugins.load("growth/methods", growth.method)
    dtype = compute_dtype(reader.dtype(names.EMBEDDING))
    layers = depth.map_layers(source, target, growth)
    roles, outer = names.role_shapes(target, 0), names.outer_shapes(target)
    width = Width(
        units=map_units(source, target, growth, seed),
        growth=growth,
        shapes=roles | outer,
        tied=target.tie_word_embeddings,
        initializer_range=target.initializer_range,
        seed=seed,
        place="",
        dtype=dtype,
    )

    def outside(name: str) -> tuple[str, Tensor]:
        alone = _Source(reader, {name: name}, dtype)
        return name, method.grow(alone, alone, width)[name]

    yield outside(names.EMBEDDING)
    for index, origin in enumerate(layers.sources):
        upper = min(origin + 1, source.num_hidden_layers - 1)
        layer, upper_layer = (_Source(reader, names.layer_names(source, i), dtype) for i in (origin, upper))
        grown = dict(method.grow(layer, upper_layer, replace(width, place=f"model.layers.{index}.")))
        _soften_copy(grown, index, layers, growth.new_layers)
        for role in roles:
            yield names.layer_name(target, index, role), grown.pop(role)
    for name in outer:
        if name != names.EMBEDDING:
            yield outside(name)


def _soften_copy(grown: dict[str, Tensor], index: int, layers: UnitMap, new_layers: str) -> None:
    """Scale what a layer writes to the residual stream, in place, as `new_layers` says.

    `zero` silences all but the first copy of a layer (LLaMA-Pro: the function is kept); `scaled` lets the copies share.
    """
    if new_layers == "zero" and layers.is_new[index]:
        factor = 0.0
    elif new_layers == "scaled":
        factor = 1 / layers.copies[index]
    else:
        return
    for role in (names.O_WEIGHT, names.DOWN):
        grown[role] = grown[role] * factor
