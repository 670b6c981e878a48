"""Streaming writer of Hugging Face folders: every offset is known before the first tensor arrives."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from torch import Tensor

from isomerge.checkpoint.files import FilePool, write_from
from isomerge.checkpoint.folder import SAFETENSORS, SAFETENSORS_INDEX
from isomerge.checkpoint.format import Entry, TensorSpec, build_header
from isomerge.checkpoint.ledger import Ledger, side_name
from isomerge.checkpoint.staging import Staging, sync
from isomerge.errors import InputError

_PART = ".part"  # ends every file name until all of them are complete, so that nothing half done looks like a model


@dataclass(frozen=True, slots=True)
class _Shard:
    name: str
    header: bytes
    entries: Sequence[Entry]


class Writer:
    """Writes tensors in any order and from any thread, whole or in pieces, into a new folder.

    The folder appears at `commit`, complete and on the disk; until then everything is in a hidden folder beside it,
    under names that nothing loads. Leaving the context without `commit` removes all of it. Equal specs and values give
    equal bytes, whatever the order of the writes.
    """

    def __init__(
        self,
        folder: Path,
        specs: Sequence[TensorSpec],
        *,
        shard_bytes: int = 5_000_000_000,
        metadata: Mapping[str, str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """A tensor larger than `shard_bytes` gets a shard of its own.

        Raises InputError if the folder exists (unless `overwrite`), another process is writing to it, or the disk is
        too full; ValueError for specs that no safetensors file can hold.
        """
        self._ledger = Ledger(specs)
        self._shards = _plan(specs, shard_bytes, {"format": "pt", **(metadata or {})})
        self._side: dict[str, bytes | Path] = {}
        self._pool = FilePool(writable=True)
        self._closing = threading.Lock()
        self._staging: Staging | None = Staging(Path(folder), overwrite=overwrite)
        self._places: dict[str, tuple[Path, int, int]] = {}  # tensor -> file, byte offset, itemsize
        try:
            self._start(self._staging)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Put the elements of `tensor`, in logical order, at flat index `start` of the tensor `name`.

        `tensor` may have any shape, strides and device; its dtype is the spec's. Raises ValueError, naming the tensor,
        if it is unknown, of another dtype, too long, or written before in part; OSError with the path if the disk
        fails, after everything written so far has been removed.
        """
        file: Path | None = None
        try:
            with self._ledger.writing(name, tensor, start) as values:
                file, offset, itemsize = self._places[name]
                with self._pool.use(file) as fd:
                    write_from(fd, offset + start * itemsize, values)
        except OSError as error:
            self.close()
            raise OSError(error.errno, f"cannot write tensor {name!r}: {error.strerror}", str(file)) from error

    def add_file(self, relative: str, content: bytes | Path) -> None:
        """A file to go with the weights, at `relative` below the folder; a Path is copied at commit.

        Raises ValueError if `relative` reaches outside the folder or is taken, InputError if `content` is missing.
        """
        name = side_name(relative, {*self._side, *self._weight_names()}, content)
        self._side[name] = content

    def commit(self) -> None:
        """Make everything durable and move the folder to its place.

        Raises ValueError, naming the tensor, unless every element has been written exactly once; OSError if the disk
        fails. Either way nothing is left behind then.
        """
        staging = self._staging
        if staging is None:
            raise ValueError("the writer was committed or closed before")
        try:
            self._ledger.close()
            self._pool.close()
            for shard in self._shards:
                sync(staging.folder / (shard.name + _PART))
            if len(self._shards) > 1:
                self._side[SAFETENSORS_INDEX] = _build_index(self._shards)
            for name, content in self._side.items():
                _write_side_file(staging.folder / (name + _PART), content)
            # config.json last: only now does the folder load, and by now it is whole.
            names = [shard.name for shard in self._shards] + sorted(self._side, key=lambda name: name == "config.json")
            for name in names:
                os.rename(staging.folder / (name + _PART), staging.folder / name)
            staging.commit()
        except BaseException:
            self.close()
            raise
        self._staging = None

    def close(self) -> None:
        """Wait for writes that run, then remove everything that was not committed."""
        self._ledger.abandon()
        with self._closing:
            if self._staging is not None:
                self._staging.abandon()
                self._staging = None
            self._pool.close(sync=False)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, staging: Staging) -> None:
        needed = sum(len(shard.header) + (shard.entries[-1].end if shard.entries else 0) for shard in self._shards)
        free = shutil.disk_usage(staging.folder).free
        if needed > free:
            raise InputError(
                f"{staging.shown}: the disk has {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for the"
                " weights; make room or choose another disk"
            )
        for shard in self._shards:
            file = staging.folder / (shard.name + _PART)
            file.write_bytes(shard.header)
            for entry in shard.entries:
                self._places[entry.name] = (file, len(shard.header) + entry.begin, entry.dtype.itemsize)

    def _weight_names(self) -> Iterator[str]:
        yield SAFETENSORS_INDEX
        for shard in self._shards:
            yield shard.name


def _plan(specs: Sequence[TensorSpec], shard_bytes: int, metadata: Mapping[str, str]) -> list[_Shard]:
    """Fill shards in the given order; within one, wide dtypes first, so that every tensor is aligned to its items."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    shards = []
    for number, group in enumerate(groups, start=1):
        entries = []
        end = 0
        for spec in sorted(group, key=lambda spec: -spec.dtype.itemsize):
            entries.append(Entry(spec.name, spec.dtype, tuple(spec.shape), end, end + spec.nbytes))
            end += spec.nbytes
        name = SAFETENSORS if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards.append(_Shard(name, build_header(entries, metadata), entries))
    return shards


def _build_index(shards: Sequence[_Shard]) -> bytes:
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.end - entry.begin for shard in shards for entry in shard.entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _write_side_file(path: Path, content: bytes | Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
    sync(path)
