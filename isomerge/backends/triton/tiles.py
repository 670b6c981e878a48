"""What programs do with tiles, device side: which tile is theirs, how operands are rounded and multiplied."""

from __future__ import annotations

import triton
import triton.language as tl

from isomerge.backends.triton.launch import interpreted

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def triangle(index):
    """index -> (i, j), j <= i: the lower triangle row by row; exact while i < 46339, beyond which i² leaves int32.

    The float32 root is off by less than one, for any index that int32 holds: the two comparisons make it exact.
    """
    i = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    return i, index - i * (i + 1) // 2


@triton.jit
def nearest(x, BITS: tl.constexpr):
    """float32 x rounded to BITS bits of mantissa, ties to even, still float32: 7 for bfloat16, 10 for TF32.

    A conversion of the result is exact. Tensor cores would truncate float32 to TF32, which shrinks every product by
    7e-4 on average, and Triton's interpreter truncates to bfloat16.
    """
    DROPPED: tl.constexpr = 23 - BITS
    bits = x.to(tl.int32, bitcast=True)
    bits += (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    rounded = (bits >> DROPPED << DROPPED).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, float("nan"))  # the carry could leave the bits of a NaN


@triton.jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b in float32. The interpreter would multiply the bit patterns of bfloat16 as integers."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)
