"""The primitives over which iterations are written, and the formats in which backends compute them.

A format says how the operands of a product are rounded or split for the arithmetic units; accumulation is float32 or
better. All primitives are batched over leading dimensions, never modify an input, and take and return float32
(float64 for "fp64"). Symmetric results are symmetric to the bit: one half is computed and mirrored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Format(NamedTuple):
    """How operands are rounded: relative error of a product, cost in bf16 products, dtype of operands and results."""

    unit: float
    cost: int
    dtype: torch.dtype


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "bf16": Format(2e-3, 1, torch.float32),
        "tf32": Format(2.4e-4, 2, torch.float32),
        "bf16x3": Format(4e-6, 3, torch.float32),  # two planes of bfloat16, the three largest of four products
        "bf16x6": Format(6e-8, 6, torch.float32),  # three planes, the six largest of nine products
        "tf32x3": Format(6e-8, 6, torch.float32),
        "fp32": Format(6e-8, 16, torch.float32),
        "fp64": Format(1.1e-16, 13, torch.float64),
    }
)
"""Every format. Costs are ratios of the H200's peak rates: float64 products run on its tensor cores, float32 ones do
not."""


class Primitives(Protocol):
    """What a backend supplies. X [..., r, b]; G, P [..., r, r]."""

    formats: tuple[str, ...]
    """The rows of `FORMATS` that this backend computes in; "fp64" is always one of them."""

    def gram(self, X: Tensor, *, format: str) -> Tensor:
        """X Xᵀ [..., r, r], symmetric to the bit. r² b FLOP."""

    def polynomial(self, G: Tensor, b: float, c: float, *, format: str) -> Tensor:
        """b G + c G² [..., r, r] of a symmetric G, symmetric to the bit. r³ FLOP."""

    def apply(self, P: Tensor, X: Tensor, a: float, *, format: str) -> Tensor:
        """P X + a X [..., r, b]. 2 r² b FLOP."""


PLANE_PRODUCTS: Mapping[str, tuple[tuple[int, int], ...]] = MappingProxyType(
    {
        "bf16": ((0, 0),),
        "bf16x3": ((1, 0), (0, 1), (0, 0)),
        "bf16x6": ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1), (0, 0)),
    }
)
"""The pairs of planes that are multiplied, smallest first: a sum that truncates loses least in that order."""

PANEL = {"cpu": 128, "cuda": 1024}
"""Rows per product when only the lower half is wanted: on a CPU the size that is fastest at a side of 768 (0.64x of the
full product), on a GPU one of which the square part alone has 64 tiles of 128 x 128 for 132 multiprocessors."""


class TorchPrimitives:
    """The primitives by `torch.matmul`, on one type of device; bfloat16 and TF32 on CUDA alone."""

    def __init__(self, device: torch.device) -> None:
        self.formats: tuple[str, ...] = ("fp32", "fp64")
        if device.type == "cuda":
            # torch before 2.8 cannot return float32 for bfloat16 operands
            planes = tuple(PLANE_PRODUCTS) if "dtype" in torch.ops.aten.bmm.overloads() else ()
            self.formats = (*planes, "tf32", *self.formats)

    def gram(self, X: Tensor, *, format: str) -> Tensor:
        return _mirrored(self._lower(X, X.mT, format))

    def polynomial(self, G: Tensor, b: float, c: float, *, format: str) -> Tensor:
        return _mirrored(self._lower(G, G, format).mul_(c).add_(G, alpha=b))

    def apply(self, P: Tensor, X: Tensor, a: float, *, format: str) -> Tensor:
        left, right = self._operands(P, X, format)
        return self._multiply(left, right, format).add_(X, alpha=a)

    def _lower(self, A: Tensor, B: Tensor, format: str) -> Tensor:
        """A B [..., r, r] by panels of rows, each up to its diagonal; what is right of them is arbitrary."""
        r, panel = A.shape[-2], PANEL.get(A.device.type, PANEL["cuda"])
        left, right = self._operands(A, B, format)
        if r <= 2 * panel:
            return self._multiply(left, right, format)
        C = A.new_empty(*A.shape[:-1], r)
        for start in range(0, r, panel):
            stop = min(start + panel, r)
            C[..., start:stop, :stop] = self._multiply(left[..., start:stop, :], right[..., :stop], format)
        return C

    def _operands(self, A: Tensor, B: Tensor, format: str) -> tuple[Tensor, Tensor]:
        """A and B, or their planes side by side, [..., m, p k] and [..., p k, n]: one product sums over all pairs."""
        if format not in PLANE_PRODUCTS:
            return A, B
        pairs = PLANE_PRODUCTS[format]
        count = 1 + max(i for i, _ in pairs)
        left, right = split(A, count), split(B, count)
        return torch.cat([left[i] for i, _ in pairs], -1), torch.cat([right[j] for _, j in pairs], -2)

    def _multiply(self, left: Tensor, right: Tensor, format: str) -> Tensor:
        if format in PLANE_PRODUCTS:
            batch, (m, k), n = left.shape[:-2], left.shape[-2:], right.shape[-1]
            left, right = left.reshape(batch.numel(), m, k), right.reshape(batch.numel(), k, n)
            return torch.bmm(left, right, out_dtype=torch.float32).reshape(*batch, m, n)
        with float32_products("tf32" if format == "tf32" else "ieee", left.device):
            return left @ right


def split(X: Tensor, count: int) -> list[Tensor]:
    """`count` bfloat16 matrices that sum to X but for 2^(-9 count) of it: each rounds what those before left over."""
    planes = []
    for _ in range(count):
        planes.append(X.bfloat16())
        X = X - planes[-1].float()
    return planes


def _mirrored(A: Tensor) -> Tensor:
    """The symmetric matrix of which A holds the lower triangle; what is above it is not read."""
    return A.tril() + A.tril(-1).mT


@contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """CUDA multiplies float32 matrices in `precision`, "tf32" or "ieee", whatever the program has chosen.

    torch knows this as a setting of the whole process: products that other threads start meanwhile follow it too.
    """
    if device.type != "cuda":
        yield
        return
    settings = torch.backends.cuda.matmul
    name: str = "fp32_precision"
    value: str | bool = precision
    if not hasattr(settings, name):  # torch before 2.9
        name, value = "allow_tf32", precision == "tf32"
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)
