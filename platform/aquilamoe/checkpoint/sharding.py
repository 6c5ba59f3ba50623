"""Where the tensors of a checkpoint go: shards, offsets and headers, all known before the first byte is written."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from aquilamoe.checkpoint.safetensors_header import DTYPE_NAMES, INDEX_FILE, ITEM_BYTES, SINGLE_FILE

# Direct writes go from whole pages of memory to whole blocks of the disk.
PAGE = 4096
MAX_SHARD_BYTES = 5 * 10**9

Shapes = Mapping[str, tuple[int, ...]]
Dtypes = str | Mapping[str, str]  # of all tensors, or of each by name, as safetensors spells them


@dataclass(frozen=True)
class Joined:
    """A tensor of a file that is written in parts, whose bytes follow each other.

    shape: of the whole.
    parts: their names, in order.
    """

    shape: tuple[int, ...]
    parts: tuple[str, ...]


@dataclass(frozen=True)
class ShardLayout:
    """One file to be written.

    file: its final name.
    header: its first bytes, whole pages.
    tensors: names in the header.
    starts: first byte of every tensor or part of one, counted from the beginning of the file.
    size: bytes of the file.
    """

    file: str
    header: bytes
    tensors: tuple[str, ...]
    starts: Mapping[str, int]
    size: int


def spell(dtype: Any) -> str:
    """An element type as safetensors spells it, from that spelling or a torch.dtype (which need not be imported)."""
    spellings = {f"torch.{name}": spelling for spelling, name in DTYPE_NAMES.items()}
    spelling = spellings.get(str(dtype), str(dtype))
    if spelling not in ITEM_BYTES:
        raise ValueError(f"tensors are written as one of {', '.join(ITEM_BYTES)}, not as {dtype}")
    return spelling


def num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return prod(shape) * ITEM_BYTES[dtype]


def of_tensor(dtypes: Dtypes, name: str) -> str:
    """The type of one tensor."""
    return dtypes if isinstance(dtypes, str) else dtypes[name]


def plan_shards(
    shapes: Shapes, dtypes: Dtypes, max_bytes: int, joined: Mapping[str, Joined] | None = None
) -> list[ShardLayout]:
    """Fill shards in order, each up to `max_bytes` of tensors; a larger tensor gets a shard of its own.

    joined: tensors of the files whose parts are in `shapes`, by name.
    """
    groups: list[dict[str, Joined]] = [{}]
    room = max_bytes
    for name, tensor in _tensors(shapes, joined or {}).items():
        size = sum(num_bytes(shapes[part], of_tensor(dtypes, part)) for part in tensor.parts)
        if groups[-1] and size > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = tensor
        room -= size
    if len(groups) == 1:
        return [_lay_out(SINGLE_FILE, groups[0], shapes, dtypes)]
    return [
        _lay_out(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, shapes, dtypes)
        for number, group in enumerate(groups, start=1)
    ]


def _tensors(shapes: Shapes, joined: Mapping[str, Joined]) -> dict[str, Joined]:
    """What files have, in the order of the shapes; a joined tensor is where its first part is."""
    whole = {part: name for name, tensor in joined.items() for part in tensor.parts}
    return {
        whole.get(name, name): joined[whole[name]] if name in whole else Joined(shape, (name,))
        for name, shape in shapes.items()
    }


def _lay_out(file: str, tensors: Mapping[str, Joined], shapes: Shapes, dtypes: Dtypes) -> ShardLayout:
    """Header and offsets of a file. Tensors of whole pages come first, so that each of them begins on a page.

    The header is JSON after its length, padded with spaces to whole pages; `format: pt` is what transformers looks for.
    """
    parts = [part for tensor in tensors.values() for part in tensor.parts]
    sizes = {part: num_bytes(shapes[part], of_tensor(dtypes, part)) for part in parts}
    whole = {name: sum(sizes[part] for part in tensor.parts) for name, tensor in tensors.items()}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: whole[name] % PAGE != 0):
        for part in tensors[name].parts:
            offsets[part], end = end, end + sizes[part]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, tensor in tensors.items():
        start = offsets[tensor.parts[0]]
        dtype = of_tensor(dtypes, tensor.parts[0])
        entries[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, start + whole[name]],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    header = len(text).to_bytes(8, "little") + text
    starts = {part: len(header) + offsets[part] for part in parts}
    return ShardLayout(file, header, tuple(tensors), starts, len(header) + end)


def index(shards: list[ShardLayout], shapes: Shapes, dtypes: Dtypes) -> bytes | None:
    """Contents of the index in the order of `shapes`; None where one file needs none."""
    if len(shards) == 1:
        return None
    total = sum(num_bytes(shape, of_tensor(dtypes, name)) for name, shape in shapes.items())
    weight_map = {name: shard.file for shard in shards for name in shard.tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


def file_names(shards: list[ShardLayout]) -> list[str]:
    """Final names of all files, the index last."""
    return [shard.file for shard in shards] + ([INDEX_FILE] if len(shards) > 1 else [])
