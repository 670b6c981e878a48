"""Leading eigenvectors of stacks of Gram matrices, in float64, for devices where every wait of the host costs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from isomerge.backends import cuda, iterations
from isomerge.backends.iterations import BLOCK_OVERSAMPLING
from isomerge.backends.primitives import Primitives

KRYLOV_MIN_SIDE, KRYLOV_MAX_SHARE = 1024, 1 / 32
"""Block Krylov answers when r >= the first and k / r <= the second. There the eigensolve of a cycle, of side
12 (k + 8), is at most 0.47 r at r = 1024 and 0.4 r at 4096, and takes 6 to 22 % of the time of one of side r, which
grows with r³ where arithmetic bounds it and with r² where memory does. At k = r / 16 it would be of side 0.8 r."""

BLOCKS = 12
"""Krylov blocks of a cycle: flat spectra take twelve of twice the rank for six digits, of fewer columns some cycles."""

CYCLES = 6
"""By then their eigensolves have taken 0.4 to 1.3 times as long as one of side r, which is to answer instead."""

NOISE = 1e-6
"""Added to the unit columns of a Krylov block: what rank deficiency leaves of them is a random direction, and the Gram
of the block has eigenvalues of 1e-12, above its rounding in float64. It costs at most one cycle: a cycle reduces the
residual by no more than this factor."""

ROUNDING = 1e-12
"""A column whose part outside of the space is below this share of ||G V|| leaves the space by rounding alone."""


def leading(X: Tensor, k: int, primitives: Primitives, *, tol: float, seed: int) -> Tensor:
    """Orthonormal eigenvectors [B, r, k] of X Xᵀ to its k largest eigenvalues, descending; X [B, r, p] float64.

    Block Krylov for few of many; for all others, and for the matrices on which it is slow, an eigensolve of side r.
    Waits: those of one `eigh` or of `block_krylov`, or of both.
    """
    r = X.shape[-2]
    if not (r >= KRYLOV_MIN_SIDE and k <= KRYLOV_MAX_SHARE * r):
        return eigh(primitives.gram(X, format="fp64"))[1][..., r - k :].flip(-1)
    V, converged = block_krylov(X, k, tol=tol, seed=seed)
    rest = [i for i, done in enumerate(converged) if not done]
    if rest:
        V[rest] = eigh(primitives.gram(X[rest], format="fp64"))[1][..., r - k :].flip(-1)
    return V


def block_krylov(X: Tensor, k: int, *, tol: float, seed: int) -> tuple[Tensor, list[bool]]:
    """Ritz vectors [B, r, k] of G = X Xᵀ, and for each matrix whether ||G v - theta v|| <= tol theta_1 for all of them.

    Block Lanczos with full re-orthogonalisation from one random block for all, restarted with the Ritz vectors. G is
    never formed; V and G V are kept, so Ritz pairs and residuals are exact whatever the space. A matrix keeps the
    vectors with which it converged. b = k + 8 columns a step, d <= 12 b dimensions, of which V and G V take 16 r d
    bytes; FLOP of a step: 4 r p b to multiply, 8 r d b to orthogonalise. Random numbers are those of the device.
    Waits: those of one `eigh` and one more in each of at most `CYCLES` cycles.
    """
    B, r = X.shape[:2]
    b = min(r, k + BLOCK_OVERSAMPLING)
    generator = torch.Generator(X.device).manual_seed(seed)
    start = torch.randn(r, b, dtype=X.dtype, device=X.device, generator=generator).expand(B, r, b)
    result, converged = X.new_empty(B, r, k), torch.zeros(B, dtype=torch.bool, device=X.device)
    for _ in range(CYCLES):
        V = block = orthonormal(start)
        products = [X @ (X.mT @ block)]
        floor = ROUNDING * torch.linalg.matrix_norm(products[0])[:, None, None]
        for _ in range(1, min(BLOCKS, r // b)):
            block = products[-1] - V @ (V.mT @ products[-1])
            norms = torch.linalg.vector_norm(block, dim=-2, keepdim=True)
            noise = torch.randn(r, b, dtype=X.dtype, device=X.device, generator=generator) * (NOISE / math.sqrt(r))
            block = orthonormal(torch.where(norms > floor, block / norms, 0) + noise)
            block = orthonormal(block - V @ (V.mT @ block))
            V = torch.cat([V, block], dim=-1)
            products.append(X @ (X.mT @ block))
        GV = torch.cat(products, dim=-1)
        H = V.mT @ GV
        values, W = eigh(((H + H.mT) / 2).nan_to_num())  # NaN where Cholesky failed: such a matrix does not converge
        values, W = values[:, None, -b:].flip(-1), W[..., -b:].flip(-1)
        start = V @ W
        residuals = torch.linalg.vector_norm((GV @ W - start * values)[..., :k], dim=-2)
        result = torch.where(converged[:, None, None], result, start[..., :k])
        converged = converged | (residuals.amax(-1) <= tol * values[:, 0, 0])
        if bool(converged.all()):
            break
    return result, converged.tolist()


def orthonormal(X: Tensor) -> Tensor:
    """Orthonormal columns that span those of X [B, r, b] float64, by CholeskyQR2: condition numbers to 1e7."""
    for _ in range(2):
        X = X @ cholesky_inverse(X.mT @ X).mT
    return X


def cholesky_inverse(G: Tensor) -> Tensor:
    """L⁻¹ [B, s, s] of L Lᵀ = G + 1e-15 tr(G) I; NaN where that is not positive definite. No wait.

    One thread block for a matrix by the CUDA extension, where it is built and s <= 128; else two calls of torch.
    """
    if G.device.type == cuda.DEVICE and G.shape[-1] <= cuda.MAX_SIDE and cuda.availability() is None:
        return cuda.cholesky_inverse(G).inverse
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    shift = 1e-15 * G.diagonal(dim1=-2, dim2=-1).sum(-1)
    L, failed = torch.linalg.cholesky_ex(G + shift[:, None, None] * identity)
    inverse = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
    return torch.where((failed == 0)[:, None, None], inverse, torch.nan)


def eigh(G: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [B, r], ascending, and eigenvectors [B, r, r] of symmetric G [B, r, r] float64, whatever its rank.

    Waits twice, in torch for the solver's word that it succeeded and here for whether it is true; what is left unsolved
    is solved again, one matrix after the other.
    """
    try:
        values, V = torch.linalg.eigh(G)
        solved = (values.sum(-1) + V.sum((-2, -1))).isfinite().tolist()
    except torch.linalg.LinAlgError:  # which says nothing of the others
        values, V, solved = G.new_empty(G.shape[:-1]), torch.empty_like(G), [False] * len(G)
    for i, done in enumerate(solved):
        if not done:
            values[i], V[i] = iterations.eigh(G[i])
    return values, V


def square_root(M: Tensor) -> Tensor:
    """L with L Lᵀ = M [B, n, n] positive semi-definite: Cholesky, or eigenvectors where M is singular to rounding.

    Waits once, and for those eigenvectors.
    """
    L, failed = torch.linalg.cholesky_ex(M)
    singular = [i for i, pivot in enumerate(failed.tolist()) if pivot]
    if singular:
        values, V = eigh(M[singular])
        L[singular] = V * values.clamp_min(0).sqrt().unsqueeze(-2)
    return L
