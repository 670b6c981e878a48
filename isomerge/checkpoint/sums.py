"""SHA-256 of files: of one that is still being written, what can be summed already is, while the rest is computed."""

from __future__ import annotations

import hashlib
import heapq
import threading
from pathlib import Path

_BLOCK = 4 << 20  # bytes read at a time


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    return GrowingSum(path, 0).finish()


class GrowingSum:
    """SHA-256 over a file whose bytes arrive in stretches, in any order, from any thread, each once and for good."""

    def __init__(self, path: Path, start: int) -> None:
        """The first `start` bytes are there."""
        self._path = path
        self._sum = hashlib.sha256()
        self._summed = 0  # bytes
        self._end = start  # of what is there without a gap
        self._apart: list[tuple[int, int]] = []  # heap of stretches behind a gap
        self._lock = threading.Lock()
        self._summing = threading.Lock()  # held by the thread that sums

    def arrived(self, begin: int, content: memoryview) -> None:
        """The bytes from `begin` on are in the file. Unless another thread does, this one sums what is there by now.

        Stretches that come in order are summed from memory, while they are in the cache, and others from the file.
        """
        end = begin + len(content)
        with self._lock:
            heapq.heappush(self._apart, (begin, end))
            while self._apart and self._apart[0][0] <= self._end:
                self._end = max(self._end, heapq.heappop(self._apart)[1])
        if self._summing.acquire(blocking=False):
            try:
                if begin == self._summed:
                    self._sum.update(content)
                    self._summed = end
                more = True
                while more and self._summed < self._end:  # which moves on meanwhile
                    more = self._read(self._end)
            finally:
                self._summing.release()

    def finish(self) -> str:
        """In hexadecimal digits, of the whole file; nothing can be summed afterwards."""
        with self._summing:
            self._read(None)
        return self._sum.hexdigest()

    def _read(self, end: int | None) -> bool:
        """Sums what is in the file from where the sum stands to `end`; whether there was anything."""
        before = self._summed
        with open(self._path, "rb", buffering=0) as file:
            file.seek(before)
            while part := file.read(_BLOCK if end is None else min(_BLOCK, end - self._summed)):
                self._sum.update(part)
                self._summed += len(part)
        return self._summed > before
