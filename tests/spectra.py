"""Matrices with chosen spectra, and distances that do not depend on signs or rotations."""

from __future__ import annotations

import torch
from torch import Tensor

from isomerge.backends import BACKENDS

ON_CPU = tuple(name for name, row in BACKENDS.items() if row.devices is None)
"""The backends that run on any device."""

SHAPES = {"square": (48, 48), "tall": (80, 24), "wide": (24, 80), "row": (1, 40), "column": (40, 1), "single": (1, 1)}


def spectrum(name: str, r: int) -> Tensor:
    """r singular values, float64, descending."""
    values = {
        "flat": torch.ones(r),
        "decay": torch.logspace(0, -3, r),
        "ill": torch.logspace(0, -4.7, r),
        "rank_one": torch.cat([torch.ones(1), torch.zeros(r - 1)]),
        "zero": torch.zeros(r),
        "repeated": torch.ones(r).index_fill(0, torch.arange(r // 2, r), 0.25),
        "cliff": torch.cat([torch.logspace(0, -1, r - r // 3), torch.full((r // 3,), 1e-10)]),
        "spiked": torch.cat([torch.tensor([1e3]), torch.rand(r, generator=torch.Generator().manual_seed(5))[1:] + 0.5]),
    }[name]
    return values.double().sort(descending=True).values


SPECTRA = ("flat", "decay", "ill", "rank_one", "zero", "repeated", "cliff", "spiked")


def orthonormal(m: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q


def matrix(name: str, m: int, n: int, seed: int = 0) -> Tensor:
    """[m, n] float64 with the named spectrum and random singular vectors."""
    r = min(m, n)
    return (orthonormal(m, r, 2 * seed) * spectrum(name, r)) @ orthonormal(n, r, 2 * seed + 1).mT


def relative(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to that of `expected` where that is not zero."""
    actual, expected = actual.double(), expected.double()
    scale = torch.linalg.vector_norm(expected).item()
    return (torch.linalg.vector_norm(actual - expected).item()) / (scale or 1.0)


def projector(Q: Tensor) -> Tensor:
    Q = Q.double()
    return Q @ Q.mT
