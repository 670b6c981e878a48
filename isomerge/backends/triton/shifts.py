"""The feature shifts X Δᵀ of some tokens, as the planes that a product of them wants."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomerge.backends.triton.launch import Launch, launching
from isomerge.backends.triton.sums import FLUSH, accumulate, split

SHIFTS: Mapping[tuple[int, int], Launch] = MappingProxyType(
    {  # by the planes of X and of the delta: 32, 32, 32 and 48 KiB a stage
        (1, 1): Launch(128, 128, 64, 8, 3),
        (1, 3): Launch(128, 128, 32, 8, 3),
        (3, 1): Launch(128, 128, 32, 8, 3),
        (3, 3): Launch(128, 128, 32, 8, 3),
    }
)
ALIGNMENT = 16
"""Elements in a row of shifts are a multiple of it, the one divisor that the compiler looks for: copies to shared
memory are asynchronous where they are known to be of 16 aligned bytes."""


@triton.jit
def _shift_kernel(
    X,
    delta,
    Y,
    tokens,
    m,
    n,
    programs,
    X_plane,
    X_batch,
    X_token,
    X_column,
    delta_plane,
    delta_batch,
    delta_row,
    delta_column,
    Y_plane,
    Y_batch,
    Y_token,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    FLUSH: tl.constexpr,
):
    # tokens vary fastest: the planes of the delta, the larger operand, are read once
    down = tl.cdiv(tokens, ROWS)
    tile = tl.program_id(0) % programs
    batch = (tl.program_id(0) // programs).to(tl.int64)
    i = (tile % down * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    j = (tile // down * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    k = tl.arange(0, DEPTH)
    value = accumulate(
        X + batch * X_batch + i * X_token + k[None, :] * X_column,
        delta + batch * delta_batch + j * delta_row + k[:, None] * delta_column,
        i < tokens,
        j < m,
        n,
        X_column,
        delta_column,
        X_plane,
        delta_plane,
        LEFT,
        RIGHT,
        DEPTH,
        FLUSH,
    )
    Y += batch * Y_batch + i * Y_token + j
    inside = (i < tokens) & (j < m)
    y0, y1, y2 = split(value)
    tl.store(Y, y0, mask=inside)
    tl.store(Y + Y_plane, y1, mask=inside)
    tl.store(Y + Y_plane + Y_plane, y2, mask=inside)


def shifts_workspace(batch: int, tokens: int, m: int, device: torch.device) -> Tensor:
    """Memory for the three planes of shifts [batch, tokens, m], whose rows start on 32 bytes."""
    return torch.empty(3, batch, tokens, triton.cdiv(m, ALIGNMENT) * ALIGNMENT, dtype=torch.bfloat16, device=device)


def store_shifts(X: Tensor, delta: Tensor, Y: Tensor, tokens: int, m: int, n: int) -> None:
    """Y [3, B, >= tokens, >= m] = the planes of X Δᵀ, of the planes X [p, B, >= tokens, >= n] and delta [q, B, ..]."""
    launch = SHIFTS[len(X), len(delta)]
    programs = triton.cdiv(tokens, launch.rows) * triton.cdiv(m, launch.columns)
    with launching(X, delta, Y):
        _shift_kernel[(Y.shape[1] * programs,)](
            X,
            delta,
            Y,
            tokens,
            m,
            n,
            programs,
            *X.stride(),
            *delta.stride(),
            *Y.stride()[:3],
            LEFT=len(X),
            RIGHT=len(delta),
            ROWS=launch.rows,
            COLUMNS=launch.columns,
            DEPTH=launch.depth,
            FLUSH=FLUSH,
            **launch.options,
        )
