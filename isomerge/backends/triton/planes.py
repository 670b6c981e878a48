"""Operands of products, rounded for the tensor cores: a matrix as the sum of planes of few bits."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from isomerge.backends.triton.launch import Launch, batched, launching
from isomerge.backends.triton.tiles import nearest


class Rounding(NamedTuple):
    """That many planes of `bits` bits of mantissa, stored as `dtype`."""

    planes: int
    bits: int
    dtype: torch.dtype


ROUNDINGS: Mapping[str, Rounding] = MappingProxyType(
    {
        "bf16": Rounding(1, 7, torch.bfloat16),
        "tf32": Rounding(1, 10, torch.float32),
        "bf16x3": Rounding(2, 7, torch.bfloat16),
        "bf16x6": Rounding(3, 7, torch.bfloat16),
        "tf32x3": Rounding(2, 10, torch.float32),
        "fp32": Rounding(1, 23, torch.float32),
    }
)
"""By format of `primitives.FORMATS`."""

DEPTH = 64
"""Columns of planes are a multiple of it, so that products, in steps that divide it, need no masks and all their copies
are of aligned 16 bytes: others are made element by element, which for 2 bytes cannot be asynchronous."""

LAUNCH = Launch(rows=64, columns=64, depth=1, warps=4, stages=1)
"""32 elements a thread in flight; square, because one side or the other may be the contiguous one."""


@triton.jit
def _planes_kernel(
    X,
    out,
    rows,
    columns,
    batch_stride,
    row_stride,
    column_stride,
    padded,
    plane_stride,
    COUNT: tl.constexpr,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(padded, COLUMNS)
    programs = tl.cdiv(rows, ROWS) * across
    batch = (tl.program_id(0) // programs).to(tl.int64)
    tile = tl.program_id(0) % programs
    i = ((tile // across) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    j = ((tile % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    source = X + batch * batch_stride + i * row_stride + j * column_stride
    rest = tl.load(source, mask=(i < rows) & (j < columns), other=0.0)
    target = out + (batch * rows + i) * padded + j
    for _ in tl.static_range(COUNT):
        plane = nearest(rest, BITS) if BITS < 23 else rest
        tl.store(target, plane.to(out.dtype.element_ty), mask=(i < rows) & (j < padded))
        rest -= plane
        target += plane_stride


def planes(X: Tensor, format: str) -> Tensor:
    """X ≈ Σ_p planes_p: [p, B, m, n'] for float32 X [..., m, n], any strides, n' = n padded with zeros.

    Each plane is what the former left over, to the nearest; the last axis is contiguous, the leading ones of X are one.
    One read of X and one write of p planes: 100 MB for the 4096 x 4096 operand of a bf16 product, an eighth of the time
    of the product itself at 4.3 TB/s and 790 TFLOP/s, the data sheet's rates. Rounding inside the product would make
    every tile read float32: 128 bytes a cycle at 128 x 128, of an L2 cache that delivers some 28 per multiprocessor.
    """
    if X.dtype != torch.float32:
        raise ValueError(f"expected float32 operands, got {X.dtype}")
    count, bits, dtype = ROUNDINGS[format]
    X = batched(X)
    B, m, n = X.shape
    padded = triton.cdiv(n, DEPTH) * DEPTH
    out = torch.empty(count, B, m, padded, dtype=dtype, device=X.device)
    programs = B * triton.cdiv(m, LAUNCH.rows) * triton.cdiv(padded, LAUNCH.columns)
    if programs:
        with launching(X, out):
            _planes_kernel[(programs,)](
                X,
                out,
                m,
                n,
                *X.stride(),
                padded,
                out.stride(0),
                COUNT=count,
                BITS=bits,
                ROWS=LAUNCH.rows,
                COLUMNS=LAUNCH.columns,
                **LAUNCH.options,
            )
    return out
