"""Safetensors directories as tensors: a reader that maps files, and `write` for models that are in memory.

torch is imported by the first tensor that is requested.
"""

import mmap
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from aquilamoe.checkpoint.dtypes import torch_dtype
from aquilamoe.checkpoint.finite import first_nonfinite
from aquilamoe.checkpoint.raw_reader import RawReader
from aquilamoe.checkpoint.safetensors_header import INDEX_FILE, SINGLE_FILE
from aquilamoe.checkpoint.sharding import MAX_SHARD_BYTES, PAGE
from aquilamoe.checkpoint.writer import CheckpointWriter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["INDEX_FILE", "SINGLE_FILE", "CheckpointWriter", "Reader", "first_nonfinite", "write"]
# Not accounted as memory that could be needed: a file may be larger than the machine's.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class Reader(RawReader):
    """The tensors of a checkpoint directory. Opening reads every header; a tensor is a view of its mapped file.

    What was read stays in memory until it is released or the reader closed. Changing a tensor in place does not change
    the file.

    Args:
        directory: of a checkpoint, one safetensors file or shards.

    Raises:
        UserError: the directory has no weights, or they are damaged.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._maps: dict[str, mmap.mmap] = {}

    def dtype(self, name: str) -> "torch.dtype":
        """Element type of a tensor, from the header only."""
        return torch_dtype(self.info(name).dtype)

    def get(self, name: str) -> "Tensor":
        """A tensor, mapped from its file."""
        info = self.info(name)
        return self._view(name, info.start, info.shape)

    def rows(self, name: str, start: int, stop: int) -> "Tensor":
        """Rows `start` to `stop` of a tensor, mapped from its file."""
        info = self.info(name)
        assert 0 <= start <= stop <= info.shape[0]
        row_bytes = info.num_bytes // max(1, info.shape[0])
        return self._view(name, info.start + start * row_bytes, (stop - start, *info.shape[1:]))

    def release(self, name: str) -> None:
        """Give back the memory of a tensor that was read; views of it stay valid and are read again when used.

        In-place changes of the tensor are lost.
        """
        info = self.info(name)
        if info.file in self._maps:
            start, end = -(-info.start // PAGE) * PAGE, info.end // PAGE * PAGE
            if start < end:
                self._maps[info.file].madvise(mmap.MADV_DONTNEED, start, end - start)

    def check(self, name: str, tensor: "Tensor", first_row: int = 0) -> None:
        """Raise UserError for a value that is infinite or NaN in rows of a tensor from `first_row` on."""
        index = first_nonfinite(tensor)
        if index is not None:
            raise self.nonfinite(name, first_row * prod(self.shape(name)[1:]) + index)

    def _view(self, name: str, start: int, shape: tuple[int, ...]) -> "Tensor":
        import torch

        dtype = self.dtype(name)
        size = prod(shape)
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        file = self.info(name).file
        self._advise(file, start, size * dtype.itemsize)
        data = memoryview(self._map(file))[start : start + size * dtype.itemsize]
        if start % dtype.itemsize:  # a header of another writer may have any length
            data = memoryview(bytearray(data))
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def _map(self, file: str) -> mmap.mmap:
        descriptor = self._descriptor(file)
        with self._lock:
            if file not in self._maps:
                private = mmap.MAP_PRIVATE | NO_RESERVE
                self._maps[file] = mmap.mmap(descriptor, 0, private, mmap.PROT_READ | mmap.PROT_WRITE)
            return self._maps[file]

    def close(self) -> None:
        """Close the files; tensors that are still referred to stay readable."""
        self._maps.clear()
        super().close()


def write(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: "torch.dtype",
    tensors: "Iterable[tuple[str, Tensor]]",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors, cast to `dtype`, as one safetensors file, or as shards of `max_shard_bytes` at most and an index.

    Args:
        directory: made if it does not exist.
        shapes: shape of every tensor, by name.
        dtype: of all tensors in the file.
        tensors: yields exactly the names of `shapes`, in that order; each is released before the next is requested.
        max_shard_bytes: bytes of tensors in a file.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
        UserError: as `CheckpointWriter`.
    """
    stream = iter(tensors)
    with CheckpointWriter(directory, shapes, dtype, max_shard_bytes) as writer:
        for name, shape in shapes.items():
            item = next(stream, None)
            if item is None:
                raise ValueError(f"tensor '{name}' is missing: the stream ended before it")
            if item[0] != name:
                raise ValueError(f"unexpected tensor '{item[0]}' where '{name}' was due")
            if tuple(item[1].shape) != shape:
                raise ValueError(f"tensor '{name}' has shape {tuple(item[1].shape)}, not {shape}")
            writer.write(name, iter([item[1]]))
            del item
        extra = next(stream, None)
        if extra is not None:
            raise ValueError(f"unexpected tensor '{extra[0]}' after the last of {len(shapes)}")
