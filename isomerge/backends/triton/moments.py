"""Second moments of a layer's inputs, or of the shifts that a delta makes of them.

`_moment_kernel` multiplies tokens by tokens, one program for a tile of the lower triangle and a share of the tokens;
`_reduce_kernel` adds the shares in order, and mirrors. The shifts are made by `shifts.py`, some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomerge.backends.triton.launch import PROCESSORS, Launch, batched, launching
from isomerge.backends.triton.planes import planes
from isomerge.backends.triton.shifts import shifts_workspace, store_shifts
from isomerge.backends.triton.sums import FLUSH, accumulate
from isomerge.backends.triton.tiles import triangle

MOMENTS: Mapping[int, Launch] = MappingProxyType(
    {  # by the planes of an operand; square tiles, so that the triangle has no halves
        # 64 registers a thread for each of the two accumulators; 32 KiB a stage
        1: Launch(128, 128, 64, 8, 3),
        # as many; all planes of a step are 48 KiB, and three stages the most that capability 8.0 has room for
        3: Launch(128, 128, 32, 8, 3),
    }
)
REDUCTION = Launch(32, 64, 1, 4, 1)
"""16 elements a thread: `out`, its new value and a partial sum, in float64 if need be, within 168 registers."""

MIN_TOKENS, MAX_TOKENS = 2048, 8192
"""Of which planes are stored at a time. Few cost reading and writing `out` more often: with 2048 tokens and d = 14336
that is 2 GB for 2.5 TFLOP of products. More than fit into the cache are read from memory."""

CACHE = 32 * 2**20
"""Bytes of planes that stay in an L2 cache of 50 MB (40 on an A100) beside the tiles that are being written."""


@triton.jit
def _moment_kernel(
    Y,
    partial,
    tokens,
    d,
    tiles,
    splits,
    share,
    plane_stride,
    batch_stride,
    token_stride,
    column_stride,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    FLUSH: tl.constexpr,
):
    part = (tl.program_id(0) // tiles).to(tl.int64)
    first = part % splits * share
    row, column = triangle(tl.program_id(0) % tiles)
    block = tl.arange(0, BLOCK)
    i, j = (row * BLOCK + block).to(tl.int64), (column * BLOCK + block).to(tl.int64)
    token = first + tl.arange(0, DEPTH)
    Y += part // splits * batch_stride
    value = accumulate(
        Y + i[:, None] * column_stride + token[None, :] * token_stride,
        Y + j[None, :] * column_stride + token[:, None] * token_stride,
        (i < d)[:, None],
        (j < d)[None, :],
        tl.minimum(share, tokens - first).to(tl.int32),
        token_stride,
        token_stride,
        plane_stride,
        plane_stride,
        PLANES,
        PLANES,
        DEPTH,
        FLUSH,
    )
    partial += tl.program_id(0).to(tl.int64) * BLOCK * BLOCK
    tl.store(partial + block[:, None] * BLOCK + block[None, :], value)


@triton.jit
def _reduce_kernel(
    partial,
    out,
    d,
    tiles,
    splits,
    batch_stride,
    row_stride,
    column_stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    PIECES: tl.constexpr = BLOCK // ROWS * (BLOCK // COLUMNS)
    piece = tl.program_id(0) % PIECES
    tile = tl.program_id(0) // PIECES % tiles
    batch = (tl.program_id(0) // PIECES // tiles).to(tl.int64)
    row, column = triangle(tile)
    i = (piece // (BLOCK // COLUMNS) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (piece % (BLOCK // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    within = i * BLOCK + j
    i, j = (row * BLOCK + i).to(tl.int64), (column * BLOCK + j).to(tl.int64)
    lower = out + batch * batch_stride + i * row_stride + j * column_stride
    inside = (i < d) & (j < d)
    value = tl.load(lower, mask=inside, other=0.0)
    total = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    for part in range(splits):
        total += tl.load(partial + ((batch * splits + part) * tiles + tile) * BLOCK * BLOCK + within)
    value += total
    upper = out + batch * batch_stride + j * row_stride + i * column_stride
    if row == column:  # of each pair the lower one, for both
        tl.store(lower, value, mask=inside & (j <= i))
        tl.store(upper, value, mask=inside & (j < i))
    else:
        tl.store(lower, value, mask=inside)
        tl.store(upper, value, mask=inside)


def shift_cov(X: Tensor, delta: Tensor | None, *, out: Tensor, precision: str) -> Tensor:
    """out + YᵀY, Y = X or X Δᵀ, in `out`: X [..., N, n], delta [..., m, n], out [..., d, d] float32 or float64.

    Products of bfloat16, or of float16 with float16, are exact in float32. Whatever else there is, and the shifts
    themselves, are split into three planes of bfloat16, 24 bits. Sums are float32 of at most 512 products, added in
    float32. Planes and shifts are stored of at most 8192 tokens at a time, of a share of the tokens one sum each.
    The order of all sums is that of the shape of one matrix. Cost: N d² FLOP, times 6 for planes, and with a delta
    2 N m n, times 1, 3 or 6. Raises ValueError for float64 X or delta and for precision "exact".
    """
    for tensor in (X,) if delta is None else (X, delta):
        if tensor.dtype == torch.float64 or precision == "exact":
            raise ValueError(
                f"shift_cov[triton]: expected at most float32 and precision fast or default, got {tensor.dtype} and "
                f'{precision}; use backend="eager"'
            )
    X, target = batched(X), batched(out)
    if X.numel() == 0 or out.numel() == 0:
        return out
    B, N, n = X.shape
    if delta is None:
        exact = X.dtype != torch.float32
        for chunk in X.split(N if exact else workspace_tokens(n), dim=1):
            _add_moment(_planes(chunk, exact), chunk.shape[1], target)
    else:
        alike, m = X.dtype == delta.dtype != torch.float32, delta.shape[-2]
        D = _planes(batched(delta), alike or delta.dtype == torch.bfloat16)
        tokens = min(N, workspace_tokens(max(m, n)))
        Y = shifts_workspace(B, tokens, m, X.device)
        for chunk in X.split(tokens, dim=1):
            store_shifts(_planes(chunk, alike or X.dtype == torch.bfloat16), D, Y, chunk.shape[1], m, n)
            _add_moment(Y, chunk.shape[1], target)
    if target.data_ptr() != out.data_ptr():  # strides that no single batch dimension can have
        out.copy_(target.view(out.shape))
    return out


def _planes(A: Tensor, exact: bool) -> Tensor:
    """A [B, rows, columns] as planes [p, B, rows, >= columns]: itself where its products are exact, else three."""
    return A[None] if exact else planes(A.float(), "bf16x6")


def workspace_tokens(d: int) -> int:
    """Of how many tokens planes [3, tokens, d] are stored at a time: such as the cache holds, within limits."""
    fitting = CACHE // (3 * d * torch.bfloat16.itemsize)
    return min(max(fitting // FLUSH * FLUSH, MIN_TOKENS), MAX_TOKENS)


def splits_of(tiles: int, tokens: int) -> int:
    """Programs that share the tokens of one tile: the least number that leaves 10 % of the processors idle or fewer.

    Each has 512 tokens or more; where no such number is, the one with the fewest idle. It depends on the shape of one
    matrix alone, so the bits of its moment do not depend on what it is batched with.
    """

    def idle(splits: int) -> float:
        programs = tiles * splits
        return 1 - programs / (triton.cdiv(programs, PROCESSORS) * PROCESSORS)

    most = max(1, min(tokens // FLUSH, PROCESSORS))
    return next((splits for splits in range(1, most + 1) if idle(splits) <= 0.1), min(range(1, most + 1), key=idle))


def _add_moment(Y: Tensor, tokens: int, out: Tensor) -> None:
    """out [B, d, d] += YᵀY over the first tokens of the planes Y [p, B, >= tokens, >= d]."""
    B, d, _ = out.shape
    launch = MOMENTS[len(Y)]
    side = triton.cdiv(d, launch.rows)
    tiles = side * (side + 1) // 2
    splits = splits_of(tiles, tokens)
    share = triton.cdiv(triton.cdiv(tokens, launch.depth), splits) * launch.depth
    partial = out.new_empty(B, splits, tiles, launch.rows, launch.rows, dtype=torch.float32)
    with launching(Y, out):
        _moment_kernel[(B * splits * tiles,)](
            Y,
            partial,
            tokens,
            d,
            tiles,
            splits,
            share,
            *Y.stride(),
            PLANES=len(Y),
            BLOCK=launch.rows,
            DEPTH=launch.depth,
            FLUSH=FLUSH,
            **launch.options,
        )
        _reduce_kernel[(B * tiles * (launch.rows // REDUCTION.rows) * (launch.rows // REDUCTION.columns),)](
            partial,
            out,
            d,
            tiles,
            splits,
            *out.stride(),
            BLOCK=launch.rows,
            ROWS=REDUCTION.rows,
            COLUMNS=REDUCTION.columns,
            **REDUCTION.options,
        )
