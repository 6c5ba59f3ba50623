"""The bytes of a safetensors directory, by tensor, without torch: what a growth that only copies needs."""

import hashlib
import mmap
import os
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Self

from aquilamoe.checkpoint import packed
from aquilamoe.checkpoint.safetensors_header import TensorInfo
from aquilamoe.config.messages import UserError

HASH_BYTES = 2**20
AHEAD_BYTES = 32 * 2**20


class RawReader:
    """The tensors of a checkpoint directory, one file or shards; opening reads every header. A context manager.

    Args:
        directory: of a checkpoint with safetensors.

    Raises:
        UserError: the directory has no weights, or they are damaged (see `safetensors_header.read`).
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors = packed.read(directory)
        self._descriptors: dict[str, int] = {}
        self._digests: dict[str, str] = {}
        self._lock = Lock()

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.tensors)

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor."""
        if name not in self.tensors:
            raise UserError(
                f"{self.directory}: there is no tensor '{name}' among its {len(self.tensors)}; "
                "take config.json and weights from the same checkpoint"
            )
        return self.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header only."""
        return self.info(name).shape

    def read_into(self, name: str, position: int, room: memoryview) -> None:
        """Fill `room` with the bytes of a tensor from `position` (in bytes) on.

        Raises:
            UserError: the file has become shorter.
        """
        info = self.info(name)
        offset, end = info.start + position, info.start + position + len(room)
        assert end <= info.end
        while offset < end:
            count = os.preadv(self._descriptor(info.file), [room[offset - end :]], offset)
            if count == 0:
                raise UserError(
                    f"{self.directory / info.file}: tensor '{name}' ends at byte {info.end}, the file now at {offset}; "
                    "leave the source alone while it is read"
                )
            offset += count

    def will_need(self, name: str) -> None:
        """Let the disk read a tensor ahead."""
        info = self.info(name)
        self._advise(info.file, info.start, info.num_bytes + AHEAD_BYTES)

    def digest(self, name: str) -> str:
        """SHA-256 of the bytes of a tensor, in hexadecimal; computed once, from any thread."""
        if name not in self._digests:
            found, info = hashlib.sha256(), self.info(name)
            with mmap.mmap(-1, HASH_BYTES) as memory, memoryview(memory) as room:
                for position in range(0, info.num_bytes, HASH_BYTES):
                    with room[: min(HASH_BYTES, info.num_bytes - position)] as piece:
                        self.read_into(name, position, piece)
                        found.update(piece)
            self._digests[name] = found.hexdigest()
        return self._digests[name]

    def nonfinite(self, name: str, index: int) -> UserError:
        """The error for element `index` of a flattened tensor that is infinite or NaN."""
        info = self.info(name)
        return UserError(
            f"{self.directory / info.file}: tensor '{name}' {info.shape} is infinite or no number at element {index}; "
            "choose a checkpoint from before its training diverged, or copy it again"
        )

    def _advise(self, file: str, start: int, size: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor(file), start, size, os.POSIX_FADV_WILLNEED)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(self.directory / file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
