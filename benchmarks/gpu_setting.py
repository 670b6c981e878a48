"""What `gpu.py` measures on: the shapes of real models, and inputs drawn on the device as `deltas.py` draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from deltas import VIT_B32
from gpu_measure import Candidate
from torch import Tensor

from isomerge.backends import table

Shape = tuple[int, int]
VIT_L14 = ((1024, 1024), (3072, 1024), (4096, 1024), (1024, 4096))  # one of each in 24 blocks
LLAMA_8B = {  # in 32 blocks
    (4096, 4096): 64,  # q_proj, o_proj
    (1024, 4096): 64,  # k_proj, v_proj
    (14336, 4096): 64,  # gate_proj, up_proj
    (4096, 14336): 32,  # down_proj
}

EPS = torch.finfo(torch.float32).eps
MOMENT = 1e-6  # of `shift_cov`, by its docstring
LARGE = 2048  # above this rank float64 singular vectors are those of a Gram matrix: error 1e-16 κ², 1e-6 at κ = 1e5
LARGEST = 4096  # side up to which a float64 eigensolve is waited for
INPUT_BYTES = 8e9  # of inputs drawn for one problem; layers are taken as far as these go
DRIVERS = ("gesvd", "gesvdj", "gesvda")
SVDS: Mapping[str, Callable[[int], int]] = {
    "iso_c": lambda T: 1,
    "tsvm": lambda T: T,
    "iso_cts": lambda T: 1 + T,
    "esm": lambda T: T,
}
"""Large SVDs in the papers' computation of T tasks; the smaller ones that follow are not counted here."""


@dataclass(frozen=True)
class Model:
    """Matrices of a model: shapes and how many of each; layers that are merged together; tokens per task for ESM."""

    name: str
    counts: Mapping[Shape, int]
    layers: int
    tokens: int


@dataclass(frozen=True)
class Setting:
    """Where and how large; `driver` is cuSOLVER's fastest for a shape, as measured."""

    device: torch.device
    quick: bool = False
    driver: Callable[[int, int], str | None] = lambda m, n: None

    @property
    def tasks(self) -> int:
        return 2 if self.quick else 8

    @property
    def models(self) -> list[Model]:
        if self.quick:
            return [Model("tiny", {(24, 24): 2, (24, 16): 2, (16, 24): 2}, 2, 64)]
        return [
            Model("ViT-B/32", dict.fromkeys(VIT_B32.values(), 12), 12, 32 * 50),
            Model("ViT-L/14", dict.fromkeys(VIT_L14, 24), 24, 32 * 257),
            Model("Llama-3-8B", LLAMA_8B, 1, 8192),
        ]

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator(self.device).manual_seed(seed), device=self.device)

    def deltas(self, layers: int, m: int, n: int, seed: int = 0) -> Tensor:
        """[L, T, m, n]: a low-rank signal with decaying spectrum over a noise floor."""
        rank, shape = min(64, m, n), (layers, self.tasks)
        signal = self.normal(*shape, m, rank, seed=seed) * torch.logspace(0, -1.3, rank, device=self.device)
        noise = self.normal(*shape, m, n, seed=seed + 1).mul_(0.05)
        return noise.add_(signal @ self.normal(*shape, rank, n, seed=seed + 2) / n**0.5).mul_(1e-3)

    def inputs(self, tokens: int, n: int, layers: int = 1, tasks: int = 1) -> Tensor:
        """[L, T, N, n]: a mean, and a spectrum that falls by 1e2 in a basis common to all."""
        basis = torch.linalg.qr(self.normal(n, n, seed=3)).Q * torch.logspace(0, -2, n, device=self.device)[:, None]
        X = self.normal(layers, tasks, tokens, n, seed=4)
        for part in X.flatten(0, 1):  # in place
            part.copy_(part @ basis)
        return X.add_(0.1 * self.normal(n, seed=5))

    def svd(self, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a matrix in float32, by the driver that was fastest for its shape."""
        driver = self.driver(*A.shape) if A.is_cuda else None
        U, S, Vh = torch.linalg.svd(A, full_matrices=False, driver=driver)
        return U, S, Vh

    def backends(self, op: str) -> list[str]:
        """Who answers `op` here; the reference, which is the truth, only where it is quick."""
        cells = table(self.device)
        return [who for name, who, why in cells if name == op and why is None and (self.quick or who != "reference")]


def svd64(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, by torch's SVD or, where that takes too long, by the eigenvectors of the Gram matrix."""
    A = A.double()
    if min(A.shape) < LARGE:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        return U, S, Vh
    if A.shape[0] < A.shape[1]:
        U, S, Vh = svd64(A.mT)
        return Vh.mT, S, U.mT
    squares, V = torch.linalg.eigh(A.mT @ A)
    S, V = squares.flip(0).clamp_min(0).sqrt(), V.flip(1)
    return (A @ V) / S, S, V.mT


@lru_cache(maxsize=1)
def summed(setting: Setting, layers: int, m: int, n: int) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Sums of deltas [L, m, n], and the float64 SVD of the first."""
    A = setting.deltas(layers, m, n).sum(1)
    return A, svd64(A[0])


def among(
    problem: Callable[[str], Any], names: list[str], baseline: Callable[[], Any], layers: float | None = 1.0
) -> dict[str, Candidate]:
    """Backends by name, and torch: on the first matrix, where it has no batched way, or on all."""
    return {"torch": Candidate(baseline, layers=layers), **{who: Candidate(partial(problem, who)) for who in names}}


def projected(Q: Tensor, setting: Setting) -> Tensor:
    """QQᵀ G of a fixed G [m, 16]: unlike Q, the same for every basis of a subspace."""
    G = setting.normal(Q.shape[-2], 16, seed=9).to(Q.dtype)
    return Q @ (Q.mT @ G)
