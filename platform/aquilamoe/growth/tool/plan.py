"""What a growth would do and take, from headers only: rows for the plan's tables.

Where a tensor comes from is read off the recipe by which it would be written, of which no row is made.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from aquilamoe.checkpoint import sharding, tensor_names
from aquilamoe.checkpoint.safetensors_header import ITEM_BYTES
from aquilamoe.checkpoint.sources import Sources
from aquilamoe.config.growth import GrowthConfig, ShrinkConfig
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.numbers import Config
from aquilamoe.files import free_bytes
from aquilamoe.growth.bounds import calibration_bytes, growth_bytes
from aquilamoe.growth.depth import map_layers
from aquilamoe.growth.lazy_tensor import LazyTensor
from aquilamoe.growth.mix import FITTED
from aquilamoe.growth.mix import recipes as mix_recipes
from aquilamoe.growth.reduction import recipes as shrink_recipes
from aquilamoe.growth.scale_out import recipes as scale_out_recipes
from aquilamoe.growth.scale_up import ABOVE
from aquilamoe.growth.scale_up import recipes as scale_up_recipes
from aquilamoe.growth.stream import Recipe
from aquilamoe.growth.tool.held_out import CALIBRATION_LENGTH
from aquilamoe.growth.tool.request import Request
from aquilamoe.growth.units import UnitMap, map_units


@dataclass(frozen=True)
class Origin:
    """One tensor of the target.

    name: on disk.
    layer: that it is in, None outside the layers.
    role: in its layer; outside the layers its name.
    family: what it is called on a line that it shares with its equals in other layers and among other experts.
    rows: what it would be written of.
    """

    name: str
    layer: int | None
    role: str
    family: str
    rows: LazyTensor

    @property
    def sources(self) -> tuple[str, ...]:
        """The source's tensors that it would be made of, on disk."""
        return tuple(dict.fromkeys(part.name for part in self.rows.parts))

    @property
    def how(self) -> str:
        """What would be done with them."""
        return "; ".join(self.rows.notes) or "copied"


@dataclass(frozen=True)
class TensorLine:
    """A line of the plan's table of tensors: one tensor, or its equals in many layers and among many experts."""

    tensor: str
    layers: str
    shape: tuple[int, ...]
    source: str
    how: str


@dataclass(frozen=True)
class Size:
    """A field of the model, of source and target; `why` is empty where both are equal."""

    field: str
    source: str
    target: str
    why: str


@dataclass(frozen=True, kw_only=True)
class GrowthCost:
    """What a growth takes: bytes of disk, bytes of memory at most, and seconds at `disk_bytes_per_s`."""

    read_bytes: int
    written_bytes: int
    files: int
    memory_bytes: int
    free_bytes: int
    seconds: float


def document(request: Request, disk_bytes_per_s: float) -> dict[str, Any]:
    """The whole plan as one JSON document, a line of it for every tensor."""
    return {
        "version": 1,
        "action": "plan",
        "source": str(request.source.directory),
        **({"sources": [str(path) for path in request.directories]} if request.others else {}),
        "target": str(request.target),
        "kind": request.kind,
        "method": request.growth.method,
        "preserving": request.preserving,
        "model": request.model.model_dump(mode="json"),
        "parameters": request.model.num_params,
        "active_parameters": request.model.num_active_params,
        "tensors": [asdict(line) for line in lines(request, full=True)],
        "cost": asdict(cost(request, disk_bytes_per_s)),
    }


def lines(request: Request, full: bool) -> list[TensorLine]:
    """Where every tensor of the target comes from, in the order of its files; `full` has a line for each."""
    found = origins(request)
    if full:
        return [TensorLine(o.name, "", o.rows.shape, " + ".join(o.sources), o.how) for o in found]
    groups: dict[tuple[object, ...], list[Origin]] = {}
    for origin in found:
        key = (origin.family, origin.rows.shape, _pattern(origin, request), origin.layer is None)
        groups.setdefault(key, []).append(origin)
    in_layers = {o.family: place for place, o in reversed(list(enumerate(found)))}
    rows = sorted(groups.values(), key=lambda group: in_layers[group[0].family])
    kinds = _layer_kinds(request)
    return [_line(group, _pattern(group[0], request), kinds) for group in rows]


def origins(request: Request) -> list[Origin]:
    """What every tensor of the target would be made of, in the order of its files. A method may read what it needs."""
    with Sources(request.directories) as reader:
        rows = {name: recipe.rows for recipe in _recipes(reader, request) for name in recipe.names}
    places = dict(_places(request.model))
    assert rows.keys() == places.keys()
    return [Origin(name, *places[name], rows[name]) for name in request.shapes]


def _recipes(reader: Sources, request: Request) -> Iterator[Recipe]:
    source, model = request.source.model, request.model
    if isinstance(request.growth, ShrinkConfig):
        return shrink_recipes(reader, source, model, request.reduction)
    if isinstance(request.growth, GrowthConfig):
        return scale_up_recipes(reader, source, model, request.growth, request.seed)
    if request.others:
        return mix_recipes(reader, source, model, request.growth, request.seed)
    return scale_out_recipes(reader, source, model, request.growth, request.seed)


def _places(model: ModelConfig) -> Iterator[tuple[str, tuple[int | None, str, str]]]:
    """Layer, role and family of every tensor, by name."""
    for name in tensor_names.outer_shapes(model):
        yield name, (None, name, name)
    for layer in range(model.num_hidden_layers):
        for role, name in tensor_names.layer_names(model, layer).items():
            family = name.removeprefix(f"model.layers.{layer}.")
            yield name, (layer, role, re.sub(r"\.experts\.\d+\.", ".experts.*.", family))


def _pattern(origin: Origin, request: Request) -> tuple[str, str]:
    """Sources as seen from their layer, and what is done with them, as a line prints them that many tensors share."""
    how = re.sub(r"part \d+ of (\d+)", r"part e % \1 of \1", origin.how)
    if request.kind == "scale_out" and request.source.model.is_moe and ".experts." in origin.role:
        return f"expert e // {request.model.num_experts // request.source.model.num_experts}", how
    if len(origin.rows.parts) == len(request.sources) > 1:
        return "same of all sources", how
    named = {origin.role: "same", origin.role + ABOVE: ABOVE.removeprefix(" of the ")}
    return " + ".join(named.get(part.label, part.label) for part in origin.rows.parts), how


def _layer_kinds(request: Request) -> dict[frozenset[int], str]:
    """What sets of layers are called that need not be listed."""
    everywhere = range(request.model.num_hidden_layers)
    kinds = {frozenset(everywhere): "all"}
    if isinstance(request.growth, GrowthConfig):
        found = map_layers(request.source.model, request.model, request.growth)
        further = {layer for layer in everywhere if found.is_new[layer]}
        kinds |= {frozenset(further): "further *", frozenset(everywhere) - further: "all but *"} if further else {}
    return kinds


def _line(group: Sequence[Origin], pattern: tuple[str, str], kinds: Mapping[frozenset[int], str]) -> TensorLine:
    first = group[0]
    if first.layer is None:
        return TensorLine(first.name, "", first.rows.shape, *pattern)
    layers = sorted({origin.layer for origin in group if origin.layer is not None})
    tensor = first.family
    if ".experts.*." in tensor:
        experts = sorted({int(origin.name.partition(".experts.")[2].split(".")[0]) for origin in group})
        tensor = tensor.replace("*", ranges(experts))
    return TensorLine(tensor, kinds.get(frozenset(layers)) or ranges(layers), first.rows.shape, *pattern)


def ranges(numbers: Iterable[int]) -> str:
    """Rising numbers as ranges: 0-3, 5, 7-9."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def sizes(request: Request) -> list[Size]:
    """Every field of the model that differs, then those that stay, as one row each."""
    source, model = request.source.model, request.model
    different = [field for field in ModelConfig.model_fields if getattr(source, field) != getattr(model, field)]
    return [
        Size(field, _shown(getattr(source, field)), _shown(getattr(model, field)), request.derived.get(field, "named"))
        for field in different
    ]


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ranges(value) or "none"
    if isinstance(value, Config):
        return ", ".join(f"{key} {_shown(each)}" for key, each in value.model_dump().items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def copies(request: Request) -> list[str]:
    """How often units are copied: `channels 1-2 times`; of an upcycling, how often a feed-forward is."""
    source, model = request.source.model, request.model
    if not isinstance(request.growth, GrowthConfig):
        return []
    units = map_units(source, model, request.growth, request.seed)
    return [f"{name} {_times(space)}" for name, space in units.named.items() if not space.is_identity]


def _times(space: UnitMap) -> str:
    fewest, most = min(space.counts), max(space.counts)
    padding = f" and {space.padding} zeros" if space.padding else ""
    return (f"{fewest} times" if fewest == most else f"{fewest}-{most} times") + padding


def layers(request: Request) -> list[str]:
    """The source's layer of every target layer: `0-1 <- 0`, `2 <- 1`; new copies are marked. None when all stay."""
    if isinstance(request.growth, ShrinkConfig):
        kept = request.growth.layers or ()
        is_all = len(kept) == request.source.model.num_hidden_layers
        return [] if is_all else [f"{layer} <- {source}" for layer, source in enumerate(kept)]
    if not isinstance(request.growth, GrowthConfig):
        return []
    found = map_layers(request.source.model, request.model, request.growth)
    if found.is_identity:
        return []
    return [
        f"{layer}{'*' if is_new else ''} <- {source}"
        for layer, (source, is_new) in enumerate(zip(found.sources, found.is_new, strict=True))
    ]


def target_bytes(request: Request) -> int:
    """Bytes of the target's weight files."""
    return sum(shard.size for shard in _shards(request))


def _shards(request: Request) -> list[sharding.ShardLayout]:
    joined = tensor_names.joined(request.model)
    return sharding.plan_shards(request.shapes, request.dtypes, sharding.MAX_SHARD_BYTES, joined)


def is_calibrated(request: Request) -> bool:
    """Whether text is read before anything is written."""
    growth = request.growth
    return growth.method == "split" or getattr(growth, "router_init", None) in FITTED


def _calibration_bytes(request: Request) -> int:
    """What finding the directions of a split takes in memory; 0 for other growths."""
    tokens = getattr(request.growth, "calibration_tokens", None)
    if not tokens or not is_calibrated(request):
        return 0
    tokens *= max(1, len(request.texts))
    length = min(CALIBRATION_LENGTH, request.source.model.max_position_embeddings)
    item_bytes = max(4, ITEM_BYTES[request.source.dtype])
    return calibration_bytes(request.source.model, -(-tokens // length), length, item_bytes)


def cost(request: Request, disk_bytes_per_s: float) -> GrowthCost:
    """What the growth reads, writes and keeps in memory; the certificate comes on top."""
    largest = max(sharding.num_bytes(shape, request.dtypes[name]) for name, shape in request.shapes.items())
    if request.kind == "shrink":
        largest = max(tensor.num_bytes for tensor in request.source.tensors.values())
    read, written = sum(source.weight_bytes for source in request.sources), target_bytes(request)
    return GrowthCost(
        read_bytes=read,
        written_bytes=written,
        files=len(_shards(request)),
        memory_bytes=max(growth_bytes(largest), _calibration_bytes(request)),
        free_bytes=free_bytes(request.target),
        seconds=(read + written) / disk_bytes_per_s,
    )
