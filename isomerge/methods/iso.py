"""Isotropic merging: flatten the singular spectrum of the summed updates."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from isomerge import ops
from isomerge.methods.bases import beside, norms, without_null
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
    polar = partial(ops.polar, precision=precision, backend=backend)
    rsvd = partial(ops.rsvd, precision=precision, backend=backend)
    matmul = partial(ops.matmul, backend=backend)
    summed = total(deltas)
    null = ops.RANK_RTOL * norms(deltas) / math.sqrt(min(m, n))  # [..., T]
    if m <= n:
        basis = ops.subspace(summed, k, full=True, precision=precision, backend=backend)  # [..., m, m]
        U_c, complement = basis[..., :k], basis[..., k:]
        rows = matmul(U_c.mT, summed)  # diag(σ_c) V_c
        S_c = torch.linalg.vector_norm(rows, dim=-1)
        # 4 times the usual threshold, above the rounding of this float32 product; k-th values of updates are far larger
        S_c = torch.where(S_c > 4 * ops.RANK_RTOL * S_c.amax(-1, keepdim=True), S_c, 0) if k else S_c
        V_c = torch.where((S_c > 0).unsqueeze(-1), rows / S_c.unsqueeze(-1), 0)
        U_t, S_t, V_t = rsvd(matmul(complement.mT.unsqueeze(-3), deltas), s, atol=null)  # [..., T, m - k, s]
    else:
        U_c, S_c, V_c = rsvd(summed, k)
        U_t, S_t, V_t = rsvd(deltas, s, deflate=U_c.unsqueeze(-3), atol=null)
    task_left = polar(beside(without_null(U_t, S_t), dim=-1)).factor  # [..., m or m - k, T s]
    if m <= n:
        task_left = matmul(complement, task_left)
    task_right = beside(without_null(V_t.mT, S_t).mT, dim=-2)  # [..., T s, n]
    left = torch.cat([task_left, without_null(U_c, S_c)], dim=-1)
    right = torch.cat([task_right, without_null(V_c.mT, S_c).mT], dim=-2)
    S = torch.cat([S_t.flatten(-2), S_c], dim=-1)
    mean = S.sum(-1) / (S > 0).sum(-1).clamp_min(1)
    return matmul(left, polar(right).factor).mul_(mean[..., None, None])


def subspace_sizes(r: int, T: int, common_space_fraction: float) -> tuple[int, int]:
    """(k, s): common dimensions and dimensions per task, k + T s = r, as `iso_cts` states them."""
    task_specific = round((r - int(r * common_space_fraction)) / T) * T
    task_specific = min(task_specific, r // T * T)  # rounding up may pass r when f is near 0
    return r - task_specific, task_specific // T
