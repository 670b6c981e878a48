"""Every op in plain torch, fast on CPUs and correct on any device: Gram matrices, eigensolves, products, no SVDs.

On a CPU matrices run side by side, one per core (`side_by_side.py`); elsewhere one after the other. Each function
with a leading underscore sees one matrix; inside it B [p, r] is that matrix with its small side last, p >= r.

`precision` bounds the relative Frobenius error of a result. The bound is checked with the eigenvalues at hand, and
the next dearer arithmetic is used where it does not hold: float32 Gram and eigensolve, then a part of the spectrum
again in float64 (`eigen.py`), then all of it, then a float64 SVD. The SVD is the guarded fall-back for
ill-conditioned input: a Gram matrix squares the condition number, so at "default" it answers for spectra whose
measured condition number over the numerical rank exceeds about 1e5 in most directions, at "exact" about 3e3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from isomerge.backends.eigen import (
    TOLERANCE,
    Apply,
    GramIn,
    decoupled,
    gram,
    leading,
    noise,
    split_basis,
    times,
    unresolved,
)
from isomerge.backends.iterations import block_krylov
from isomerge.backends.side_by_side import matrices, side_by_side

KRYLOV_MIN_SIDE, KRYLOV_MAX_SHARE = 1536, 1 / 48
"""Block Krylov answers when r >= the first and k/r <= the second; below, one dense eigensolve is faster."""

MIXED_MIN_SQUARE = 512
"""Nearly square matrices with smaller sides go to float64 at once: a third of the directions of real sums at r = 384
would have to be solved again (15.8 ms a matrix against 20.6)."""

DOUBTFUL = 1e-4
"""Singular values below this share of the first are computed in float64: the null threshold is near float32 noise."""

STEEP = 1 / 32
"""Where sigma_k / sigma_1 is below this, B V is computed in float64: its columns round by eps * sigma_1 / sigma_k."""


def polar(A: Tensor, *, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factor B G^(-1/2), G = BᵀB, over the numerical rank, by one symmetric eigensolve of the small side."""
    batch = A.shape[:-2]
    results = side_by_side(lambda A: _polar(A, rtol, precision), matrices(A))
    factor, nuclear_norm, rank = (torch.stack(column) for column in zip(*results, strict=True))
    return factor.reshape(A.shape), nuclear_norm.reshape(batch), rank.reshape(batch)


def polar_product(A: Tensor, B: Tensor, *, scale: Tensor, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """Both polar factors of a pair on one worker, so that a factor that is only multiplied need not be formed."""
    batch, (m, n) = A.shape[:-2], (A.shape[-2], B.shape[-1])

    def one(A: Tensor, scale: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _polar_product(A, scale, B, rtol, precision)

    results = side_by_side(one, matrices(A), list(scale.reshape(-1, scale.shape[-1]).unbind()), matrices(B))
    product, left, right = (torch.stack(column) for column in zip(*results, strict=True))
    return product.reshape(*batch, m, n), left.reshape(batch), right.reshape(batch)


def rsvd(
    A: Tensor, k: int, *, deflate: Tensor, rtol: float, atol: Tensor, tol: float, seed: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading k triplets: eigenvectors of the small-side Gram, one product with A, one k x k eigensolve."""
    batch, (m, n) = A.shape[:-2], A.shape[-2:]

    def one(A: Tensor, Q: Tensor, atol: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _rsvd(A, k, Q, rtol, atol, tol, seed, precision)

    results = side_by_side(one, matrices(A), matrices(deflate), atol.reshape(-1).unbind())
    U, S, Vh = (torch.stack(column) for column in zip(*results, strict=True))
    return U.reshape(*batch, m, k), S.reshape(*batch, k), Vh.reshape(*batch, k, n)


def subspace(A: Tensor, k: int, *, full: bool, precision: str) -> Tensor:
    """Eigenvectors of the Gram on the left side; completed by Householder QR where that is the longer side."""
    m, n = A.shape[-2:]
    columns = m if full else k

    def one(A: Tensor) -> Tensor:
        if m <= n and full:
            return split_basis(gram(A.mT.double()), k, A.dtype, precision).to(A.dtype)
        if m <= n:
            return leading(*_products(A.mT, A.new_zeros(m, 0), True), m, k, A.dtype, precision)[0].to(A.dtype)
        U, S, _ = _rsvd(A, min(k, n), A.new_zeros(m, 0), 0.0, A.new_zeros(()), 1e-6, 0, precision)
        U = U[:, S > m * torch.finfo(A.dtype).eps * S[:1]]
        return torch.cat([U, torch.linalg.qr(U, mode="complete").Q[:, U.shape[1] : columns]], dim=1)

    results = side_by_side(one, matrices(A))
    return torch.stack(results).reshape(*A.shape[:-1], columns)


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B, each matrix of the stack by one thread: the bits do not depend on the batch."""
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    A, B = A.expand(*batch, *A.shape[-2:]), B.expand(*batch, *B.shape[-2:])
    products = side_by_side(torch.mm, matrices(A), matrices(B))
    return torch.stack(products).reshape(*batch, A.shape[-2], B.shape[-1])


# ---------------------------------------------------------------------------------------------- one matrix


class _Factored(NamedTuple):
    """polar(A) = outer @ root of a tall A, or `outer` itself where a product with the root would lose digits."""

    outer: Tensor  # [m, n]
    root: Tensor | None  # [n, n], symmetric
    nuclear_norm: Tensor
    rank: Tensor

    def factor(self) -> Tensor:
        return self.outer if self.root is None else self.outer @ self.root


def _polar(A: Tensor, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = A.shape[0] < A.shape[1]
    result = _factored(A.mT if wide else A, rtol, precision)
    factor = result.factor()
    return factor.mT if wide else factor, result.nuclear_norm, result.rank


def _polar_product(A: Tensor, scale: Tensor, B: Tensor, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """polar(A) diag(scale) polar(B); the root of a tall A or a wide B is multiplied where it has fewer rows."""
    (m, q), n = A.shape, B.shape[1]
    if m < q or n < q:
        left, left_norm, _ = _polar(A, rtol, precision)
        right, right_norm, _ = _polar(B, rtol, precision)
        return left @ (scale[:, None] * right), left_norm, right_norm
    a, b = _factored(A, rtol, precision), _factored(B.mT, rtol, precision)
    norms = a.nuclear_norm, b.nuclear_norm
    if a.root is not None and n < m:
        return a.outer @ (a.root @ (scale[:, None] * b.factor().mT)), *norms
    if b.root is not None and m < n:
        return ((a.factor() * scale) @ b.root) @ b.outer.mT, *norms
    return (a.factor() * scale) @ b.factor().mT, *norms


def _factored(A: Tensor, rtol: float, precision: str) -> _Factored:
    m, n = A.shape
    if A.dtype == torch.float32 and precision != "exact" and (m >= 2 * n or n >= MIXED_MIN_SQUARE):
        result = _factored_mixed(A, rtol, TOLERANCE[precision])
        if result is not None:
            return result
    B = A.double()
    values, V = torch.linalg.eigh(gram(B))
    S = values.clamp_min(0).sqrt()
    kept = S > rtol * S[-1]
    error = noise(torch.float64)
    decided = rtol**2 > 4 * error or bool(kept.all())  # else noise could decide the rank
    if decided and not unresolved(values[kept], error, TOLERANCE[precision]):
        inverse = torch.where(kept, S.reciprocal(), 0)
        factor = B @ gram((V * inverse.sqrt()).mT)
    else:
        U, S, Vh = torch.linalg.svd(B, full_matrices=False)
        kept = S > rtol * S[0]
        factor = (U * kept) @ Vh
    return _Factored(factor.to(A.dtype), None, (S * kept).sum(), kept.sum())


def _factored_mixed(A: Tensor, rtol: float, tolerance: float) -> _Factored | None:
    """The float32 factor, its d least directions solved in float64; None where those are more than a third.

    B V D^(-1/2) Vᵀ splits into the well-resolved directions, a product in float32, and the d others, for which B X is
    computed in float64: its own small Gram resolves singular values down to 1e-8 of the largest.
    """
    r = A.shape[1]
    values, V = torch.linalg.eigh(gram(A))
    d = unresolved(values, noise(A.dtype), tolerance)
    if d > r // 3:
        return None
    S = values[d:].sqrt()
    if d == 0:
        return _Factored(A, gram((V * S.rsqrt()).mT), S.double().sum(), torch.tensor(r, device=A.device))
    B = A.double()
    X, V = decoupled(lambda X: times(B.mT, times(B, X)), values[d:], V[:, :d], V[:, d:])
    Y = times(B, X)
    squares, W = torch.linalg.eigh(gram(Y))
    least = squares.clamp_min(0).sqrt()
    kept = least > rtol * S[-1]
    inverse = torch.where(kept, least.reciprocal(), 0)
    factor = A @ gram((V * S.rsqrt()).mT)
    factor += (Y @ (W * inverse)).to(A.dtype) @ (X @ W).mT.to(A.dtype)
    return _Factored(factor, None, S.double().sum() + (least * kept).sum(), kept.sum() + r - d)


def _rsvd(
    A: Tensor, k: int, Q: Tensor, rtol: float, atol: Tensor, tol: float, seed: int, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    m, n = A.shape
    wide = m <= n
    B = A.mT if wide else A
    r = B.shape[1]
    if precision == "exact":
        B, Q = B.double(), Q.double()
    eigenvectors = False
    if r >= KRYLOV_MIN_SIDE and k <= KRYLOV_MAX_SHARE * r:
        V = block_krylov(lambda X: _deflated_gram_apply(B, Q, wide, X), r, k, like=B, tol=tol, seed=seed)
    else:
        V, eigenvectors = leading(*_products(B, Q, wide), r, k, B.dtype, precision)
    Y = _image(B, Q, wide, V.to(B.dtype))  # [p, k]
    squares, W = torch.linalg.vector_norm(Y, dim=0).double().square(), None
    if eigenvectors and B.dtype == torch.float32 and bool(squares[-1] < STEEP**2 * squares[0]):
        B, Q = B.double(), Q.double()
        Y = _image(B, Q, wide, V.double())
        squares = torch.linalg.vector_norm(Y, dim=0).square()
    if not eigenvectors:  # Rayleigh-Ritz: whatever basis of the subspace V is, the SVD of Y turns it to the triplets
        squares, W = torch.linalg.eigh(gram(Y.double()))
        squares, W = squares.flip(0), W.flip(1)
    V = V.to(B.dtype)
    S = squares.clamp_min(0).sqrt()
    if B.dtype == torch.float32 and bool((S[-1:] < DOUBTFUL * S[:1]).any()):
        return _rsvd(A, k, Q, rtol, atol, tol, seed, "exact")
    S = torch.where((S > rtol * S[:1]) & (S > atol), S, 0)
    inverse = torch.where(S > 0, S.reciprocal(), 0)
    if W is None:
        small, large = V, Y * inverse.to(Y.dtype)
    else:
        small, large = times(V, W.to(V.dtype)), times(Y, (W * inverse).to(Y.dtype))
    U, Vh = (small, large.mT) if wide else (large, small.mT)
    return U.to(A.dtype), S, Vh.to(A.dtype)


def _products(B: Tensor, Q: Tensor, wide: bool) -> tuple[GramIn, Apply]:
    """The small-side Gram of (I - QQᵀ) A, where B = Aᵀ if wide else A: formed in a dtype, or applied in float64."""

    def gram_in(dtype: torch.dtype) -> tuple[Tensor, float]:
        return _deflated_gram(B.to(dtype), Q.to(dtype), wide)

    def apply(X: Tensor) -> Tensor:
        return _deflated_gram_apply(B.double(), Q.double(), wide, X)

    return gram_in, apply


def _image(B: Tensor, Q: Tensor, wide: bool, V: Tensor) -> Tensor:
    """The matrix (its transpose if wide) less its part in Q, times V [r, k]; for wide ones V is orthogonal to Q."""
    Y = times(B, V)
    return Y if wide else Y.sub_(times(Q, times(Q.mT, Y)))


def _deflated_gram(B: Tensor, Q: Tensor, wide: bool) -> tuple[Tensor, float]:
    """Small-side Gram of (I - QQᵀ) A, where B = Aᵀ if wide else A; and how much larger it was before the deflation."""
    G = gram(B)
    if Q.shape[1] == 0:
        return G, 1.0
    before = torch.linalg.vector_norm(G)
    if wide:
        C = G @ Q
        cross = Q @ C.mT
        G = G - cross - cross.mT + Q @ (Q.mT @ C) @ Q.mT
    else:
        G = G - gram(Q.mT @ B)
    return G, (before / torch.linalg.vector_norm(G).clamp_min(torch.finfo(G.dtype).tiny)).item()


def _deflated_gram_apply(B: Tensor, Q: Tensor, wide: bool, X: Tensor) -> Tensor:
    """The same Gram times X [r, b], never formed."""
    if wide:
        X = X - times(Q, times(Q.mT, X))
        Y = times(B.mT, times(B, X))
        return Y - times(Q, times(Q.mT, Y))
    Y = times(B, X)
    return times(B.mT, Y - times(Q, times(Q.mT, Y)))
