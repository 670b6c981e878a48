"""The two passes that memory bounds: deltas summed on the way in, the update added to the base on the way out."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomerge.backends.triton.launch import Launch, batched, launching
from isomerge.backends.triton.sums import to_bfloat16

PASS = Launch(rows=1, columns=2048, depth=1, warps=4, stages=1)
"""16 elements a thread: two loads of 16 bytes of a bfloat16 input in flight, four of a float32 one. At 64 registers
1024 threads a multiprocessor keep 32 KB or more in flight; 4.8 TB/s at a latency of 600 ns take 22 KB."""

FINALIZE = replace(PASS, fused=False)
"""The product is rounded before the sum."""

COLUMN_SUMS = Launch(rows=64, columns=16, depth=1, warps=4, stages=1)
"""8 partial sums a thread and step: 8 KB a program, in flight together."""


@triton.jit
def _delta_sum_kernel(
    tuned,
    base,
    total,
    squares,
    tasks,
    size,
    pieces,
    tuned_batch,
    tuned_task,
    base_batch,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0) % pieces
    batch = (tl.program_id(0) // pieces).to(tl.int64)
    i = piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    dtype = total.dtype.element_ty
    origin = tl.load(base + batch * base_batch + i, mask=inside, other=0.0).to(dtype)
    tuned += batch * tuned_batch + i
    squares += (batch * pieces + piece) * (tasks + 1)
    summed = tl.zeros((BLOCK,), dtype)
    for _ in range(tasks):
        delta = tl.load(tuned, mask=inside, other=0.0).to(dtype) - origin
        summed += delta
        tl.store(squares, tl.sum(delta.to(tl.float64) * delta.to(tl.float64)))
        tuned += tuned_task
        squares += 1
    tl.store(squares, tl.sum(summed.to(tl.float64) * summed.to(tl.float64)))
    tl.store(total + batch * size + i, summed, mask=inside)


@triton.jit
def _finalize_kernel(
    base, update, scale, out, size, pieces, base_batch, update_batch, DOUBLE: tl.constexpr, BLOCK: tl.constexpr
):
    dtype: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    piece = tl.program_id(0) % pieces
    batch = (tl.program_id(0) // pieces).to(tl.int64)
    i = piece.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    origin = tl.load(base + batch * base_batch + i, mask=inside, other=0.0).to(dtype)
    step = tl.load(update + batch * update_batch + i, mask=inside, other=0.0).to(dtype)
    merged = step * tl.load(scale + batch).to(dtype)  # FINALIZE: the product is rounded
    merged += origin
    if out.dtype.element_ty == tl.bfloat16:
        stored = to_bfloat16(merged.to(tl.float32))  # from float64 by way of float32, as torch converts
    elif out.dtype.element_ty == tl.float16:
        stored = merged.to(tl.float32).to(tl.float16)
    else:
        stored = merged.to(out.dtype.element_ty)
    tl.store(out + batch * size + i, stored, mask=inside)


@triton.jit
def _column_sums_kernel(partial, out, count, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    across = tl.cdiv(columns, COLUMNS)
    batch = (tl.program_id(0) // across).to(tl.int64)
    i = tl.arange(0, ROWS)[:, None]
    j = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, count, ROWS):
        mask = (start + i < count) & (j < columns)[None, :]
        total += tl.load(partial + (batch * count + start + i) * columns + j[None, :], mask=mask, other=0.0)
    tl.store(out + batch * columns + j, tl.sum(total, axis=0), mask=j < columns)


def delta_sum(tuned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_t Δ_t [..., m, n], ||Δ_t||_F [..., T], ||Σ_t Δ_t||_F [...], Δ_t = tuned_t - base, each input read once.

    tuned [..., T, m, n], base [..., m, n]. Deltas and their sum are float32 (float64 where an input is), squares and
    their sums float64: one conversion and one multiply-add in double an element. Bytes: those of the inputs and of the
    sum. Matrices with gaps between rows are copied first; stacks that are all stored by columns are not.
    """
    batch, (T, m, n) = base.shape[:-2], tuned.shape[-3:]
    by_columns, (tuned, base) = _dense(tuned, base)
    tuned, base = tuned[None] if tuned.ndim == 3 else tuned.flatten(0, -4), batched(base)
    B, size = len(base), m * n
    total = torch.empty(base.shape, dtype=_arithmetic(tuned, base), device=base.device)
    pieces = triton.cdiv(size, PASS.columns)
    squares = torch.empty(B, pieces, T + 1, dtype=torch.float64, device=base.device)
    with launching(tuned, base):
        _delta_sum_kernel[(B * pieces,)](
            tuned,
            base,
            total,
            squares,
            T,
            size,
            pieces,
            *tuned.stride()[:2],
            base.stride(0),
            BLOCK=PASS.columns,
            **PASS.options,
        )
    norms = column_sums(squares).sqrt_()
    total = (total.mT if by_columns else total).view(*batch, m, n)
    return total, norms[:, :T].reshape(*batch, T), norms[:, T].reshape(batch)


def finalize(base: Tensor, update: Tensor, *, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """base + scale * update [..., m, n] in `out_dtype`, one scale [...] per matrix, to the bits of the eager backend.

    The product is rounded, then the sum, in float32 (float64 where an input is), then the result. Bytes: those of the
    inputs and of the result; strides as in `delta_sum`.
    """
    shape = base.shape
    by_columns, (base, update) = _dense(base, update)
    base, update = batched(base), batched(update)
    out = torch.empty(base.shape, dtype=out_dtype, device=base.device)
    B, size = len(base), base.shape[1:].numel()
    pieces = triton.cdiv(size, FINALIZE.columns)
    with launching(base, update, scale):
        _finalize_kernel[(B * pieces,)](
            base,
            update,
            scale.reshape(B).contiguous(),
            out,
            size,
            pieces,
            base.stride(0),
            update.stride(0),
            DOUBLE=_arithmetic(base, update) == torch.float64,
            BLOCK=FINALIZE.columns,
            **FINALIZE.options,
        )
    return (out.mT if by_columns else out).view(shape)


def column_sums(partial: Tensor) -> Tensor:
    """Σ_i partial[b, i, j] [B, columns] in float64 of [B, count, columns], contiguous; in one order for one shape."""
    B, count, columns = partial.shape
    out = torch.empty(B, columns, dtype=torch.float64, device=partial.device)
    with launching(partial):
        _column_sums_kernel[(B * triton.cdiv(columns, COLUMN_SUMS.columns),)](
            partial, out, count, columns, ROWS=COLUMN_SUMS.rows, COLUMNS=COLUMN_SUMS.columns, **COLUMN_SUMS.options
        )
    return out


def _arithmetic(A: Tensor, B: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)


def _dense(*stacks: Tensor) -> tuple[bool, tuple[Tensor, ...]]:
    """Whether all stacks [..., m, n] store their matrices by columns; and the stacks, or if so their transposes, with
    matrices that are contiguous: views where they are so already.
    """
    first = [A[(0,) * (A.ndim - 2)] for A in stacks]
    by_columns = all(A.mT.is_contiguous() for A in first) and not all(A.is_contiguous() for A in first)
    turned = [A.mT if by_columns else A for A in stacks]
    return by_columns, tuple(A if A[(0,) * (A.ndim - 2)].is_contiguous() else A.contiguous() for A in turned)
