"""Safetensors files: the header as a tree, the header as bytes, the length before it, the data after it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError, deserialize

from isomerge.checkpoint import open_checkpoint
from isomerge.checkpoint.format import DTYPE_NAMES, DTYPES, Entry, build_header, parse_header
from isomerge.errors import InputError

from . import mutate

_OTHER_DTYPES = ("F4", "F6_E2M3", "F8_E8M0", "f32", "F32 ", "", "torch.float32", "F128", "STRING", "I128", "BF16\0")
_NAMES = ("w", "a", "b", "", "layers.0.weight", "é", "\n", "\0", "x" * 300, "dtype", "😀")
_PIECES = (b"-1", b"1e9", b"null", b"[", b"]", b"{", b"}", b'"', b",", b":", b"99999", b"\0", b"\xff", b"\xc3", b"\\u")
_LENGTHS = (0, 1, 2, 7, 8, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)


class SafetensorsFiles:
    """Held to the safetensors library wherever both accept a file; see `_stricter` for where it must accept it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "input.safetensors"

    def make(self, random: Random) -> bytes:
        table, data = _layout(random)
        root = mutate.tree(table)
        for _ in range(random.choice((0, 0, 1, 1, 1, 2, 3))):
            root = mutate.change(root, random)
        header = mutate.text(root, random if random.random() < 0.2 else None).encode("utf-8", "surrogatepass")
        if random.random() < 0.2:
            header = mutate.scramble(header, random, _PIECES)
        if random.random() < 0.2:
            before = random.choice((b" ", b"\n", b"\0", b"\xef\xbb\xbf", b"", b"", b"", b"x"))
            header = before + header + b" " * random.randrange(9)
        length = len(header)
        if random.random() < 0.1:
            length = random.choice((length - 1, length + 1, length + 8, *_LENGTHS))
        content = max(length, 0).to_bytes(8, "little") + header + data
        if random.random() < 0.1:
            content = content[: random.randint(0, len(content))]
        if random.random() < 0.1:
            content += random.randbytes(random.randrange(9))
        return content

    def check(self, content: bytes) -> str:
        self._path.write_bytes(content)
        theirs = _library(content)
        try:
            found = self._read(content)
        except InputError as error:
            if isinstance(theirs, dict) and not _stricter(str(error)):
                raise AssertionError(f"the library accepts what is refused: {error}") from error
            raise
        if isinstance(theirs, str):
            assert _harmless(theirs), f"the library refuses what is accepted: {theirs}"
            return "not by the library"
        assert found == theirs, "the library reads other tensors"
        return f"{min(len(found), 3)}{'+' if len(found) > 3 else ''} tensors"

    def _read(self, content: bytes) -> dict[str, tuple[str, list[int], bytes]]:
        found, covered = {}, 8 + int.from_bytes(content[:8], "little")
        with open_checkpoint(self._path) as checkpoint:
            for name, info in checkpoint.tensors.items():
                assert info.offset == covered, "tensors leave a hole, or overlap"
                covered += info.nbytes
                tensor = checkpoint.read(name)
                stored = bytes(tensor.reshape(-1).view(torch.uint8).numpy().data)
                assert stored == content[info.offset : covered], "other bytes than the file's"
                found[name] = DTYPE_NAMES[tensor.dtype], list(tensor.shape), stored
            metadata = dict(checkpoint.metadata)
        assert covered == len(content), "tensors do not fill the file"
        _assert_again(found, metadata)
        return found


def _layout(random: Random) -> tuple[dict[str, object], bytes]:
    """A valid header, in an order of its own, and its data."""
    table: dict[str, object] = {}
    end = 0
    for name in random.sample(_NAMES, random.choice((0, 1, 1, 2, 2, 3, 5))):
        dtype = random.choice(list(DTYPES))
        shape = [random.choice((0, 1, 1, 2, 3, 5)) for _ in range(random.choice((0, 1, 1, 2, 2, 3)))]
        nbytes = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        known = dtype if random.random() < 0.98 else random.choice(_OTHER_DTYPES)
        table[name] = {"dtype": known, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    items = list(table.items())
    if random.random() < 0.5:
        items.append(("__metadata__", {"format": "pt", random.choice(_NAMES): random.choice(mutate.STRINGS)}))
    random.shuffle(items)
    return dict(items), random.randbytes(end)


def _library(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | str:
    """What the library reads, or why it does not."""
    try:
        tensors = deserialize(content)
    except SafetensorError as error:
        return str(error).split(":", 1)[-1].split(" at line")[0][:60]
    return {name: (entry["dtype"], list(entry["shape"]), bytes(entry["data"])) for name, entry in tensors}


def _stricter(message: str) -> bool:
    """Whether a file that the library accepts is refused for a reason that holds: the format forbids leading spaces and
    keys given twice, torch has no tensors of the library's newest dtypes, and none whose sizes come to 2^63.
    """
    return (
        re.search(
            r"it starts with a space|has the key .* twice|: dtype is '|: shape is .*\d{19}|more than 2\^63 bytes",
            message,
        )
        is not None
    )


def _harmless(refusal: str) -> bool:
    """Whether the library refuses a file for its parser's limits: -0 is a float to it; in fields that nobody reads, it
    minds numbers beyond float64 and nesting beyond 128.
    """
    return any(part in refusal for part in ("floating point `-0.0`", "number out of range", "recursion limit"))


def _assert_again(found: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str]) -> None:
    """What was read can be written, and is then read the same by both."""
    entries, end = [], 0
    for name, (dtype, shape, stored) in found.items():
        entries.append(Entry(name, DTYPES[dtype], tuple(shape), end, end + len(stored)))
        end += len(stored)
    header = build_header(entries, metadata)
    assert parse_header(Path("again"), header[8:], end) == (entries, metadata), "written again it reads differently"
    again = _library(header + b"".join(stored for _, _, stored in found.values()))
    assert again == found, f"the library does not read what is written again: {again}"
    text = header[8:].rstrip()
    assert json.loads(text).get("__metadata__", {}) == metadata
