"""Bytes to the disk at its own speed: reused buffers, direct writes around the page cache, several under way at once.

A buffered write copies every byte into the page cache and is throttled once that fills; a direct one goes from the
buffer to the disk, holds nothing in memory, and is durable soon after. Where a file system refuses it, the same bytes
go through the cache.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread

from aquilamoe import format as formats
from aquilamoe.checkpoint.sharding import PAGE
from aquilamoe.config.messages import UserError

BUFFER_BYTES = 4 * 2**20
DIRECT_BYTES = 64 * 2**10  # less than this is quicker through the cache, and flushed with everything else
DIRECT = getattr(os, "O_DIRECT", 0)
REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file may not become that large",
}


class Buffer:
    """Whole pages of memory, lent to several readers at a time and free again when each has released it."""

    def __init__(self, free: "SimpleQueue[Buffer]") -> None:
        self.memory = mmap.mmap(-1, BUFFER_BYTES)
        self._free = free
        self._lock = Lock()
        self._borrowers = 0

    def lend(self, borrowers: int) -> None:
        self._borrowers = borrowers

    def release(self) -> None:
        with self._lock:
            self._borrowers -= 1
            last = self._borrowers == 0
        if last:
            self._free.put(self)


class Lane:
    """A thread that does one thing after the other, and nothing more after the first error, which it keeps."""

    def __init__(self, name: str) -> None:
        self.error: BaseException | None = None
        self._stopped = False
        self._jobs: SimpleQueue[tuple[Callable[[], None], Buffer | None] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None], buffer: Buffer | None = None) -> None:
        """Queue a job; `buffer` is released after it, whatever happens."""
        self._jobs.put((job, buffer))

    def stop(self) -> None:
        """Do nothing more of what is queued."""
        self._stopped = True

    def join(self) -> None:
        """Wait for all that was queued."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, buffer = item
            try:
                if not self._stopped:
                    job()
            except BaseException as error:  # raised again in the thread that waits for it
                self.error, self._stopped = error, True
            finally:
                if buffer is not None:
                    buffer.release()
            del item, job, buffer


class OutputFile:
    """A file of known size whose bytes come in any order, from several threads.

    It is opened by the first write and, when all its bytes have come, made durable and closed.
    """

    def __init__(self, path: Path, size: int, header: bytes = b"") -> None:
        self.path = path
        self._size = size
        self._header = header
        self._remaining = size
        self._descriptor = self._direct = -1
        self._refuses_direct = False
        self._lock = Lock()

    def finish(self) -> None:
        """Make sure that the file is there, also when nothing had to be written to it."""
        if self._remaining == self._size:
            self.write(memoryview(b""), 0, len(self._header))
        assert self._remaining == 0

    def write(self, data: memoryview, phase: int, offset: int) -> None:
        """Put `data`, whose memory begins `phase` bytes after a page's beginning, at `offset` of the file."""
        try:
            with self._lock:
                if self._descriptor < 0:
                    self._open()
            head = body = 0
            if self._direct >= 0 and not self._refuses_direct and (offset - phase) % PAGE == 0:
                head = min(-offset % PAGE, len(data))
                body = (len(data) - head) // PAGE * PAGE
            if body >= DIRECT_BYTES:
                _write_all(self._descriptor, data[:head], offset)
                self._write_direct(data[head : head + body], offset + head)
                _write_all(self._descriptor, data[head + body :], offset + head + body)
            else:
                _write_all(self._descriptor, data, offset)
            with self._lock:
                self._remaining -= len(data)
                is_last = self._remaining == 0
            if is_last:
                os.fsync(self._descriptor)
                self.close()
        except OSError as error:
            raise refusal(self.path, self._size, error) from error

    def close(self) -> None:
        """Close without a guarantee: only a file that got all its bytes is durable."""
        for descriptor in (self._descriptor, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._direct = -1

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        _allocate(self._descriptor, self._size)
        _write_all(self._descriptor, memoryview(self._header), 0)
        self._remaining -= len(self._header)
        if DIRECT:
            try:
                self._direct = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC | DIRECT)
            except OSError as error:
                if error.errno not in REFUSALS:
                    raise

    def _write_direct(self, data: memoryview, offset: int) -> None:
        """Write whole pages; some file systems open a file for direct writes and then refuse each of them."""
        try:
            written = os.pwrite(self._direct, data, offset)
        except OSError as error:
            if error.errno not in REFUSALS:
                raise
            self._refuses_direct, written = True, 0
        _write_all(self._descriptor, data[written:], offset + written)


def _allocate(descriptor: int, size: int) -> None:
    """Give the file its size, and blocks on the disk where the file system can: then it takes several writes at once.

    Not `os.posix_fallocate`, which writes to every block where the file system cannot.
    """
    os.truncate(descriptor, size)
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None or fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) == 0:
        return
    if ctypes.get_errno() in FULL:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def refusal(path: Path, size: int, error: OSError) -> UserError:
    """What a user reads when a file cannot be written."""
    reason = FULL.get(error.errno or 0)
    if reason is None:
        return UserError(
            f"{path}: cannot be written ({error.strerror}); name a directory on a disk that can be written"
        )
    disk = os.statvfs(path.parent)
    free = disk.f_bavail * disk.f_frsize
    return UserError(
        f"{path}: {reason}: the file needs {formats.size(size)}, {formats.size(free)} are free and "
        "nothing of it is left behind; make room or name another directory"
    )


def check_space(directory: Path, needed: int) -> None:
    """Refuse before the first byte what the disk cannot hold."""
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if needed > free:
        raise UserError(
            f"{directory}: needs {formats.size(needed)}, {formats.size(free)} are free; "
            f"free {formats.size(needed - free)} or name a directory on another disk"
        )
