"""Open files, a few at a time, read and written at offsets straight into and out of the memory of tensors.

Reading is by pread into fresh tensors, never by mmap: mapped pages count as resident memory, and isomerge promises
a bound. Both directions release the interpreter lock while the kernel works.
"""

from __future__ import annotations

import ctypes
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from isomerge.errors import InputError

try:
    from isal.isal_zlib import crc32 as _crc32  # the same numbers by products without carry: 40 GB/s, not 2.6
except ModuleNotFoundError:  # a machine for which it is not packaged
    from zlib import crc32 as _crc32

_BLOCK = 4 << 20  # bytes read at a time for a checksum
_MAX_CALL = 1 << 30  # bytes; Linux moves at most 2 GiB - 4 KiB per call, macOS 2 GiB - 1


class Stamp(NamedTuple):
    """What tells that a file is still the one whose header was checked."""

    size: int
    mtime_ns: int
    inode: int

    @property
    def modified(self) -> str:
        """The time of the last change, in UTC, to the nanosecond."""
        seconds, rest = divmod(self.mtime_ns, 10**9)
        return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest:09d}Z"

    @classmethod
    def of(cls, fd: int) -> Stamp:
        status = os.fstat(fd)
        return cls(status.st_size, status.st_mtime_ns, status.st_ino)


def open_input(path: Path) -> FileIO:
    """The regular file at `path`, unbuffered; InputError if it is missing, unreadable or something else."""
    try:
        # A pipe would block the open for ever, so the kind is asked first.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: not a regular file, expected a file of weights")
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def read_bytes(fd: int, offset: int, count: int) -> bytes:
    """At most `count` bytes at `offset`; fewer only where the file ends."""
    parts = []
    while count > 0 and (part := os.pread(fd, min(count, _MAX_CALL), offset)):
        parts.append(part)
        offset += len(part)
        count -= len(part)
    return b"".join(parts)


def read_into(fd: int, offset: int, tensor: Tensor) -> bool:
    """Fill a contiguous CPU tensor with the bytes at `offset`; False if the file ended first."""
    memory = memory_of(tensor)
    done = 0
    while done < len(memory):
        count = os.preadv(fd, [memory[done : done + _MAX_CALL]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def write_from(fd: int, offset: int, tensor: Tensor) -> None:
    """Put the bytes of a contiguous CPU tensor at `offset`."""
    memory = memory_of(tensor)
    done = 0
    while done < len(memory):
        done += os.pwrite(fd, memory[done : done + _MAX_CALL], offset + done)


def crc32(tensor: Tensor) -> int:
    """Of the bytes of a contiguous CPU tensor."""
    return _crc32(memory_of(tensor))


def crc32_at(fd: int, offset: int, count: int) -> int:
    """Of the `count` bytes at `offset`, or those up to the end of the file."""
    value = 0
    while count > 0 and (part := os.pread(fd, min(count, _BLOCK), offset)):
        value = _crc32(part, value)
        offset += len(part)
        count -= len(part)
    return value


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, in place."""
    # Tensors have no buffer protocol of their own without numpy. The caller keeps the tensor alive.
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes == 0:
        return memoryview(b"")
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")


@dataclass(slots=True)
class _Open:
    file: FileIO
    users: int = 0


@dataclass(slots=True)
class FilePool:
    """Keeps the few most recently used files open; safe to use from several threads.

    With `writable`, files are opened for writing and fsynced before they are closed, so that a failed write-back
    is never lost with its descriptor.
    """

    writable: bool = False
    max_open: int = 4
    _files: OrderedDict[Path, _Open] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False
    _sync: bool = True

    @contextmanager
    def use(self, path: Path) -> Iterator[int]:
        """A descriptor of `path` that stays open for the length of the block. Raises OSError if it cannot be opened."""
        with self._lock:
            if self._closed:
                raise ValueError(f"{path}: used after close()")
            entry = self._files.get(path)
            if entry is None:
                entry = self._files[path] = _Open(self._open(path))
            entry.users += 1
            self._files.move_to_end(path)
        try:
            yield entry.file.fileno()
        finally:
            with self._lock:
                entry.users -= 1
                self._evict(0 if self._closed else self.max_open)

    def close(self, *, sync: bool = True) -> None:
        """Close every file; one that a thread is still using is closed when that thread is done.

        Without `sync`, for files that have been removed, nothing is forced to the disk.
        """
        with self._lock:
            self._closed = True
            self._sync = self._sync and sync
            self._evict(0)

    def _open(self, path: Path) -> FileIO:
        file = FileIO(path, "r+" if self.writable else "r")
        if not self.writable and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return file

    def _evict(self, keep: int) -> None:
        for path in [path for path, entry in self._files.items() if entry.users == 0]:
            if len(self._files) <= keep:
                return
            file = self._files.pop(path).file
            try:
                if self.writable and self._sync:
                    os.fsync(file.fileno())
            finally:
                file.close()
