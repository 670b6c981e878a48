"""Headers of torch.save files: a zip whose pickle describes the tensors and whose other records are their storages.

`torch.load(map_location="meta")` tells the offsets of storages in recent releases only, and by an estimate of how the
zip was laid out that is wrong for a file zipped again; here they come from the directory of the zip itself.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from isomerge.checkpoint.files import Stamp, read_bytes
from isomerge.checkpoint.format import DTYPE_NAMES, MAX_HEADER, element_count
from isomerge.checkpoint.pickles import ForbiddenGlobal, Foreign, Record, Storage, Table, describe
from isomerge.checkpoint.reader import Scan, TensorInfo, open_header
from isomerge.checkpoint.show import show
from isomerge.checkpoint.views import span
from isomerge.errors import InputError

_WRAPPERS = ("state_dict", "model", "module")
_RESAVE = "load it with torch and save model.state_dict() again, as safetensors or with torch.save"
_REFETCH = "copy or download the file again"


class _Place(NamedTuple):
    """Where the bytes of a zip record lie in the file."""

    offset: int
    nbytes: int


def scan_torch_file(path: Path) -> Scan:
    """Describe the state dict of a torch file without reading its data. Raises InputError.

    The file holds names -> tensors, or a mapping with such a table under `state_dict`, `model` or `module`; values
    that are no tensors are left out. Names tied to the same elements become aliases of the first.
    """
    with open_header(path) as file:
        stamp = Stamp.of(file.fileno())
        places = _read_directory(path, file, stamp.size)
        pickled = places["data.pkl"]
        if pickled.nbytes > MAX_HEADER:
            raise InputError(f"{path}: its pickle has {pickled.nbytes} bytes, expected at most {MAX_HEADER}; {_RESAVE}")
        text = read_bytes(file.fileno(), *pickled)
    try:
        content = describe(text)
    except ForbiddenGlobal as forbidden:
        raise InputError(
            f"{path}: loading it would run code: its pickle asks for {show(str(forbidden))}; if you trust the file,"
            f" convert it to safetensors"
        ) from None
    except Exception:
        raise InputError(f"{path}: its pickle is damaged; {_REFETCH}") from None

    infos: list[TensorInfo] = []
    aliases: dict[str, str] = {}
    views: dict[str, tuple[Tensor, int]] = {}
    seen: dict[object, str] = {}
    for name, record in _state_dict(path, content):
        view, storage, place = _resolve(path, name, record, places)
        same = (storage.key, view.dtype, view.shape, view.stride(), view.storage_offset())
        first = seen.setdefault(same, name) if view.numel() else name
        if first != name:
            aliases[name] = first
            continue
        offset = place.offset + int(view.storage_offset()) * view.element_size()
        infos.append(TensorInfo(name, view.dtype, tuple(view.shape), path, offset))
        if not view.is_contiguous():
            views[name] = (view, place.offset)
    infos.sort(key=lambda info: info.offset)
    directory = "".join(f"{name!r} {place.offset} {place.nbytes}\n" for name, place in places.items())
    return Scan(path, stamp, text + directory.encode("utf-8", "surrogatepass"), infos, aliases, {}, views)


def _read_directory(path: Path, file: FileIO, size: int) -> dict[str, _Place]:
    """Records by name, without the archive's own folder. Raises InputError for anything but a whole torch zip."""
    start = read_bytes(file.fileno(), 0, 64)
    if size == 0:
        raise InputError(f"{path}: the file is empty, expected a torch state dict; {_REFETCH}")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: this is a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
    if start.startswith(b"\x80"):
        raise InputError(f"{path}: written in the format of torch before 1.6 (not a zip file); {_RESAVE}")
    if not start.startswith(b"PK\x03\x04"):
        raise InputError(f"{path}: not a file of torch.save: it is no zip file; check the path and the suffix")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except Exception:  # of many kinds: zipfile promises none in particular for a damaged directory
        raise InputError(f"{path}: the zip file is truncated or damaged, it has no directory; {_REFETCH}") from None

    roots = [entry.filename[: -len("data.pkl")] for entry in entries if entry.filename.endswith("/data.pkl")]
    root = min(roots, key=len, default=None)
    if root is None:
        raise InputError(f"{path}: not a file of torch.save: the zip file has no data.pkl; check the path")
    places: dict[str, _Place] = {}
    for entry in entries:
        name = entry.filename.removeprefix(root)
        inside = 0 <= entry.header_offset <= size
        head = read_bytes(file.fileno(), entry.header_offset, 30) if inside else b""
        if name in places or len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise InputError(f"{path}: the zip file is damaged at its record {show(name)}; {_REFETCH}")
        # The local header repeats the name and may pad with an extra field of its own, which aligns the data.
        lengths = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
        offset = entry.header_offset + 30 + sum(lengths)
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise InputError(f"{path}: its record {show(name)} is compressed, expected it stored as it is; {_RESAVE}")
        if offset + entry.file_size > size:
            raise InputError(f"{path}: the zip file is truncated in its record {show(name)}; {_REFETCH}")
        places[name] = _Place(offset, entry.file_size)
    if "constants.pkl" in places:
        raise InputError(f"{path}: this is a TorchScript program, expected a state dict; {_RESAVE}")
    if "byteorder" in places and read_bytes(file.fileno(), places["byteorder"].offset, 6) != b"little":
        raise InputError(f"{path}: written on a big-endian machine, expected little-endian; {_RESAVE}")
    return places


def _state_dict(path: Path, content: object) -> Iterator[tuple[str, Record]]:
    """The tensors by name, from the content itself or the one well-known key it is wrapped in."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {_kind(content)}, expected a state dict (names -> tensors); {_RESAVE}")
    wrapped = [key for key in _WRAPPERS if isinstance(content.get(key), dict)]
    if len(wrapped) > 1:
        raise InputError(f"{path}: has tables under {', '.join(map(repr, wrapped))}, expected one of them; {_RESAVE}")
    table = content[wrapped[0]] if wrapped else content
    found = False
    for name, value in table.items():
        if isinstance(value, Record) and isinstance(name, str):
            found = True
            yield name, value
        elif isinstance(value, Record):
            raise InputError(f"{path}: a tensor has the key {show(name)}, expected a name; {_RESAVE}")
        elif isinstance(value, Foreign) and "tensor" in value.what:
            raise InputError(f"{path}: tensor {show(name)} is {value.what}, expected a dense one; {_RESAVE}")
        elif _holds_tensors(value):
            raise InputError(f"{path}: key {show(name)} holds {_kind(value)} of tensors, expected a tensor; {_RESAVE}")
    if not found:
        keys = ", ".join(show(key) for key in list(table)[:5]) or "none"
        raise InputError(f"{path}: has no tensors, expected names -> tensors; its keys: {keys}; {_RESAVE}")


def _holds_tensors(value: object) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(item, Record) for item in values)


def _kind(value: object) -> str:
    if isinstance(value, Record):
        return "one tensor"
    if isinstance(value, Foreign):
        return value.what
    return "a dict" if isinstance(value, Table) else f"a {type(value).__name__}"


def _is_sizes(value: object) -> bool:
    return isinstance(value, tuple) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _resolve(path: Path, name: str, record: Record, places: Mapping[str, _Place]) -> tuple[Tensor, Storage, _Place]:
    """The tensor as a view on the meta device, its storage and where that lies. Raises InputError."""
    where = f"{path}: tensor {show(name)}:"
    storage, shape, stride, offset = record.storage, record.shape, record.stride, record.offset
    damaged = InputError(f"{where} storage or shape {show(shape)} make no sense; {_REFETCH}")
    if not isinstance(storage, Storage) or type(offset) is not int or not 0 <= offset < 2**63:
        raise damaged
    if not (isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)):
        raise damaged
    dtype = storage.dtype if record.dtype is None else record.dtype
    if not isinstance(dtype, torch.dtype) or not (_is_sizes(shape) and _is_sizes(stride)):
        raise damaged
    if dtype not in DTYPE_NAMES:
        raise InputError(f"{where} dtype is {dtype}, which safetensors cannot hold; convert it")
    if isinstance(record.flags, dict) and any(record.flags.values()):
        raise InputError(f"{where} stored as a conjugate or negative view; save tensor.resolve_conj().resolve_neg()")
    place = places.get(f"data/{storage.key}", _Place(0, 0))
    if storage.nbytes > place.nbytes:
        raise InputError(
            f"{where} its storage data/{show(storage.key)[1:-1]} has {place.nbytes} bytes, expected {storage.nbytes};"
            f" {_REFETCH}"
        )
    try:
        base = torch.empty(storage.nbytes // dtype.itemsize, dtype=dtype, device="meta")
        view = base.as_strided(shape, stride, offset)
        inside = element_count(max(size, 1) for size in shape) < 2**63 and (
            view.numel() == 0 or offset + span(view) <= base.numel()
        )
    except (RuntimeError, TypeError, OverflowError):
        inside = False
    if not inside:
        raise InputError(f"{where} shape {show(shape)} reaches outside its storage, {storage.nbytes} bytes; {_REFETCH}")
    return view, storage, place
