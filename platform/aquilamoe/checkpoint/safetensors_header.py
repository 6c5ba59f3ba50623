"""The header of a safetensors checkpoint: every tensor's type, shape and place, checked before a byte is used.

Parsed here and not by the library, because a plan must not import torch, and because a refusal names file and tensor.
Nothing is ever unpickled.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from aquilamoe.checkpoint import jsonfile, links
from aquilamoe.config.messages import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# As config.json and torch call them.
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
MAX_HEADER_BYTES = 32 * 2**20
# Of one checkpoint. The largest that are published have less than half as many; beyond, a header is no header.
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 8
COLONS = 5  # in the entry of one tensor, and one to spare
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Older files repeat the fixed frequencies of the rotary embedding, in float32 whatever the weights are in.
FIXED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is.

    file: name of the file in the checkpoint's directory.
    dtype: as safetensors spells it, a key of `ITEM_BYTES`.
    start, end: its bytes, counted from the beginning of the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def read(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint directory, from `model.safetensors` or from the index and its shards.

    Only headers are read, of all files.

    Raises:
        UserError: names file and tensor when there are no weights, when a header is damaged, when tensors overlap,
            leave holes or exceed their file, when index and shards disagree, and when a tensor is of a type that cannot
            be computed with.
    """
    links.check(directory / SINGLE_FILE, directory)
    if (directory / SINGLE_FILE).is_file():
        tensors = read_file(directory / SINGLE_FILE)
    else:
        tensors = _read_shards(directory, _read_index(directory))
    _check_types(directory, tensors)
    return tensors


def read_file(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file, in the order of its header."""
    if not path.is_file():
        raise UserError(f"{path}: this shard of the checkpoint is missing; copy it again")
    size = path.stat().st_size
    header, data_start = _read_header(path, size)
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise _too_many(path, len(header))
    tensors = {name: _parse_entry(path, name, entry, data_start) for name, entry in header.items()}
    _check_places(path, tensors, data_start, size)
    return tensors


def _damaged(path: Path, size: int, reason: str) -> UserError:
    return UserError(f"{path}: is damaged or cut short at {size} bytes ({reason}); copy or write it again")


def _too_many(path: Path, count: int) -> UserError:
    return UserError(f"{path}: names {count} tensors or more, at most {MAX_TENSORS} are read; take another checkpoint")


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The JSON at the beginning of a file, and where the tensors begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, size, f"its header should have {length} bytes, {max(size - 8, 0)} are there")
        if length > MAX_HEADER_BYTES:
            raise _damaged(path, size, f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
        text = file.read(length)
    # Every tensor has four: counted before anything is made of them, which would take gigabytes.
    if (colons := text.count(b":")) > COLONS * MAX_TENSORS:
        raise _too_many(path, colons // COLONS)
    try:
        header = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, size, f"its header is not JSON: {' '.join(str(error).split())}") from error
    if not isinstance(header, dict):
        raise _damaged(path, size, "its header is not a JSON object")
    return header, 8 + length


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it has '{twice}' twice")
    return found


def _parse_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One tensor of a header; its size must match type and shape."""
    try:
        dtype = entry["dtype"]
        shape = entry["shape"]
        start, end = entry["data_offsets"]
        if not (isinstance(dtype, str) and isinstance(shape, list)):
            raise TypeError("dtype is not a string or shape not a list")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"shape has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
        if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, start, end)):
            raise ValueError("shape or offsets are not whole numbers from 0")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: is damaged: tensor '{name}' is described by {str(entry)[:80]} ({error!r}); copy it again"
        ) from error
    expected = prod(shape) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else end - start
    if end - start != expected or end < start:
        raise UserError(
            f"{path}: is damaged: tensor '{name}' of shape {tuple(shape)} in {dtype} has {expected} bytes, its "
            f"offsets {start} to {end} give it {end - start}; copy it again"
        )
    return TensorInfo(path.name, dtype, tuple(shape), data_start + start, data_start + end)


def _check_places(path: Path, tensors: Mapping[str, TensorInfo], data_start: int, size: int) -> None:
    """Refuse tensors beyond the file, overlapping ones, and bytes that belong to none, as the library does."""
    position, before = data_start, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.end > size:
            raise _damaged(path, size, f"tensor '{name}' ends at byte {info.end}")
        if info.start < position:
            raise UserError(
                f"{path}: is damaged: tensor '{name}' begins at byte {info.start}, inside '{before}', which ends at "
                f"{position}; copy it again"
            )
        if info.start > position:
            raise UserError(
                f"{path}: is damaged: bytes {position} to {info.start} before tensor '{name}' belong to no tensor; "
                "copy it again"
            )
        position, before = info.end, name
    if position < size:
        raise _damaged(path, size, f"its last tensor '{before}' ends at byte {position}")


def _read_index(directory: Path) -> dict[str, str]:
    """Name of the shard of every tensor."""
    path = directory / INDEX_FILE
    links.check(path, directory)
    if not path.is_file():
        pickled = sorted(file.name for pattern in PICKLED for file in directory.glob(pattern))
        if pickled:
            raise UserError(
                f"{directory}: has only pickled weights ({pickled[0]}), which are never opened because they can run "
                f"code; convert them to {SINGLE_FILE}"
            )
        raise UserError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}; name a directory with a checkpoint")
    weight_map = jsonfile.read(path, directory, jsonfile.MAX_INDEX_BYTES).get("weight_map")
    if not (isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())):
        raise UserError(
            f"{path}: is not an index of safetensors shards (weight_map does not map names of tensors to names of "
            "files); copy it again"
        )
    if len(weight_map) > MAX_TENSORS:
        raise _too_many(path, len(weight_map))
    for name, file in weight_map.items():
        if Path(file).name != file or not file or file == ".." or "\0" in file:
            raise UserError(
                f"{path}: puts tensor '{name}' into {file!r}, which is not the name of a file beside it; copy it again"
            )
    return weight_map


def _read_shards(directory: Path, weight_map: Mapping[str, str]) -> dict[str, TensorInfo]:
    """The tensors of the shards that the index names, also what it omits; one that two shards have is refused."""
    contents: dict[str, dict[str, TensorInfo]] = {}
    for file in dict.fromkeys(weight_map.values()):
        links.check(directory / file, directory)
        contents[file] = read_file(directory / file)
    for name, file in weight_map.items():
        if name not in contents[file]:
            raise UserError(
                f"{directory / file}: lacks the tensor '{name}' that {INDEX_FILE} promises; "
                "copy the shards and the index from the same checkpoint"
            )
    holders: dict[str, str] = {}
    for file, tensors in contents.items():
        for name in tensors:
            if name in holders:
                raise UserError(
                    f"{directory / file}: has tensor '{name}', which {holders[name]} has too; copy the shards and the "
                    "index from the same checkpoint"
                )
            holders[name] = file
    if len(holders) > MAX_TENSORS:
        raise _too_many(directory, len(holders))
    named = {name: contents[file][name] for name, file in weight_map.items()}
    return named | {name: contents[file][name] for name, file in holders.items()}


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The type of most of the weights, by bytes: what config.json states, e.g. `BF16` where norms are `F32`."""
    counted: Counter[str] = Counter()
    for name, info in tensors.items():
        if not name.endswith(FIXED):
            counted[info.dtype] += info.num_bytes
    return max(counted or {"F32": 0}, key=lambda dtype: (counted[dtype], ITEM_BYTES[dtype]))


def _check_types(directory: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse types that are not floating point."""
    for name, info in tensors.items():
        if info.dtype not in ITEM_BYTES:
            raise UserError(
                f"{directory / info.file}: tensor '{name}' is stored as {info.dtype}; convert it to one of "
                f"{', '.join(ITEM_BYTES)}"
            )
