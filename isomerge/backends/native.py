"""The passes over memory in C++ on the CPU: the only door to `isomerge._cpu`, which knows addresses, but no tensors.

Everything that can be wrong with a tensor is found here, before an address leaves Python. Arithmetic is float32's, bit
for bit that of `eager`, whose turn it is where something is float64 or lies in memory with gaps. One pass where torch
needs one for each operation: averaging four bfloat16 experts takes 0.9 ns an element on a core instead of 3.5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isomerge.backends import BackendUnavailable, eager
from isomerge.backends.extension import load
from isomerge.backends.selection import DIGITS, by_digits
from isomerge.backends.side_by_side import concurrently, matrices
from isomerge.memory import on_huge_pages

PIECE = 2**18
"""Elements of one tensor that a thread takes at a time."""

FEW = 2**14
"""Values of which torch finds the k-th sooner: of 1000 in 6 us instead of 97, of 20 000 in 75 instead of 104."""

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # `Dtype` of csrc/cpu/values.h
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}  # `Reduction` of csrc/cpu/passes.h


class Stretch(NamedTuple):
    """Elements of an open file from the byte `offset` on."""

    file: int  # descriptor
    offset: int
    dtype: torch.dtype


class Drop(NamedTuple):
    """What `drop` leaves of deltas: the numbers of element i of task t are drawn from `first` + t * `apart` + i."""

    density: float
    seed: int
    first: int
    apart: int


class Finalized(NamedTuple):
    """What an update makes of the base."""

    values: tuple[Tensor, ...]  # [count] for each scale
    sum_square: float  # ||sum of the deltas||²
    update_square: float  # ||update||²


def availability() -> str | None:
    """Why nothing can run here, or None when it can."""
    try:
        _extension()
    except BackendUnavailable as error:
        return str(error)
    return None


def finalize(base: Tensor, update: Tensor, *, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Blocks of a KiB or four: widened, the product, the sum, rounded, while they are in a core's first cache."""
    if not {base.dtype, update.dtype, out_dtype} <= _DTYPES.keys():
        return eager.finalize(base, update, scale=scale, out_dtype=out_dtype)
    extension, update = _extension(), update.float()
    merged = on_huge_pages(torch.empty(base.shape, dtype=out_dtype))
    calls = []
    factors = scale.float().reshape(-1).tolist()
    for stored, added, factor, out in zip(
        matrices(base.contiguous()), matrices(update.contiguous()), factors, matrices(merged), strict=True
    ):
        pieces = zip(*(t.view(-1).split(PIECE) for t in (stored, added, out)), strict=True)
        calls += [
            partial(extension.finalize, _values(b), u.data_ptr(), factor, u.numel(), _values(o)) for b, u, o in pieces
        ]
    _each(calls)
    return merged


def subtract(
    base: Tensor, tuned: Iterable[Tensor], *, weights: Sequence[float], reduction: str, base_out: Tensor, out: Tensor
) -> float:
    """All tasks of an element at once, so all of `tuned` is in memory together. One thread."""
    if base_out.dtype != torch.float32 or not base_out.is_contiguous() or not out[0].is_contiguous():
        return eager.subtract(base, tuned, weights=weights, reduction=reduction, base_out=base_out, out=out)
    models = [base.contiguous(), *(values.contiguous() for values in tuned)]
    if not {model.dtype for model in models} <= _DTYPES.keys():
        return eager.subtract(models[0], models[1:], weights=weights, reduction=reduction, base_out=base_out, out=out)
    first, *others = map(_values, models)
    square: float = _extension().subtract(
        *(first, others, weights, base.numel(), _REDUCTIONS[reduction]),
        *(base_out.data_ptr(), out.data_ptr(), out.stride(0)),
    )
    return square


class FileModels:
    """The elements of a base and of what was tuned from it, in open files, read in blocks. Each call is one thread's.

    Deltas are those of `subtract`, or what is left of them. Every answer is None where a block is not read or the sum
    of its deltas is not finite.
    """

    def __init__(self, models: Sequence[Stretch], count: int, *, weights: Sequence[float], drop: Drop | None) -> None:
        """Of dtypes that `reads`."""
        base, *tuned = ((model.file, model.offset, _DTYPES[model.dtype]) for model in models)
        self._models = _extension().Models(base, tuned, weights, count, drop)
        self._tasks, self._count = len(tuned), count

    def blend(self, reduction: str, scales: Sequence[float], out_dtype: torch.dtype) -> Finalized | None:
        """A reduction of the deltas, what is left of them their sum, and `finalize` for each scale; None also where a
        block's update is zero.
        """
        return self._finalized(self._models.blend, (_REDUCTIONS[reduction],), scales, out_dtype)

    def elect(
        self, thresholds: Tensor, majority: int, scales: Sequence[float], out_dtype: torch.dtype
    ) -> Finalized | None:
        """`elect` and `finalize` for each scale; None also where the update is zero."""
        return self._finalized(self._models.elect, (thresholds.tolist(), majority), scales, out_dtype)

    def votes(self, thresholds: Tensor) -> int | None:
        """`votes`."""
        total: int | None = self._models.votes(thresholds.tolist())
        return total

    def count_digits(self, higher: Sequence[Sequence[int]]) -> Tensor | None:
        """`count_digits` of each task behind its digits: [T, 2^16]."""
        counts = torch.zeros(self._tasks, DIGITS, dtype=torch.int64)
        highs = [digits[0] if digits else None for digits in higher]
        return counts if self._models.count_digits(highs, counts.data_ptr()) else None

    def _finalized(
        self, function: Callable[..., Any], arguments: tuple[Any, ...], scales: Sequence[float], dtype: torch.dtype
    ) -> Finalized | None:
        values = tuple(torch.empty(self._count, dtype=dtype) for _ in scales)
        squares = function(*arguments, scales, [merged.data_ptr() for merged in values], _DTYPES[dtype])
        return None if squares is None else Finalized(values, *squares)


def reads(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether `FileModels` reads and writes them here."""
    return availability() is None and set(dtypes) <= _DTYPES.keys()


def frobenius(A: Tensor) -> float:
    """Squares taken and added in float64."""
    if A.dtype != torch.float32 or not A.is_contiguous():
        return eager.frobenius(A)
    extension, pieces = _extension(), A.view(-1).split(PIECE) if A.numel() else ()
    return math.sqrt(sum(_each([partial(extension.sum_squares, p.data_ptr(), p.numel()) for p in pieces])))


def count_digits(values: Tensor, higher: Sequence[int]) -> Tensor:
    """High digits by two tables in turn, low ones of the few values that have the high one. One thread."""
    if values.dtype != torch.float32 or not values.is_contiguous():
        return eager.count_digits(values, higher)
    counts = torch.zeros(DIGITS, dtype=torch.int64)
    _extension().count_digits(values.data_ptr(), values.numel(), *(higher or (None,)), counts.data_ptr())
    return counts


def kth_largest(values: Tensor, k: int) -> Tensor:
    """By `count_digits` of both digits. One thread."""
    if values.dtype != torch.float32 or not values.is_contiguous() or values.numel() <= FEW:
        return eager.kth_largest(values, k)
    return by_digits(values, k, count_digits)


def votes(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """A thousand columns at a time. One thread."""
    if deltas.dtype != torch.float32 or not deltas[0].is_contiguous():
        return eager.votes(deltas, thresholds)
    total = _extension().votes(deltas.data_ptr(), deltas.stride(0), thresholds.tolist(), deltas.shape[1])
    return torch.tensor(total)


def elect(deltas: Tensor, thresholds: Tensor, majority: int) -> Tensor:
    """A thousand columns at a time. One thread."""
    if deltas.dtype != torch.float32 or not deltas[0].is_contiguous():
        return eager.elect(deltas, thresholds, majority)
    merged = on_huge_pages(torch.empty_like(deltas[0]))
    _extension().elect(
        *(deltas.data_ptr(), deltas.stride(0), thresholds.tolist(), majority, merged.numel(), merged.data_ptr())
    )
    return merged


def drop(values: Tensor, density: float, *, seed: int, first: int) -> Tensor:
    """Drawn, divided and chosen in one pass. One thread."""
    if values.dtype != torch.float32 or not values.is_contiguous():
        return eager.drop(values, density, seed=seed, first=first)
    kept = torch.empty_like(values)
    _extension().drop(values.data_ptr(), values.numel(), density, seed, first, kept.data_ptr())
    return kept


def _extension() -> ModuleType:
    return load("isomerge._cpu", "ISOMERGE_CPU")


def _values(tensor: Tensor) -> tuple[int, int]:
    """What the extension calls `Values`: where they are and what they are."""
    return tensor.data_ptr(), _DTYPES[tensor.dtype]


def _each(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """A single call in this thread, several side by side."""
    return [calls[0]()] if len(calls) == 1 else concurrently(calls)
