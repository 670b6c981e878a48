"""Torch files: the opcodes of the pickle, its bytes, and the bytes of the zip around it."""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from random import Random

import torch

from isomerge.checkpoint import open_checkpoint

from . import mutate

_GLOBALS = (
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter"),
    *("torch._tensor _rebuild_from_type_v2", "torch Tensor", "torch Size", "torch float32", "torch FloatStorage"),
    *("torch.storage UntypedStorage", "collections OrderedDict", "collections Counter", "builtins set", "os system"),
)
_OPCODES = (
    # whole numbers of one to 4096 bytes
    *(b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"),
    *(b"\x8a\xff" + b"\x7f" * 255, b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096, b"I12\n", b"I01\n", b"G" + bytes(8)),
    # the top of the stack twice, in tuples, lists, sets and keys of tables
    *(b"2\x86", b"2\x86" * 40, b"2\x87", b"(22t", b"2\x862s", b"q\x00h\x00\x86" * 30, b"2l", b"2a", b"]2a2a"),
    *(b"N\x85" + b"2\x86" * 40 + b"Ns", b"\x8f(N\x85" + b"2\x86" * 40 + b"\x90"),
    # lengths beyond the file
    *(b"r\xff\xff\xff\xff", b"\x96" + (2**33).to_bytes(8, "little"), b"\x95" + b"\xff" * 8, b"\x8d" + b"\xff" * 8),
    *(b"T\xff\xff\xff\x7f", b"X\x01\0\0\0w", b"\x82\x01", b"P0\n", b"jA\0\0\0"),
    *(f"c{name.replace(' ', chr(10))}\n".encode() for name in _GLOBALS),
    *(bytes([code]) for code in b"012()}]Ntuseab.RQo\x81\x88\x8f\x90\x91\x92\x93\x94\x97\x98"),
)
_PIECES = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"\xff" * 4, b"\0" * 4, b"archive/data.pkl")


class TorchFiles:
    """An accepted file's tensors can all be read, and what they hold are bytes of the file."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "input.pt"
        base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
        contents: list[object] = [
            {"w": base, "t": base.t(), "s": base[1:, ::2], "tied": base, "n": torch.ones(2, dtype=torch.bfloat16)},
            {"state_dict": OrderedDict(w=torch.nn.Parameter(base)), "epoch": 3, "ids": {1, 2}, "raw": b"x"},
        ]
        self._files = [_saved(content) for content in contents]

    def make(self, random: Random) -> bytes:
        content = random.choice(self._files)
        if random.random() < 0.3:
            return mutate.scramble(content, random, _PIECES)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, record in records:
                archive.writestr(name, _changed(record, random) if name.endswith("data.pkl") else record)
        return out.getvalue()

    def check(self, content: bytes) -> str:
        self._path.write_bytes(content)
        with open_checkpoint(self._path) as checkpoint:
            assert checkpoint.tensors, "accepted without a tensor"
            for name, info in checkpoint.tensors.items():
                tensor = checkpoint.read(name)
                assert tensor.is_contiguous()
                assert (tensor.shape, tensor.dtype) == (info.shape, info.dtype)
                if tensor.numel():
                    first = bytes(tensor.reshape(-1)[:1].view(torch.uint8).tolist())
                    assert info.offset + info.dtype.itemsize <= len(content), "outside the file"
                    assert content[info.offset :].startswith(first), "other bytes than the file's"
            assert all(first in checkpoint.tensors for first in checkpoint.aliases.values())
        return "a state dict"


def _saved(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def _changed(text: bytes, random: Random) -> bytes:
    """A pickle with opcodes replaced, removed, repeated, moved or put in; at times with a few bytes changed."""
    starts = [place for _, _, place in pickletools.genops(text) if place is not None]
    pieces = [text[begin:end] for begin, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    for _ in range(random.choice((0, 1, 1, 2, 3, 6))):
        at, kind = random.randrange(len(pieces)), random.randrange(6)
        if kind == 0:
            pieces[at] = random.choice(_OPCODES)
        elif kind == 1:
            pieces[at] = b""
        elif kind == 2:
            pieces.insert(at, pieces[random.randrange(len(pieces))])
        elif kind == 3:
            other = random.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        else:
            pieces.insert(at, random.choice(_OPCODES))
    found = b"".join(pieces)
    return mutate.scramble(found, random, _OPCODES) if random.random() < 0.2 else found
