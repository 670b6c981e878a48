"""Task singular vectors."""

from __future__ import annotations

from torch import Tensor

from isomerge import ops
from isomerge.methods.bases import beside, without_null


def tsvm(deltas: Tensor, *, precision: str = "default", backend: str = "auto") -> Tensor:
    """polar([U_1 .. U_T]) diag(S_1 .. S_T) polar([V_1; ..; V_T]): TSV-Merge.

    U_t S_t V_t are the leading s = floor(min(m, n) / T) singular triplets of Δ_t; their vectors are whitened across the
    tasks, their singular values stay. Null directions carry nothing and are left out, so the result is unique.
    T = 1 returns Δ_1; T > min(m, n) leaves no direction and returns zero, as the published code does.

    deltas [..., T, m, n] -> [..., m, n]. Cost: T leading-subspace solves and two polar factors.
    Source: Gargiulo et al. 2025, "Task Singular Vectors", algorithm 1.
    """
    T, m, n = deltas.shape[-3:]
    U, S, Vh = ops.rsvd(deltas, min(m, n) // T, precision=precision, backend=backend)
    left = beside(without_null(U, S), dim=-1)  # [..., m, T s]
    right = beside(without_null(Vh.mT, S).mT, dim=-2)  # [..., T s, n]
    return ops.polar_product(left, right, scale=S.flatten(-2), precision=precision, backend=backend).product
