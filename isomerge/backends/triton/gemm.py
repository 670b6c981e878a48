"""The product that iterations are made of: out = alpha left rightᵀ + beta addend, or half of it where it is symmetric.

One kernel, with compile-time choices: SYMMETRIC, ADD, and the number of PLANES that an operand is split into.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomerge.backends.triton.launch import Launch, capability, launching
from isomerge.backends.triton.planes import ROUNDINGS
from isomerge.backends.triton.schedule import fitting, grouping, programs
from isomerge.backends.triton.tiles import product, triangle

STRIDE = 2**23
"""Strides below it keep offsets within a tile of 256 rows in 32 bits; offsets of tiles have 64."""


@triton.jit
def _store(
    accumulator,
    addend,
    out,
    rows,
    columns,
    first_row,
    first_column,
    alpha,
    beta,
    SYMMETRIC: tl.constexpr,
    ADD: tl.constexpr,
    SIDE: tl.constexpr,
):
    """The square of out = alpha accumulator + beta addend at (first_row, first_column); with SYMMETRIC also its mirror
    image, the very same values, and of a square on the diagonal the upper half from the lower."""
    i, j = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    inside = (i < rows - first_row) & (j < columns - first_column)
    corner = first_row.to(tl.int64) * columns + first_column
    offset = i * columns + j
    result = alpha * accumulator
    if ADD:
        result += beta * tl.load(addend + corner + offset, mask=inside, other=0.0)
    lower = out + corner + offset
    if SYMMETRIC and first_column == first_row:
        tl.store(lower, tl.where(i >= j, result, tl.trans(result)), mask=inside)
    else:
        tl.store(lower, result, mask=inside)
        if SYMMETRIC:
            upper = out + (first_column.to(tl.int64) * columns + first_row) + j * columns + i
            tl.store(upper, result, mask=inside)


@triton.jit
def _gemm_kernel(
    left,
    right,
    addend,
    out,
    rows,
    columns,
    depth,
    alpha,
    beta,
    programs,
    left_plane,
    left_batch,
    right_plane,
    right_batch,
    SYMMETRIC: tl.constexpr,
    ADD: tl.constexpr,
    PLANES: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # programs come in squares of GROUP tiles, which share their operands in the cache; some find nothing to do
    SIDE: tl.constexpr = GROUP * COLUMNS
    SQUARE: tl.constexpr = GROUP * (SIDE // ROWS)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    index = tl.program_id(0) % programs
    if SYMMETRIC:
        square_row, square_column = triangle(index // SQUARE)
    else:
        square_row = index // SQUARE // tl.cdiv(columns, SIDE)
        square_column = index // SQUARE % tl.cdiv(columns, SIDE)
    first_row = square_row * SIDE + index % SQUARE // GROUP * ROWS
    first_column = square_column * SIDE + index % SQUARE % GROUP * COLUMNS
    if first_row >= rows or first_column >= columns:
        return
    if SYMMETRIC and first_column > first_row:
        return  # above the diagonal

    # 64-bit to the corner of the tile, 32-bit within it; rows beyond the last repeat it, in results that are not stored
    i, j, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    left += batch * left_batch + first_row.to(tl.int64) * depth
    right += batch * right_batch + first_column.to(tl.int64) * depth
    left_offset = tl.minimum(i, rows - 1 - first_row)[:, None] * depth + k[None, :]
    right_offset = tl.minimum(j, columns - 1 - first_column)[None, :] * depth + k[:, None]
    accumulator = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, depth, DEPTH):
        l0 = tl.load(left + left_offset)
        r0 = tl.load(right + right_offset)
        if PLANES == 1:
            accumulator = product(l0, r0, accumulator, PRECISION)
        else:
            # Tensor cores truncate what they add to an accumulator, which after thousands of additions costs more
            # than the planes gain: one step is summed apart, the smallest products first, and added to the nearest.
            l1 = tl.load(left + left_plane + left_offset)
            r1 = tl.load(right + right_plane + right_offset)
            step = tl.zeros((ROWS, COLUMNS), tl.float32)
            if PLANES == 3:
                l2 = tl.load(left + left_plane + left_plane + left_offset)
                r2 = tl.load(right + right_plane + right_plane + right_offset)
                step = product(l2, r0, step, PRECISION)
                step = product(l0, r2, step, PRECISION)
                step = product(l1, r1, step, PRECISION)
            step = product(l1, r0, step, PRECISION)
            step = product(l0, r1, step, PRECISION)
            accumulator += product(l0, r0, step, PRECISION)
        left += DEPTH
        right += DEPTH

    addend += batch * rows * columns
    out += batch * rows * columns
    # by squares: the addresses of a wide tile do not fit the registers beside its values
    wide: tl.constexpr = COLUMNS > ROWS
    squares = tl.reshape(accumulator, (ROWS, 2, ROWS)).permute(0, 2, 1).split() if wide else (accumulator,)
    for square in tl.static_range(COLUMNS // ROWS):
        _store(
            squares[square],
            addend,
            out,
            rows,
            columns,
            first_row,
            first_column + square * ROWS,
            alpha,
            beta,
            SYMMETRIC,
            ADD,
            ROWS,
        )


def gemm(
    left: Tensor,
    right: Tensor,
    shape: torch.Size,
    format: str,
    *,
    alpha: float = 1.0,
    addend: Tensor | None = None,
    beta: float = 0.0,
    symmetric: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """out = alpha left rightᵀ + beta addend, float32 [..., m, n] of the given shape, contiguous.

    left [p, B, m', k'] and right [p, B, n', k'] are planes in `format`, B the product of the leading dimensions; addend
    [..., m, n] float32, copied unless contiguous. With `symmetric` the product and the addend must be symmetric in
    exact arithmetic: the lower triangle is computed (m n k FLOP a pair of planes instead of 2 m n k) and mirrored, so
    the result is symmetric to the bit. Float32 accumulation. Raises ValueError for operands that do not fit each other.
    """
    *_, m, n = shape
    _, B, _, depth = left.shape
    if left.shape[:2] != right.shape[:2] or depth != right.shape[-1] or B != shape[:-2].numel():
        raise ValueError(
            f"expected planes of one batch and depth, got {[*left.shape]}, {[*right.shape]} for {[*shape]}"
        )
    if left.shape[-2] < m or right.shape[-2] < n or (symmetric and m != n):
        raise ValueError(f"expected planes of {m} and {n} rows, got {[*left.shape]}, {[*right.shape]}")
    if addend is not None and addend.shape != shape:
        raise ValueError(f"expected an addend {[*shape]}, got {[*addend.shape]}")
    if max(depth, n) >= STRIDE:
        raise ValueError(f"expected less than {STRIDE} columns, got {max(depth, n)}")
    out = torch.empty(shape, dtype=torch.float32, device=left.device)
    if out.numel() == 0:
        return out
    added = out if addend is None else addend.contiguous()
    launch = launch or fitting(format, m, n, B, symmetric, capability(left.device))
    group = grouping(left.nbytes // B)
    count = programs(launch, group, m, n, symmetric)
    with launching(left, right, added, out):
        _gemm_kernel[(B * count,)](
            left,
            right,
            added,
            out,
            m,
            n,
            depth,
            alpha,
            beta,
            count,
            *left.stride()[:2],
            *right.stride()[:2],
            SYMMETRIC=symmetric,
            ADD=addend is not None,
            PLANES=len(left),
            PRECISION="tf32" if ROUNDINGS[format].bits == 10 else "ieee",
            GROUP=group,
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            DEPTH=launch.depth,
            **launch.options,
        )
    return out
