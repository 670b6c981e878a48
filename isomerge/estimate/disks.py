"""How fast the disks are: a little of the inputs is read, an unnamed file is written and gone again."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PIECE = 16 << 20  # bytes read or written at a time
MOST = 4 * PIECE
SECONDS = 0.3  # no further piece is begun after
PAGES = 256  # asked whether they are in memory: the share is known to 3 %, one standard error


@dataclass(frozen=True, slots=True)
class Disks:
    """Bytes per second."""

    read: float  # from the inputs' disk, where they are not in memory
    write: float  # to the output's disk, until they are safe there
    checksum: float  # read again from memory for SHA-256
    cached: float | None  # share of the inputs that is in memory now; None where the system does not tell


def measure(inputs: Sequence[Path], scratch: IO[bytes]) -> Disks:
    """The disks of the input files, and of the unbuffered file `scratch`, which is empty afterwards."""
    sizes = {path: os.path.getsize(path) for path in inputs}
    cached = cached_share(sizes)  # before anything is read
    write, checksum = write_rates(scratch)
    return Disks(read_rate(sizes), write, checksum, cached)


def cached_share(sizes: dict[Path, int]) -> float | None:
    """Share of the bytes of some files that reading would find in memory, from pages chosen at random."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    found, byte = [], bytearray(1)
    for path, offsets in _places(sizes, PAGES, 1).items():
        with open(path, "rb", buffering=0) as file:
            # Asking for a page that is not there must not fetch those around it.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for offset in offsets:
                try:
                    found.append(os.preadv(file.fileno(), [byte], offset, os.RWF_NOWAIT) > 0)
                except OSError as error:
                    if error.errno != errno.EAGAIN:  # the file system does not tell
                        return None
                    found.append(False)
    return sum(found) / len(found) if found else None


def read_rate(sizes: dict[Path, int]) -> float:
    """Bytes per second of reading what is not in memory: the kernel is told to forget a few pieces first."""
    buffer, done, seconds = bytearray(PIECE), 0, 0.0
    for path, offsets in _places(sizes, MOST // PIECE, PIECE).items():
        with open(path, "rb", buffering=0) as file:
            for offset in offsets:
                if seconds > SECONDS:
                    break
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), offset, PIECE, os.POSIX_FADV_DONTNEED)
                started = time.perf_counter()
                done += os.preadv(file.fileno(), [buffer], offset)
                seconds += time.perf_counter() - started
    return max(done, 1) / max(seconds, 1e-6)


def write_rates(scratch: IO[bytes]) -> tuple[float, float]:
    """Bytes per second of writing and fsync, and of SHA-256 over what was written."""
    data, done, seconds, fd = os.urandom(PIECE // 16) * 16, 0, 0.0, scratch.fileno()
    try:
        while done < MOST and seconds <= SECONDS:
            started = time.perf_counter()
            done += os.pwrite(fd, data, done)
            os.fsync(fd)
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        hashlib.sha256(os.pread(fd, PIECE, 0))
        checksum = PIECE / (time.perf_counter() - started)
    finally:
        scratch.truncate(0)
    return done / seconds, checksum


def _places(sizes: dict[Path, int], count: int, length: int) -> dict[Path, list[int]]:
    """`count` offsets chosen at random among all bytes, each with `length` bytes after it where the file has them.

    At random anew in every call: what an earlier call has read is in memory since.
    """
    files = [path for path, size in sizes.items() if size > 0]
    places: dict[Path, list[int]] = {}
    for path in random.choices(files, [sizes[path] for path in files], k=count) if files else ():
        places.setdefault(path, []).append(random.randrange(max(1, sizes[path] - length + 1)))
    return places
