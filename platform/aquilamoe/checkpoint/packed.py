"""Tensors that files have as one, seen in parts: every part is a run of bytes, so that nothing has to be read.

Experts as transformers 5 holds and can write them: `mlp.experts.gate_up_proj` (e, 2f, d) and `mlp.experts.down_proj`
(e, d, f) are what files otherwise have as `mlp.experts.N.gate_proj.weight` and so on. And what a family joins: its
experts by other names, or queries, keys and values.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from aquilamoe.checkpoint import jsonfile, safetensors_header, tensor_names
from aquilamoe.checkpoint.families import registry
from aquilamoe.checkpoint.families.family import Family
from aquilamoe.checkpoint.families.registry import FAMILIES
from aquilamoe.checkpoint.safetensors_header import MAX_TENSORS, TensorInfo
from aquilamoe.config.messages import UserError

Roles = Mapping[str, tuple[str, ...]]
# The roles of each expert, by the name of the tensor in its layer.
PACKED: Roles = {
    "mlp.experts.gate_up_proj": (tensor_names.GATE, tensor_names.UP),
    "mlp.experts.down_proj": (tensor_names.DOWN,),
}
_NAMES = {*PACKED, *(name for family in FAMILIES.values() for name in (*family.joined, *family.joined_experts))}
_IN_LAYER = re.compile(
    rf"(?P<layer>model\.layers\.\d+\.)(?P<name>{'|'.join(map(re.escape, sorted({*_NAMES, tensor_names.ROUTER})))})"
)


def read(directory: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint (see `safetensors_header.read`), each part by itself."""
    tensors = safetensors_header.read(directory)
    places = {name: found for name in tensors if (found := _IN_LAYER.fullmatch(name))}
    if all(found["name"] == tensor_names.ROUTER for found in places.values()):
        return tensors
    family = registry.stated(jsonfile.read(directory / "config.json", directory)) or FAMILIES["LlamaForCausalLM"]
    parts: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name not in places:
            parts[name] = info
            continue
        in_layer = _parts(directory, name, places[name]["name"], family, tensors)
        parts |= {f"{places[name]['layer']}{part}": info for part, info in in_layer.items()}
        if len(parts) > MAX_TENSORS:
            raise UserError(f"{directory}: has more than {MAX_TENSORS} tensors of experts; take another checkpoint")
    return parts


def _parts(
    directory: Path, name: str, in_layer: str, family: Family, tensors: Mapping[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """The parts of a tensor, by their names in its layer; `in_layer` is its own."""
    info = tensors[name]
    # Some files spell router and experts in their own way.
    if in_layer in PACKED or in_layer in family.joined_experts:
        roles = PACKED.get(in_layer) or family.joined_experts[in_layer]
        return {family.spell(role): part for role, part in _experts(directory, name, info, roles)}
    if in_layer in family.joined:
        roles = family.joined[in_layer]
        mixed = tensors.get(name.removesuffix(in_layer) + tensor_names.O_WEIGHT)
        return dict(_rows(directory, name, info, roles, mixed))
    # Packed experts beside a router by the name that they have in transformers; others have the names of their family.
    is_packed = any(name.removesuffix(in_layer) + packed in tensors for packed in PACKED)
    return {family.spell(in_layer) if is_packed else in_layer: info}


def _experts(directory: Path, name: str, info: TensorInfo, roles: Sequence[str]) -> Iterator[tuple[str, TensorInfo]]:
    if len(info.shape) != 3 or info.shape[1] % len(roles) or info.shape[0] > MAX_TENSORS:
        raise UserError(
            f"{directory / info.file}: tensor '{name}' of packed experts has shape {info.shape}, (experts, "
            f"{'2 * neurons, hidden' if len(roles) == 2 else 'hidden, neurons'}) is read; write it with transformers 5"
        )
    experts, rows, columns = info.shape
    places = ((expert, role) for expert in range(experts) for role in roles)
    shape = (rows // len(roles), columns)
    for (expert, role), (start, end) in zip(places, _runs(info, [1] * (experts * len(roles))), strict=True):
        yield tensor_names.expert_role(expert, role), TensorInfo(info.file, info.dtype, shape, start, end)


def _rows(
    directory: Path, name: str, info: TensorInfo, roles: Sequence[str], mixed: TensorInfo | None
) -> Iterator[tuple[str, TensorInfo]]:
    """Rows of a matrix; of queries there are as many as columns of o_proj (`mixed`), other parts are equal."""
    shape = info.shape
    first = mixed.shape[1:2] if roles[0] == tensor_names.Q_WEIGHT and mixed is not None else ()
    rest, further = (shape[0] if shape else 0) - sum(first), len(roles) - len(first)
    if len(shape) != 2 or rest < 0 or rest % further:
        raise UserError(
            f"{directory / info.file}: tensor '{name}' has shape {shape}, which does not part into {', '.join(roles)}; "
            "take config.json and weights from the same checkpoint"
        )
    rows = [*first, *[rest // further] * further]
    for role, count, (start, end) in zip(roles, rows, _runs(info, rows), strict=True):
        yield role, TensorInfo(info.file, info.dtype, (count, shape[1]), start, end)


def _runs(info: TensorInfo, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The bytes of a tensor in parts of these relative sizes."""
    unit, end = info.num_bytes // max(1, sum(sizes)), info.start
    for size in sizes:
        start, end = end, end + size * unit
        yield start, end
