"""What is merged together: units, groups of them, and their deltas in memory.

A *unit* is what a method is called on: one matrix, one slice of a stack of experts, or a run of elements of a tensor
of any shape, taken as a 1 x count matrix. A *group* is units of one shape whose deltas stand in one stack
[L, T, m, n]. L letters as everywhere: L units, T experts, m x n = out x in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

GROUP_BYTES = 64 * 2**20  # of the deltas of small units that are computed together
STREAM_BYTES = 512 * 2**20  # of those that are not held: the threads that stream them wait for one another at the end
SURVEY_BYTES = 32 * 2**20  # of what is counted in tensors that are surveyed together
PIECE_ELEMENTS = 2**19  # of a tensor that is merged in pieces: 2 MiB in float32, five arrays of which a cache holds
RUNS_BYTES = 8 * 2**20  # of raw runs, of all models together, that a thread holds at a time
_ALIGN = 64  # bytes: every unit starts on a cache line, so BLAS takes the same path wherever in a stack it stands

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Unit:
    """`count` elements of the tensor `name` from flat index `start`; `sources[t]` is its name in expert t."""

    name: str
    sources: tuple[str, ...]
    start: int
    count: int
    whole: bool  # the unit is the whole tensor
    slice_index: int | None = None  # in a stack of experts

    @property
    def label(self) -> str:
        return self.name if self.slice_index is None else f"{self.name}[{self.slice_index}]"


@dataclass(frozen=True, slots=True)
class Group:
    """Units that are all m x n, stored [n, m] when `transposed`, and their arithmetic."""

    m: int
    n: int
    transposed: bool
    dtype: torch.dtype  # of the deltas
    units: tuple[Unit, ...]
    moment_size: int = 0  # d of the second moments that go with the deltas; 0: none
    tokens: int = 0  # rows of the largest inputs that a moment is computed from; 0: all are stored
    reduction: str = "none"  # "sum", "mean": of the deltas, formed as they are read; the stack is that of one expert


@dataclass(slots=True)
class Read:
    """What reading a group found."""

    bytes_read: int = 0
    sum_squares: list[float] = field(default_factory=list)  # ||sum of the deltas||² of each unit
    nonfinite: dict[tuple[int, str], int] = field(default_factory=dict)  # (expert, tensor) -> entries set to zero

    def add(self, other: Read) -> None:
        """What was found in further units."""
        self.bytes_read += other.bytes_read
        self.sum_squares += other.sum_squares
        for key, count in other.nonfinite.items():
            self.nonfinite[key] = self.nonfinite.get(key, 0) + count

    def tensors(self) -> Iterator[Tensor]:
        """Everything in it, each tensor once; nothing, where it is on the CPU for good."""
        return iter(())


@dataclass(slots=True)
class Stack(Read):
    """A group in memory."""

    deltas: Tensor = field(kw_only=True)  # [L, T or 1, m, n], in the arithmetic dtype, each unit on its own cache lines
    base: list[Tensor] = field(kw_only=True)  # L tensors [m, n], in the arithmetic dtype
    moments: Tensor | None = None  # [L, T, d, d], like the deltas

    def tensors(self) -> Iterator[Tensor]:
        """Everything in it, each tensor once."""
        yield self.deltas
        yield from self.base
        if self.moments is not None:
            yield self.moments


@dataclass(slots=True)
class Mapped(Read, Generic[Result]):
    """What a function made of each of a group's L units, of which nothing else is left."""

    results: list[Result] = field(default_factory=list)


def unit_seed(seed: int, label: str) -> int:
    """A seed for one unit that depends on the recipe's seed and on its name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{label}".encode()).digest()[:8], "big") >> 1


def cut(units: Sequence[Unit], length: int) -> Iterator[tuple[Unit, ...]]:
    """The units in runs of at most `length`."""
    for first in range(0, len(units), length):
        yield tuple(units[first : first + length])


def pieces(name: str, sources: tuple[str, ...], numel: int) -> Iterator[Unit]:
    """The pieces in which a tensor of `numel` elements is merged."""
    for start in range(0, numel, PIECE_ELEMENTS):
        count = min(PIECE_ELEMENTS, numel - start)
        yield Unit(name, sources, start, count, whole=count == numel)


def moment_bytes(size: int, tokens: int, n: int) -> int:
    """Bytes that reading one moment [d, d] counts for, or where there are `tokens` inputs [tokens, n]: of float32."""
    return 4 * (tokens * n if tokens else size * size)


def empty_stack(length: int, experts: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for [L, T, rows, columns], each of the L units on its own cache lines."""
    step = _ALIGN // dtype.itemsize
    stride = -(-experts * rows * columns // step) * step
    buffer = torch.empty(length * stride, dtype=dtype, device=device)
    return buffer.as_strided((length, experts, rows, columns), (stride, rows * columns, columns, 1))
