"""Folders of shards: only the index varies, over files that are whole, broken, links, elsewhere and no files at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file

from isomerge.checkpoint import open_checkpoint

from . import mutate

_SHARDS = {"one.safetensors": ("a", "b"), "two.safetensors": ("c",), "link.safetensors": ("d",)}
_OTHERS = (
    *("broken.safetensors", "folder.safetensors", "loop.safetensors", "dangling.safetensors", "pipe.safetensors"),
    *("model.bin", "missing.safetensors", "../outside.safetensors", "./one.safetensors", ".", "..", "", "/dev/zero"),
    *("/dev/null", "a\\b.safetensors", "x" * 300 + ".safetensors", "\n.safetensors", "\0.safetensors", ".safetensors"),
    *("\\ud800.safetensors", "one.safetensors/", "~/one.safetensors", "ONE.safetensors", "\x1b[2J.safetensors"),
    *("model.safetensors.index.json", "\u202e.safetensors"),
)
_PIECES = (b'"', b"{", b"}", b"[", b",", b":", b"null", b"..", b"/", b"\0", b"\xff", b"\\u0000", b"\\n", b"NaN")


class Indices:
    """An accepted index names exactly the tensors of its shards, all of them files beside it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "model"
        self._folder.mkdir()
        self._index = self._folder / "model.safetensors.index.json"
        self._tensors = {name: torch.full((3,), float(ord(name))) for names in _SHARDS.values() for name in names}
        for shard, names in _SHARDS.items():
            save_file({name: self._tensors[name] for name in names}, self._folder / shard)
        (self._folder / "link.safetensors").rename(folder / "elsewhere.safetensors")
        (self._folder / "link.safetensors").symlink_to(folder / "elsewhere.safetensors")  # as in a cache
        save_file({"a": torch.zeros(3)}, folder / "outside.safetensors")
        (self._folder / "broken.safetensors").write_bytes(b"\x20" + bytes(20))
        (self._folder / "folder.safetensors").mkdir()
        (self._folder / "loop.safetensors").symlink_to("loop.safetensors")
        (self._folder / "dangling.safetensors").symlink_to("nowhere.safetensors")
        os.mkfifo(self._folder / "pipe.safetensors")
        torch.save({"a": torch.zeros(3)}, self._folder / "model.bin")

    def make(self, random: Random) -> bytes:
        kept = random.sample(list(_SHARDS), random.choice((1, 2, 3, 3)))
        weight_map = {name: shard for shard in kept for name in _SHARDS[shard]}
        if random.random() < 0.5:
            weight_map[random.choice("abcdxy")] = random.choice((*_SHARDS, *_OTHERS))
        root = mutate.tree({"metadata": {"total_size": 48}, "weight_map": weight_map})
        for _ in range(random.choice((0, 1, 1, 2, 3))):
            root = mutate.change(root, random)
        content = mutate.text(root, random if random.random() < 0.2 else None).encode("utf-8", "surrogatepass")
        return mutate.scramble(content, random, _PIECES) if random.random() < 0.2 else content

    def check(self, content: bytes) -> str:
        self._index.write_bytes(content)
        with open_checkpoint(self._folder) as checkpoint:
            files = {info.file for info in checkpoint.tensors.values()}
            for name, info in checkpoint.tensors.items():
                assert info.file.parent == self._folder, "a file outside the folder"
                assert torch.equal(checkpoint.read(name), self._tensors[name]), "another tensor"
        wanted = {name for file in files for name in _SHARDS[file.name]}
        assert set(checkpoint.tensors) == wanted, "not the tensors of its shards"
        assert json.loads(content)["weight_map"].keys() == wanted, "not the tensors of the index"
        return f"{len(files)} shards"
