"""The k leading eigenvectors of one symmetric matrix in float64: G = Q T Qᵀ, T tridiagonal; only theirs are formed.

torch solves for all of them. At r = 768 on one core that takes 97 ms in float64 and 45 in float32; here k = 38 take
31 ms, k = 96 37, k = 384 59 and all of them 73, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from isomerge.backends import lapack
from isomerge.backends.iterations import eigh

MIN_SIDE = 192
"""Smaller matrices are solved by torch: whole `rsvd` of k = r/8 take 1.4 ms at r = 128 and 2.4 at 192 either way."""

INVERSE_SHARE = 1 / 4
"""Up to this k/r inverse iteration, quadratic in k, beats the divide and conquer that finds all vectors of T: at
r = 768 by 23 ms to 26, at k/r = 1/3 it takes 32."""

FAITHFUL = 1e-11
"""Largest departure from orthonormality, and residual relative to lambda_1, of vectors of T that are accepted."""


def partial(r: int, device: torch.device) -> bool:
    """Whether `leading_eigenvectors` computes k vectors in less time than all: on CPUs with scipy, not for small r."""
    return device.type == "cpu" and r >= MIN_SIDE and lapack.availability() is None


def leading_eigenvectors(G: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues [r], ascending, and eigenvectors [r, k] of the k greatest of a positive semi-definite G [r, r].

    In float64, with its accuracy: eigenvalues and residuals to some eps(float64) * lambda_1. `eigh` answers where
    `partial` does not hold or LAPACK gives up. Memory: two matrices of G's size, four where k > r * INVERSE_SHARE.
    Cost: 4/3 r³ FLOP for T, r² for its values, r k² or about 2 r³ for its vectors, 2 r² k to turn them.
    """
    r = G.shape[0]
    if k > 0 and partial(r, G.device):
        A = torch.empty(r, r, dtype=torch.float64).copy_(G)
        d, e, tau = A.new_empty(3, r)
        work = A.new_empty(64 * r)
        if lapack.call("dsytrd", "U", r, A, r, d, e, tau, work, work.numel()) == 0:
            solved = _inverse_iteration(d, e, k) if k <= r * INVERSE_SHARE else _divide_and_conquer(d, e, k)
            if solved is not None:
                values, Z = solved
                work = A.new_empty(64 * k + 65 * 64)
                if lapack.call("dormtr", "L", "U", "N", r, k, A, r, tau, Z, r, work, work.numel()) == 0:
                    return values, Z.mT
    values, V = eigh(G.double())
    return values, V[:, r - k :]


def _inverse_iteration(d: Tensor, e: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues [r] of the tridiagonal matrix with diagonal d and e beside it, the k leading eigenvectors as rows
    [k, r]; None if they are not what they should be, as can be where many eigenvalues are equal."""
    r = d.shape[0]
    values, scratch = d.clone(), e.clone()
    if lapack.call("dsterf", r, values, scratch) != 0:
        return None
    wanted, Z = values[r - k :].clone(), d.new_empty(k, r)
    block, end = torch.ones(r, dtype=torch.int32), torch.full((r,), r, dtype=torch.int32)  # T as one block
    work, integers, failed = d.new_empty(5 * r), block.new_empty(r), block.new_empty(k)
    if lapack.call("dstein", r, d, e, k, wanted, block, end, Z, r, work, integers, failed) != 0:
        return None
    residual = Z * (d - wanted[:, None])
    residual[:, 1:] += Z[:, :-1] * e[:-1]
    residual[:, :-1] += Z[:, 1:] * e[:-1]
    departure = Z @ Z.mT - torch.eye(k, dtype=Z.dtype)
    faithful = (residual.abs().max() <= FAITHFUL * values[-1]) & (departure.abs().max() <= FAITHFUL)
    return (values, Z) if bool(faithful) else None


def _divide_and_conquer(d: Tensor, e: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The same from all eigenvectors."""
    r = d.shape[0]
    values, Z = d.clone(), d.new_empty(r, r)
    work, integers = d.new_empty(1 + 4 * r + r * r), torch.empty(3 + 5 * r, dtype=torch.int32)
    sizes = work.numel(), integers.numel()
    if lapack.call("dstedc", "I", r, values, e.clone(), Z, r, work, sizes[0], integers, sizes[1]) != 0:
        return None
    return (values, Z[r - k :]) if bool((values.sum() + Z.sum()).isfinite()) else None
