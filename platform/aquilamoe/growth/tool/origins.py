"""Where every tensor of a target comes from, determined without reading one: for plans.

What a growth method does to a layer is taken from the method itself: it is run on stand-ins that track which tensors
took part. A new method therefore has a plan as soon as it is a file.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config import plugins
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.schema import GrowthConfig, UpcyclingConfig
from aquilamoe.growth import rules
from aquilamoe.growth.depth import map_layers
from aquilamoe.growth.tool.request import Request
from aquilamoe.growth.units import UnitMap, Units, map_units

OWN, ABOVE = "own", "above"
ABOVE_TEXT = "layer above"
SILENT = "zeros: a new layer is silent"
FILLER = "zeros: the format requires it"
_NORMS = (tensor_names.INPUT_NORM, tensor_names.POST_ATTENTION_NORM, tensor_names.FINAL_NORM)


@dataclass(frozen=True)
class Origin:
    """One tensor of the target.

    name: on disk.
    layer: that it is in, None outside the layers.
    sources: the source's tensors, on disk; none for what is drawn or zero.
    how: what is done with them.
    family: what it is called on a line that it shares with its equals in other layers and among other experts.
    pattern: sources and how, as that line prints them.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    sources: tuple[str, ...]
    how: str
    family: str
    pattern: tuple[str, str]


def trace(request: Request) -> list[Origin]:
    """Every tensor of the target, in the order of its files."""
    if isinstance(request.growth, GrowthConfig):
        found = list(_scale_up(request, request.growth))
    else:
        found = list(_scale_out(request, request.growth))
    order = {name: place for place, name in enumerate(request.shapes)}
    assert {origin.name for origin in found} == set(order)
    return sorted(found, key=lambda origin: order[origin.name])


class _Traced:
    """A stand-in for a tensor in a growth method: what is computed from it keeps track of its parts and notes."""

    def __init__(self, parts: tuple[tuple[str, str], ...], notes: tuple[str, ...] = ()) -> None:
        self.parts, self.notes = parts, notes

    def join(self, *others: Any, **named: Any) -> "_Traced":
        """A tensor computed of this and others."""
        traced = [self, *(other for other in (*others, *named.values()) if isinstance(other, _Traced))]
        parts = dict.fromkeys(part for one in traced for part in one.parts)
        notes = dict.fromkeys(note for one in traced for note in one.notes)
        return _Traced(tuple(parts), tuple(notes))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.join

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = join
    __matmul__ = __rmatmul__ = __pow__ = __neg__ = __getitem__ = join


class _TracedWidth(SimpleNamespace):
    """What a method gets beside its tensors, as `growth.width.Width` has it; answers in words."""

    units: Units
    growth: GrowthConfig
    initializer_range: float

    def copy(self, role: str, tensor: Any, new_rows: Any = None, new_columns: Any = None) -> _Traced:
        rows, columns = self.units.rows(role), self.units.columns(role)
        notes = _describe_units(self.units, role, self.growth.norm)
        for units, new, side in ((rows, new_rows, "rows"), (columns, new_columns, "columns")):
            if new is not None and units is not None and units.has_new:
                tensor = tensor.join(new)
                notes.append(f"new {side} from the {ABOVE_TEXT}")
        if self.growth.noise > 0 and columns is not None and columns.has_new:
            notes.append(f"noise {self.growth.noise:g}")
        return _Traced(tensor.parts, (*tensor.notes, *notes))

    def draw(self, role: str) -> _Traced:
        if role.endswith("norm.weight"):
            return _Traced((), ("ones",))
        zeros = role.endswith(".bias")
        return _Traced((), ("zeros" if zeros else f"drawn, normal with std {self.initializer_range:g}",))


def _describe_units(units: Units, role: str, norm: str) -> list[str]:
    """What grows in a tensor: of its rows, then of its columns."""
    notes = []
    # By norm exact: what writes channels, and the gains.
    scaled = norm == "exact" and (role in (tensor_names.EMBEDDING, *_NORMS) or tensor_names.writes_residual(role))
    if role in (tensor_names.EMBEDDING, *_NORMS):
        spaces: list[UnitMap | None] = [units.residual]
    else:
        spaces = [units.rows(role), units.columns(role)]
    for space in spaces:
        if space is not None and not space.is_identity:
            rescaled = " (rescaled, norm exact)" if scaled and space is units.residual else ""
            notes.append(_describe_space(units, space) + rescaled)
    return notes


def _describe_space(units: Units, space: UnitMap) -> str:
    spaces = space_names(units)
    inside = "" if units.rotary.is_identity else f" of {units.rotary.num_sources} -> {units.rotary.size}"
    if space in (units.q_channels, units.mixed_channels):
        return f"query heads {_sizes(units.q_heads)}{inside}"
    if space in (units.k_channels, units.v_channels):
        return f"KV heads {_sizes(units.kv_heads)}{inside}"
    name = next(name for name, candidate in spaces.items() if candidate == space)
    padding = f", {space.padding} of them zero" if space.padding else ""
    return f"{name} {_sizes(space)}{padding}"


def space_names(units: Units) -> dict[str, UnitMap]:
    """The spaces of units that a growth in width has, by what a reader calls them."""
    return {
        "channels": units.residual,
        "neurons": units.ffn,
        "experts' neurons": units.expert_ffn,
        "shared neurons": units.shared_ffn,
        "query heads": units.q_heads,
        "KV heads": units.kv_heads,
        "channels of a head": units.rotary,
    }


def _sizes(space: UnitMap) -> str:
    return f"{space.num_sources} -> {space.size}"


def _scale_up(request: Request, growth: GrowthConfig) -> Iterator[Origin]:
    source, model = request.source.model, request.model
    units = map_units(source, model, growth, request.seed)
    layers = map_layers(source, model, growth)
    outer, fillers = tensor_names.outer_shapes(model), set(tensor_names.filler_roles(model))
    every_role = dict.fromkeys(role for layer in _one_of_each(model) for role in tensor_names.role_shapes(model, layer))
    traced = _run_method(growth, units, model, tuple(role for role in every_role if role not in fillers))
    for role, shape in outer.items():
        alone = _run_method(growth, units, model, (role,))[role]
        notes = [*alone.notes, *_vocabulary(role, source, model)]
        sources = (role,) if alone.parts else ()
        how = "; ".join(notes) or "copied"
        yield Origin(role, shape, None, sources, how, role, ("same" if sources else "", how))
    for layer, below in enumerate(layers.sources):
        above = min(below + 1, source.num_hidden_layers - 1)
        above_roles = tensor_names.role_shapes(source, above)
        for role, shape in tensor_names.role_shapes(model, layer).items():
            if role in fillers:
                yield _in_layer(request, layer, role, shape, (), FILLER, ("", FILLER))
                continue
            if growth.new_layers == "zero" and layers.is_new[layer] and tensor_names.writes_residual(role):
                yield _in_layer(request, layer, role, shape, (), SILENT, ("", SILENT))
                continue
            shared = growth.new_layers == "scaled" and layers.copies[layer] > 1 and tensor_names.writes_residual(role)
            notes = [*traced[role].notes, *([f"divided by {layers.copies[layer]}"] if shared else [])]
            # A layer above of the other kind has no namesakes: the layer's own stand for them.
            own_layer = {OWN: below, ABOVE: above if role in above_roles else below}
            found = [tensor_names.layer_name(source, own_layer[where], part) for where, part in traced[role].parts]
            how = "; ".join(notes) or "copied"
            pattern = _relative(role, traced[role].parts)
            yield _in_layer(request, layer, role, shape, tuple(dict.fromkeys(found)), how, (pattern, how))


def _one_of_each(model: ModelConfig) -> list[int]:
    """A layer with experts and one without, where the model has them."""
    kinds = {model.is_sparse(layer): layer for layer in range(model.num_hidden_layers)}
    return list(kinds.values())


def _run_method(
    growth: GrowthConfig, units: Units, model: ModelConfig, roles: tuple[str, ...]
) -> Mapping[str, _Traced]:
    """What the method makes of a layer, in words; for a method that stand-ins do not suit, that it makes it."""
    layers = [{role: _Traced(((where, role),)) for role in roles} for where in (OWN, ABOVE)]
    width = _TracedWidth(
        units=units,
        growth=growth,
        shapes=tensor_names.outer_shapes(model),
        tied=model.tie_word_embeddings,
        initializer_range=model.initializer_range,
        seed=0,
        place="",
    )
    try:
        grown = plugins.load("growth/methods", growth.method).grow(*layers, width)
        if all(isinstance(grown.get(role), _Traced) for role in roles):
            return dict(grown)
    except (AttributeError, TypeError, ValueError, KeyError):
        pass
    own, upper = layers
    return {role: _Traced(own[role].parts + upper[role].parts, (f"by method {growth.method}",)) for role in roles}


def _vocabulary(role: str, source: ModelConfig, model: ModelConfig) -> list[str]:
    if role == tensor_names.FINAL_NORM or source.vocab_size == model.vocab_size:
        return []
    return [f"tokens {source.vocab_size} -> {model.vocab_size}, new ones as the mean"]


def _relative(role: str, parts: tuple[tuple[str, str], ...]) -> str:
    """Sources as seen from their layer."""
    texts = []
    for where, part in parts:
        name = "same" if part == role else part
        if where == OWN:
            texts.append(name)
        else:
            texts.append(ABOVE_TEXT if part == role else f"{part} of the {ABOVE_TEXT}")
    return " + ".join(texts)


def _in_layer(
    request: Request,
    layer: int,
    role: str,
    shape: tuple[int, ...],
    sources: tuple[str, ...],
    how: str,
    pattern: tuple[str, str],
) -> Origin:
    name = tensor_names.layer_name(request.model, layer, role)
    inside = name.removeprefix(f"model.layers.{layer}.")
    if ".experts." in role:
        before, _, after = inside.partition(".experts.")
        inside = f"{before}.experts.*.{after.partition('.')[2]}"
    return Origin(name, shape, layer, sources, how, inside, pattern)


def _scale_out(request: Request, upcycling: UpcyclingConfig) -> Iterator[Origin]:
    source, model = request.source.model, request.model
    for role, shape in tensor_names.outer_shapes(model).items():
        yield Origin(role, shape, None, (role,), "copied", role, ("same", "copied"))
    for layer in range(model.num_hidden_layers):
        kept = tensor_names.role_shapes(source, layer).keys() - set(tensor_names.filler_roles(source))
        for role, shape in tensor_names.role_shapes(model, layer).items():
            if role in kept and not (source.is_moe and role.startswith(("mlp.experts", tensor_names.ROUTER))):
                own = (tensor_names.layer_name(source, layer, role),)
                yield _in_layer(request, layer, role, shape, own, "copied", ("same", "copied"))
                continue
            parts, how, pattern = _explain_new(role, request, upcycling)
            sources = tuple(tensor_names.layer_name(source, layer, part) for part in parts)
            yield _in_layer(request, layer, role, shape, sources, how, pattern)


def _explain_new(
    role: str, request: Request, upcycling: UpcyclingConfig
) -> tuple[tuple[str, ...], str, tuple[str, str]]:
    """Roles of the source that a tensor of a sparse layer is made of, how, and both for a shared line."""
    source, model = request.source.model, request.model
    if role in tensor_names.filler_roles(model):
        return (), FILLER, ("", FILLER)
    if role == tensor_names.ROUTER:
        return _explain_router(request, upcycling)
    if role == tensor_names.SHARED_ROUTER:
        how = "zeros: every token goes through the shared expert by one half"
        return (), how, ("", how)
    if not role.startswith("mlp.experts."):
        dense = role.replace("shared_expert.", "")
        return (dense,), "copied: the shared expert", (dense, "copied: the shared expert")
    expert, projection = int(role.split(".")[2]), role.split(".", 3)[3]
    dense = f"mlp.{projection}"
    note = _method_note(upcycling)
    if source.is_moe:
        copies = model.num_experts // source.num_experts
        origin = tensor_names.expert_role(expert // copies, dense)
        how = "; ".join([f"one of {copies} copies", *note])
        return (origin,), how, (f"expert e // {copies}", how)
    shards = rules.num_shards(source, model)
    whole = f"one of {model.num_experts // shards} copies"
    parts = [whole] if shards == 1 else [f"{whole}, part {expert % shards} of {shards}"]
    general = [whole] if shards == 1 else [f"{whole}, part e % {shards} of {shards}"]
    if shards > 1 and dense != tensor_names.GATE:
        note = [f"x sqrt({shards})", *note]
    if model.shared_expert_intermediate_size and dense == tensor_names.DOWN:
        note = ["x 1/2", *note]
    return (dense,), "; ".join([*parts, *note]), (dense, "; ".join([*general, *note]))


def _explain_router(request: Request, upcycling: UpcyclingConfig) -> tuple[tuple[str, ...], str, tuple[str, str]]:
    source, model = request.source.model, request.model
    if source.is_moe:
        how = f"every row {model.num_experts // source.num_experts} times"
        return (tensor_names.ROUTER,), how, ("same", how)
    std = upcycling.router_std
    how = {
        "normal": f"drawn, normal with std {std:g}",
        "variance": f"drawn, normal with variance {std:g}",
        "orthogonal": f"drawn, orthogonal rows with std {std:g}",
        "zero": "zeros",
    }[upcycling.router_init]
    shards = rules.num_shards(source, model)
    if shards > 1:
        how += f"; one row for the {shards} parts of a copy"
    return (), how, ("", how)


def _method_note(upcycling: UpcyclingConfig) -> list[str]:
    """What makes experts differ."""
    return {
        "copy": [],
        "noise": [f"noise {upcycling.noise:g}"],
        "drop": [f"{upcycling.drop_ratio:g} of the neurons drawn afresh"],
        "permute": ["neurons in an order of its own"],
    }[upcycling.method]
