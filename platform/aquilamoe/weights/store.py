"""Safetensors directories: a reader that maps files, and a writer that holds one tensor at a time.

The writer makes the files itself (eight bytes of header length, a JSON header, the raw tensors): the library's own
`save_file` wants the whole model in memory.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aquilamoe.config.messages import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# The header fills whole pages, so that the tensors start on a page and a mapped file is aligned for every dtype.
HEADER_MULTIPLE = 4096


class Reader:
    """The tensors of a checkpoint directory, one file or shards. Opening reads every header, `get` one tensor.

    Raises `UserError` when the directory has no weights, a shard is missing, or a file is damaged or cut short.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = ExitStack()
        try:
            self._where = self._open()
        except BaseException:
            self._files.close()
            raise

    def _open(self) -> dict[str, Any]:
        """Open every file; return the open file of every tensor."""
        if (self.directory / SINGLE_FILE).is_file():
            handle = self._open_file(SINGLE_FILE)
            return dict.fromkeys(handle.keys(), handle)
        weight_map = _read_index(self.directory)
        handles = {file: self._open_file(file) for file in dict.fromkeys(weight_map.values())}
        contents = {file: set(handle.keys()) for file, handle in handles.items()}
        for name, file in weight_map.items():
            if name not in contents[file]:
                raise UserError(
                    f"{self.directory / file}: lacks the tensor '{name}' that {INDEX_FILE} promises; "
                    "copy the shards and the index from the same checkpoint"
                )
        return {name: handles[file] for name, file in weight_map.items()}

    def _open_file(self, file: str) -> Any:
        path = self.directory / file
        if not path.is_file():
            raise UserError(f"{path}: this shard of the checkpoint is missing; copy it again")
        try:
            return self._files.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path}: is damaged or cut short at {path.stat().st_size} bytes ({reason}); copy or write it again"
            ) from error

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._where)

    def _file_of(self, name: str) -> Any:
        if name not in self._where:
            raise UserError(
                f"{self.directory}: there is no tensor '{name}' among its {len(self._where)}; "
                "take config.json and weights from the same checkpoint"
            )
        return self._where[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Element type of a tensor, from the header alone."""
        spelling = self._file_of(name).get_slice(name).get_dtype()
        if spelling not in DTYPES:
            raise UserError(
                f"{self.directory}: tensor '{name}' is stored as {spelling}; convert it to one of {', '.join(DTYPES)}"
            )
        return DTYPES[spelling]

    def get(self, name: str) -> Tensor:
        """A tensor, mapped from its file: changing it in place does not change the file."""
        self.dtype(name)
        return self._file_of(name).get_tensor(name)

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX_FILE
    if not path.is_file():
        raise UserError(f"{directory}: has neither {SINGLE_FILE} nor {INDEX_FILE}; name a directory with a checkpoint")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not (isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())):
            raise ValueError("weight_map does not map names of tensors to names of files")
        return weight_map
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not an index of safetensors shards ({error!r}); copy it again") from error


@dataclass(frozen=True)
class _Shard:
    """One file to be written: its final name and the tensors in it."""

    file: str
    shapes: dict[str, tuple[int, ...]]


def write(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write tensors, cast to `dtype`, as one safetensors file, or as shards of `max_shard_bytes` at most and an index.

    `tensors` yields exactly the names of `shapes`, in that order; each is released before the next is asked for. Files
    get their names only when all of them are complete and on disk, and replace the weights that were there. A tensor
    larger than `max_shard_bytes` gets a shard of its own. Raises ValueError for a tensor that is missing, unexpected or
    of another shape.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards = _plan_shards(shapes, dtype, max_shard_bytes)
    partials = [directory / f"{shard.file}.partial" for shard in shards]
    stream = iter(tensors)
    try:
        for shard, partial in zip(shards, partials, strict=True):
            with partial.open("wb") as file:
                file.write(_header(shard.shapes, dtype))
                for name, shape in shard.shapes.items():
                    _write_next(file, stream, name, shape, dtype)
                _sync(file)
        extra = next(stream, None)
        if extra is not None:
            raise ValueError(f"unexpected tensor '{extra[0]}' after the last of {len(shapes)}")
        _publish(directory, shards, partials, dtype)
    finally:
        for partial in [*partials, directory / f"{INDEX_FILE}.partial"]:
            partial.unlink(missing_ok=True)


def _plan_shards(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_bytes: int) -> list[_Shard]:
    """Fill shards in order, each up to `max_bytes` of tensors."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    room = max_bytes
    for name, shape in shapes.items():
        size = _num_bytes(shape, dtype)
        if groups[-1] and size > room:
            groups.append({})
            room = max_bytes
        groups[-1][name] = shape
        room -= size
    if len(groups) == 1:
        return [_Shard(SINGLE_FILE, groups[0])]
    return [_Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, start=1)]


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return prod(shape) * dtype.itemsize


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """Length, then JSON padded with spaces to whole pages; `format: pt` is what transformers looks for."""
    spelling = next(spelling for spelling, known in DTYPES.items() if known == dtype)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + _num_bytes(shape, dtype)
        entries[name] = {"dtype": spelling, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % HEADER_MULTIPLE)
    return len(text).to_bytes(8, "little") + text


def _write_next(
    file: BinaryIO, stream: Iterator[tuple[str, Tensor]], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Take one tensor from the stream and append its bytes; nothing refers to it after the return."""
    item = next(stream, None)
    if item is None:
        raise ValueError(f"tensor '{name}' is missing: the stream ended before it")
    if item[0] != name:
        raise ValueError(f"unexpected tensor '{item[0]}' where '{name}' was due")
    if tuple(item[1].shape) != shape:
        raise ValueError(f"tensor '{name}' has shape {tuple(item[1].shape)}, not {shape}")
    flat = item[1].detach().to(device="cpu", dtype=dtype).contiguous().reshape(-1)
    file.write(flat.view(torch.uint8).numpy().data)


def _publish(directory: Path, shards: list[_Shard], partials: list[Path], dtype: torch.dtype) -> None:
    """Give the complete files their names, remove what is left of older weights, and make both durable."""
    for shard, partial in zip(shards, partials, strict=True):
        partial.replace(directory / shard.file)
    if len(shards) > 1:
        _write_index(directory, shards, dtype)
    current = {shard.file for shard in shards} | ({INDEX_FILE} if len(shards) > 1 else set())
    for path in [*directory.glob("model-*-of-*.safetensors"), directory / SINGLE_FILE, directory / INDEX_FILE]:
        if path.name not in current:
            path.unlink(missing_ok=True)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_index(directory: Path, shards: list[_Shard], dtype: torch.dtype) -> None:
    total = sum(_num_bytes(shape, dtype) for shard in shards for shape in shard.shapes.values())
    weight_map = {name: shard.file for shard in shards for name in shard.shapes}
    partial = directory / f"{INDEX_FILE}.partial"
    with partial.open("wb") as file:
        file.write(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode())
        _sync(file)
    partial.replace(directory / INDEX_FILE)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
