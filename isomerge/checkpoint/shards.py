"""How the tensors of an output are laid out in files: every offset is known before the first tensor arrives."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isomerge.checkpoint.folder import SAFETENSORS
from isomerge.checkpoint.format import Entry, TensorSpec, build_header


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights."""

    name: str
    header: bytes
    entries: Sequence[Entry]

    @property
    def nbytes(self) -> int:
        return len(self.header) + (self.entries[-1].end if self.entries else 0)


def layout(specs: Sequence[TensorSpec], shard_bytes: int, metadata: Mapping[str, str]) -> list[Shard]:
    """Fill shards in the given order; within one, wide dtypes first, so that every tensor is aligned to its items.

    A tensor larger than `shard_bytes` gets a shard of its own.
    """
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
        shards.append(Shard(name, build_header(entries, metadata), entries))
    return shards


def build_index(shards: Sequence[Shard]) -> bytes:
    """The content of model.safetensors.index.json."""
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.end - entry.begin for shard in shards for entry in shard.entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
