"""Checkpoints that live in memory: models already loaded, and results that need no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from isomerge.checkpoint.format import DTYPE_NAMES, TensorSpec
from isomerge.checkpoint.ledger import Ledger, Receipt, side_name
from isomerge.checkpoint.reader import Checkpoint, TensorInfo, digest
from isomerge.checkpoint.views import flat_pieces
from isomerge.errors import InputError


def from_state_dict(tensors: Mapping[str, Tensor], label: str) -> Checkpoint:
    """A checkpoint over tensors in memory; nothing is copied until it is read.

    Tensors on one storage with equal offset, shape, strides and dtype are tied: the first name is in `tensors`, the
    others in `aliases`. Raises InputError for values that are not dense tensors with data.
    """
    return _MemoryCheckpoint(tensors, label)


class _MemoryCheckpoint(Checkpoint):
    def __init__(self, tensors: Mapping[str, Tensor], label: str) -> None:
        self.path = Path(label)
        self.label = label
        self.metadata = {}
        self.side_files = ()
        self.modified = {}
        self._values: dict[str, Tensor] = {}
        infos: dict[str, TensorInfo] = {}
        aliases: dict[str, str] = {}
        seen: dict[object, str] = {}
        for name, tensor in tensors.items():
            _check_value(label, name, tensor)
            place = _place(tensor)
            first = seen.setdefault(place, name) if tensor.numel() else name
            if first != name:
                aliases[name] = first
                continue
            self._values[name] = tensor.detach()
            infos[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape), self.path, 0)
        self.tensors = infos
        self.aliases = aliases
        lines = [f"{info.name!r} {info.dtype} {info.shape}" for info in infos.values()]
        lines += [f"{name!r} = {first!r}" for name, first in aliases.items()]
        self.digest = digest([("\n".join(lines).encode(), sum(info.nbytes for info in infos.values()))])

    def _fill(self, info: TensorInfo, start: int, out: Tensor) -> None:
        done = 0
        for piece in flat_pieces(self._values[info.name], start, out.numel()):
            out[done : done + piece.numel()].view(piece.shape).copy_(piece)
            done += piece.numel()

    def close(self) -> None:
        self._values = {}


class MemoryWriter:
    """The surface of `Writer`, into memory: after `commit`, `tensors` holds the result and `files` the side files."""

    records: Sequence[Mapping[str, object]] = ()  # nothing is ever taken over

    def __init__(self, specs: Sequence[TensorSpec], *, metadata: Mapping[str, str] | None = None) -> None:
        self.metadata = dict(metadata or {})
        self.tensors: dict[str, Tensor] = {}
        self.files: dict[str, bytes | Path] = {}
        self._ledger = Ledger(specs)
        self._values = {spec.name: torch.empty(spec.shape, dtype=spec.dtype, device="cpu") for spec in specs}

    def write(self, name: str, tensor: Tensor, start: int = 0, output: int = 0) -> Receipt:
        """As `Writer.write`, for one output, without a checksum."""
        with self._ledger.writing(name, tensor, start) as values:
            self._values[name].view(-1)[start : start + values.numel()].copy_(values.reshape(-1))
        return Receipt(output, name, start, values.numel(), 0)

    def note(self, record: Mapping[str, object], receipts: Sequence[Receipt]) -> None:
        """As `Writer.note`: nothing to be done in memory."""

    def add_file(self, relative: str, content: bytes | Path) -> None:
        """As `Writer.add_file`; the content is kept in `files`."""
        self.files[side_name(relative, self.files, content)] = content

    def commit(self) -> None:
        """As `Writer.commit`."""
        self._ledger.close()
        self.tensors = self._values

    def __enter__(self) -> MemoryWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.tensors is not self._values:
            self._values = {}


def _check_value(label: str, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise InputError(f"{label}: {name!r} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise InputError(f"{label}: tensor {name!r} is sparse, nested or quantized, expected a dense one; convert it")
    if tensor.is_meta:
        raise InputError(f"{label}: tensor {name!r} is on the meta device and has no data; load the weights first")
    if tensor.dtype not in DTYPE_NAMES:
        raise InputError(f"{label}: tensor {name!r} has {tensor.dtype}, which safetensors cannot hold; convert it")


def _place(tensor: Tensor) -> object:
    storage = tensor.untyped_storage()
    return (
        tensor.device,
        storage.data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )
