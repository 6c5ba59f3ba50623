"""A safetensors directory written a block at a time, in any order, with constant memory (no torch unless it is given).

Three things happen at once: the caller fills buffers, some threads write them, two hash them. The library's own
`save_file` needs the whole model in memory.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from aquilamoe.checkpoint import sharding
from aquilamoe.checkpoint.direct_io import BUFFER_BYTES, Buffer, Lane, OutputFile, check_space
from aquilamoe.checkpoint.dtypes import cast, encode, torch_dtype
from aquilamoe.checkpoint.finite import first_nonfinite_bytes
from aquilamoe.checkpoint.raw_reader import RawReader
from aquilamoe.checkpoint.safetensors_header import INDEX_FILE, ITEM_BYTES, SINGLE_FILE
from aquilamoe.checkpoint.sharding import MAX_SHARD_BYTES, PAGE
from aquilamoe.files import sync_directory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Block = Tensor | np.ndarray

PARTIAL = ".partial"
FILES = ("model-*-of-*.safetensors", SINGLE_FILE, INDEX_FILE)  # what a checkpoint's weights can be called
NUM_BUFFERS = 6
NUM_WRITING = 4  # direct writes under way: a disk is faster with more requests queued
NUM_HASHING = 2


class CheckpointWriter:
    """Writes the tensors of a checkpoint, each once, in any order, from any thread; a context manager.

    Files get their names when the block ends without an exception; after an exception nothing is left behind.

    Args:
        directory: made if it does not exist. Its weights are replaced, and stay as they are until all else is on disk.
        shapes: shape of every tensor; the index keeps their order.
        dtype: of all tensors, a torch.dtype or as safetensors spells it; or a mapping from every name to the latter.
        max_shard_bytes: bytes of tensors in a file.
        joined: tensors of the files that are written in parts, by name; the parts are in `shapes`.

    Raises:
        UserError: the disk is too small or becomes full.
        ValueError: at the end, if a tensor is missing.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: "torch.dtype | sharding.Dtypes",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        *,
        joined: Mapping[str, sharding.Joined] | None = None,
    ) -> None:
        self.directory = directory
        self.digests: dict[str, str] = {}  # SHA-256 of every tensor's bytes, complete after the exit
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._dtypes = dict(dtype) if isinstance(dtype, Mapping) else dict.fromkeys(self._shapes, sharding.spell(dtype))
        self._shards = sharding.plan_shards(self._shapes, self._dtypes, max_shard_bytes, joined)
        self._index = sharding.index(self._shards, self._shapes, self._dtypes)
        self._claimed: set[str] = set()
        self._missing = dict.fromkeys(self._shapes)

    def __enter__(self) -> Self:
        self._is_new = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._remove_partials()
        try:
            check_space(self.directory, sum(shard.size for shard in self._shards))
        except BaseException:
            self._remove_directory()
            raise
        self._files = [OutputFile(self._partial(shard.file), shard.size, shard.header) for shard in self._shards]
        self._places = {
            name: (file, start)
            for file, shard in zip(self._files, self._shards, strict=True)
            for name, start in shard.starts.items()
        }
        self._free: SimpleQueue[Buffer] = SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._free.put(Buffer(self._free))
        self._writing = [Lane(f"writing-{number}") for number in range(NUM_WRITING)]
        self._hashing = [Lane(f"hashing-{number}") for number in range(NUM_HASHING)]
        self._hashing_turns, self._writing_turns = count(), count()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            complete = error is None and not self._missing
            for lane in self._lanes():
                if not complete:
                    lane.stop()
                lane.join()
            if error is None:
                self._raise_errors()
                if self._missing:
                    raise ValueError(
                        f"tensor '{next(iter(self._missing))}' is missing: {len(self._missing)} never came"
                    )
                for file in self._files:
                    file.finish()
                self._publish()
        finally:
            for file in self._files:
                file.close()
            self._remove_partials()
            self._remove_directory()

    def write(self, names: str | Sequence[str], blocks: "Iterable[Block]") -> None:
        """Write a tensor, given as blocks of its rows in order, under one name or the same under several.

        Args:
            names: of the tensor; of several, all get the same bytes.
            blocks: of shape (rows, ...) as the tensor has after its first dimension, of any type, on any device, or
                arrays of NumPy in float32 or wider; their rows add up to those of the tensor. Each is converted once
                and released before the next is requested.

        Raises:
            UserError: a number does not fit into float16.
            ValueError: a name is unexpected or written twice, or a shape is not the tensor's.
        """
        names, shape = self._claim(names)
        flow = _Flow(self, names, self._next_hashing())
        stream = iter(blocks)
        rows, due = 0, shape[0] if shape else 1
        while (block := next(stream, None)) is not None:
            if tuple(block.shape[1:]) != shape[1:] or len(block.shape) != len(shape):
                raise ValueError(f"tensor '{names[0]}' has shape {shape}, a block of it {tuple(block.shape)}")
            rows += block.shape[0] if shape else 1
            if rows <= due:
                flow.convert(block, self._dtypes[names[0]])
            del block
        if rows != due:
            raise ValueError(f"tensor '{names[0]}' has shape {shape}, its blocks {rows} rows instead of {due}")
        self._end(flow, names)

    def copy(self, names: str | Sequence[str], reader: RawReader, source_name: str) -> None:
        """Write the bytes of a tensor of `reader`, which has the same shape and type, under one name or several.

        They are read once.

        Args:
            names: in this checkpoint; of several, all get the same bytes.
            reader: of the source.
            source_name: of the tensor in the source.

        Raises:
            UserError: a value is infinite or NaN.
            ValueError: a name is unexpected or written twice, or shape or type differ.
        """
        names, shape = self._claim(names)
        info, dtype = reader.info(source_name), self._dtypes[names[0]]
        if (info.shape, info.dtype) != (shape, dtype):
            raise ValueError(
                f"tensor '{names[0]}' is {dtype} {shape}, '{source_name}' of the source {info.dtype} {info.shape}"
            )
        reader.will_need(source_name)
        # Not from the buffers, which would wait for it where a tensor has few copies.
        self._next_hashing().put(partial(self._digest_copy, names, reader, source_name))
        flow = _Flow(self, names, None)
        position = 0
        while position < info.num_bytes:
            room = flow.room()[: info.num_bytes - position]
            reader.read_into(source_name, position, room)
            index = first_nonfinite_bytes(room, dtype)
            if index is not None:
                raise reader.nonfinite(source_name, position // ITEM_BYTES[dtype] + index)
            flow.advance(len(room))
            position += len(room)
        self._end(flow, names)

    def _digest_copy(self, names: list[str], reader: RawReader, source_name: str) -> None:
        self.digests |= dict.fromkeys(names, reader.digest(source_name))

    def _claim(self, names: str | Sequence[str]) -> tuple[list[str], tuple[int, ...]]:
        """Names that are written now, and the shape that they share."""
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if name not in self._shapes:
                raise ValueError(f"unexpected tensor '{name}'")
            if name in self._claimed:
                raise ValueError(f"tensor '{name}' is written twice")
            assert self._dtypes[name] == self._dtypes[names[0]]
            if self._shapes[name] != self._shapes[names[0]]:
                raise ValueError(
                    f"tensors '{names[0]}' {self._shapes[names[0]]} and '{name}' {self._shapes[name]} differ in shape"
                )
            self._claimed.add(name)
        return names, self._shapes[names[0]]

    def _end(self, flow: "_Flow", names: list[str]) -> None:
        flow.end()
        for name in names:
            del self._missing[name]

    def _lanes(self) -> list[Lane]:
        return [*self._writing, *self._hashing]

    def _raise_errors(self) -> None:
        for lane in self._lanes():
            if lane.error is not None:
                raise lane.error

    def take_buffer(self) -> Buffer:
        """An empty buffer, as soon as there is one."""
        buffer = self._free.get()
        self._raise_errors()
        return buffer

    def _next_hashing(self) -> Lane:
        """The thread whose turn it is to hash a tensor."""
        return self._hashing[next(self._hashing_turns) % NUM_HASHING]

    def next_writing(self) -> Lane:
        """The thread whose turn it is to write a buffer to one place."""
        return self._writing[next(self._writing_turns) % NUM_WRITING]

    def places(self, names: Sequence[str]) -> list[tuple[OutputFile, int]]:
        """File and first byte of tensors."""
        return [self._places[name] for name in names]

    def _partial(self, file: str) -> Path:
        return self.directory / f"{file}{PARTIAL}"

    def _remove_partials(self) -> None:
        """Those of this writer, and what one that was killed left behind."""
        for pattern in FILES:
            for path in self.directory.glob(f"{pattern}{PARTIAL}"):
                path.unlink(missing_ok=True)

    def _remove_directory(self) -> None:
        if self._is_new and self.directory.is_dir() and not any(self.directory.iterdir()):
            self.directory.rmdir()

    def _publish(self) -> None:
        """Give the complete files their names, remove what is left of older weights, and make both durable."""
        if self._index is not None:
            OutputFile(self._partial(INDEX_FILE), len(self._index), self._index).finish()
        current = sharding.file_names(self._shards)
        for file in current:
            self._partial(file).replace(self.directory / file)
        for pattern in FILES:
            for path in self.directory.glob(pattern):
                if path.name not in current:
                    path.unlink()
        sync_directory(self.directory)
        if self._is_new:
            sync_directory(self.directory.parent)


class _Flow:
    """The bytes of one tensor on their way into buffers, from there to its places, and in a lane through a hash."""

    def __init__(self, writer: "CheckpointWriter", names: list[str], hashing: Lane | None) -> None:
        self.name = names[0]
        self._writer = writer
        self._names = names
        self._hashing = hashing
        self._places = writer.places(names)
        # Memory and file have to agree on where pages begin; of several places the first decides.
        self._begin = self._end = self._places[0][1] % PAGE
        self._written = 0
        self._buffer: Buffer | None = None
        self._hash = hashlib.sha256()

    def room(self) -> memoryview:
        """Memory for the next bytes, at least one."""
        if self._buffer is None:
            self._buffer = self._writer.take_buffer()
        return memoryview(self._buffer.memory)[self._end :]

    def advance(self, count: int) -> None:
        """Count bytes that were put into the room, and send a full buffer on its way."""
        self._end += count
        if self._end == BUFFER_BYTES:
            self._send()

    def convert(self, block: "Block", dtype: str) -> None:
        """Put the elements of a block into the room, cast."""
        if not isinstance(block, np.ndarray):
            _convert(block, self, dtype)
            return
        data = encode(block, dtype, self.name).reshape(-1).view(np.uint8).data
        while data:
            room = self.room()
            count = min(len(data), len(room))
            room[:count] = data[:count]
            self.advance(count)
            data = data[count:]

    def end(self) -> None:
        """Send what is left; the digest follows when all has been hashed."""
        if self._end > self._begin:
            self._send()
        if self._hashing:
            self._hashing.put(self._digest)

    def _send(self) -> None:
        assert self._buffer is not None
        buffer, self._buffer = self._buffer, None
        data = memoryview(buffer.memory)[self._begin : self._end]
        buffer.lend(len(self._places) + (1 if self._hashing else 0))
        if self._hashing:
            self._hashing.put(partial(self._hash.update, data), buffer)
        for file, start in self._places:
            job = partial(file.write, data, self._begin, start + self._written)
            self._writer.next_writing().put(job, buffer)
        self._written += len(data)
        self._begin = self._end = 0

    def _digest(self) -> None:
        self._writer.digests |= dict.fromkeys(self._names, self._hash.hexdigest())


def _convert(block: "Tensor", flow: _Flow, dtype: str) -> None:
    """Put the elements of a block, cast, into the flow; what is not contiguous is gathered in small pieces."""
    import torch

    kind = torch_dtype(dtype)
    item_bytes = kind.itemsize
    block = block.detach()
    rows = max(1, BUFFER_BYTES * len(block) // max(1, block.numel() * item_bytes)) if block.dim() else 1
    for piece in [block] if block.is_contiguous() or block.dim() == 0 else block.split(rows):
        flat = piece.reshape(-1)
        position, size = 0, flat.numel()
        while position < size:
            room = flow.room()
            count = min(size - position, len(room) // item_bytes)
            part = flat[position : position + count]
            if kind == torch.float16:
                part = cast(part, kind, flow.name)
            if part.dtype == kind and part.device.type == "cpu" and part.is_contiguous():
                # Without torch's threads, which would wait for each other while others compute.
                np.copyto(np.frombuffer(room, np.uint8, part.nbytes), part.view(torch.uint8).numpy())
            else:
                torch.frombuffer(room, dtype=kind, count=count).copy_(part)
            flow.advance(count * item_bytes)
            position += count
