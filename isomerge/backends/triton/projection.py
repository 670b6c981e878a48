"""The T projections of a layer onto the bases of its tasks, scaled, one below the other, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomerge.backends.triton.launch import Launch, launching
from isomerge.backends.triton.passes import column_sums
from isomerge.backends.triton.sums import product_of_planes, split

LAUNCHES = (
    # Operands are split into planes in registers, which bounds the columns; W is read once for a strip of rows.
    Launch(64, 64, 32, 4, 3),  # 160 to 168 registers, 45 KiB: three programs a multiprocessor
    Launch(128, 64, 32, 8, 3),  # 126 registers, 60 KiB on 9.0: two programs; 171 and one on 8.0
)


@triton.jit
def _project_kernel(
    Q,
    W,
    row_scale,
    C,
    partial,
    tasks,
    m,
    n,
    s,
    Q_batch,
    Q_task,
    Q_row,
    Q_column,
    W_batch,
    W_task,
    W_row,
    W_column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # rows vary fastest: the programs that read the same columns of W run together
    down = tl.cdiv(s, ROWS)
    strip = tl.program_id(0) % down
    column = tl.program_id(0) // down % tl.cdiv(n, COLUMNS)
    stack = (tl.program_id(0) // down // tl.cdiv(n, COLUMNS)).to(tl.int64)  # of batch and task
    batch, task = stack // tasks, stack % tasks
    i = (strip * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    j = (column * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    k = tl.arange(0, DEPTH).to(tl.int64)
    depth = tl.full((), DEPTH, tl.int64)
    left = Q + batch * Q_batch + task * Q_task + k[None, :] * Q_row + i[:, None] * Q_column
    right = W + batch * W_batch + task * W_task + k[:, None] * W_row + j[None, :] * W_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, m, DEPTH):
        a = tl.load(left, mask=(i < s)[:, None] & (start + k < m)[None, :], other=0.0)
        b = tl.load(right, mask=(j < n)[None, :] & (start + k < m)[:, None], other=0.0)
        a0, a1, a2 = split(a.to(tl.float32))
        b0, b1, b2 = split(b.to(tl.float32))
        total += product_of_planes(a0, a1, a2, b0, b1, b2)
        left += depth * Q_row
        right += depth * W_row
    total *= tl.load(row_scale + stack * s + i, mask=i < s, other=0.0)[:, None]
    inside = (i < s)[:, None] & (j < n)[None, :]
    tl.store(C + (stack * s + i[:, None]) * n + j[None, :], total, mask=inside)
    tl.store(partial + (stack * down + strip) * n + j, tl.sum(total * total, axis=0), mask=j < n)


def project_scale(Q: Tensor, W: Tensor, *, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """C [..., T s, n] of rows row_scale[t, i] (Q_tᵀ W_t)[i], float32; Σ_i C[i, j]² [..., n], float64.

    Q [..., T, m, s], W [..., T, m, n], row_scale [..., T, s], of at most float32, any strides; each factor as three
    planes of bfloat16, split where it is multiplied: W is read once for every 64 or 128 rows of a task's result. Sums
    over m are float32, squares are summed in float32 within a tile and in float64 across, in an order that depends on
    the shape alone. Cost: 6 products of 2 T m n s. Raises ValueError for float64.
    """
    if torch.float64 in (Q.dtype, W.dtype, row_scale.dtype):
        raise ValueError('project_scale[triton]: expected at most float32, got float64; use backend="eager"')
    batch, (T, m, s), n = Q.shape[:-3], Q.shape[-3:], W.shape[-1]
    Q, W = (A[None] if A.ndim == 3 else A.flatten(0, -4) for A in (Q, W))
    B, launch = len(Q), fitting(s)
    down, across = triton.cdiv(s, launch.rows), triton.cdiv(n, launch.columns)
    C = torch.empty(*batch, T * s, n, dtype=torch.float32, device=Q.device)
    partial = torch.empty(B, T * down, n, dtype=torch.float32, device=Q.device)
    with launching(Q, W, row_scale):
        _project_kernel[(B * T * across * down,)](
            Q,
            W,
            row_scale.contiguous(),
            C,
            partial,
            T,
            m,
            n,
            s,
            *Q.stride(),
            *W.stride(),
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            DEPTH=launch.depth,
            **launch.options,
        )
    return C, column_sums(partial).view(*batch, n)


def fitting(s: int) -> Launch:
    """The row of `LAUNCHES` that pads s the least; of equals the larger, which reads W less often."""
    return min(LAUNCHES, key=lambda launch: (triton.cdiv(s, launch.rows) * launch.rows, -launch.rows))
