"""The arithmetic of tensor cores on a CPU: operands rounded or split, products exact, sums in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from isomerge.backends.primitives import FORMATS, TorchPrimitives


def tf32(X: Tensor) -> Tensor:
    """Float32 X rounded to 10 explicit bits of significand, to nearest even; finite values."""
    bits = X.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


class RoundedPrimitives(TorchPrimitives):
    """`TorchPrimitives` of a CUDA device, with its products on the CPU; `products` lists their formats."""

    def __init__(self, *formats: str) -> None:
        super().__init__(torch.device("cpu"))
        self.formats = formats or tuple(FORMATS)
        self.products: list[str] = []

    def _operands(self, A: Tensor, B: Tensor, format: str) -> tuple[Tensor, Tensor]:
        if format not in ("tf32", "tf32x3"):
            return super()._operands(A, B, format)
        left, right = tf32(A), tf32(B)
        if format == "tf32":
            return left, right
        return torch.cat([tf32(A - left), left, left], -1), torch.cat([right, tf32(B - right), right], -2)

    def _multiply(self, left: Tensor, right: Tensor, format: str) -> Tensor:
        dtype = FORMATS[format].dtype
        self.products.append(format)
        return left.to(dtype) @ right.to(dtype)
