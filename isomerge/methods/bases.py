"""Bases of several tasks, put side by side, and arithmetic whose bits do not depend on the stack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def without_null(vectors: Tensor, S: Tensor) -> Tensor:
    """The columns of vectors [..., m, k], zero where S [..., k] is."""
    return vectors * (S > 0).unsqueeze(-2)


def beside(blocks: Tensor, dim: int) -> Tensor:
    """The T blocks of [..., T, m, n], concatenated along one of the last two dimensions."""
    return torch.cat(blocks.unbind(-3), dim=dim)


def norms(deltas: Tensor) -> Tensor:
    """Frobenius norms [...] of [..., m, n], one call each: torch reduces a stack in another order than its parts."""
    return _each(torch.linalg.vector_norm, deltas, 2)


def sums(values: Tensor) -> Tensor:
    """Sums [..., 1] of [..., n] along the last dimension, one call each."""
    return _each(torch.sum, values, 1).unsqueeze(-1)


def powers(values: Tensor, exponent: float) -> Tensor:
    """values^exponent [..., n], a call per row: torch rounds vector lanes and the scalars left over differently."""
    return _each(lambda row: row.pow(exponent), values, 1)


def _each(function: Callable[[Tensor], Tensor], values: Tensor, dims: int) -> Tensor:
    """The function of each block of the last `dims` dimensions, by itself."""
    batch, block = values.shape[:-dims], values.shape[-dims:]
    results = torch.stack([function(part) for part in values.reshape(batch.numel(), *block)])
    return results.reshape((*batch, *results.shape[1:]))
