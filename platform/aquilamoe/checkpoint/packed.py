"""Experts that are packed into one tensor, as transformers 5 holds and can write them, seen one by one.

`mlp.experts.gate_up_proj` (e, 2f, d) and `mlp.experts.down_proj` (e, d, f) hold what files otherwise have as
`mlp.experts.N.gate_proj.weight` and so on: every expert's part is a run of bytes, so that nothing has to be read.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from aquilamoe.checkpoint import jsonfile, safetensors_header, tensor_names
from aquilamoe.checkpoint.families import registry
from aquilamoe.checkpoint.safetensors_header import MAX_TENSORS, TensorInfo
from aquilamoe.config.messages import UserError

PACKED = re.compile(r"(?P<layer>model\.layers\.\d+\.)mlp\.experts\.(?P<projection>gate_up_proj|down_proj)")
ROUTER = re.compile(rf"(?P<layer>model\.layers\.\d+\.){re.escape(tensor_names.ROUTER)}")


def read(directory: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint (see `safetensors_header.read`), each expert by itself."""
    tensors = safetensors_header.read(directory)
    packed = {name: found for name in tensors if (found := PACKED.fullmatch(name))}
    if not packed:
        return tensors
    family = registry.stated(jsonfile.read(directory / "config.json", directory))
    # Some files spell router and experts in their own way.
    spelled = family.spell if family else str
    unpacked: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        if name in packed:
            unpacked |= _experts(directory, name, info, packed[name], spelled)
        elif router := ROUTER.fullmatch(name):
            unpacked[f"{router['layer']}{spelled(tensor_names.ROUTER)}"] = info
        else:
            unpacked[name] = info
        if len(unpacked) > MAX_TENSORS:
            raise UserError(f"{directory}: has more than {MAX_TENSORS} tensors of experts; take another checkpoint")
    return unpacked


def _experts(
    directory: Path, name: str, info: TensorInfo, match: re.Match[str], spelled: Callable[[str], str]
) -> dict[str, TensorInfo]:
    roles = (tensor_names.DOWN,) if match["projection"] == "down_proj" else (tensor_names.GATE, tensor_names.UP)
    if len(info.shape) != 3 or info.shape[1] % len(roles) or info.shape[0] > MAX_TENSORS:
        raise UserError(
            f"{directory / info.file}: tensor '{name}' of packed experts has shape {info.shape}, (experts, "
            f"{'2 * neurons, hidden' if len(roles) == 2 else 'hidden, neurons'}) is read; write it with transformers 5"
        )
    places = ((expert, role) for expert in range(info.shape[0]) for role in roles)
    shape = (info.shape[1] // len(roles), info.shape[2])
    parts = zip(places, _runs(info, info.shape[0] * len(roles)), strict=True)
    return {
        f"{match['layer']}{spelled(tensor_names.expert_role(expert, role))}": TensorInfo(
            info.file, info.dtype, shape, start, end
        )
        for (expert, role), (start, end) in parts
    }


def _runs(info: TensorInfo, count: int) -> Iterator[tuple[int, int]]:
    """The bytes of a tensor in equal parts."""
    size = info.num_bytes // max(1, count)
    return ((info.start + part * size, info.start + (part + 1) * size) for part in range(count))
