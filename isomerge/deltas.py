"""From checkpoints to stacks of deltas: what is read together, and how.

A *unit* is what a method is called on: one matrix, one slice of a stack of experts, or a run of elements of a tensor
of any shape, taken as a 1 x count matrix. A *group* is units of one shape whose deltas stand in one stack
[L, T, m, n]. L letters as everywhere: L units, T experts, m x n = out x in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from isomerge.errors import InputError
from isomerge.place import Place

if TYPE_CHECKING:
    from isomerge.checkpoint import Checkpoint

GROUP_BYTES = 64 * 2**20  # of the deltas of small units that are computed together
PIECE_ELEMENTS = 16 * 2**20  # of a stack of deltas, when a tensor is merged in pieces: 64 MiB in float32
_ALIGN = 64  # bytes: every unit starts on a cache line, so BLAS takes the same path wherever in a stack it stands


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


@dataclass(slots=True)
class Stack:
    """A group in memory."""

    deltas: Tensor  # [L, T, m, n], in the arithmetic dtype, each unit on its own cache lines
    base: list[Tensor]  # L tensors [m, n], in the arithmetic dtype
    moments: Tensor | None = None  # [L, T, d, d], like the deltas
    bytes_read: int = 0
    nonfinite: dict[tuple[int, str], int] = field(default_factory=dict)  # (expert, tensor) -> entries set to zero

    def tensors(self) -> Iterator[Tensor]:
        """Everything in it, each tensor once."""
        yield self.deltas
        yield from self.base
        if self.moments is not None:
            yield self.moments


class MomentSource(Protocol):
    """The second moments of one expert's layers."""

    label: str

    def moment(self, name: str) -> Tensor:
        """YᵀY [d, d] of the layer with the weight `name`; InputError unless it is a finite second moment."""
        ...


def cut(units: Sequence[Unit], length: int) -> Iterator[tuple[Unit, ...]]:
    """The units in runs of at most `length`."""
    for first in range(0, len(units), length):
        yield tuple(units[first : first + length])


def pieces(count: int, experts: int) -> Iterator[tuple[int, int]]:
    """(start, count) of the pieces in which a tensor is merged; they depend on its size and on T, on nothing else."""
    step = max(1, PIECE_ELEMENTS // experts)
    for start in range(0, count, step):
        yield start, min(step, count - start)


class DeltaReader:
    """Reads groups: delta_t = weight_t * (expert_t - base), the difference taken in the group's dtype, never below,
    and where the group asks for them the second moments: YᵀY for inputs, weight_t² YᵀY for shifts Y = X delta_tᵀ.

    All of it is on the device of `place`, uploaded and computed as `Place.reading` says.
    InputError names the file, the tensor and the count when a value is not finite. With `allow_nonfinite` such an
    entry of an expert counts as a delta of zero; in the base it is an error always.
    """

    def __init__(
        self,
        base: Checkpoint,
        experts: Sequence[Checkpoint],
        weights: Sequence[float],
        *,
        moments: Sequence[MomentSource] = (),
        allow_nonfinite: bool = False,
        place: Place | None = None,
    ) -> None:
        self._place = place or Place()
        self._base, self._experts, self._weights, self._moments = base, experts, weights, moments
        self._allow_nonfinite = allow_nonfinite

    def read(self, group: Group) -> Stack:
        m, n, experts = group.m, group.n, len(self._experts)
        deltas = _stack(len(group.units), experts, m, n, group.dtype, self._place.device)
        stack = Stack(deltas, [self.read_base(unit, group) for unit in group.units])
        stack.bytes_read += sum(self.base_bytes(unit) for unit in group.units)
        for t, (expert, weight) in enumerate(zip(self._experts, self._weights, strict=True)):
            for unit, base, target in zip(group.units, stack.base, deltas[:, t], strict=True):
                raw = _matrix(self._read(expert, unit.sources[t], unit), group)
                target.copy_(raw).sub_(base)
                if not _all_finite(target) and (count := self._zero_nonfinite(target, raw, expert, unit.sources[t])):
                    stack.nonfinite[t, unit.name] = stack.nonfinite.get((t, unit.name), 0) + count
                if weight != 1.0:
                    target.mul_(weight)
                stack.bytes_read += self._nbytes(expert, unit.sources[t], unit)
        if group.moment_size:
            stack.moments = self._read_moments(group)
            stack.bytes_read += len(group.units) * experts * moment_bytes(group.moment_size)
        return stack

    def base_bytes(self, unit: Unit) -> int:
        """Bytes that reading the base's values of a unit takes."""
        return self._nbytes(self._base, unit.name, unit)

    def read_base(self, unit: Unit, group: Group) -> Tensor:
        """The base's values of a unit, [m, n] in the group's dtype; InputError unless they are finite."""
        base = self._base
        values = _matrix(self._read(base, unit.name, unit), group).to(group.dtype).contiguous()
        if not _all_finite(values):
            count = int((~torch.isfinite(values)).sum())
            if count:
                raise InputError(
                    f"{base.label}: {unit.name}: {count} non-finite values in the base model; repair them, "
                    f'or copy the tensor unchanged with a rule {{filter: "{unit.name}", keep_base: true}}'
                )
        return values

    def _read_moments(self, group: Group) -> Tensor:
        d = group.moment_size
        moments = _stack(len(group.units), len(self._moments), d, d, group.dtype, self._place.device)
        for t, (source, weight) in enumerate(zip(self._moments, self._weights, strict=True)):
            for unit, target in zip(group.units, moments[:, t], strict=True):
                name = unit.sources[t]
                target.copy_(self._place.up(source.moment(name)))
                if d != group.n and weight != 1.0:  # of the shifts X deltaᵀ: they scale as the delta does
                    target.mul_(weight**2)
                if not _all_finite(target) and not bool(torch.isfinite(target).all()):
                    raise InputError(
                        f"{source.label}: {name}: second moments overflow {str(target.dtype)[6:]}; set `dtype: float64`"
                    )
        return moments

    def _zero_nonfinite(self, target: Tensor, raw: Tensor, expert: Checkpoint, name: str) -> int:
        """Sets the non-finite entries of a delta to zero and returns their number; an InputError unless allowed."""
        bad = ~torch.isfinite(target)
        count = int(bad.sum())
        if count == 0:  # finite values whose sum overflowed
            return 0
        in_expert = int((~torch.isfinite(raw)).sum())
        if in_expert == 0:
            raise InputError(
                f"{expert.label}: {name}: {count} differences from the base overflow {str(target.dtype)[6:]}; "
                "set `dtype: float64`"
            )
        if not self._allow_nonfinite:
            raise InputError(
                f"{expert.label}: {name}: {in_expert} non-finite values (NaN or Inf); nothing was written. Repair the "
                "checkpoint, or leave such entries out of the merge with --allow-nonfinite"
            )
        target.masked_fill_(bad, 0.0)
        return count

    def _read(self, checkpoint: Checkpoint, name: str, unit: Unit) -> Tensor:
        return self._place.up(checkpoint.read(name) if unit.whole else checkpoint.read(name, unit.start, unit.count))

    @staticmethod
    def _nbytes(checkpoint: Checkpoint, name: str, unit: Unit) -> int:
        return unit.count * checkpoint.tensors[name].dtype.itemsize


def moment_bytes(size: int) -> int:
    """Bytes that reading one moment [d, d] counts for: those of float32, the format of statistics files."""
    return 4 * size * size


def _stack(length: int, experts: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for [L, T, rows, columns], each of the L units on its own cache lines."""
    step = _ALIGN // dtype.itemsize
    stride = -(-experts * rows * columns // step) * step
    buffer = torch.empty(length * stride, dtype=dtype, device=device)
    return buffer.as_strided((length, experts, rows, columns), (stride, rows * columns, columns, 1))


def _matrix(values: Tensor, group: Group) -> Tensor:
    """Elements as stored -> [m, n]."""
    return values.reshape(group.n, group.m).mT if group.transposed else values.reshape(group.m, group.n)


def _all_finite(values: Tensor) -> bool:
    """False when some value is not finite, and at times when all are: their sum may overflow. One pass, no mask."""
    return bool(torch.isfinite(values.sum()))
