"""Every op in plain torch, fast on CPUs and correct on any device: Gram matrices, eigensolves, products, no SVDs.

On a CPU matrices run side by side, one per core (`side_by_side.py`); elsewhere one after the other. Each function
with a leading underscore sees one matrix, and inside it `B` is that matrix with the small side last: B [p, r], p >= r.

Which arithmetic. `precision` is a bound on the relative Frobenius error of the result; a bound is checked before a
result is accepted, from eigenvalues at hand, and the next dearer arithmetic is used where it does not hold:
float32 Gram and eigensolve -> float64 Gram and eigensolve -> float64 SVD. The last is the guarded fall-back for
ill-conditioned input: a Gram matrix squares the condition number, so at "default" it answers for spectra whose
measured condition number exceeds about 1e6, which the default rank policy cuts off for sides of 8 and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from isomerge.backends.iterations import block_krylov, orthonormal
from isomerge.backends.side_by_side import side_by_side

TOLERANCE = {"fast": 1e-2, "default": 3e-5, "exact": 1e-8}
"""Accepted error bound by precision. "default" must stay under 1e-4 after four such steps; "fast" is 2e-2."""

EIGH_ERROR = 2.0
"""Backward error of Gram + LAPACK eigh in units of eps * lambda_max (measured: 0.5 to 3 for r = 64 to 1024)."""

GRAM_ERROR = 0.2
"""The share of EIGH_ERROR that is the rounding of the Gram product itself (measured: 1/10 at k/r = 1/8)."""

BLOCK = 128
"""Columns per block of a triangular Gram product: 0.64x of the full product at 3072 x 768, least of 96 to 384."""

KRYLOV_MIN_SIDE, KRYLOV_MAX_SHARE = 1536, 1 / 48
"""Block Krylov answers when r >= the first and k/r <= the second; below, one dense eigensolve is faster."""


def polar(A: Tensor, *, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factor B G^(-1/2), G = BᵀB, over the numerical rank, by one symmetric eigensolve of the small side."""
    batch = A.shape[:-2]
    results = side_by_side(lambda A: _polar(A, rtol, precision), A.reshape(-1, *A.shape[-2:]))
    factor, nuclear_norm, rank = (torch.stack(column) for column in zip(*results, strict=True))
    return factor.reshape(A.shape), nuclear_norm.reshape(batch), rank.reshape(batch)


def rsvd(
    A: Tensor, k: int, *, deflate: Tensor, rtol: float, atol: Tensor, tol: float, seed: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading k triplets: eigenvectors of the small-side Gram, one product with A, one k x k eigensolve."""
    batch, (m, n) = A.shape[:-2], A.shape[-2:]

    def one(A: Tensor, Q: Tensor, atol: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _rsvd(A, k, Q, rtol, atol, tol, seed, precision)

    q, count = deflate.shape[-1], batch.numel()
    results = side_by_side(one, A.reshape(count, m, n), deflate.reshape(count, m, q), atol.reshape(count))
    U, S, Vh = (torch.stack(column) for column in zip(*results, strict=True))
    return U.reshape(*batch, m, k), S.reshape(*batch, k), Vh.reshape(*batch, k, n)


def subspace(A: Tensor, k: int, *, precision: str) -> Tensor:
    """Leading k left singular vectors, completed to k orthonormal columns where the rank is smaller."""
    results = side_by_side(lambda A: _subspace(A, k, precision), A.reshape(-1, *A.shape[-2:]))
    return torch.stack(results).reshape(*A.shape[:-1], k)


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B, each matrix of the stack by one thread: the bits do not depend on the batch."""
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    A, B = A.expand(*batch, *A.shape[-2:]), B.expand(*batch, *B.shape[-2:])
    products = side_by_side(torch.mm, A.reshape(-1, *A.shape[-2:]), B.reshape(-1, *B.shape[-2:]))
    return torch.stack(products).reshape(*batch, A.shape[-2], B.shape[-1])


# ---------------------------------------------------------------------------------------------- one matrix


def gram(B: Tensor) -> Tensor:
    """BᵀB [r, r], the lower triangle by blocks of columns, mirrored."""
    r = B.shape[1]
    if r <= 2 * BLOCK:
        return B.mT @ B
    G = B.new_empty(r, r)
    for start in range(0, r, BLOCK):
        stop = min(start + BLOCK, r)
        G[start:stop, :stop] = B[:, start:stop].mT @ B[:, :stop]
        G[:start, start:stop] = G[start:stop, :start].mT
    return G


def _polar(A: Tensor, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    m, n = A.shape
    if m < n:
        factor, nuclear_norm, rank = _polar(A.mT, rtol, precision)
        return factor.mT, nuclear_norm, rank
    tolerance = TOLERANCE[precision]
    G, noise = _polar_gram(A, precision)
    eigenvalues, V = torch.linalg.eigh(G)
    S = eigenvalues.clamp_min(0).sqrt().double()
    kept = S > rtol * S[-1]
    inverse = torch.where(kept, S.reciprocal(), 0)
    decided = rtol * rtol > 4 * noise or bool(kept.all())  # else noise could decide the rank
    if decided and _turning(noise * eigenvalues[-1], inverse.square()) <= tolerance:
        root = gram((V * inverse.sqrt()).mT)
        # the product rounds in proportion to the entries of G^(-1/2) (measured: 10 eps at condition 7e4)
        rounding = 16 * torch.finfo(A.dtype).eps * S.square().mean().sqrt() * inverse.square().mean().sqrt()
        factor = A @ root.to(A.dtype) if rounding <= tolerance else A.double() @ root.double()
    else:
        U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
        kept = S > rtol * S[0]
        factor = (U * kept) @ Vh
    return factor.to(A.dtype), (S * kept).sum().to(A.dtype), kept.sum()


def _polar_gram(A: Tensor, precision: str) -> tuple[Tensor, float]:
    """The Gram of A in the cheapest arithmetic whose error the polar factor bears, and that error / lambda_max.

    Three levels: float32 Gram and eigensolve, float32 Gram and float64 eigensolve, both in float64.
    """
    m, n = A.shape
    # nearly square matrices skip float32: even random ones have condition numbers of order r
    if A.dtype == torch.float32 and (m >= 2 * n or precision == "fast"):
        G = gram(A)
        L, info = torch.linalg.cholesky_ex(G)
        if info == 0:
            probes = torch.ones(n, 8, dtype=G.dtype, device=G.device)
            probes[:, 1:] = torch.randn(n, 7, generator=torch.Generator().manual_seed(0), dtype=G.dtype).to(G.device)
            # Hutchinson: the mean of ||G^-1 z||^2 over probes is ||G^-1||_F^2, here per eigenvalue
            inverse = torch.cholesky_solve(probes, L).square().sum(0).mean().div(n).sqrt()
            for _ in range(6):  # power steps: lambda_max within a few per cent
                probes = G @ (probes / torch.linalg.vector_norm(probes, dim=0))
            largest = torch.linalg.vector_norm(probes, dim=0).max()
            for error, dtype in ((EIGH_ERROR, torch.float32), (GRAM_ERROR, torch.float64)):
                noise = error * torch.finfo(torch.float32).eps
                if _turning(noise * largest, inverse) <= TOLERANCE[precision]:
                    return G.to(dtype), noise
    return gram(A.double()), EIGH_ERROR * torch.finfo(torch.float64).eps


def _turning(error: Tensor, inverse: Tensor) -> float:
    """Relative error of a polar factor whose Gram, with inverse eigenvalues `inverse`, is off by `error`.

    A backward error E of the Gram moves direction i of the factor by about |E| / (2 lambda_i).
    """
    return (error * inverse.square().mean().sqrt() / 2).item()


def _rsvd(
    A: Tensor, k: int, Q: Tensor, rtol: float, atol: Tensor, tol: float, seed: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    m, n = A.shape
    wide = m <= n
    B = A.mT if wide else A
    r = B.shape[1]
    work = torch.float64 if precision == "exact" or A.dtype == torch.float64 else torch.float32
    if r >= KRYLOV_MIN_SIDE and k <= KRYLOV_MAX_SHARE * r:
        V = block_krylov(lambda X: _deflated_gram_apply(B, Q, wide, X), r, k, like=B, tol=tol, seed=seed)
    else:
        V = _leading_eigenvectors(lambda dtype: _deflated_gram(B.to(dtype), Q.to(dtype), wide), k, A.dtype, precision)
    V = V.to(work)
    Y = B.to(work) @ V  # [p, k]
    if not wide:
        Y -= Q.to(work) @ (Q.mT.to(work) @ Y)
    # Rayleigh-Ritz: whatever basis of the subspace V is, its rotation by the SVD of Y gives the triplets
    squares, W = torch.linalg.eigh(gram(Y.double()))
    squares, W = squares.flip(0), W.flip(1)
    S = squares.clamp_min(0).sqrt()
    S = torch.where((S > rtol * S[:1]) & (S > atol), S, 0)
    inverse = torch.where(S > 0, S.reciprocal(), 0)
    small, large = V @ W.to(work), Y @ (W * inverse).to(work)
    U, Vh = (small, large.mT) if wide else (large, small.mT)
    return U.to(A.dtype), S.to(A.dtype), Vh.to(A.dtype)


def _subspace(A: Tensor, k: int, precision: str) -> Tensor:
    m, n = A.shape
    if m <= n:
        empty = A.new_zeros(m, 0)
        V = _leading_eigenvectors(
            lambda dtype: _deflated_gram(A.mT.to(dtype), empty.to(dtype), True), k, A.dtype, precision
        )
        return V.to(A.dtype)
    rtol = m * torch.finfo(torch.float32).eps
    U, S, _ = _rsvd(A, min(k, n), A.new_zeros(m, 0), rtol, A.new_zeros(()), 0.0, 0, precision)
    U = U[:, S > 0]
    completion = torch.linalg.qr(U, mode="complete").Q[:, U.shape[1] :]
    return torch.cat([U, completion], dim=1)[:, :k]


def _deflated_gram(B: Tensor, Q: Tensor, wide: bool) -> Tensor:
    """Small-side Gram of (I - QQᵀ) A, where B = Aᵀ if wide else A."""
    G = gram(B)
    if Q.shape[1] == 0:
        return G
    if not wide:
        return G - gram(Q.mT @ B)
    C = G @ Q
    cross = Q @ C.mT
    return G - cross - cross.mT + Q @ (Q.mT @ C) @ Q.mT


def _deflated_gram_apply(B: Tensor, Q: Tensor, wide: bool, X: Tensor) -> Tensor:
    """The same Gram times X [r, b], never formed."""
    if wide:
        X = X - Q @ (Q.mT @ X)
        Y = B.mT @ (B @ X)
        return Y - Q @ (Q.mT @ Y)
    Y = B @ X
    return B.mT @ (Y - Q @ (Q.mT @ Y))


def _leading_eigenvectors(
    gram_in: Callable[[torch.dtype], Tensor], k: int, dtype: torch.dtype, precision: str
) -> Tensor:
    """Orthonormal basis [r, k] of the dominant k-dimensional eigenspace of a Gram, given the Gram as f(dtype)."""
    if dtype == torch.float32 and precision != "exact":
        G = gram_in(torch.float32)
        eigenvalues, V = torch.linalg.eigh(G)
        if _mixing(eigenvalues, k, EIGH_ERROR) <= TOLERANCE[precision]:
            return V[:, -k:].flip(1)
        if _mixing(eigenvalues, k, GRAM_ERROR) <= TOLERANCE[precision] and 3 * k <= G.shape[0]:
            return _refined(G.double(), eigenvalues.flip(0).double(), V.flip(1).double(), k)
    return torch.linalg.eigh(gram_in(torch.float64)).eigenvectors[:, -k:].flip(1)


def _refined(G: Tensor, eigenvalues: Tensor, V: Tensor, k: int) -> Tensor:
    """The dominant k-dimensional eigenspace of G in float64 from a float32 eigensolve (V, descending).

    The far eigenvectors are corrected to first order, V_rest (V_restᵀ R) / (theta_j - lambda_i) with the residual R,
    those near the k-th by Rayleigh-Ritz in k + k/3 dimensions: 0.6x of the time of a float64 eigensolve at r = 768.
    """
    q = k + max(8, k // 3)
    X, rest = V[:, :q], V[:, q:]
    GX = G @ X
    theta = (X * GX).sum(0)
    X = X + rest @ ((rest.mT @ (GX - X * theta)) / (theta[None, :] - eigenvalues[q:, None]))
    X = orthonormal(X)
    return X @ torch.linalg.eigh(X.mT @ G @ X).eigenvectors[:, -k:].flip(1)


def _mixing(eigenvalues: Tensor, k: int, error: float) -> float:
    """Root mean square sine between the computed and the true dominant k-dimensional subspace, estimated.

    A backward error E turns eigenvector j towards eigenvector i by E_ij / (lambda_j - lambda_i); E is taken as
    unstructured with ||E|| = `error` eps lambda_1, so its entries are of size ||E|| / (2 sqrt(r)).
    """
    r = eigenvalues.shape[0]
    if k == r:
        return 0.0
    rest, leading = eigenvalues.double()[: r - k], eigenvalues.double()[r - k :]
    entry = error * torch.finfo(eigenvalues.dtype).eps * eigenvalues[-1].item() / (2 * math.sqrt(r))
    gaps = (leading[:, None] - rest[None, :]).clamp_min(entry)
    return entry * math.sqrt(gaps.reciprocal().square().sum().item() / k)
