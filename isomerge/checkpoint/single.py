"""One safetensors file that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from isomerge.checkpoint.files import write_from
from isomerge.checkpoint.format import Entry, TensorSpec, build_header
from isomerge.checkpoint.ledger import Ledger
from isomerge.checkpoint.staging import sync
from isomerge.errors import InputError


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, durable: bool = True
) -> int:
    """Writes a file under a hidden name beside `path`, fsyncs it and renames it; the number of bytes written.

    What is not to last need not be `durable`: it is not fsynced.

    A file at `path` is replaced, and stays as it was when anything fails. Equal input gives equal bytes. InputError if
    the folder cannot be written to or the disk is too full, OSError if the disk fails, ValueError for tensors that no
    safetensors file can hold.
    """
    path = Path(path)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    ledger = Ledger(specs)
    entries, end = [], 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):  # wide first: every tensor is aligned
        entries.append(Entry(spec.name, spec.dtype, spec.shape, end, end + spec.nbytes))
        end += spec.nbytes
    header = build_header(entries, metadata)
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(header)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise InputError(f"{path}: the file cannot be written here: {error.strerror}; choose another place") from None
    try:
        free = shutil.disk_usage(path.parent).free
        if end > free:
            raise InputError(f"{path}: the disk has {free / 1e9:.1f} GB free, expected {end / 1e9:.1f} GB; make room")
        fd = os.open(part, os.O_WRONLY)
        try:
            for entry in entries:
                with ledger.writing(entry.name, tensors[entry.name], 0) as values:
                    write_from(fd, len(header) + entry.begin, values)
            ledger.close()
            if durable:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(part, path)
        if durable:
            sync(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return len(header) + end
