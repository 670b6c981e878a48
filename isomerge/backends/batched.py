"""The spectral ops on whole stacks [..., m, n] at once, for devices where every wait of the host costs.

Batched products, eigensolves and factorizations of torch, and the polar iteration, over the `Primitives` of a device;
nothing walks through a stack but what an iteration or an eigensolver leaves unsolved. Calling convention of
`reference.py`, with the primitives as a further argument. r is the size of the small side of a matrix, p of the other.

Eigenproblems are those of Gram matrices, formed and solved in float64 whatever the precision asked for: on an H200
float64 products run at the rate of IEEE float32 ones, and singular values are resolved down to 1e-8 of the largest.
What a matrix gives does not depend on what it is batched with, but for the bits of products, whose library may choose
by the size of the batch, and for the polar factor, whose schedule is that of the worst-conditioned matrix of a stack.

The host waits for the device where a docstring says so, as often for a stack as for one matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from isomerge.backends.batched_eigen import eigh, leading, square_root
from isomerge.backends.polar_iteration import polar
from isomerge.backends.primitives import Primitives, float32_products

SUBSPACE_TOL = 1e-9
"""Of the Ritz residuals, relative to lambda_1, for bases that are given away without singular values."""

PART_BYTES = 256 * 2**20
"""Of the float64 copies of a stack that are worked on at a time; Grams, bases and solvers take five times as much
beside. 56 matrices of 768 x 768 fill the chip, and of 4096 x 14336 a single one does."""

TOKENS = 2048
"""Whose shifts are stored at a time in float64: 235 MB at d = 14336."""


def polar_product(
    A: Tensor, B: Tensor, primitives: Primitives, *, scale: Tensor, rtol: float, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """polar(A) diag(scale) polar(B) [..., m, n]; Σ σ_i and ρ of A and of B [..., 2]; A [..., m, q], B [..., q, n].

    Two iterations, and one IEEE product of 2 m q n FLOP. A longer factor [p, q] is formed: to multiply by its matrix
    and its square part instead would save at most 2 q² (p - q) FLOP in the first format of its iteration, for p = 4 q
    a sixth of its cost, and only where all matrices of the stack are iterated. Waits: those of two `polar`.
    """
    left, left_norm, left_rank = polar(A, primitives, rtol=rtol, precision=precision)
    right, right_norm, right_rank = polar(B, primitives, rtol=rtol, precision=precision)
    norms, ranks = torch.stack([left_norm, right_norm], -1), torch.stack([left_rank, right_rank], -1)
    dtype = torch.promote_types(left.dtype, right.dtype)  # each that of the last format it was computed in
    return matmul(left.to(dtype) * scale.to(dtype).unsqueeze(-2), right.to(dtype)), norms, ranks


def rsvd(
    A: Tensor,
    k: int,
    primitives: Primitives,
    *,
    deflate: Tensor,
    rtol: float,
    atol: Tensor,
    tol: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leading k triplets U [..., m, k], S [..., k] float64, Vh [..., k, n] of R = (I - QQᵀ) A, Q = `deflate`.

    Eigenvectors V of R's small-side Gram, and their images Y = σ times the singular vectors of the other side: no
    second eigenproblem, as the columns of Y are orthogonal to 1e-15 σ_1². R takes the place of A's float64 copy.
    FLOP beside `leading`: 2 r p k, and 4 m n q for a Q of q columns. Waits, for each part: those of `leading`.
    """
    batch, (m, n) = A.shape[:-2], A.shape[-2:]

    def of_part(part: slice) -> tuple[Tensor, ...]:
        X = _stack(A)[part].double()
        if deflate.shape[-1]:
            Q = torch.stack([deflate[i] for i in list(product(*map(range, batch)))[part]]).double()
            X = torch.baddbmm(X, Q, Q.mT @ X, alpha=-1)
        X = X if m <= n else X.mT  # [B, r, p]
        V = leading(X, k, primitives, tol=tol, seed=seed)
        Y = X.mT @ V
        S = torch.linalg.vector_norm(Y, dim=-2)
        S, order = S.sort(dim=-1, descending=True, stable=True)  # eigenvalues order them only to 1e-15 sigma_1²
        V, Y = (torch.take_along_dim(columns, order.unsqueeze(-2), dim=-1) for columns in (V, Y))
        kept = (S > rtol * S[:, :1]) & (S > atol.reshape(-1, 1)[part])
        Y = Y * torch.where(kept, S.reciprocal(), 0).unsqueeze(-2)
        U, W = (V, Y) if m <= n else (Y, V)
        return U.to(A.dtype), torch.where(kept, S, 0), W.mT.to(A.dtype)

    U, S, Vh = _in_parts(of_part, batch.numel(), m * n)
    return U.reshape(*batch, m, k), S.reshape(*batch, k), Vh.reshape(*batch, k, n)


def subspace(A: Tensor, k: int, primitives: Primitives, *, full: bool) -> Tensor:
    """Orthonormal [..., m, k], the leading k left singular vectors of A, completed; with `full` [..., m, m].

    For m <= n eigenvectors of A Aᵀ. For m > n those of AᵀA times A; random vectors take the place of null ones and of
    what is beyond n, and a Householder QR makes the columns orthonormal, each to all before. Waits: `leading`.
    """
    (m, n), columns = A.shape[-2:], A.shape[-2] if full else k
    X = _stack(A).double()
    if m <= n:
        Q = leading(X, columns, primitives, tol=SUBSPACE_TOL, seed=0)
    else:
        Y = X @ leading(X.mT, min(k, n), primitives, tol=SUBSPACE_TOL, seed=0)
        S = torch.linalg.vector_norm(Y, dim=-2, keepdim=True)
        kept = S > m * torch.finfo(A.dtype).eps * S[..., :1]
        fill = _normal(X, m, columns, seed=0).expand(len(X), m, columns)
        count = Y.shape[-1]
        Y = torch.where(kept, Y / S, fill[..., :count])
        Q = torch.linalg.qr(torch.cat([Y, fill[..., count:]], dim=-1)).Q
    return Q.to(A.dtype).reshape(*A.shape[:-1], columns)


def principal(
    moment: Tensor, k: int, primitives: Primitives, *, delta: Tensor | None, rtol: float
) -> tuple[Tensor, Tensor]:
    """Leading eigenvectors [..., m, k] and eigenvalues [..., k] float64 of M = `moment` or Δ M Δᵀ, zero where null.

    For m <= n an eigensolve of Δ M Δᵀ itself; for m > n one of Lᵀ ΔᵀΔ L [n, n], where M = L Lᵀ.
    FLOP: 2 m n (m + n) or 5 m n² beside it. Waits, for each part: those of one `eigh`; for m > n once more for
    Cholesky's answer, and those of another `eigh` where a moment is singular to rounding.
    """
    batch = moment.shape[:-2]
    dtype = moment.dtype if delta is None else torch.promote_types(moment.dtype, delta.dtype)

    def of_part(part: slice) -> tuple[Tensor, ...]:
        M, D = _stack(moment)[part].double(), None if delta is None else _stack(delta)[part].double()
        if D is None or D.shape[-2] <= D.shape[-1]:
            values, V = eigh(M if D is None else D @ M @ D.mT)
            values, V = values[:, -k:].flip(-1), V[..., -k:].flip(-1)
        else:
            L = square_root(M)
            values, W = eigh(L.mT @ primitives.gram(D.mT, format="fp64") @ L)
            values, W = values.flip(-1)[:, :k], W.flip(-1)[..., :k]
            inverse = torch.where(values > 0, values, torch.inf).rsqrt()
            V = D @ (L @ W) * inverse.unsqueeze(-2)
            values, V = (torch.nn.functional.pad(columns, (0, k - columns.shape[-1])) for columns in (values, V))
        values = torch.where(values > rtol * values[:, :1], values, 0)
        return (V * (values > 0).unsqueeze(-2)).to(dtype), values

    sides = (moment.shape[-1] if delta is None else max(delta.shape[-2:]), moment.shape[-1])
    V, values = _in_parts(of_part, batch.numel(), sides[0] * sides[1])
    return V.reshape(*batch, *V.shape[-2:]), values.reshape(*batch, k)


def shift_cov(X: Tensor, delta: Tensor | None, primitives: Primitives, *, out: Tensor) -> Tensor:
    """out + YᵀY in float64, Y = X or X Δᵀ, in `out`; `TOKENS` at a time. FLOP: N d², with a delta 2 N m n more."""
    for chunk in X.split(TOKENS, dim=-2):
        Y = chunk.double() if delta is None else chunk.double() @ delta.double().mT
        out += primitives.gram(Y.mT, format="fp64").to(out.dtype)
    return out


def project_scale(Q: Tensor, W: Tensor, *, row_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Rows row_scale[t, i] (Q_tᵀ W_t)[i] [..., T s, n], and the sums of squares of their columns [..., n]; float64."""
    C = (row_scale.double().unsqueeze(-1) * (Q.double().mT @ W.double())).flatten(-3, -2)
    return C, C.square().sum(-2)


def matmul(A: Tensor, B: Tensor) -> Tensor:
    """A B [..., m, n] in IEEE arithmetic, float32 or float64, whatever the program allows elsewhere."""
    with float32_products("ieee", A.device):
        return A @ B


def _in_parts(compute: Callable[[slice], tuple[Tensor, ...]], count: int, elements: int) -> tuple[Tensor, ...]:
    """What `compute` gives for part after part of `count` matrices, put together: `PART_BYTES` at a time, one at least.

    What a part is depends on the stack alone, not on the memory there is.
    """
    most = max(1, PART_BYTES // (8 * elements))
    results = [compute(slice(start, start + most)) for start in range(0, count, most)]
    return results[0] if len(results) == 1 else tuple(map(torch.cat, zip(*results, strict=True)))


def _stack(A: Tensor) -> Tensor:
    """A [..., m, n] as [B, m, n]."""
    return A.reshape(A.shape[:-2].numel(), *A.shape[-2:])


def _normal(like: Tensor, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
