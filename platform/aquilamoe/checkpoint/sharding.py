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
class ShardLayout:
    """One file to be written.

    file: its final name.
    header: its first bytes, whole pages.
    starts: first byte of every tensor, counted from the beginning of the file.
    size: bytes of the file.
    """

    file: str
    header: bytes
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


def plan_shards(shapes: Shapes, dtypes: Dtypes, max_bytes: int) -> list[ShardLayout]:
    """Fill shards in order, each up to `max_bytes` of tensors; a larger tensor gets a shard of its own."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    room = max_bytes
    for name, shape in shapes.items():
        size = num_bytes(shape, of_tensor(dtypes, name))
        if groups[-1] and size > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = shape
        room -= size
    if len(groups) == 1:
        return [_lay_out(SINGLE_FILE, groups[0], dtypes)]
    return [
        _lay_out(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group, dtypes)
        for number, group in enumerate(groups, start=1)
    ]


def _lay_out(file: str, shapes: Shapes, dtypes: Dtypes) -> ShardLayout:
    """Header and offsets of a file. Tensors of whole pages come first, so that each of them begins on a page.

    The header is JSON after its length, padded with spaces to whole pages; `format: pt` is what transformers looks for.
    """
    sizes = {name: num_bytes(shape, of_tensor(dtypes, name)) for name, shape in shapes.items()}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(sizes, key=lambda name: sizes[name] % PAGE != 0):
        offsets[name], end = end, end + sizes[name]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        span = [offsets[name], offsets[name] + sizes[name]]
        entries[name] = {"dtype": of_tensor(dtypes, name), "shape": list(shape), "data_offsets": span}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    header = len(text).to_bytes(8, "little") + text
    starts = {name: len(header) + offsets[name] for name in shapes}
    return ShardLayout(file, header, starts, len(header) + end)


def index(shards: list[ShardLayout], shapes: Shapes, dtypes: Dtypes) -> bytes | None:
    """Contents of the index in the order of `shapes`; None where one file needs none."""
    if len(shards) == 1:
        return None
    total = sum(num_bytes(shape, of_tensor(dtypes, name)) for name, shape in shapes.items())
    weight_map = {name: shard.file for shard in shards for name in shard.starts}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


def file_names(shards: list[ShardLayout]) -> list[str]:
    """Final names of all files, the index last."""
    return [shard.file for shard in shards] + ([INDEX_FILE] if len(shards) > 1 else [])
