"""The surface every checkpoint answers to, and the one that reads files: headers first, tensors on request."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from isomerge.checkpoint.files import FilePool, Stamp, open_input, read_bytes, read_into
from isomerge.checkpoint.format import TensorSpec, header_length, parse_header
from isomerge.checkpoint.views import flat_pieces, flat_range, span
from isomerge.errors import InputError

_BUFFER = 64 << 20  # bytes of storage read at once for a tensor that is not contiguous in its file
_Self = TypeVar("_Self", bound="Checkpoint")


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """One tensor of a checkpoint; `offset` is the absolute byte position of its first element in `file`."""

    file: Path
    offset: int


class Checkpoint(ABC):
    """Named tensors that are read on request. A context manager; reading is safe from several threads.

    path        the folder or file as it was given; for checkpoints in memory a path made of the label
    label       how messages call it
    tensors     what can be read, ordered by (file, offset): iterate it to read sequentially
    aliases     tied names -> the name in `tensors` that holds their values
    metadata    the `__metadata__` of the first safetensors shard, else empty
    side_files  what a user needs beside the weights; paths below `path`
    modified    when each file was last written, by its name; {} for checkpoints in memory
    digest      sha256 (hex) of the headers (names, dtypes, shapes, offsets) and file sizes; independent of the path
    """

    path: Path
    label: str
    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    side_files: tuple[Path, ...]
    modified: Mapping[str, str]
    digest: str

    def read(self, name: str, start: int = 0, count: int | None = None, *, out: Tensor | None = None) -> Tensor:
        """A tensor in its own shape and dtype, or `count` consecutive elements from flat index `start`, 1-D.

        The result is on the CPU, contiguous, in memory of its own, or in `out`: 1-D, contiguous, as long as what is
        read and of its dtype. An alias reads the tensor it is tied to.
        Raises KeyError for an unknown name, ValueError for a range outside the tensor or an `out` that does not fit,
        and InputError if the file is no longer the one that was opened.
        """
        try:
            info = self.tensors[self.aliases.get(name, name)]
        except KeyError:
            raise KeyError(f"{self.label}: no tensor {name!r}") from None
        length = flat_range(info.numel, start, count)
        if out is None:
            out = torch.empty(length, dtype=info.dtype, device="cpu")
        elif out.shape != (length,) or out.dtype != info.dtype or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(
                f"{name}: out must be contiguous, {length} of {info.dtype} on the CPU, got {tuple(out.shape)} of "
                f"{out.dtype} on {out.device}"
            )
        self._fill(info, start, out)
        return out.reshape(info.shape) if start == 0 and count is None else out

    def in_order(self, name: str) -> bool:
        """Whether a tensor's elements stand as they are read: then reading a part costs what the part holds."""
        return True

    @contextmanager
    def stretch(self, name: str, start: int = 0) -> Iterator[tuple[int, int] | None]:
        """Where a tensor's elements from flat index `start` lie: a file's descriptor and a byte in it, for the block.

        None where they are in no file, or not `in_order`. InputError, at the end of the block, if the file is no longer
        the one that was opened.
        """
        yield None

    @abstractmethod
    def _fill(self, info: TensorInfo, start: int, out: Tensor) -> None:
        """Put the elements from flat index `start` into the 1-D tensor `out`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and tensors; nothing can be read afterwards."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Scan:
    """What the header of one file says.

    `views` holds the tensors that are not contiguous in the file, as views on the meta device whose storage is the
    stored one, with the absolute byte offset of that storage.
    """

    file: Path
    stamp: Stamp
    header: bytes
    tensors: Sequence[TensorInfo]
    aliases: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    views: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)


@contextmanager
def open_header(path: Path) -> Iterator[FileIO]:
    """The file at `path`, open for the block; InputError if it cannot be opened, or the disk fails in the block."""
    with open_input(path) as file:
        try:
            yield file
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def scan_safetensors(path: Path) -> Scan:
    """Read and prove the header of a safetensors file. Raises InputError."""
    with open_header(path) as file:
        stamp = Stamp.of(file.fileno())
        length = header_length(path, read_bytes(file.fileno(), 0, 64), stamp.size)
        header = read_bytes(file.fileno(), 8, length)
    if len(header) < length:
        raise _changed(path)
    data = 8 + length
    entries, metadata = parse_header(path, header, stamp.size - data)
    tensors = [TensorInfo(entry.name, entry.dtype, entry.shape, path, data + entry.begin) for entry in entries]
    return Scan(path, stamp, header, tensors, metadata=metadata)


class FileCheckpoint(Checkpoint):
    """Tensors in safetensors or torch files, at most a few of them open at a time."""

    def __init__(self, path: Path, scans: Sequence[Scan], side_files: Sequence[Path] = ()) -> None:
        """`scans` in reading order, with no name in two of them."""
        self.path = path
        self.label = str(path)
        self.tensors = {info.name: info for scan in scans for info in scan.tensors}
        self.aliases = {name: first for scan in scans for name, first in scan.aliases.items()}
        self.metadata = scans[0].metadata
        self.side_files = tuple(side_files)
        self.modified = {scan.file.name: scan.stamp.modified for scan in scans}
        self.digest = digest((scan.header, scan.stamp.size) for scan in scans)
        self._stamps = {scan.file: scan.stamp for scan in scans}
        self._views = {name: view for scan in scans for name, view in scan.views.items()}
        self._pool = FilePool()

    def in_order(self, name: str) -> bool:
        return self.aliases.get(name, name) not in self._views

    def close(self) -> None:
        self._pool.close()

    @contextmanager
    def stretch(self, name: str, start: int = 0) -> Iterator[tuple[int, int] | None]:
        if not self.in_order(name):
            yield None
            return
        info = self.tensors[self.aliases.get(name, name)]
        with self._opened(info) as fd:
            yield fd, info.offset + start * info.dtype.itemsize

    def _fill(self, info: TensorInfo, start: int, out: Tensor) -> None:
        with self._opened(info) as fd:
            if not self._fill_from(fd, info, start, out):
                raise _changed(info.file)

    @contextmanager
    def _opened(self, info: TensorInfo) -> Iterator[int]:
        """The file of a tensor, for reading in the block."""
        try:
            with self._pool.use(info.file) as fd:
                yield fd
                # Asked after the read, so that a change at any moment since the header was read is seen.
                unchanged = Stamp.of(fd) == self._stamps[info.file]
        except FileNotFoundError:
            raise _changed(info.file) from None
        except OSError as error:
            raise OSError(error.errno, f"cannot read tensor {info.name!r}: {error.strerror}", str(info.file)) from error
        if not unchanged:
            raise _changed(info.file)

    def _fill_from(self, fd: int, info: TensorInfo, start: int, out: Tensor) -> bool:
        if info.name not in self._views:
            return read_into(fd, info.offset + start * info.dtype.itemsize, out)
        view, storage = self._views[info.name]
        done = 0
        for piece in flat_pieces(view, start, out.numel()):
            target = out[done : done + piece.numel()].view(piece.shape)
            if not _read_view(fd, storage, piece, target):
                return False
            done += piece.numel()
        return True


def digest(parts: Iterable[tuple[bytes, int]]) -> str:
    """sha256 (hex) over (header, file size) pairs, each framed by its length."""
    total = hashlib.sha256()
    for header, size in parts:
        total.update(f"{len(header)} {size}\n".encode())
        total.update(header)
    return total.hexdigest()


def _changed(file: Path) -> InputError:
    return InputError(f"{file}: the file changed while it was being read; wait until it is complete and run again")


def _read_view(fd: int, storage: int, view: Tensor, out: Tensor) -> bool:
    """Fill `out` with the elements of a non-empty meta view of the storage that starts at byte `storage`.

    The stretch from its first to its last element is read at once where that is at most 64 MiB, and in halves along
    the widest stride where it is more: gaps between rows cost no memory and a transposed matrix at most 64 MiB.
    """
    position = storage + int(view.storage_offset()) * view.element_size()
    if view.is_contiguous() and out.is_contiguous():
        return read_into(fd, position, out)
    length = span(view)
    if length * view.element_size() <= _BUFFER:
        buffer = torch.empty(length, dtype=view.dtype, device="cpu")
        complete = read_into(fd, position, buffer)
        out.copy_(buffer.as_strided(view.shape, view.stride()))
        return complete
    dim = max((d for d in range(view.dim()) if view.shape[d] > 1), key=view.stride)
    half = view.shape[dim] // 2
    return all(
        _read_view(fd, storage, view.narrow(dim, begin, size), out.narrow(dim, begin, size))
        for begin, size in ((0, half), (half, view.shape[dim] - half))
    )
