"""The public ops: linear algebra on stacks of matrices, without SVDs, on interchangeable backends.

Notation, one letter, one meaning everywhere: A [..., m, n] a stack of matrices (out x in), r = min(m, n), k the
kept rank, sigma_1 >= sigma_2 >= ... singular values, rho the numerical rank, Q orthonormal columns.

All ops work on any leading dimensions, take float16, bfloat16, float32 or float64, never modify an input, and return
float32 (float64 for float64 input). Half precisions are computed in float32 from the exact input values.

`precision` bounds the relative Frobenius error of the result: "fast" 2e-2, "default" no worse than twice the float32
`torch.linalg.svd` of the same matrix or 1e-4, "exact" float64 accumulation. `backend` is "auto", "eager" or
"reference" (float64, by definition); a named backend runs or raises `BackendUnavailable`.

A singular value at or below `rtol` * sigma_1 of its own matrix is null: it counts as zero, and its direction gets no
energy. The default is `RANK_RTOL`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from isomerge.backends import BackendUnavailable, resolve

__all__ = [
    "RANK_RTOL",
    "SVD",
    "BackendUnavailable",
    "Polar",
    "PolarProduct",
    "matmul",
    "polar",
    "polar_product",
    "rsvd",
    "subspace",
]

RANK_RTOL = 8 * torch.finfo(torch.float32).eps
"""Default null threshold, 9.5e-7, whatever the size. Rounding leaves noise of 0.4 eps * sigma_1 in float32 sums of
low-rank updates, and of 2.2 eps * sigma_1 when a LoRA was merged into float32 weights before (64 to 3072 rows, 2 to
20 tasks). The least true direction met in sums of eight real fine-tuned updates is at 20 eps * sigma_1; a threshold of
max(m, n) eps, as for matrices of unknown origin, would cut it off and move Iso-C by 5 %."""

PRECISIONS = ("fast", "default", "exact")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Polar(NamedTuple):
    """`factor` U_ρ V_ρᵀ [..., m, n], `nuclear_norm` Σ_{i<=ρ} σ_i [...], `rank` ρ [...] (int64)."""

    factor: Tensor
    nuclear_norm: Tensor
    rank: Tensor


class PolarProduct(NamedTuple):
    """`product` [..., m, n]; the nuclear norms `left_norm` and `right_norm` [...] of the two matrices."""

    product: Tensor
    left_norm: Tensor
    right_norm: Tensor


class SVD(NamedTuple):
    """Leading triplets: `U` [..., m, k], `S` [..., k] descending, `Vh` [..., k, n]."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def polar(A: Tensor, *, rtol: float = RANK_RTOL, precision: str = "default", backend: str = "auto") -> Polar:
    """U_ρ V_ρᵀ, the canonical polar factor over the numerical rank ρ of A = U diag(σ) Vᵀ.

    It is the nearest partial isometry to A, unique, zero for a zero matrix; <factor, A> = nuclear_norm.

    A: [..., m, n]. Cost on a CPU: m n r for the Gram matrix, about 9 r³ for its eigensolve, 2 m n r for the product.
    Raises ValueError for a non-floating, non-finite or less than two-dimensional A or an unknown precision or backend.
    """
    _check("polar", A, precision)
    B, scale = _scaled("polar", A)
    if B.numel() == 0:
        batch = A.shape[:-2]
        return Polar(torch.zeros_like(B), B.new_zeros(batch), torch.zeros(batch, dtype=torch.int64, device=A.device))
    factor, nuclear_norm, rank = resolve("polar", backend, A)(B, rtol=rtol, precision=precision)
    return Polar(factor.to(B.dtype), (nuclear_norm * scale).to(B.dtype), rank)


def polar_product(
    A: Tensor,
    B: Tensor,
    *,
    scale: Tensor | None = None,
    rtol: float = RANK_RTOL,
    precision: str = "default",
    backend: str = "auto",
) -> PolarProduct:
    """polar(A) diag(scale) polar(B): two bases whitened, and multiplied; each factor as in `polar`.

    The way in which the concatenated subspaces of several tasks become one update. Cheaper than two calls of `polar`
    and a product: the factor of the longer matrix is never formed.

    A: [..., m, q], B: [..., q, n] and scale [..., q] of the same leading dimensions. Cost on a CPU: one eigensolve for
    each, m q n for the product, and q² times the shortest side of m, n. Raises ValueError as `polar`, and for shapes
    that do not match.
    """
    _check("polar_product", A, precision)
    _check("polar_product", B, precision)
    batch, q = A.shape[:-2], A.shape[-1]
    if B.shape[:-1] != (*batch, q) or (scale is not None and scale.shape != (*batch, q)):
        got = "" if scale is None else f" and scale {tuple(scale.shape)}"
        raise ValueError(
            f"polar_product: expected A [..., m, q], B [..., q, n] and scale [..., q], got {tuple(A.shape)}, "
            f"{tuple(B.shape)}{got}"
        )
    left, left_scale = _scaled("polar_product", A)
    right, right_scale = _scaled("polar_product", B)
    dtype = torch.promote_types(left.dtype, right.dtype)
    if batch.numel() * A.shape[-2] * q * B.shape[-1] == 0:
        zeros = left.new_zeros(batch, dtype=dtype)
        return PolarProduct(left.new_zeros(*batch, A.shape[-2], B.shape[-1], dtype=dtype), zeros, zeros)
    scale = left.new_ones(*batch, q, dtype=dtype) if scale is None else scale.to(dtype)
    compute = resolve("polar_product", backend, A)
    product, left_norm, right_norm = compute(
        left.to(dtype), right.to(dtype), scale=scale, rtol=rtol, precision=precision
    )
    return PolarProduct(product.to(dtype), (left_norm * left_scale).to(dtype), (right_norm * right_scale).to(dtype))


def rsvd(
    A: Tensor,
    k: int,
    *,
    deflate: Tensor | None = None,
    rtol: float = RANK_RTOL,
    atol: Tensor | None = None,
    tol: float = 1e-6,
    seed: int = 0,
    precision: str = "default",
    backend: str = "auto",
) -> SVD:
    """The leading k singular triplets of A, or of (I - QQᵀ) A with Q = `deflate` [..., m, q], without forming it.

    U and Vh are orthonormal; S is exactly 0 for null directions, whose vectors complete the basis of the smaller side
    and are zero on the larger one (on the right for square A), so U diag(S) Vh is unaffected. Null is what is at or
    below max(rtol * sigma_1, atol); `atol` [...] serves matrices that are themselves the rest of a larger one.

    One eigensolve of the r x r Gram matrix where that is cheapest; for k much smaller than r, block Krylov with full
    re-orthogonalisation (Musco & Musco 2015; Tropp & Webber 2023), started from `seed`, stopped when the residual of
    every Ritz pair of AᵀA is at most tol * sigma_1². Plain power iteration does not resolve the flat spectra of weight
    updates. A: [..., m, n], 0 <= k <= r.
    Raises ValueError as `polar`, and for k out of range or a `deflate` of another shape.
    """
    _check("rsvd", A, precision)
    m, n = A.shape[-2:]
    if not 0 <= k <= min(m, n):
        raise ValueError(f"rsvd: k must be within 0..min(m, n) = {min(m, n)} for A of shape {tuple(A.shape)}, got {k}")
    if deflate is not None and (deflate.shape[-2] != m or deflate.dim() < 2):
        raise ValueError(f"rsvd: deflate must be [..., {m}, q], got {tuple(deflate.shape)}")
    B, scale = _scaled("rsvd", A)
    batch = A.shape[:-2]
    if B.numel() == 0 or k == 0:
        return SVD(B.new_zeros(*batch, m, k), B.new_zeros(*batch, k), B.new_zeros(*batch, k, n))
    floor = B.new_zeros(batch, dtype=torch.float64) if atol is None else atol.double().expand(batch) / scale
    Q = B.new_zeros(*batch, m, 0) if deflate is None else deflate.to(B.dtype).expand(*batch, *deflate.shape[-2:])
    U, S, Vh = resolve("rsvd", backend, A)(
        B, k, deflate=Q, rtol=rtol, atol=floor, tol=tol, seed=seed, precision=precision
    )
    return SVD(U.to(B.dtype), (S * scale.unsqueeze(-1)).to(B.dtype), Vh.to(B.dtype))


def subspace(
    A: Tensor, k: int, *, side: str = "left", full: bool = False, precision: str = "default", backend: str = "auto"
) -> Tensor:
    """Orthonormal basis Q [..., m, k] of the dominant k-dimensional left subspace of A, or [..., n, k] for "right".

    The columns are singular vectors, leading first. Where A has fewer than k of them, the basis is completed
    arbitrarily. With `full`, further columns span the orthogonal complement: Q is square.
    A: [..., m, n], 0 <= k <= m ("left") or n ("right"). Raises ValueError as `rsvd`, and for an unknown side.
    """
    _check("subspace", A, precision)
    if side not in ("left", "right"):
        raise ValueError(f'subspace: side must be "left" or "right", got {side!r}')
    B, _ = _scaled("subspace", A if side == "left" else A.mT)
    m, n = B.shape[-2:]
    if not 0 <= k <= m:
        raise ValueError(f"subspace: k must be within 0..{m} for A of shape {tuple(A.shape)}, side {side}, got {k}")
    columns = m if full else k
    if B.shape[:-2].numel() == 0 or n == 0 or columns == 0:
        return torch.eye(m, columns, dtype=B.dtype, device=B.device).expand(*B.shape[:-2], m, columns).clone()
    Q: Tensor = resolve("subspace", backend, A)(B, k, full=full, precision=precision)
    return Q.to(B.dtype)


def matmul(A: Tensor, B: Tensor, *, backend: str = "auto") -> Tensor:
    """A B for stacks [..., m, l] and [..., l, n] whose leading dimensions broadcast.

    Unlike `torch.matmul`, the bits of each product do not depend on how many it is batched with.
    Raises ValueError for shapes that do not match.
    """
    if A.dim() < 2 or B.dim() < 2 or A.shape[-1] != B.shape[-2]:
        raise ValueError(f"matmul: expected [..., m, l] and [..., l, n], got {tuple(A.shape)} and {tuple(B.shape)}")
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    if batch.numel() * A.shape[-2] * A.shape[-1] * B.shape[-1] == 0:
        return A.new_zeros(*batch, A.shape[-2], B.shape[-1])
    product: Tensor = resolve("matmul", backend, A)(A, B)
    return product.to(dtype)


def _check(op: str, A: Tensor, precision: str) -> None:
    if A.dim() < 2:
        raise ValueError(f"{op}: expected A of shape [..., m, n], got {tuple(A.shape)}")
    if A.dtype not in DTYPES:
        raise ValueError(f"{op}: expected float16, bfloat16, float32 or float64, got {A.dtype}")
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _scaled(op: str, A: Tensor) -> tuple[Tensor, Tensor]:
    """A / scale in at least float32, and the scale [...]: 1, or a power of two where squares could leave the range."""
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    if A.numel() == 0:
        return A, A.new_ones(A.shape[:-2])
    largest = torch.maximum(A.amax((-2, -1)), -A.amin((-2, -1)))  # 1/8 of the time of an infinity norm on a CPU
    if not bool(largest.isfinite().all()):
        raise ValueError(f"{op}: A holds {int((~A.isfinite()).sum())} non-finite values")
    extreme = (largest != 0) & ((largest < 2.0**-40) | (largest > 2.0**40))
    if not bool(extreme.any()):
        return A, torch.ones_like(largest)
    scale = torch.where(extreme, torch.exp2(torch.floor(torch.log2(largest.double()))), 1.0)
    return (A.double() / scale[..., None, None]).to(A.dtype), scale.to(torch.float64)
