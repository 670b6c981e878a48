"""Ops on ViT-B/32 shapes, eight matrices at a time, each against `torch.linalg.svd` in float32 on the same tensors.

`extra_info` holds the error of both against float64 and the rate on the op's own count of floating-point operations.
The roof is the GEMM rate of the cores together: measure it with `-k gemm`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from deltas import VIT_B32, synthetic
from measure import error
from torch import Tensor

from isomerge import ops

MATRICES = 8
SIZES = pytest.mark.parametrize("shape", VIT_B32.values(), ids=VIT_B32)


def bench(benchmark: Callable[..., Tensor], function: Callable[[], Tensor], expected: Tensor, flops: float) -> None:
    result = benchmark.pedantic(function, rounds=3, warmup_rounds=1)
    worst = max(error(a, b) for a, b in zip(result, expected, strict=True))
    benchmark.extra_info |= {
        "relative error": f"{worst:.1e}",
        "GFLOP/s": round(flops / benchmark.stats.stats.median / 1e9),
    }
    assert worst <= 1e-4


def factors(A: Tensor, k: int) -> Tensor:
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    return U[..., :k] @ Vh[..., :k, :]


@SIZES
@pytest.mark.parametrize("how", ["isomerge", "svd"])
def bench_polar(benchmark: Callable[..., Tensor], shape: tuple[int, int], how: str) -> None:
    A, r = torch.stack([synthetic(8, *shape, seed=i).sum(0) for i in range(MATRICES)]), min(shape)
    benchmark.group = f"polar {shape[0]}x{shape[1]}"
    run = (lambda: ops.polar(A).factor) if how == "isomerge" else (lambda: torch.stack([factors(a, r) for a in A]))
    bench(benchmark, run, factors(A.double(), r), MATRICES * (3.0 * shape[0] * shape[1] * r + 10.0 * r**3))


@SIZES
@pytest.mark.parametrize("how", ["isomerge", "svd"])
def bench_leading_triplets(benchmark: Callable[..., Tensor], shape: tuple[int, int], how: str) -> None:
    A, r, k = synthetic(MATRICES, *shape), min(shape), min(shape) // 8
    benchmark.group = f"rsvd k=r/8 {shape[0]}x{shape[1]}"

    def triplets() -> Tensor:
        U, _, Vh = ops.rsvd(A, k)
        return U @ Vh

    run = triplets if how == "isomerge" else (lambda: torch.stack([factors(a, k) for a in A]))
    bench(benchmark, run, factors(A.double(), k), MATRICES * (shape[0] * shape[1] * r + 9.0 * r**3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def bench_gemm(benchmark: Callable[..., Tensor], dtype: torch.dtype) -> None:
    A = torch.randn(MATRICES, 768, 768, dtype=dtype)
    benchmark.group = "roof: gemm 768x768"
    bench(benchmark, lambda: ops.matmul(A, A), (A.double() @ A.double()), MATRICES * 2.0 * 768**3)
