"""Which tiles a product is cut into, and how many programs compute them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import triton

from isomerge.backends.triton.launch import PROCESSORS, Launch
from isomerge.backends.triton.planes import ROUNDINGS

LAUNCHES: Mapping[str, tuple[Launch, ...]] = MappingProxyType(
    {
        # One plane: what a tile reads from L2 per product bounds it, so the accumulator takes what registers there are,
        # 128 a thread at 128 x 256, 222 registers in all. A row of depth is the widest swizzle of shared memory, 128
        # bytes; 144 KiB and 128 KiB.
        "bf16": (Launch(128, 256, 64, 8, 3), Launch(128, 128, 64, 8, 4), Launch(64, 64, 64, 4, 4)),
        "tf32": (Launch(128, 256, 32, 8, 3), Launch(128, 128, 32, 8, 4), Launch(64, 64, 32, 4, 4)),
        # Several planes: a second accumulator of the same size leaves 128 x 128, and one step of all planes is 32 KiB
        # (bf16x3, tf32x3) or 48 KiB (bf16x6): as many stages as fit into 144 KiB.
        "bf16x3": (Launch(128, 128, 32, 8, 4), Launch(64, 64, 32, 4, 4)),
        "bf16x6": (Launch(128, 128, 32, 8, 3), Launch(64, 64, 32, 4, 3)),
        "tf32x3": (Launch(128, 128, 16, 8, 4), Launch(64, 64, 16, 4, 4)),
        # No tensor cores: the operands of a step are held in registers, which bounds the depth.
        "fp32": (Launch(64, 64, 16, 4, 3),),
    }
)
"""By format, the largest tile first. Columns are rows or twice as many, and depths divide `planes.DEPTH`.

They take at most 144 of the 227 KiB of shared memory of capability 9.0; before, where a stage less is kept, 96 of the
99 KiB that 8.6 and 8.9 have. The rows of one format have the same
depth, so that the order of summation does not depend on the tile, nor on how many matrices are multiplied at once."""

CACHE = 32 * 2**20
"""Bytes of operands that stay in an L2 cache of 50 MB (40 on an A100) beside the result."""


def usable(format: str, symmetric: bool, capability: int) -> tuple[Launch, ...]:
    """The rows of `LAUNCHES` that fit the registers, on devices of a compute capability (90 for 9.0).

    Symmetric results take square tiles, for the mirrored half of a wide one. Before 9.0 tensor cores take operands
    from registers, and the two accumulators of several planes leave none for the mirrored half of 128 x 128.
    """
    rows = LAUNCHES[format]
    if symmetric:
        rows = tuple(row for row in rows if row.rows == row.columns)
        if capability < 90 and ROUNDINGS[format].planes > 1:
            rows = rows[-1:]
    return rows


@lru_cache(maxsize=1024)
def fitting(format: str, m: int, n: int, batch: int, symmetric: bool, capability: int = 90) -> Launch:
    """The usable row of `LAUNCHES` with the least waves x (rows + columns): what one multiprocessor reads in all.

    Reading from L2 bounds every tile here: of the 48 bytes a cycle that tensor cores take in at 128 x 256 it delivers
    some 28. Waves alone would favour tiles that are too large, sizes alone waves that are half empty.
    """

    def read(launch: Launch) -> int:
        tiles = 0
        for row in range(0, m, launch.rows):
            end = min(n, row + launch.rows) if symmetric else n
            tiles += triton.cdiv(end, launch.columns)
        return triton.cdiv(batch * tiles, PROCESSORS) * (launch.rows + launch.columns)

    return min(usable(format, symmetric, capability), key=read)


def grouping(size: int) -> int:
    """Tiles along the side of a square in which programs are launched, for operands of `size` bytes.

    Row by row the 132 programs of a wave of a large matrix at r = 14336 read 114 strips of operands,
    in squares of 8 x 8 tiles 32.
    """
    return 1 if size <= CACHE else 8


def programs(launch: Launch, group: int, m: int, n: int, symmetric: bool) -> int:
    """Programs of one matrix [m, n]: whole squares, of which some tiles may lie outside, or above the diagonal."""
    side = group * launch.columns
    down, across = triton.cdiv(m, side), triton.cdiv(n, side)
    squares = down * (down + 1) // 2 if symmetric else down * across
    return squares * (side // launch.rows) * group
