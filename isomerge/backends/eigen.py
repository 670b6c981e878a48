"""Eigenproblems of one Gram matrix G = BᵀB [r, r], as cheap as the result allows.

A float32 eigensolve costs half a float64 one, and its backward error turns eigenvectors of near eigenvalues into one
another. Where that is too much, a block of the eigenbasis is solved again in float64 and decoupled from the rest to
first order, which squares the error: at r = 768 with a sixth of the basis in the block, 15 ms beside 50 ms for the
float32 eigensolve and 100 ms for a float64 one (one core). Where only leading vectors are wanted and a partial solve is
at hand (`partial_eigen.py`), they come from it in float64: 37 ms for an eighth of the basis.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from isomerge.backends.iterations import chebyshev_subspace, eigh
from isomerge.backends.lapack import add_syrk, availability
from isomerge.backends.partial_eigen import leading_eigenvectors, partial

TOLERANCE = {"fast": 1e-2, "default": 3e-5, "exact": 1e-8}
"""Accepted error bound by precision, for one step. A method makes up to four; "default" must stay under 1e-4 in all."""

EIGH_ERROR = 5.0
"""Backward error of Gram and LAPACK eigensolve in units of eps * lambda_1. With it `mixing` bounds the float32 error of
the 96-dimensional subspaces of 14 of 16 updates (768 x 768 and 3072 x 768), and is passed by 1.7x at most."""

GRAM_ERROR = 0.2
"""The share of it that is the rounding of the Gram product: on the same updates `mixing` is passed by 1.3x at most."""

FIRST_ORDER = 3e-3
"""Largest mixing that one first-order correction brings down to its square."""

SUBSPACE_SHARE = 1 / 3
"""Of the tolerance, for a subspace: polar factors of concatenated subspaces amplify their errors."""

FILTER_MIN_SIDE, FILTER_MAX_SHARE = 512, 1 / 24
"""The filtered iteration is asked when r >= the first and k/r <= the second; beyond, an eigensolve is faster."""

BLOCK = 128
"""Columns per block of a triangular Gram product: 0.64x of the full product at 3072 x 768, least of 96 to 384."""

_SVD = threading.Lock()


def gram(B: Tensor) -> Tensor:
    """BᵀB [r, r]: its lower triangle, by syrk or by blocks of columns, mirrored.

    In float32 by blocks: they add a vector's products in more parts, and round to 1.5e-7 where syrk does to 2.5e-7.
    """
    r = B.shape[1]
    if r <= 2 * BLOCK:
        return B.mT @ B
    if B.dtype == torch.float64 and _syrk_takes(B):
        G = B.new_zeros(r, r)
        add_syrk(B, G)
        mirror(G)
        return G
    G = B.new_empty(r, r)
    for start in range(0, r, BLOCK):
        stop = min(start + BLOCK, r)
        G[start:stop, :stop] = B[:, start:stop].mT @ B[:, :stop]
        G[:start, start:stop] = G[start:stop, :start].mT
    return G


def add_gram(B: Tensor, out: Tensor) -> None:
    """out += BᵀB in the lower triangle at least; `mirror` makes it symmetric.

    By syrk where it is at hand (1024 x 384 in float32: 1.7 ms), else by blocks (2.0 ms; the whole product takes 2.9).
    """
    if B.dtype == out.dtype and out.stride(1) == 1 and _syrk_takes(B):
        add_syrk(B, out)
        return
    for start in range(0, B.shape[1], BLOCK):
        stop = min(start + BLOCK, B.shape[1])
        rows, columns, target = B[:, start:stop].mT, B[:, :stop], out[start:stop, :stop]
        if target.dtype == B.dtype and stop > BLOCK:
            target.addmm_(rows, columns)
        else:  # small products would carry on one chain of sums
            target += rows @ columns


def _syrk_takes(B: Tensor) -> bool:
    p, r = B.shape
    dense = (B.stride(1) == 1 and B.stride(0) >= r) or (B.stride(0) == 1 and B.stride(1) >= p)
    plain = B.device.type == "cpu" and B.dtype in (torch.float32, torch.float64)
    return plain and dense and r > 2 * BLOCK and p > 0 and availability() is None


def mirror(G: Tensor) -> None:
    """G[i, j] = G[j, i] for i < j, in place."""
    for start in range(0, G.shape[0], BLOCK):
        stop = min(start + BLOCK, G.shape[0])
        G[:start, start:stop] = G[start:stop, :start].mT
        block = G[start:stop, start:stop]
        block.copy_(block.tril() + block.tril(-1).mT)


def times(B: Tensor, X: Tensor) -> Tensor:
    """B X for X [r, b] of few columns, computed and left in memory as rows, (Xᵀ Bᵀ)ᵀ.

    Of the layouts a product can meet this one has no slow path: at 3072 x 768 by 128 in float64 on one core it takes
    15 ms, where others take up to 75.
    """
    return (X.mT.contiguous() @ B.mT).mT


def noise(dtype: torch.dtype, error: float = EIGH_ERROR) -> float:
    """Backward error of an eigensolve in `dtype`, relative to lambda_1."""
    return error * torch.finfo(dtype).eps


def unresolved(values: Tensor, noise: float, tolerance: float) -> int:
    """How many of the least eigenvalues (ascending) must be solved better for a polar factor within `tolerance`.

    A backward error E of the Gram moves direction i of the factor by about |E| / (2 lambda_i), so a factor over the
    directions i >= d is off by noise lambda_1 sqrt(Σ_{i>=d} lambda_i^-2 / r) / 2, relative to sqrt(r).
    """
    if values.numel() == 0:
        return 0
    values = values.double().clamp_min(torch.finfo(torch.float64).tiny)
    tails = values.reciprocal().square().flip(0).cumsum(0).flip(0) / values.shape[0]
    return int((noise * values[-1] * tails.sqrt() / 2 > tolerance).sum())


def settled(values: Tensor, kept: Tensor, rtol: float, tolerance: float) -> bool:
    """Whether a float64 eigensolve of a Gram (values ascending) gives a polar factor over the `kept` directions within
    `tolerance`, and noise did not decide which these are."""
    error = noise(torch.float64)
    decided = rtol**2 > 4 * error or bool(kept.all())
    return decided and not unresolved(values[kept], error, tolerance)


def polar_by_eigenvectors(A: Tensor, rtol: float, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factor [m, n], nuclear norm and rank of A [m, n], m >= n, from its float64 Gram; else by an SVD."""
    B = A.double()
    values, V = eigh(gram(B))
    S = values.clamp_min(0).sqrt()
    kept = S > rtol * S[-1]
    if not settled(values, kept, rtol, tolerance):
        factor, nuclear_norm, rank = polar_by_svd(B, rtol)
        return factor.to(A.dtype), nuclear_norm, rank
    factor = B @ gram((V * torch.where(kept, S.rsqrt(), 0)).mT)
    return factor.to(A.dtype), (S * kept).sum(), kept.sum()


def polar_by_svd(A: Tensor, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factor [m, n], nuclear norm and rank of A [m, n] by its definition, in its own dtype.

    One matrix at a time, whatever the threads: it takes half as much memory again as all else, and is seldom needed.
    """
    with _SVD:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        kept = S > rtol * S[0]
        return (U * kept) @ Vh, (S * kept).sum(), kept.sum()


def mixing(values: Tensor, k: int, noise: float) -> float:
    """Root mean square sine between the computed and the true dominant k-dimensional eigenspace, estimated.

    A backward error E turns eigenvector j towards eigenvector i by E_ij / (lambda_j - lambda_i). E is taken as
    unstructured with ||E|| = noise lambda_1, its entries of size ||E|| / (2 sqrt(r)). values: ascending.
    """
    r = values.shape[0]
    if k in (0, r):
        return 0.0
    values = values.double()
    entry = max(noise * values[-1].item() / (2 * math.sqrt(r)), torch.finfo(torch.float64).tiny)
    gaps = (values[r - k :, None] - values[None, : r - k]).clamp_min(entry)
    return entry * math.sqrt(gaps.reciprocal().square().sum().item() / k)


def decoupled(apply: Callable[[Tensor], Tensor], values: Tensor, block: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """The span of `block` [r, d] turned in float64 to an eigenspace, orthonormal; and `rest` turned to stay orthogonal.

    `apply` multiplies by G in float64; `rest` [r, r - d] holds the other approximate eigenvectors with eigenvalues
    `values`. With the residual R of the block's Ritz pairs (X, theta): X += rest H, rest -= X Hᵀ, where
    H_ij = (restᵀ R)_ij / (theta_j - values_i). Pairs that an H > 1 % would mix are equal to rounding and stay.
    """
    X = block.double()
    GX = apply(X)
    theta, W = eigh(X.mT @ GX)
    X, GX = times(X, W), times(GX, W)
    residual = (GX - X * theta).to(rest.dtype)
    H = times(rest.mT, residual).double() / (theta[None, :] - values.double()[:, None])
    H = torch.where(H.abs() <= 0.01, H, 0).to(rest.dtype)
    rest, X = rest - X.to(rest.dtype) @ H.mT, X + times(rest, H)
    L = torch.linalg.cholesky(X.mT @ X)
    return torch.linalg.solve_triangular(L, X.mT, upper=False).mT, rest


GramIn = Callable[[torch.dtype], tuple[Tensor, float]]
"""The Gram computed in a given dtype, and its rounding error in units of that of a plain product: deflation cancels."""

Apply = Callable[[Tensor], Tensor]
"""The Gram times a block of columns, in float64."""


def leading(gram_in: GramIn, apply: Apply, r: int, k: int, dtype: torch.dtype, precision: str) -> tuple[Tensor, bool]:
    """Orthonormal basis [r, k] of the dominant eigenspace, and whether its columns are eigenvectors in float64.

    `apply` multiplies by the Gram in float64; dtype is that of the matrix whose Gram it is. Few directions come from a
    filtered subspace iteration. Up to half come from a partial float64 solve of the float32 Gram, where the mixing at
    the k-th eigenvalue that its rounding makes allows it; without partial solves from a float32 one of all, corrected
    where the mixing asks for it. Others, and more than half, come from the float64 Gram.
    """
    if dtype == torch.float32 and precision != "exact" and 2 * k <= r:
        tolerance = SUBSPACE_SHARE * TOLERANCE[precision]
        G, inflation = gram_in(torch.float32)
        product = noise(dtype, GRAM_ERROR * inflation)
        if r >= FILTER_MIN_SIDE and k <= FILTER_MAX_SHARE * r:
            X = chebyshev_subspace(G, k, tol=tolerance, noise=product)
            if X is not None:
                return X, False
        if partial(r, G.device):
            values, V = leading_eigenvectors(G, k)
            if mixing(values, k, product) <= tolerance:
                return V.flip(1), False
        else:
            values, V = eigh(G)
            error = mixing(values, k, product + noise(dtype))
            if error <= tolerance:
                return V[:, -k:].flip(1), False
            size = k + max(8, k // 3)  # columns in which the k-th eigenvalue is well inside
            if 2 * size <= r and error <= FIRST_ORDER:
                exact = mixing(values, k, product) > tolerance
                return _corrected(apply if exact else _applied(G), G, values, V, k, size), False
    return leading_eigenvectors(gram_in(torch.float64)[0], k)[1].flip(1), True


def _applied(G: Tensor) -> Apply:
    G = G.double()  # a float32 product would round by several times more than the float32 Gram
    return lambda X: times(G, X)


def _corrected(apply: Apply, G: Tensor, values: Tensor, V: Tensor, k: int, size: int) -> Tensor:
    """The k leading eigenvectors in float64 from a float32 eigensolve of G (ascending): far ones enter to first order,
    as in `decoupled`, near ones by Rayleigh-Ritz in `size` dimensions. `apply` multiplies by the exact Gram."""
    split = V.shape[0] - size
    X, rest = V[:, split:].double(), V[:, :split]
    GX = apply(X)
    theta = (X * GX).sum(0)
    H = times(rest.mT, (GX - X * theta).float()).double() / (theta[None, :] - values[:split, None].double())
    turn = times(rest, torch.where(H.abs() <= 0.01, H, 0).float())
    X, GX = X + turn, GX + times(G, turn)
    L = torch.linalg.cholesky(X.mT @ X)
    inside = torch.linalg.solve_triangular(L, X.mT @ GX, upper=False)
    W = eigh(torch.linalg.solve_triangular(L, inside.mT, upper=False))[1][:, -k:]
    return times(X, torch.linalg.solve_triangular(L.mT, W, upper=True).flip(1))


def split_basis(G: Tensor, k: int, dtype: torch.dtype, precision: str) -> Tensor:
    """Orthonormal basis [r, r] whose first k columns span the dominant eigenspace of G, the others its complement.

    G in float64, of a matrix in `dtype`. A float32 eigensolve, of which the smaller part is decoupled in float64.
    """
    if dtype == torch.float32 and precision != "exact":
        values, V = eigh(G.float())
        error = mixing(values, k, noise(dtype))
        if error <= SUBSPACE_SHARE * TOLERANCE[precision]:
            return V.flip(1)
        r = G.shape[0]
        share = min(k, r - k)
        size = share + max(8, share // 3)
        if 2 * size <= r and error <= FIRST_ORDER:
            low = 2 * k > r  # the smaller part is at the lower end
            block, rest = (slice(size), slice(size, r)) if low else (slice(r - size, r), slice(r - size))
            X, others = decoupled(lambda X: times(G, X), values[rest], V[:, block], V[:, rest])
            X = times(X, eigh(X.mT @ times(G, X))[1])
            return torch.cat([X, others.double()] if low else [others.double(), X], dim=1).flip(1)
    return eigh(G)[1].flip(1)
