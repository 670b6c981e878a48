"""The primitives of iterations on one kernel: `isomerge.backends.primitives.Primitives` for CUDA devices."""

from __future__ import annotations

import torch
from torch import Tensor

from isomerge.backends.primitives import TorchPrimitives
from isomerge.backends.triton.gemm import gemm
from isomerge.backends.triton.planes import ROUNDINGS, planes


class TritonPrimitives:
    """Every format; those of float64 by `torch.matmul`, whose library uses the float64 tensor cores at full rate."""

    def __init__(self, device: torch.device) -> None:
        self.double = TorchPrimitives(device)
        self.formats: tuple[str, ...] = (*ROUNDINGS, "fp64")

    def gram(self, X: Tensor, *, format: str) -> Tensor:
        if format == "fp64":
            return self.double.gram(X, format=format)
        operand = planes(X, format)
        return gemm(operand, operand, X.shape[:-1] + X.shape[-2:-1], format, symmetric=True)

    def polynomial(self, G: Tensor, b: float, c: float, *, format: str) -> Tensor:
        if format == "fp64":
            return self.double.polynomial(G, b, c, format=format)
        operand = planes(G, format)
        return gemm(operand, operand, G.shape, format, alpha=c, addend=G, beta=b, symmetric=True)

    def apply(self, P: Tensor, X: Tensor, a: float, *, format: str) -> Tensor:
        if format == "fp64":
            return self.double.apply(P, X, a, format=format)
        return gemm(planes(P, format), planes(X.mT, format), X.shape, format, addend=X, beta=a)
