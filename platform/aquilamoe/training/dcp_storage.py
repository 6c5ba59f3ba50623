"""Tensors of a checkpoint as rows of safetensors files, for torch.distributed.checkpoint to write through.

Its own storage pickles, or leaves files by rank. Here every process puts the rows that it holds at their place in the
files that one process alone would write: no process gathers, and any number of them can read what any number wrote.
The processes share a file system.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from aquilamoe.checkpoint.direct_io import check_space, refusal
from aquilamoe.checkpoint.dtensor import own_part
from aquilamoe.checkpoint.sharding import ShardLayout

DTYPE, ITEM_BYTES = torch.float32, 4  # of every tensor in a checkpoint
HASH_BYTES = 2**20


@dataclass(frozen=True)
class FileSlice:
    """Bytes of a file of a checkpoint, and what they were when they were written."""

    file: str
    start: int
    length: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, file: str, start: int, length: int) -> Self:
        """These bytes as they are now."""
        found, left = hashlib.sha256(), length
        with (folder / file).open("rb") as opened:
            opened.seek(start)
            while left and (piece := opened.read(min(left, HASH_BYTES))):
                found.update(piece)
                left -= len(piece)
        return cls(file, start, length - left, found.hexdigest())

    def is_intact(self, folder: Path) -> bool:
        """Whether the bytes are there and still the same."""
        return FileSlice.of(folder, self.file, self.start, self.length) == self


@dataclass(frozen=True)
class Files:
    """Where every tensor of a checkpoint goes.

    shards: the files, by their path in the checkpoint. places: by key, file and first byte of a tensor, or of each
    tensor of a stack.
    """

    shards: Mapping[str, ShardLayout]
    places: Mapping[str, Sequence[tuple[str, int]]]

    @classmethod
    def of(cls, shards: Mapping[str, ShardLayout], tensors: Mapping[str, Sequence[str]]) -> Self:
        """tensors: by key, the names that the tensor has in the files: one, or of stacked experts one for each."""
        found = {name: (path, shard.starts[name]) for path, shard in shards.items() for name in shard.starts}
        return cls(shards, {key: [found[name] for name in names] for key, names in tensors.items()})


@dataclass(frozen=True)
class TensorPart:
    """What this process has of a tensor: its values, where they begin in the whole, and the shape of the whole."""

    values: Tensor
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, copied: bool) -> Self:
        """copied: to memory of its own, which training does not change."""
        part, place = own_part(tensor.detach())
        values = part.to("cpu", DTYPE, copy=True) if copied else part
        return cls(values, tuple(axis.start for axis in place), tuple(tensor.shape))

    def __create_write_items__(self, key: str, _: Any) -> list[WriteItem]:
        """What torch's planner requires of a distributed tensor."""
        chunk = ChunkStorageMetadata(torch.Size(self.start), self.values.size())
        properties = TensorProperties.create_from_tensor(self.values)
        data = TensorWriteData(chunk, properties, torch.Size(self.shape))
        return [WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]


class PartsPlanner(DefaultSavePlanner):
    """Finds the values of a part. A part that several processes have is written by one of them."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        part = self.state_dict[index.fqn]
        assert isinstance(part, TensorPart)
        return part.values


class Staged(AsyncStager):
    """Nothing to copy: the parts have been (`Part.of`)."""

    should_synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def synchronize_staging(self) -> None:
        return None

    def close(self) -> None:
        return None


class SafetensorsWriter(StorageWriter):
    """Writes one checkpoint into a folder that is not there yet.

    publish: called by the first process when all bytes of all processes are on disk, with what was written.
    """

    def __init__(self, folder: Path, files: Files, publish: Callable[[list[FileSlice]], None]) -> None:
        self.folder = folder
        self.files = files
        self._publish = publish

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a writer is for one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing: the files are made when all plans are known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the files, on the first process, before any other writes into them."""
        self.folder.mkdir(parents=True)
        check_space(self.folder, sum(shard.size for shard in self.files.shards.values()))
        for path, shard in self.files.shards.items():
            (self.folder / path).parent.mkdir(exist_ok=True)
            with (self.folder / path).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this process's parts, and wait until they are on disk."""
        done: Future[list[WriteResult]] = Future()
        with _OpenFiles(self.folder, self.files) as files:
            results = []
            for item in plan.items:
                assert item.tensor_data is not None
                part, data = planner.resolve_data(item), item.tensor_data
                assert isinstance(part, Tensor)
                rows = self._rows(item.index.fqn, part, data.chunk.offsets, data.size)
                spans = [files.write(*row) for row in rows]
                results.append(WriteResult(item.index, sum(span.length for span in spans), spans))
        done.set_result(results)
        return done

    def _rows(
        self, key: str, part: Tensor, start: Sequence[int], shape: Sequence[int]
    ) -> Iterator[tuple[str, int, Tensor]]:
        """The pieces of a part that are contiguous in a file: file, first byte, values."""
        places = self.files.places[key]
        if len(shape) < 3:
            part = part[None]
            start = (0, *start)
            shape = (1, *shape)
        elif len(places) == 1:  # a stack that is one tensor in the file, too
            path, first_byte = places[0]
            places = [(path, first_byte + index * prod(shape[1:]) * ITEM_BYTES) for index in range(shape[0])]
        for (path, first_byte), rows in zip(places[start[0] :], part, strict=False):
            row_bytes = prod(shape[2:]) * ITEM_BYTES
            first_row = first_byte + start[1] * row_bytes if len(shape) > 1 else first_byte
            if rows.shape[1:] == torch.Size(shape[2:]):
                yield path, first_row, rows
            else:  # of a matrix that is cut along its columns
                for index, row in enumerate(rows):
                    yield path, first_row + index * row_bytes + start[2] * ITEM_BYTES, row

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:  # noqa: ARG002
        """On the first process: publish what all have written, and what none of them has: headers, and zeros."""
        spans = [span for of_rank in results for result in of_rank for span in result.storage_data]
        for path, shard in self.files.shards.items():
            end = 0
            written = sorted((span.start, span.start + span.length) for span in spans if span.file == path)
            for start, stop in [*written, (shard.size, shard.size)]:
                if start > end:
                    spans.append(FileSlice.of(self.folder, path, end, start - end))
                end = stop
        self._publish(spans)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:  # noqa: ARG003
        return True


class _OpenFiles:
    """Files that are open for writing anywhere in them, and flushed when all is written."""

    def __init__(self, folder: Path, files: Files) -> None:
        self._folder, self._files = folder, files
        self._descriptors: dict[str, int] = {}

    def __enter__(self) -> "_OpenFiles":
        return self

    def write(self, path: str, start: int, values: Tensor) -> FileSlice:
        data = values.to("cpu", DTYPE).contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(self._folder / path, os.O_WRONLY | os.O_CLOEXEC)
            position = 0
            while position < len(data):
                position += os.pwrite(self._descriptors[path], data[position:], start + position)
        except OSError as error:
            raise self._refusal(path, error) from error
        return FileSlice(path, start, len(data), hashlib.sha256(data).hexdigest())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for path, descriptor in self._descriptors.items():
            try:
                if kind is None:
                    os.fsync(descriptor)
            except OSError as error:
                raise self._refusal(path, error) from error
            finally:
                os.close(descriptor)

    def _refusal(self, path: str, error: OSError) -> Exception:
        return refusal(self._folder / path, self._files.shards[path].size, error)
