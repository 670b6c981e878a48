"""The files of weights of an output under way: written at known offsets, checked, and finished one by one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from isomerge.checkpoint.files import FilePool, crc32_at, memory_of, write_from
from isomerge.checkpoint.shards import Shard
from isomerge.checkpoint.staging import sync
from isomerge.checkpoint.sums import GrowingSum, sha256_of

PART = ".part"  # ends every file name until the file is complete, so that nothing half done looks like a model
FLUSH_BYTES = 256 << 20  # written to a file before the disk is made to take them: the last fsync finds little to do
_MAX_OPEN = 64  # shards; groups of equal matrices go through all of them in turn


class ShardFiles:
    """The same shards in each of the folders `outputs` below `folder`, summed as they are written. In a thread of their
    own, files are flushed to the disk as they grow, and those that are complete are fsynced and renamed.
    """

    def __init__(
        self,
        folder: Path,
        outputs: Sequence[str],
        shards: Sequence[Shard],
        *,
        summed: Mapping[str, str],
        finished: Callable[[str, str], None],
    ) -> None:
        """Makes the files, or takes those that are there: whole ones if their SHA-256 is the one in `summed`, by path
        below `folder`. `finished(path, sha256)` is called, in a thread, for every file that is complete.
        """
        self._folder, self._tell = folder, finished
        self._paths = [[f"{name}/{shard.name}" if name else shard.name for shard in shards] for name in outputs]
        self._places = {
            entry.name: (index, len(shard.header) + entry.begin, entry.dtype.itemsize)
            for index, shard in enumerate(shards)
            for entry in shard.entries
        }
        elements = [sum((entry.end - entry.begin) // entry.dtype.itemsize for entry in s.entries) for s in shards]
        self._missing = {path: count for paths in self._paths for path, count in zip(paths, elements, strict=True)}
        self._pool = FilePool(writable=True, max_open=_MAX_OPEN)
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="isomerge-finish")
        self._sums: dict[str, Future[str]] = {}
        self._growing = {
            path: GrowingSum(folder / (path + PART), len(shard.header))
            for paths in self._paths
            for path, shard in zip(paths, shards, strict=True)
        }
        self._unflushed: dict[str, int] = {}  # bytes
        self._flushes: list[Future[None]] = []  # an error in one of them is told once, and by no later fsync
        self._lock = threading.Lock()
        for name, paths in zip(outputs, self._paths, strict=True):
            (folder / name).mkdir(exist_ok=True)
            for path, shard in zip(paths, shards, strict=True):
                self._open(path, shard, summed.get(path))

    def file(self, output: int, name: str) -> Path:
        """The file under way that holds a tensor."""
        return self._folder / (self._paths[output][self._places[name][0]] + PART)

    def write(self, output: int, name: str, start: int, values: Tensor) -> None:
        """Put contiguous values at flat index `start` of a tensor."""
        index, offset, itemsize = self._places[name]
        path, begin = self._paths[output][index], offset + start * itemsize
        with self._pool.use(self.file(output, name)) as fd:
            write_from(fd, begin, values)
        self._growing[path].arrived(begin, memory_of(values))
        with self._lock:
            self._unflushed[path] = self._unflushed.get(path, 0) + values.nbytes
            if self._unflushed[path] >= FLUSH_BYTES:
                self._unflushed[path] = 0
                self._flushes.append(self._finisher.submit(self._flush, path))

    def stands(self, output: int, name: str, start: int, count: int, checksum: int) -> bool:
        """Whether elements of a tensor are on the disk, with this CRC-32 where their file is not yet finished."""
        index, offset, itemsize = self._places[name]
        if self._paths[output][index] in self._sums:
            return True
        with self._pool.use(self.file(output, name)) as fd:
            return crc32_at(fd, offset + start * itemsize, count * itemsize) == checksum

    def count(self, output: int, name: str, count: int) -> None:
        """`count` elements of a tensor are done for good; with the last of a file it is finished."""
        path = self._paths[output][self._places[name][0]]
        with self._lock:
            self._missing[path] -= count
            if self._missing[path] == 0:
                self._finish(path)

    def finish(self) -> list[dict[str, str]]:
        """For each output the SHA-256 of its files by name, when all of them are on the disk under their own names."""
        with self._lock:
            for paths in self._paths:
                for path in paths:
                    self._finish(path)
        for flush in self._flushes:
            flush.result()
        return [{Path(path).name: self._sums[path].result() for path in paths} for paths in self._paths]

    def close(self) -> None:
        """Let go of the files, where they are."""
        self._finisher.shutdown(wait=True, cancel_futures=True)
        self._pool.close(sync=False)

    def _open(self, path: str, shard: Shard, expected: str | None) -> None:
        whole, part = self._folder / path, self._folder / (path + PART)
        if whole.exists():
            if expected is not None and sha256_of(whole) == expected:
                known: Future[str] = Future()
                known.set_result(expected)
                self._sums[path] = known
                return
            os.replace(whole, part)
        with open(part, "r+b" if part.exists() else "w+b") as file:
            if file.read(len(shard.header)) != shard.header:
                file.truncate(0)
                file.seek(0)
                file.write(shard.header)

    def _finish(self, path: str) -> None:
        if path not in self._sums:
            self._sums[path] = self._finisher.submit(self._finish_file, path)

    def _flush(self, path: str) -> None:
        sync(self._folder / (path + PART))

    def _finish_file(self, path: str) -> str:
        part = self._folder / (path + PART)
        sync(part)
        digest = self._growing[path].finish()
        os.rename(part, self._folder / path)
        self._tell(path, digest)
        return digest
