"""Device side: float32 as three planes of bfloat16, and sums of products that tensor cores do not round off."""

from __future__ import annotations

import triton
import triton.language as tl

from isomerge.backends.triton.tiles import INTERPRETED, nearest, product

FLUSH = 512
"""Products that a tensor core adds up by itself. It truncates: 2²⁰ tokens in one chain are off by 1.5e-3, in chains of
512, added to the nearest, by 7e-7."""


@triton.jit
def to_bfloat16(x):
    """float32 x to the nearest bfloat16, ties to even: one instruction a pair; the interpreter would truncate."""
    if INTERPRETED:
        x = nearest(x, 7)
    return x.to(tl.bfloat16)


@triton.jit
def split(x):
    """float32 x ≈ x0 + x1 + x2 in bfloat16, each the nearest to what is left: 24 bits, all that float32 has."""
    x0 = to_bfloat16(x)
    rest = x - x0.to(tl.float32)
    x1 = to_bfloat16(rest)
    return x0, x1, to_bfloat16(rest - x1.to(tl.float32))


@triton.jit
def product_of_planes(a0, a1, a2, b0, b1, b2):
    """(a0 + a1 + a2)(b0 + b1 + b2) less the terms below 2⁻²⁴: six products, the smallest first.

    Tensor cores truncate what they add to an accumulator: a sum that starts with the small terms loses least. The
    result is for the caller to add to its own, to the nearest.
    """
    step = product(a2, b0, tl.zeros((a0.shape[0], b0.shape[1]), tl.float32), "ieee")
    step = product(a0, b2, step, "ieee")
    step = product(a1, b1, step, "ieee")
    step = product(a1, b0, step, "ieee")
    step = product(a0, b1, step, "ieee")
    return product(a0, b0, step, "ieee")


@triton.jit
def accumulate(
    left,
    right,
    left_inside,
    right_inside,
    length,
    left_stride,
    right_stride,
    left_plane,
    right_plane,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    DEPTH: tl.constexpr,
    FLUSH: tl.constexpr,
):
    """Σ_{k < length} left[:, k] right[k, :] in float32, of operands in LEFT and RIGHT planes.

    left, right: pointers to the tiles of the first DEPTH terms, [rows, DEPTH] and [DEPTH, columns]; strides along k.
    """
    k = tl.arange(0, DEPTH)
    depth = tl.full((), DEPTH, tl.int64)
    total = tl.zeros((left.shape[0], right.shape[1]), tl.float32)
    chain = tl.zeros((left.shape[0], right.shape[1]), tl.float32)
    for start in range(0, length, DEPTH):
        left_mask = left_inside & (start + k < length)[None, :]
        right_mask = right_inside & (start + k < length)[:, None]
        l0 = tl.load(left, mask=left_mask, other=0.0)
        r0 = tl.load(right, mask=right_mask, other=0.0)
        if LEFT == 3:
            l1 = tl.load(left + left_plane, mask=left_mask, other=0.0)
            l2 = tl.load(left + left_plane + left_plane, mask=left_mask, other=0.0)
        if RIGHT == 3:
            r1 = tl.load(right + right_plane, mask=right_mask, other=0.0)
            r2 = tl.load(right + right_plane + right_plane, mask=right_mask, other=0.0)
        if LEFT == 3 and RIGHT == 3:
            total += product_of_planes(l0, l1, l2, r0, r1, r2)
        elif LEFT == 3:
            step = product(l2, r0, tl.zeros_like(total), "ieee")
            total += product(l0, r0, product(l1, r0, step, "ieee"), "ieee")
        elif RIGHT == 3:
            step = product(l0, r2, tl.zeros_like(total), "ieee")
            total += product(l0, r0, product(l0, r1, step, "ieee"), "ieee")
        else:
            chain = product(l0, r0, chain, "ieee")
            if (start + DEPTH) % FLUSH == 0:
                total += chain
                chain = tl.zeros_like(chain)
        left += depth * left_stride
        right += depth * right_stride
    return total + chain
