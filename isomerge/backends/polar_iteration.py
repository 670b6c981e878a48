"""The polar factor by Newton-Schulz iteration over `Primitives`: products of matrices, and two decisions on the host.

X [r, b] is the matrix with its small side first, X = U diag(σ) Vᵀ. Once σ_1 <= 1, steps X ← (a I + b XXᵀ + c (XXᵀ)²) X
take every σ to 1 and leave U and V alone. The rounding error of a step turns singular vectors for good, by its size
over the least σ at that step; so a step at σ >= l runs in the cheapest format of unit at most TOLERANCE * l: accurate
first, cheap last. The reverse order ends in an orthogonal but wrong factor.

The float64 Gram G = XXᵀ = L Lᵀ decides the length of the schedule, and whether there is one: L^(-1) gives the bound
σ_r >= ||G^(-1)||^(-1/2), which also proves that no σ is null. Rank-deficient matrices, and those too ill-conditioned
for a Gram matrix in float64, are left to an eigensolve.

A long X, of aspect a = b / r, is reduced by the same factor: polar(X) = polar(L) L^(-1) X. In r³ FLOP times the cost of
a format, nine steps of mean cost 39/9 ("default", condition 1e4) take 156 on the square L, and the two products around
it 26 + 12 a, against 39 (3 a + 1) on X: 230 against 507 at a = 4. Gram Newton-Schulz, with its squared singular values,
would take 13 (6 a + 30) = 702 in float64, or 351 in the same formats restarted every two steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from isomerge.backends.batched_eigen import eigh
from isomerge.backends.coefficients import NEWTON_SCHULZ, Step, schedule
from isomerge.backends.eigen import polar_by_svd, settled
from isomerge.backends.primitives import FORMATS, Primitives

TOLERANCE = {"fast": 2e-2, "default": 2e-4, "exact": 1e-10}
"""Accepted rounding error of a step, relative to the least singular value that it works on."""

ORTHONORMAL = 5e-6
"""What the last step may leave, by truncation and by rounding: the nuclear norm <factor, X> is off by as much, while
turned singular vectors enter it squared."""

SAFETY = 0.01
"""Damping of all steps but the last. Without it, what rounding lifts above 1 grows with the fifth power."""

RESOLVED = 1e-6
"""Least σ_r / σ_1 that is iterated: its square is 1e4 eps of float64, in which the Gram is formed and factored."""

SQUARINGS = 3
"""In `spectral_bound`. Each costs one product in the cheapest format, and halves the logarithm of the excess."""

SAFEGUARDS = 4
"""Steps added where a schedule was too short: they lift 0.1 to 0.97. None is needed while the bound of σ_r holds."""


def polar(A: Tensor, primitives: Primitives, *, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factor [..., m, n], nuclear norm [...] in float64 and rank [...], in the convention of `reference.py`.

    One schedule for the whole stack, that of the worst-conditioned matrix. Float64 matrices are computed in float64
    throughout. The host waits for the device twice: for the conditioning, and for the deviation of each result from
    orthonormal rows, without which none is returned; then after each safeguard step, and in `by_eigenvectors`.
    """
    batch, (m, n) = A.shape[:-2], A.shape[-2:]
    X = A.reshape(batch.numel(), m, n)
    X = (X if m <= n else X.mT).to(torch.promote_types(A.dtype, torch.float32))
    tolerance = TOLERANCE["exact" if X.dtype == torch.float64 else precision]

    condition = conditioning(X, primitives)
    lower = condition.lower.tolist()
    able = [i for i, bound in enumerate(lower) if bound >= max(2 * rtol, RESOLVED)]
    rest = set(range(len(X))).difference(able)
    factor, nuclear_norm = torch.empty_like(X), torch.empty_like(condition.scale)
    if able:
        worst = min(lower[i] for i in able)
        some = (X[able], condition.of(able)) if rest else (X, condition)
        factor, nuclear_norm, converged = iterated(*some, worst, primitives, tolerance)
        if rest:
            factor, nuclear_norm = _spread(factor, able, len(X)), _spread(nuclear_norm, able, len(X))
        rest.update(i for i, done in zip(able, converged, strict=True) if not done)
    rank = torch.full((len(X),), min(m, n), device=X.device)
    if rest:
        left = sorted(rest)
        solved, nuclear_norm[left], rank[left] = by_eigenvectors(X[left].double(), primitives, rtol, tolerance)
        factor[left] = solved.to(factor.dtype)
    factor = factor if m <= n else factor.mT
    return factor.reshape(A.shape), nuclear_norm.reshape(batch), rank.reshape(batch)


def _spread(part: Tensor, indices: list[int], size: int) -> Tensor:
    """[size, ...] with the rows of `part` at the indices and anything elsewhere."""
    return part.new_empty(size, *part.shape[1:]).index_copy_(0, torch.tensor(indices, device=part.device), part)


class Conditioning(NamedTuple):
    """Of X [B, r, b], in float64: `scale` >= σ_1 and `lower` <= σ_r / scale [B], zero or NaN where X is singular to
    rounding or zero; `gram` X Xᵀ / scale² = L Lᵀ, `L` and its `inverse` [B, r, r], arbitrary there."""

    scale: Tensor
    lower: Tensor
    gram: Tensor
    L: Tensor
    inverse: Tensor

    def of(self, indices: list[int]) -> Conditioning:
        return Conditioning(*(part[indices] for part in self))


def conditioning(X: Tensor, primitives: Primitives) -> Conditioning:
    """Bounds of the singular values of X [B, r, b] from a Cholesky factor of its Gram. No synchronisation.

    Cost in r³ FLOP times that of a format: 13 (b / r + 2/3) + 7.
    """
    cheapest = _cheapest(primitives, math.inf)
    G = primitives.gram(X.double(), format="fp64")
    scale = spectral_bound(G, primitives).sqrt()
    G = G / scale.square()[:, None, None]
    L, failed = torch.linalg.cholesky_ex(G)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    inverse = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
    inverse_gram = primitives.gram(inverse.mT.to(FORMATS[cheapest].dtype), format=cheapest)
    lower = torch.where(failed == 0, spectral_bound(inverse_gram, primitives).rsqrt(), 0)
    return Conditioning(scale, lower, G, L, inverse)


def spectral_bound(S: Tensor, primitives: Primitives) -> Tensor:
    """Bound of ||S||_2 [B], float64, for symmetric S [B, r, r]: ||S⁸||_F^(1/8), too large by at most r^(1/16).

    That is 1.7 at r = 4096, where ||S||_F may be too large by 64. The 2 % added are for rounding in bfloat16: up to
    twice its unit in every squaring, of which the powers 1/2, 1/4 and 1/8 count.
    """
    cheapest = _cheapest(primitives, math.inf)
    bound = torch.full(S.shape[:1], 1.02, dtype=torch.float64, device=S.device)
    for i in range(SQUARINGS + 1):
        if i:
            S = primitives.polynomial(S, 0.0, 1.0, format=cheapest)
        norm = torch.linalg.vector_norm(S, dim=(-2, -1), dtype=torch.float64)
        bound *= norm ** (0.5**i)
        S = (S / norm.clamp_min(torch.finfo(S.dtype).tiny)[:, None, None]).to(FORMATS[cheapest].dtype)
    return bound


def iterated(
    X: Tensor, condition: Conditioning, lower: float, primitives: Primitives, tolerance: float
) -> tuple[Tensor, Tensor, list[bool]]:
    """Polar factors and nuclear norms of X [B, r, b] with σ_r / scale >= `lower`, and whether each has converged."""
    lower = 10 ** (math.floor(20 * math.log10(lower)) / 20)  # 20 schedules a decade are kept
    steps = schedule(lower, min(tolerance / 10, ORTHONORMAL), SAFETY)
    formats = ladder(steps, primitives, tolerance)
    dtype, scale = FORMATS[formats[0]].dtype, condition.scale[:, None, None]
    reduced = reduces(formats, X.shape[-1] / X.shape[-2], lower, tolerance)
    start = condition.L if reduced else (X.to(dtype) / scale).to(dtype)
    factor = newton_schulz(start, condition.gram, steps, formats, primitives)
    converged = orthonormal(factor, primitives, tolerance)
    for _ in range(SAFEGUARDS):
        if all(converged):
            break
        factor = newton_schulz(factor, None, (Step(*NEWTON_SCHULZ, lower),), formats, primitives)
        converged = orthonormal(factor, primitives, tolerance)
    nuclear_norm = (factor * start).sum((-2, -1), dtype=torch.float64) * condition.scale  # = <factor, X> also for L
    if reduced:
        root = primitives.apply(factor.double(), condition.inverse, 0.0, format="fp64") / scale
        factor = primitives.apply(root.to(dtype), X.to(dtype), 0.0, format=formats[0])  # root is as large as 1 / σ_r
    return factor, nuclear_norm, converged


def newton_schulz(
    X: Tensor, G: Tensor | None, steps: tuple[Step, ...], formats: tuple[str, ...], primitives: Primitives
) -> Tensor:
    """X [B, r, b] after the steps, each in its format; G is X Xᵀ where that is known. 3 r² b + r³ FLOP a step."""
    for step, format in zip(steps, formats, strict=False):
        dtype = FORMATS[format].dtype
        X = X.to(dtype)
        G = primitives.gram(X, format=format) if G is None else G.to(dtype)
        P = primitives.polynomial(G, step.b, step.c, format=format)
        X, G = primitives.apply(P, X, step.a, format=format), None
    return X


def ladder(steps: tuple[Step, ...], primitives: Primitives, tolerance: float) -> tuple[str, ...]:
    """Per step, the cheapest format of unit at most `tolerance` times the least singular value; a fine one at last."""
    units = [tolerance * step.lower for step in steps]
    return tuple(_cheapest(primitives, unit) for unit in (*units[:-1], min(units[-1], ORTHONORMAL)))


def _cheapest(primitives: Primitives, unit: float) -> str:
    """The cheapest format that is accurate to `unit`, or the most accurate one."""
    accurate = [format for format in primitives.formats if FORMATS[format].unit <= unit]
    return min(accurate or ["fp64"], key=lambda format: FORMATS[format].cost)


def reduces(formats: tuple[str, ...], aspect: float, lower: float, tolerance: float) -> bool:
    """Whether polar(L) L^(-1) X costs less than polar(X), and rounds well within the tolerance."""
    cost, double = sum(FORMATS[format].cost for format in formats), FORMATS["fp64"]
    reduced = 4 * cost + 2 * double.cost + 2 * aspect * FORMATS[formats[0]].cost
    return reduced < (3 * aspect + 1) * cost and double.unit <= tolerance / 10 * lower**2


def orthonormal(X: Tensor, primitives: Primitives, tolerance: float) -> list[bool]:
    """Whether all singular values of X [B, r, b] are within twice the tolerance of 1; false for NaN."""
    format = _cheapest(primitives, tolerance)
    G = primitives.gram(X.to(FORMATS[format].dtype), format=format)
    G.diagonal(dim1=-2, dim2=-1).sub_(1)
    close: list[bool] = (spectral_bound(G, primitives) <= 4 * tolerance).tolist()
    return close


def by_eigenvectors(X: Tensor, primitives: Primitives, rtol: float, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factors, nuclear norms and ranks of float64 X [B, r, b] from eigensolves of their Grams, for any rank.

    Waits in `eigh`, and once for the eigenvalues; a matrix whose rank or factor noise could decide gets an SVD.
    """
    values, V = eigh(primitives.gram(X, format="fp64"))
    S = values.clamp_min(0).sqrt()
    kept = S > rtol * S[:, -1:]
    root = primitives.gram(V * torch.where(kept, S.rsqrt(), 0).unsqueeze(-2), format="fp64")
    factor, nuclear_norm, rank = root @ X, (S * kept).sum(-1), kept.sum(-1)
    for i, (mine, known) in enumerate(zip(values.cpu(), kept.cpu(), strict=True)):
        if not settled(mine, known, rtol, tolerance):
            factor[i], nuclear_norm[i], rank[i] = polar_by_svd(X[i], rtol)
    return factor, nuclear_norm, rank
