"""Isotropic merging: flatten the singular spectrum of the summed updates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isomerge import ops
from isomerge.methods.linear import total


def iso_c(deltas: Tensor, *, precision: str = "default", backend: str = "auto") -> Tensor:
    """mean(σ) U Vᵀ, where Σ_t Δ_t = U diag(σ) Vᵀ: the polar factor of the sum times its mean singular value.

    The mean runs over the numerical rank (all min(m, n) values where the sum has full rank, as published); null
    directions get no energy, and a zero sum gives a zero update.

    deltas [..., T, m, n] -> [..., m, n]. Cost: one polar factor, independent of T.
    Source: Marczak et al. 2025, "No Task Left Behind", algorithm 1.
    """
    factor, nuclear_norm, rank = ops.polar(total(deltas), precision=precision, backend=backend)
    return factor.mul_((nuclear_norm / rank.clamp_min(1))[..., None, None])


def iso_cts(
    deltas: Tensor, *, common_space_fraction: float = 0.8, precision: str = "default", backend: str = "auto"
) -> Tensor:
    """mean(σ) polar([U_1 .. U_T, U_c]) polar([V_1; ..; V_T; V_c]): a common and T task-specific subspaces.

    U_c, V_c are the leading k singular vectors of Σ_t Δ_t; U_t, V_t the leading s of Δ_t - U_c U_cᵀ Δ_t; σ all k + T s
    singular values. With r = min(m, n): T s = T round((r - int(r f)) / T) in Python's rounding, at most r, and
    k = r - T s. s = 0 (few directions, many tasks, or f = 1) is Iso-C. Null directions are left out, as in `iso_c`;
    for a residual they lie at or below `ops.RANK_RTOL` times the root mean square singular value of its Δ_t.

    No SVD of an m x n residual is formed: U_1 .. U_T are orthogonal to U_c, so the left factor splits into
    polar([U_1 .. U_T]) and U_c, and for m <= n everything task-specific happens in m - k dimensions.

    deltas [..., T, m, n] -> [..., m, n]; common_space_fraction f in [0, 1].
    Source: Marczak et al. 2025, "No Task Left Behind", algorithm 2.
    """
    T, m, n = deltas.shape[-3:]
    k, s = subspace_sizes(min(m, n), T, common_space_fraction)
    if s == 0:
        return iso_c(deltas, precision=precision, backend=backend)
    how = {"precision": precision, "backend": backend}
    summed = total(deltas)
    rms = torch.linalg.vector_norm(deltas, dim=(-2, -1)) / math.sqrt(min(m, n))  # [..., T]
    null = ops.RANK_RTOL * rms
    if m <= n:
        basis = ops.subspace(summed, m, **how)  # [..., m, m], leading singular vectors first
        U_c, complement = basis[..., :k], basis[..., k:]
        rows = ops.matmul(U_c.mT, summed, backend=backend)  # diag(σ_c) V_c
        S_c = torch.linalg.vector_norm(rows, dim=-1)
        S_c = torch.where(S_c > ops.RANK_RTOL * S_c[..., :1], S_c, 0)
        V_c = rows * torch.where(S_c > 0, S_c.reciprocal(), 0).unsqueeze(-1)
        U_c = U_c * (S_c > 0).unsqueeze(-2)
        inside = ops.matmul(complement.mT.unsqueeze(-3), deltas, backend=backend)  # [..., T, m - k, n]
        U_t, S_t, V_t = ops.rsvd(inside, s, atol=null, **how)
    else:
        U_c, S_c, V_c = ops.rsvd(summed, k, **how)
        complement = None
        U_t, S_t, V_t = ops.rsvd(deltas, s, deflate=U_c.unsqueeze(-3), atol=null, **how)
    kept = (S_t > 0).to(S_t.dtype)
    task_left = torch.cat((U_t * kept.unsqueeze(-2)).unbind(-3), dim=-1)
    task_left = ops.polar(task_left, **how).factor  # [..., m or m - k, T s]
    if complement is not None:
        task_left = ops.matmul(complement, task_left, backend=backend)
    task_right = torch.cat((V_t * kept.unsqueeze(-1)).unbind(-3), dim=-2)
    common_right = V_c * (S_c > 0).unsqueeze(-1)
    right = ops.polar(torch.cat([task_right, common_right], dim=-2), **how).factor  # [..., r, n]
    count = (S_c > 0).sum(-1) + (S_t > 0).sum((-2, -1))
    mean = (S_c.sum(-1) + S_t.sum((-2, -1))) / count.clamp_min(1)
    merged = ops.matmul(torch.cat([task_left, U_c], dim=-1), right, backend=backend)
    return merged.mul_(mean[..., None, None])


def subspace_sizes(r: int, T: int, common_space_fraction: float) -> tuple[int, int]:
    """(k, s): common dimensions and dimensions per task, k + T s = r, as `iso_cts` states them."""
    task_specific = round((r - int(r * common_space_fraction)) / T) * T
    task_specific = min(task_specific, r // T * T)  # rounding up may pass r when f is near 0
    return r - task_specific, task_specific // T
