"""The specification: every op in float64, by its definition. Any device, any size, never sped up.

Calling convention of all backends. `A` has shape [..., m, n] and any floating dtype; r = min(m, n). A singular value
at or below `rtol` times the largest one of its matrix is null: it counts as zero and its direction gets no energy.
`precision` is "fast", "default" or "exact"; the reference has one precision, the last.
Results are float64 here and at least float32 in the fast backends; `ops` casts them to the promised dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def polar(A: Tensor, *, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """U_ρ V_ρᵀ [..., m, n], Σ_{i≤ρ} σ_i [...], ρ [...], where A = U diag(σ) Vᵀ and ρ is the numerical rank."""
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    kept = S > rtol * S[..., :1]
    return (U * kept.unsqueeze(-2)) @ Vh, (S * kept).sum(-1), kept.sum(-1)


def polar_product(A: Tensor, B: Tensor, *, scale: Tensor, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """polar(A) diag(scale) polar(B) [..., m, n], Σ σ_i of A [...] and of B [...]; A [..., m, q], B [..., q, n]."""
    left, left_norm, _ = polar(A, rtol=rtol, precision=precision)
    right, right_norm, _ = polar(B, rtol=rtol, precision=precision)
    return (left * scale.double().unsqueeze(-2)) @ right, left_norm, right_norm


def rsvd(
    A: Tensor, k: int, *, deflate: Tensor, rtol: float, atol: Tensor, tol: float, seed: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading k triplets U [..., m, k], S [..., k], Vh [..., k, n] of (I - QQᵀ) A, where Q = `deflate` [..., m, q]."""
    A, Q = A.double(), deflate.double()
    U, S, Vh = torch.linalg.svd(A - Q @ (Q.mT @ A), full_matrices=False)
    U, S, Vh = U[..., :k], S[..., :k], Vh[..., :k, :]
    kept = (S > rtol * S[..., :1]) & (S > atol.unsqueeze(-1))
    if A.shape[-2] > A.shape[-1]:  # null vectors: orthonormal on the small side, zero on the other
        U = U * kept.unsqueeze(-2)
    else:
        Vh = Vh * kept.unsqueeze(-1)
    return U, S * kept, Vh


def subspace(A: Tensor, k: int, *, full: bool, precision: str) -> Tensor:
    """The first k left singular vectors [..., m, k] of A, completed to orthonormal columns; all m if `full`."""
    U = torch.linalg.svd(A.double(), full_matrices=full or k > min(A.shape[-2:])).U
    return U if full else U[..., :k]


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B in float64."""
    return A.double() @ B.double()
