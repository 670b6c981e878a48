"""SHA-256 of files: of one that is still being written, what can be summed already is, while the rest is computed."""

from __future__ import annotations

import hashlib
import heapq
import threading
from pathlib import Path

_BLOCK = 4 << 20  # bytes read at a time


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    return GrowingSum(0).finish(path)


class GrowingSum:
    """SHA-256 over a file whose bytes arrive in stretches, in any order, from any thread, each once and for good."""

    def __init__(self, start: int) -> None:
        """The first `start` bytes are there."""
        self._sum = hashlib.sha256()
        self._summed = 0  # bytes
        self._end = start  # of what is there without a gap
        self._apart: list[tuple[int, int]] = []  # heap of stretches behind a gap
        self._lock = threading.Lock()

    def arrived(self, begin: int, end: int) -> None:
        """The bytes from `begin` to `end` are in the file."""
        with self._lock:
            heapq.heappush(self._apart, (begin, end))
            while self._apart and self._apart[0][0] <= self._end:
                self._end = max(self._end, heapq.heappop(self._apart)[1])

    def advance(self, path: Path) -> None:
        """Sums what has arrived without a gap; one thread at a time."""
        with self._lock:
            end = self._end
        self._read(path, end)

    def finish(self, path: Path) -> str:
        """In hexadecimal digits, of the whole file; nothing can be summed afterwards."""
        self._read(path, None)
        return self._sum.hexdigest()

    def _read(self, path: Path, end: int | None) -> None:
        with open(path, "rb", buffering=0) as file:
            file.seek(self._summed)
            while part := file.read(_BLOCK if end is None else min(_BLOCK, end - self._summed)):
                self._sum.update(part)
                self._summed += len(part)
