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

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isomerge.backends.draws import drop as drop  # "as": ops that other files hold
from isomerge.backends.eigen import (
    TOLERANCE,
    Apply,
    GramIn,
    add_gram,
    decoupled,
    gram,
    leading,
    mirror,
    noise,
    polar_by_eigenvectors,
    split_basis,
    times,
    unresolved,
)
from isomerge.backends.election import count_digits as count_digits
from isomerge.backends.election import elect as elect
from isomerge.backends.election import kth_largest as kth_largest
from isomerge.backends.election import votes as votes
from isomerge.backends.iterations import block_krylov, eigh
from isomerge.backends.partial_eigen import leading_eigenvectors
from isomerge.backends.side_by_side import matrices, side_by_side

TOKENS = 512
"""Tokens per Gram product: float32 sums of 2048 bfloat16 squares are off by 3e-6, of 512 by less than 1e-6."""

PIECE = 2**17
"""Elements of a matrix whose deltas are taken at a time on a CPU, so that they stay in its cache."""

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
    product, norms, ranks = (torch.stack(column) for column in zip(*results, strict=True))
    return product.reshape(*batch, m, n), norms.reshape(*batch, 2), ranks.reshape(*batch, 2)


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


def principal(moment: Tensor, k: int, *, delta: Tensor | None, rtol: float) -> tuple[Tensor, Tensor]:
    """Eigenvectors in float64 of the smaller of Δ M Δᵀ and Lᵀ Δᵀ Δ L, where M = L Lᵀ."""
    batch = moment.shape[:-2]
    if delta is None:
        results = side_by_side(lambda M: _principal(M, None, k, rtol), matrices(moment))
    else:
        results = side_by_side(lambda M, D: _principal(M, D, k, rtol), matrices(moment), matrices(delta))
    vectors, values = (torch.stack(column) for column in zip(*results, strict=True))
    return vectors.reshape(*batch, *vectors.shape[-2:]), values.reshape(*batch, k)


def shift_cov(X: Tensor, delta: Tensor | None, *, out: Tensor, precision: str) -> Tensor:
    """Gram products of `TOKENS` tokens at a time, each added to `out`: a sum of sums, so rounding does not build up."""

    dtype = torch.float64 if precision == "exact" else torch.promote_types(X.dtype, torch.float32)

    def one(X: Tensor, *delta: Tensor, out: Tensor) -> None:
        for start in range(0, X.shape[0], TOKENS):
            Y = X[start : start + TOKENS].to(dtype)
            add_gram(Y @ delta[0].to(dtype).mT if delta else Y, out)
        mirror(out)

    inputs = [matrices(X)] if delta is None else [matrices(X), matrices(delta)]
    side_by_side(one, *inputs, out=matrices(out))
    return out


def project_scale(Q: Tensor, W: Tensor, *, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """One product per task, scaled on its way into its rows of the result."""
    batch, (T, s), n = Q.shape[:-3], row_scale.shape[-2:], W.shape[-1]
    C = Q.new_empty(*batch, T * s, n)

    def one(Q: Tensor, W: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        torch.mul(Q.mT @ W, scale[:, None], out=out)
        return out.square().sum(0, dtype=torch.float64)

    scales = row_scale.reshape(-1, s).unbind()
    squares = side_by_side(one, matrices(Q), matrices(W), scales, out=matrices(C.view(*batch, T, s, n)))
    return C, torch.stack(squares).reshape(*batch, T, n).sum(-2)


def delta_sum(tuned: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `PIECE` elements at a time, all their tasks in turn, while the base and the sum are in the cache."""
    batch, (T, m, n) = base.shape[:-2], tuned.shape[-3:]
    dtype = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), torch.float32)
    rows = max(1, PIECE // n) if base.device.type == "cpu" else m

    def one(tuned: Tensor, base: Tensor, out: Tensor) -> Tensor:
        base = base.to(dtype)
        delta = torch.sub(tuned[0], base, out=out)
        squares = [_square(delta)]
        for task in tuned[1:]:
            delta = task - base
            squares.append(_square(delta))
            out += delta
        return torch.stack([*squares, _square(out)])

    def pieces(stack: Tensor) -> list[Tensor]:
        return [piece for matrix in stack for piece in matrix.split(rows, dim=-2)]

    total = torch.empty(base.shape, dtype=dtype, device=base.device)
    inputs = pieces(tuned.reshape(-1, T, m, n)), pieces(base.reshape(-1, m, n))
    squares = torch.zeros(batch.numel(), T + 1, dtype=torch.float64, device=base.device)
    for i, part in enumerate(side_by_side(one, *inputs, out=pieces(total.view(-1, m, n)))):
        squares[i // -(-m // rows)] += part  # in this order, whatever is batched
    norms = squares.sqrt_()
    return total, norms[:, :T].reshape(*batch, T), norms[:, T].reshape(batch)


def finalize(base: Tensor, update: Tensor, *, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The product, rounded; the base added in place."""
    dtype = torch.promote_types(torch.promote_types(base.dtype, update.dtype), torch.float32)
    return (update * scale.to(dtype)[..., None, None]).add_(base).to(out_dtype)


def subtract(
    base: Tensor, tuned: Iterable[Tensor], *, weights: Sequence[float], reduction: str, base_out: Tensor, out: Tensor
) -> float:
    """One task after the other, each tensor of `tuned` taken when its turn comes."""
    reduced = reduction != "none"
    base_out.copy_(base)
    other = torch.empty_like(base_out)  # the sum beside the deltas, or the next delta beside their sum
    total = out[0] if reduced else other
    for t, (values, weight) in enumerate(zip(tuned, weights, strict=True)):
        target = other if reduced and t else out[0 if reduced else t]
        target.copy_(values).sub_(base_out)
        if weight != 1.0:
            target.mul_(weight)
        if t:
            total += target
        elif not reduced:
            total.copy_(target)
    square = frobenius(total) ** 2
    if reduction == "mean":
        total /= len(weights)
    return square


def frobenius(A: Tensor) -> float:
    """Summed in float64 only where the squares leave the range of A's own dtype."""
    norm = float(torch.linalg.vector_norm(A, dtype=torch.promote_types(A.dtype, torch.float32)))
    return norm if norm and math.isfinite(norm) else float(torch.linalg.vector_norm(A, dtype=torch.float64))


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B, each matrix of the stack by one thread: the bits do not depend on the batch."""
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    A, B = A.expand(*batch, *A.shape[-2:]), B.expand(*batch, *B.shape[-2:])
    products = side_by_side(torch.mm, matrices(A), matrices(B))
    return torch.stack(products).reshape(*batch, A.shape[-2], B.shape[-1])


# ---------------------------------------------------------------------------------------------- one matrix


def _square(A: Tensor) -> Tensor:
    """||A||_F², summed in float64."""
    return torch.linalg.vector_norm(A, dtype=torch.float64).square()


class _Factored(NamedTuple):
    """polar(A) of a tall A: A V diag(1 / σ) Vᵀ + left rightᵀ, the latter for directions solved in float64."""

    outer: Tensor  # A; without `resolved` the factor itself [m, n]
    resolved: tuple[Tensor, Tensor] | None  # V [n, j], 1 / σ [j]
    least: tuple[Tensor, Tensor] | None  # left [m, d], right [n, d]
    nuclear_norm: Tensor
    rank: Tensor

    def factor(self) -> Tensor:
        if self.resolved is None:
            return self.outer
        factor = self.outer @ _root(*self.resolved)
        return factor if self.least is None else factor.addmm_(self.least[0], self.least[1].mT)

    def times(self, X: Tensor) -> Tensor:
        """polar(A) X, in the order that costs least: the factor is formed only where X has more columns than A rows."""
        (m, n), c = self.outer.shape, X.shape[1]
        if self.resolved is None or c > m:
            return self.factor() @ X
        V, inverse = self.resolved
        inner = _root(V, inverse) @ X if 2 * c > n else V @ (inverse[:, None] * (V.mT @ X))
        product = self.outer @ inner
        return product if self.least is None else product.addmm_(self.least[0], self.least[1].mT @ X)


def _root(V: Tensor, values: Tensor) -> Tensor:
    """V diag(values) Vᵀ, of which half is computed."""
    return gram((V * values.sqrt()).mT)


def _polar(A: Tensor, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = A.shape[0] < A.shape[1]
    result = _factored(A.mT if wide else A, rtol, precision)
    factor = result.factor()
    return factor.mT if wide else factor, result.nuclear_norm, result.rank


def _polar_product(A: Tensor, scale: Tensor, B: Tensor, rtol: float, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    (m, q), n = A.shape, B.shape[1]
    a = _factored(A if m >= q else A.mT, rtol, precision)
    b = _factored(B if n <= q else B.mT, rtol, precision)
    norms, ranks = torch.stack([a.nuclear_norm, b.nuclear_norm]), torch.stack([a.rank, b.rank])
    if n > q and m < n:
        left = (a.factor() if m >= q else a.factor().mT) * scale
        return b.times(left.mT).mT, norms, ranks
    right = scale[:, None] * (b.factor() if n <= q else b.factor().mT)
    return a.times(right) if m >= q else a.factor().mT @ right, norms, ranks


def _factored(A: Tensor, rtol: float, precision: str) -> _Factored:
    m, n = A.shape
    if A.dtype == torch.float32 and precision != "exact" and (m >= 2 * n or n >= MIXED_MIN_SQUARE):
        result = _factored_mixed(A, rtol, TOLERANCE[precision])
        if result is not None:
            return result
    factor, nuclear_norm, rank = polar_by_eigenvectors(A, rtol, TOLERANCE[precision])
    return _Factored(factor, None, None, nuclear_norm, rank)


def _factored_mixed(A: Tensor, rtol: float, tolerance: float) -> _Factored | None:
    """The float32 factor, its d least directions solved in float64; None where those are more than a third.

    B V D^(-1/2) Vᵀ splits into the well-resolved directions, a product in float32, and the d others, for which B X is
    computed in float64: its own small Gram resolves singular values down to 1e-8 of the largest.
    """
    r = A.shape[1]
    values, V = eigh(gram(A))
    d = unresolved(values, noise(A.dtype), tolerance)
    if d > r // 3:
        return None
    S = values[d:].sqrt()
    block, V, inverse = V[:, :d], V[:, d:], S.reciprocal()
    if d == 0:
        return _Factored(A, (V, inverse), None, S.double().sum(), torch.tensor(r, device=A.device))
    B = A.double()
    X, V = decoupled(lambda X: times(B.mT, times(B, X)), values[d:], block, V)
    Y = times(B, X)
    squares, W = eigh(gram(Y))
    least = squares.clamp_min(0).sqrt()
    kept = least > rtol * S[-1]
    below = torch.where(kept, least.reciprocal(), 0)
    pair = (Y @ (W * below)).to(A.dtype), (X @ W).to(A.dtype)
    return _Factored(A, (V, inverse), pair, S.double().sum() + (least * kept).sum(), kept.sum() + r - d)


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
        squares, W = eigh(gram(Y.double()))
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


def _principal(M: Tensor, delta: Tensor | None, k: int, rtol: float) -> tuple[Tensor, Tensor]:
    dtype = M.dtype if delta is None else torch.promote_types(M.dtype, delta.dtype)
    M = M.double()
    if delta is None or delta.shape[0] <= delta.shape[1]:
        C = M if delta is None else (D := delta.double()) @ M @ D.mT
        values, V = leading_eigenvectors(C, k)
        values, V = values[-k:].flip(0), V.flip(1)
    else:
        D = delta.double()
        L = _square_root(M)
        count = min(k, D.shape[1])
        values, W = leading_eigenvectors(L.mT @ (gram(D) @ L), count)
        values, W = values.flip(0), W.flip(1)
        V = times(D, times(L, W) * values[:count].clamp_min(torch.finfo(dtype).tiny).rsqrt())
        values, V = (torch.nn.functional.pad(part[..., :count], (0, k - count)) for part in (values, V))
    values = torch.where(values > rtol * values[:1], values, 0)
    return (V * (values > 0)).to(dtype), values


def _square_root(M: Tensor) -> Tensor:
    """L with L Lᵀ = M for a positive semi-definite M: Cholesky, or by eigenvectors where M is singular to rounding."""
    L, failed = torch.linalg.cholesky_ex(M)
    if not bool(failed):
        return L
    values, V = eigh(M)
    return V * values.clamp_min(0).sqrt()


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
