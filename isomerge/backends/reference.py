"""The specification: every op in float64, by its definition. Any device, any size, never sped up.

Calling convention of all backends. `A` has shape [..., m, n] and any floating dtype; r = min(m, n). A singular value
at or below `rtol` times the largest one of its matrix is null: it counts as zero and its direction gets no energy.
`precision` is "fast", "default" or "exact"; the reference has one precision, the last.
Results are float64 here and at least float32 in the fast backends; `ops` casts them to the promised dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def polar(A: Tensor, *, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """U_ρ V_ρᵀ [..., m, n], Σ_{i≤ρ} σ_i [...], ρ [...], where A = U diag(σ) Vᵀ and ρ is the numerical rank."""
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    kept = S > rtol * S[..., :1]
    return (U * kept.unsqueeze(-2)) @ Vh, (S * kept).sum(-1), kept.sum(-1)


def polar_product(A: Tensor, B: Tensor, *, scale: Tensor, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """polar(A) diag(scale) polar(B) [..., m, n]; Σ σ_i and ρ of A and of B [..., 2]; A [..., m, q], B [..., q, n]."""
    left, left_norm, left_rank = polar(A, rtol=rtol, precision=precision)
    right, right_norm, right_rank = polar(B, rtol=rtol, precision=precision)
    norms, ranks = torch.stack([left_norm, right_norm], -1), torch.stack([left_rank, right_rank], -1)
    return (left * scale.double().unsqueeze(-2)) @ right, norms, ranks


def principal(moment: Tensor, k: int, *, delta: Tensor | None, rtol: float) -> tuple[Tensor, Tensor]:
    """Leading k eigenvectors [..., m, k] and eigenvalues [..., k] of M = `moment`, or of Δ M Δᵀ; zero where null."""
    M = moment.double()
    if delta is not None:
        M = delta.double() @ M @ delta.double().mT
    values, vectors = torch.linalg.eigh((M + M.mT) / 2)
    values, vectors = values.flip(-1)[..., :k], vectors.flip(-1)[..., :k]
    kept = values > rtol * values[..., :1].clamp_min(0)
    return vectors * kept.unsqueeze(-2), values * kept


def shift_cov(X: Tensor, delta: Tensor | None, *, out: Tensor, precision: str) -> Tensor:
    """out + YᵀY, where Y = X, or X Δᵀ with Δ = `delta`; the sum is left in `out`."""
    Y = X.double() if delta is None else X.double() @ delta.double().mT
    moment = Y.mT @ Y
    return out.add_((moment + moment.mT) / 2)


def project_scale(Q: Tensor, W: Tensor, *, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """C [..., T s, n] of rows row_scale[t, i] (Q_tᵀ W_t)[i], and the sums of squares of its columns [..., n]."""
    C = row_scale.double().unsqueeze(-1) * (Q.double().mT @ W.double())
    C = C.flatten(-3, -2)
    return C, C.square().sum(-2)


def delta_sum(tuned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_t Δ_t [..., m, n], ||Δ_t||_F [..., T] and ||Σ_t Δ_t||_F [...], where Δ_t = tuned_t - base."""
    deltas = tuned.double() - base.double().unsqueeze(-3)
    total = deltas.sum(-3)
    return total, torch.linalg.matrix_norm(deltas), torch.linalg.matrix_norm(total)


def finalize(base: Tensor, update: Tensor, *, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """base + scale * update [..., m, n], with one scale [...] per matrix."""
    return (base.double() + scale.double()[..., None, None] * update.double()).to(out_dtype)


def subtract(
    base: Tensor, tuned: Iterable[Tensor], *, weights: Sequence[float], reduction: str, base_out: Tensor, out: Tensor
) -> float:
    """Δ_t = weights_t (tuned_t - base) to out [T, ..], or Σ_t Δ_t or its mean to out [1, ..]; ||Σ_t Δ_t||²."""
    base_out.copy_(base)
    deltas = torch.stack([w * (t.double() - base.double()) for t, w in zip(tuned, weights, strict=True)])
    total = deltas.sum(0, keepdim=True)
    out.copy_({"none": deltas, "sum": total, "mean": total / len(deltas)}[reduction])
    return float(total.square().sum())


def frobenius(A: Tensor) -> float:
    """sqrt(Σ A_ij²) over all entries."""
    return float(torch.linalg.vector_norm(A.double()))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th entry of |values| [n] in descending order."""
    return values.abs().sort(descending=True).values[k - 1]


def count_digits(values: Tensor, higher: Sequence[int]) -> Tensor:
    """[2^16]: how many |values| [n] have each 16-bit digit behind the digits `higher`, the highest first."""
    bits = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).tolist()
    width = 8 * values.element_size()
    counts = [0] * 2**16
    for number in bits:
        magnitude = number % 2 ** (width - 1)  # without the sign
        digits = [magnitude >> shift & 0xFFFF for shift in range(width - 16, -1, -16)]
        if digits[: len(higher)] == list(higher):
            counts[digits[len(higher)]] += 1
    return torch.tensor(counts, device=values.device)


def votes(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """The sum of the signs of the sums of the kept entries of each column [n] of deltas [T, n]."""
    return _kept(deltas, thresholds).sum(0).sign().sum().to(torch.int64)


def elect(deltas: Tensor, thresholds: Tensor, majority: int) -> Tensor:
    """[T, n] -> [n]: the mean of the kept entries of a column that have the sign of their sum, or of the majority."""
    kept = _kept(deltas, thresholds)
    signs = kept.sum(0).sign()
    signs = torch.where(signs == 0, float(majority), signs)
    agreeing = torch.where(kept * signs > 0, kept, 0.0)
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1)


def _kept(deltas: Tensor, thresholds: Tensor) -> Tensor:
    return torch.where(deltas.abs() >= thresholds[:, None], deltas.double(), 0.0)


def drop(values: Tensor, density: float, *, seed: int, first: int) -> Tensor:
    """values [n] / density, or 0 where the first 32 bits of draw `first` + i, over 2^32, are not below the density."""
    kept = []
    for index in range(first, first + len(values)):
        x = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64  # SplitMix64: Steele, Lea, Flood 2014; Vigna's constants
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        kept.append((x ^ (x >> 31)) >> 32 < density * 2**32)
    return torch.where(torch.tensor(kept, dtype=torch.bool, device=values.device), values.double() / density, 0.0)


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
