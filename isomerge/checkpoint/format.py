"""The safetensors format: 8 bytes of header length, a JSON header, then the tensors without gaps.

Everything a header says is checked before any tensor is read: each way to be wrong is one InputError that names
the file and the key. The same table of dtypes serves reading and writing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from isomerge.checkpoint.show import show
from isomerge.errors import InputError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_BYTES = 2**63 - 1  # file offsets are signed 64-bit
_REFETCH = "copy or download the file again"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header; `begin` and `end` are byte offsets from the first byte after the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def element_count(shape: Iterable[int]) -> int:
    """Product of the sizes; stops at the first partial product past 2^63, which no file can hold."""
    count = 1
    for size in shape:
        count *= size
        if count > _MAX_BYTES:
            break
    return count


def header_length(file: Path, prefix: bytes, size: int) -> int:
    """The header's length in bytes, from the first bytes of a file of `size` bytes.

    Raises InputError if the file cannot hold such a header.
    """
    if size == 0:
        raise InputError(f"{file}: the file is empty, expected a safetensors file; {_REFETCH}")
    if prefix.startswith(b"version https://git-lfs"):
        raise InputError(f"{file}: this is a Git LFS pointer, not the weights; run `git lfs pull` where it came from")
    if prefix.startswith(b"PK\x03\x04"):
        raise InputError(f"{file}: this is a zip file as torch.save writes, not safetensors; name it .pt or .bin")
    if size < 8:
        raise InputError(f"{file}: the header is truncated, the file has {size} bytes of at least 8; {_REFETCH}")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER:
        raise InputError(
            f"{file}: the header length is {length} bytes, expected at most {MAX_HEADER}; this is not a safetensors"
            f" file, or it is damaged: {_REFETCH}"
        )
    if length > size - 8:
        raise InputError(
            f"{file}: the header is truncated, it says {length} bytes and the file has {size - 8} after the length;"
            f" {_REFETCH}"
        )
    return length


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that is or will be in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return element_count(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def parse_header(file: Path, header: bytes, data_bytes: int) -> tuple[list[Entry], dict[str, str]]:
    """Entries ordered by offset, and the `__metadata__` strings.

    `header` is the JSON text, `data_bytes` the number of bytes that follow it in the file. The entries are proved to
    cover those bytes without overlap, hole, missing or trailing byte. Raises InputError otherwise.
    """
    table = _parse_json(file, header)
    metadata = table.pop("__metadata__", None)
    if metadata is None:  # null, to the safetensors library, is none
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{file}: __metadata__ is {show(metadata)}, expected strings by name; write the file again")
    entries = sorted((_parse_entry(file, name, value) for name, value in table.items()), key=_position)
    _check_cover(file, entries, data_bytes)
    return entries, metadata


def build_header(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """Length, JSON and padding to 8 bytes: everything that precedes the data in a file.

    Metadata is sorted by key, so equal input gives equal bytes.
    """
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = dict(sorted(metadata.items()))
    for entry in entries:
        table[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_json(file: Path, text: bytes, what: str) -> dict[str, object]:
    """A JSON object without repeated keys or NaN; InputError that calls the text `what` otherwise."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{file}: {what} has the key {show(key)} twice; write the file again")
            for part in (key, value):
                if isinstance(part, str):
                    part.encode("utf-8")  # a lone surrogate, legal in JSON escapes, cannot be written again
            found[key] = value
        return found

    def refuse(constant: str) -> object:  # NaN, Infinity: Python's own additions to JSON
        raise ValueError(constant)

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except InputError:
        raise
    except UnicodeError:
        raise InputError(f"{file}: {what} is not UTF-8 text; the file is damaged: {_REFETCH}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{file}: {what} is not valid JSON; the file is damaged: {_REFETCH}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: {what} is {show(value)}, expected a JSON object; {_REFETCH}")
    return value


def _parse_json(file: Path, header: bytes) -> dict[str, object]:
    # The format demands "{" as the first byte; json.loads alone would also take leading spaces.
    if header[:1].isspace():
        raise InputError(f"{file}: the header is not valid JSON, it starts with a space, expected '{{'; {_REFETCH}")
    return read_json(file, header, "the header")


def _position(entry: Entry) -> tuple[int, int]:
    return entry.begin, entry.end


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_BYTES


def _parse_entry(file: Path, name: str, value: object) -> Entry:
    where = f"{file}: tensor {show(name)}:"
    if not isinstance(value, dict):
        raise InputError(f"{where} the entry is {show(value)}, expected dtype, shape and data_offsets; {_REFETCH}")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in value:
            raise InputError(f"{where} {key} is missing from the header; {_REFETCH}")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise InputError(f"{where} dtype is {show(value['dtype'])}, expected one of {', '.join(DTYPES)}")
    shape = value["shape"]
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise InputError(f"{where} shape is {show(shape)}, expected a list of sizes >= 0; {_REFETCH}")
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise InputError(f"{where} data_offsets is {show(offsets)}, expected [begin, end] in bytes; {_REFETCH}")
    nbytes = element_count(shape) * dtype.itemsize
    # Strides are products of the sizes too, also those of a tensor without elements.
    if element_count(max(size, 1) for size in shape) * dtype.itemsize > _MAX_BYTES:
        raise InputError(f"{where} shape is {show(shape)}, more than 2^63 bytes; {_REFETCH}")
    begin, end = offsets
    if end - begin != nbytes:
        raise InputError(
            f"{where} data_offsets {show(offsets)} hold {end - begin} bytes, expected {nbytes} for shape {show(shape)}"
            f" in {value['dtype']}; {_REFETCH}"
        )
    return Entry(name, dtype, tuple(shape), begin, end)


def _check_cover(file: Path, entries: list[Entry], data_bytes: int) -> None:
    end = 0
    for entry in entries:
        if entry.begin != end:
            fault = "overlap the tensor before" if entry.begin < end else "leave a hole after the tensor before"
            raise InputError(
                f"{file}: tensor {show(entry.name)}: data_offsets [{entry.begin}, {entry.end}] {fault}, expected"
                f" begin {end}; {_REFETCH}"
            )
        end = entry.end
        if end > data_bytes:
            raise InputError(
                f"{file}: the file is truncated: tensor {show(entry.name)} ends at byte {end} of the data, the file"
                f" has {data_bytes}; {_REFETCH}"
            )
    if end < data_bytes:
        raise InputError(f"{file}: {data_bytes - end} trailing bytes after the last tensor, expected none; {_REFETCH}")
