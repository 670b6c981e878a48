"""The public ops: linear algebra on stacks of matrices, without SVDs, on interchangeable backends.

Notation, one letter, one meaning everywhere: A [..., m, n] a stack of matrices (out x in), r = min(m, n), k the
kept rank, sigma_1 >= sigma_2 >= ... singular values, rho the numerical rank, Q orthonormal columns.

All ops work on any leading dimensions, take float16, bfloat16, float32 or float64, never modify an input, and return
float32 (float64 for float64 input). Half precisions are computed in float32 from the exact input values.

`precision` bounds the relative Frobenius error of the result: "fast" 2e-2, "default" no worse than twice the float32
`torch.linalg.svd` of the same matrix or 1e-4, "exact" float64 accumulation. `backend` is "auto" or the name of one:
"reference" (float64, by definition), "eager" (any device), "native" (C++ on the CPU, for what waits for memory),
"triton", "cuda"; a named backend runs or raises `BackendUnavailable`.

A singular value at or below `rtol` * sigma_1 of its own matrix is null: it counts as zero, and its direction gets no
energy. The default is `RANK_RTOL`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from isomerge.backends import BackendUnavailable, resolve
from isomerge.backends.selection import DIGITS, Selection

__all__ = [
    "DIGITS",
    "RANK_RTOL",
    "SVD",
    "BackendUnavailable",
    "DeltaSum",
    "Polar",
    "PolarProduct",
    "Selection",
    "count_digits",
    "delta_sum",
    "drop",
    "elect",
    "finalize",
    "frobenius",
    "kth_largest",
    "matmul",
    "polar",
    "polar_product",
    "rsvd",
    "subspace",
    "subtract",
    "votes",
]

RANK_RTOL = 8 * torch.finfo(torch.float32).eps
"""Default null threshold, 9.5e-7, whatever the size. Rounding leaves noise of 0.4 eps * sigma_1 in float32 sums of
low-rank updates, and of 2.2 eps * sigma_1 when a LoRA was merged into float32 weights before (64 to 3072 rows, 2 to
20 tasks). The least true direction met in sums of eight real fine-tuned updates is at 20 eps * sigma_1; a threshold of
max(m, n) eps, as for matrices of unknown origin, would cut it off and move Iso-C by 5 %."""

PRECISIONS = ("fast", "default", "exact")
REDUCTIONS = ("none", "sum", "mean")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Polar(NamedTuple):
    """`factor` U_ρ V_ρᵀ [..., m, n], `nuclear_norm` Σ_{i<=ρ} σ_i [...], `rank` ρ [...] (int64)."""

    factor: Tensor
    nuclear_norm: Tensor
    rank: Tensor


class PolarProduct(NamedTuple):
    """`product` [..., m, n]; of the left and the right matrix the `nuclear_norms` and `ranks` [..., 2]."""

    product: Tensor
    nuclear_norms: Tensor
    ranks: Tensor


class Principal(NamedTuple):
    """Leading eigenpairs: `vectors` [..., m, k], `values` [..., k] descending, both zero for null directions."""

    vectors: Tensor
    values: Tensor


class Projection(NamedTuple):
    """`rows` [..., T s, n] and the sums of squares of their columns, `column_squares` [..., n] (float64)."""

    rows: Tensor
    column_squares: Tensor


class DeltaSum(NamedTuple):
    """`sum` Σ_t Δ_t [..., m, n]; `norms` ||Δ_t||_F [..., T] and `norm` ||Σ_t Δ_t||_F [...], both float64."""

    sum: Tensor
    norms: Tensor
    norm: Tensor


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
        zeros = left.new_zeros(*batch, 2, dtype=dtype)
        return PolarProduct(left.new_zeros(*batch, A.shape[-2], B.shape[-1], dtype=dtype), zeros, zeros.long())
    scale = left.new_ones(*batch, q, dtype=dtype) if scale is None else scale.to(dtype)
    compute = resolve("polar_product", backend, A)
    product, norms, ranks = compute(left.to(dtype), right.to(dtype), scale=scale, rtol=rtol, precision=precision)
    return PolarProduct(product.to(dtype), (norms * torch.stack([left_scale, right_scale], -1)).to(dtype), ranks)


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


def principal(
    moment: Tensor, k: int, *, delta: Tensor | None = None, rtol: float | None = None, backend: str = "auto"
) -> Principal:
    """Leading k eigenvectors and eigenvalues of M = `moment` [..., m, m], or of Δ M Δᵀ with Δ = `delta` [..., m, n].

    With the second moment M = XᵀX [..., n, n] of a layer's inputs these are the uncentred principal directions of the
    feature shifts X Δᵀ, and no shift is ever formed; with the moment of the shifts themselves no delta is needed.

    Null is an eigenvalue at or below rtol times the largest: by default float32's eps for float32 moments, whose own
    rounding is of that size, and RANK_RTOL² for float64. Eigenvectors are computed in float64 on the smaller of the
    two sides, m and n, and returned in the promoted dtype of the inputs; eigenvalues are float64.
    Cost: one eigensolve of side min(m, n), 2 m n min(m, n) beside.
    Raises ValueError as `polar`, for k outside 0..m and for shapes that do not match.
    """
    _check("principal", moment, "default")
    m = moment.shape[-2] if delta is None else delta.shape[-2]
    if moment.shape[-1] != moment.shape[-2] or (delta is not None and delta.shape[:-2] != moment.shape[:-2]):
        given = "" if delta is None else f" and delta {tuple(delta.shape)}"
        raise ValueError(f"principal: moment must be [..., n, n] and symmetric, got {tuple(moment.shape)}{given}")
    if delta is not None and delta.shape[-1] != moment.shape[-1]:
        raise ValueError(
            f"principal: delta must be [..., m, {moment.shape[-1]}], as wide as the moment, got {tuple(delta.shape)}"
        )
    if not 0 <= k <= m:
        raise ValueError(f"principal: k must be within 0..m = {m}, got {k}")
    M, moment_scale = _scaled("principal", moment)
    D, delta_scale = (None, torch.ones_like(moment_scale)) if delta is None else _scaled("principal", delta)
    dtype = M.dtype if D is None else torch.promote_types(M.dtype, D.dtype)
    batch = moment.shape[:-2]
    if batch.numel() * moment.shape[-1] * k == 0:
        return Principal(M.new_zeros(*batch, m, k, dtype=dtype), M.new_zeros(*batch, k, dtype=torch.float64))
    if rtol is None:
        rtol = RANK_RTOL**2 if moment.dtype == torch.float64 else torch.finfo(torch.float32).eps
    vectors, values = resolve("principal", backend, moment)(M, k, delta=D, rtol=rtol)
    return Principal(vectors.to(dtype), values * (moment_scale * delta_scale.square()).double().unsqueeze(-1))


def shift_cov(
    X: Tensor,
    delta: Tensor | None = None,
    *,
    out: Tensor | None = None,
    precision: str = "default",
    backend: str = "auto",
) -> Tensor:
    """YᵀY, the uncentred second moment of Y = X [..., N, n] or of the feature shift Y = X Δᵀ, Δ = `delta` [..., m, n].

    Result [..., d, d] with d = n or m, symmetric to the last bit. `out` is added to and returned, so any split of the
    tokens gives the same moment to rounding; it may be float64 for long sums. Sums run over 512 tokens at a time, so
    the rounding of a sum does not grow with their number (1e6 tokens: below 1e-6); of the shifts those of at most 8192
    tokens are ever stored.
    `precision` "default" multiplies in float32 (float64 for float64 X), "exact" in float64; the result is that of
    `out`, or the dtype of the products. Cost: N d² and, with a delta, 2 N m n.
    Raises ValueError as `polar`, and for shapes or an `out` that do not match; what is non-finite is found in the
    result, so `out` is of no use after that.
    """
    _check("shift_cov", X, precision)
    batch, n = X.shape[:-2], X.shape[-1]
    if delta is not None and (delta.dim() < 2 or delta.shape[-1] != n or delta.shape[:-2] != batch):
        raise ValueError(f"shift_cov: delta must be [..., m, {n}] for X {tuple(X.shape)}, got {tuple(delta.shape)}")
    d = n if delta is None else delta.shape[-2]
    if out is None:
        product = torch.promote_types(X.dtype, torch.float64 if precision == "exact" else torch.float32)
        out = X.new_zeros(*batch, d, d, dtype=product)
    elif out.shape != (*batch, d, d) or out.dtype not in (torch.float32, torch.float64) or out.device != X.device:
        raise ValueError(
            f"shift_cov: out must be {(*batch, d, d)} in float32 or float64 on {X.device}, got {tuple(out.shape)} in "
            f"{out.dtype} on {out.device}"
        )
    if X.numel() == 0 or d == 0:
        return out
    moment: Tensor = resolve("shift_cov", backend, X)(X, delta, out=out, precision=precision)
    if not bool(moment.diagonal(dim1=-2, dim2=-1).sum().isfinite()):  # a pass over X would cost as much as a product
        for name, tensor in (("X", X), ("delta", delta)):
            count = 0 if tensor is None else int((~tensor.isfinite()).sum())
            if count:
                raise ValueError(f"shift_cov: {name} holds {count} non-finite values")
        raise ValueError(f"shift_cov: the moment overflows {moment.dtype}; scale X, or give a float64 `out`")
    return moment


def project_scale(Q: Tensor, W: Tensor, row_scale: Tensor, *, backend: str = "auto") -> Projection:
    """C[t s + i] = row_scale[t, i] (Q_tᵀ W_t)[i]: T projections, scaled by rows and put one below the other.

    Q: [..., T, m, s], W: [..., T, m, n], row_scale: [..., T, s] -> rows [..., T s, n] and Σ_i C[i, j]² [..., n] from
    the same pass. Cost: 2 T m n s. Raises ValueError for shapes that do not match and for non-floating inputs.
    """
    _check("project_scale", Q, "default")
    _check("project_scale", W, "default")
    if Q.dim() < 3 or Q.shape[:-1] != W.shape[:-1] or row_scale.shape != (*Q.shape[:-2], Q.shape[-1]):
        raise ValueError(
            "project_scale: expected Q [..., T, m, s], W [..., T, m, n] and row_scale [..., T, s], got "
            f"{tuple(Q.shape)}, {tuple(W.shape)} and {tuple(row_scale.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(Q.dtype, W.dtype), torch.float32)
    (T, s), n = row_scale.shape[-2:], W.shape[-1]
    if Q.numel() * n == 0:
        rows = Q.new_zeros(*Q.shape[:-3], T * s, n, dtype=dtype)
        return Projection(rows, Q.new_zeros(*Q.shape[:-3], n, dtype=torch.float64))
    rows, squares = resolve("project_scale", backend, Q)(Q.to(dtype), W.to(dtype), row_scale=row_scale.to(dtype))
    return Projection(rows.to(dtype), squares)


def delta_sum(tuned: Tensor, base: Tensor, *, backend: str = "auto") -> DeltaSum:
    """Σ_t Δ_t, ||Δ_t||_F and ||Σ_t Δ_t||_F of the deltas Δ_t = tuned_t - base, each input read once.

    tuned: [..., T, m, n], base: [..., m, n], any floating dtypes. Each delta is rounded once, to float32 (float64 where
    an input is float64), and added in that dtype in the order t = 0, 1, ..; squares are taken and added in float64. No
    delta is stored. A NaN or an infinity in tuned_t, in the base or by overflow makes norms[t] non-finite, and nothing
    else does below 1e154: one look at the norms is the check of all inputs.
    Cost: memory traffic alone, T + 1 reads and one write of m n. Raises ValueError for shapes or devices that do not
    match and for non-floating inputs.
    """
    _check("delta_sum", tuned, "default")
    _check("delta_sum", base, "default")
    if tuned.dim() < 3 or base.shape != (*tuned.shape[:-3], *tuned.shape[-2:]) or base.device != tuned.device:
        raise ValueError(
            f"delta_sum: expected tuned [..., T, m, n] and base [..., m, n] on one device, got {tuple(tuned.shape)} on "
            f"{tuned.device} and {tuple(base.shape)} on {base.device}"
        )
    dtype = torch.promote_types(torch.promote_types(tuned.dtype, base.dtype), torch.float32)
    if tuned.numel() == 0:
        norms = base.new_zeros(tuned.shape[:-2], dtype=torch.float64)
        return DeltaSum(base.new_zeros(base.shape, dtype=dtype), norms, norms.new_zeros(base.shape[:-2]))
    total, norms, norm = resolve("delta_sum", backend, tuned)(tuned, base)
    return DeltaSum(total.to(dtype), norms, norm)


def finalize(
    base: Tensor, update: Tensor, scale: Tensor | float, *, out_dtype: torch.dtype, backend: str = "auto"
) -> Tensor:
    """base + scale * update [..., m, n] in `out_dtype`: the merged weight, in one pass.

    The product is rounded, then the sum, both in float32 (float64 where base or update is float64), then the result to
    `out_dtype`; every backend but the reference gives the same bits.
    base, update: [..., m, n], any floating dtypes; scale: a number, or one per matrix [...].
    Cost: memory traffic alone. Raises ValueError for shapes or devices that do not match and for non-floating dtypes.
    """
    _check("finalize", base, "default")
    _check("finalize", update, "default")
    batch = base.shape[:-2]
    factors = scale if isinstance(scale, Tensor) else torch.full(batch, scale, dtype=torch.float64, device=base.device)
    if update.shape != base.shape or factors.shape != batch or not base.device == update.device == factors.device:
        raise ValueError(
            "finalize: expected base and update [..., m, n] and scale [...] on one device, got "
            f"{tuple(base.shape)} on {base.device}, {tuple(update.shape)} on {update.device} and "
            f"{tuple(factors.shape)} on {factors.device}"
        )
    if out_dtype not in DTYPES:
        raise ValueError(f"finalize: out_dtype must be float16, bfloat16, float32 or float64, got {out_dtype}")
    if base.numel() == 0:
        return base.new_empty(base.shape, dtype=out_dtype)
    merged: Tensor = resolve("finalize", backend, base)(base, update, scale=factors, out_dtype=out_dtype)
    return merged


def subtract(
    base: Tensor,
    tuned: Iterable[Tensor],
    weights: Sequence[float],
    *,
    base_out: Tensor,
    out: Tensor,
    reduction: str = "none",
    backend: str = "auto",
) -> float:
    """Fills out[t] with Δ_t = weights[t] (tuned_t - base), or out[0] with Σ_t Δ_t or its mean; returns ||Σ_t Δ_t||_F².

    base and every tensor of `tuned`, one for each weight: one shape [...] in any floating dtypes; base_out [...] and
    out [T, ...], for `reduction` "sum" or "mean" [1, ...], in one of float32 and float64, are overwritten, base_out
    with the base. Each delta is rounded once, then its multiple by the weight, then each sum in the order t = 0, 1, ..,
    all in that dtype; every backend but the reference gives the same bits. `tuned` may make its tensors one by one:
    eager holds one at a time.
    A NaN or an infinity in any input, or by overflow, makes the result non-finite: one look at it is the check of all
    inputs. Cost: memory traffic alone, each tensor once.
    Raises ValueError for shapes, dtypes or devices that do not match and for another number of tensors than weights.
    """
    stacked = 1 if reduction != "none" else len(weights)
    if reduction not in REDUCTIONS or not weights:
        raise ValueError(f"subtract: expected weights and a reduction of {REDUCTIONS}, got {weights} and {reduction!r}")
    if base_out.dtype not in (torch.float32, torch.float64) or out.dtype != base_out.dtype:
        raise ValueError(f"subtract: base_out and out must be float32 or float64, got {base_out.dtype}, {out.dtype}")
    if base_out.shape != base.shape or out.shape != (stacked, *base.shape) or base_out.device != out.device:
        raise ValueError(
            f"subtract: for a base {tuple(base.shape)} expected base_out as large and out {(stacked, *base.shape)} on "
            f"one device, got {tuple(base_out.shape)} on {base_out.device} and {tuple(out.shape)} on {out.device}"
        )

    def checked(models: Iterable[Tensor], count: int) -> Iterator[Tensor]:
        given = 0
        for given, values in enumerate(models, 1):
            if given > count:
                break
            if values.shape != base.shape or values.device != out.device or values.dtype not in DTYPES:
                raise ValueError(
                    f"subtract: expected floating tensors {tuple(base.shape)} on {out.device}, got "
                    f"{tuple(values.shape)} in {values.dtype} on {values.device}"
                )
            yield values
        if given != count:
            found = f"{given}" if given < count else "more"
            raise ValueError(f"subtract: expected {count} tensors, one for each weight, got {found}")

    function = resolve("subtract", backend, out)
    (stored,), tasks = checked([base], 1), checked(tuned, len(weights))
    square: float = function(stored, tasks, weights=weights, reduction=reduction, base_out=base_out, out=out)
    return square


def frobenius(A: Tensor, *, backend: str = "auto") -> float:
    """sqrt(Σ A_ij²) over all entries of A [...]; of float32 and narrower types it neither overflows nor underflows."""
    if A.dtype not in DTYPES:
        raise ValueError(f"frobenius: expected float16, bfloat16, float32 or float64, got {A.dtype}")
    norm: float = resolve("frobenius", backend, A)(A)
    return norm


def kth_largest(values: Tensor, k: int, *, backend: str = "auto") -> Tensor:
    """The k-th largest magnitude of the elements of values [n], none of them NaN: a scalar, exact, of their dtype.

    Cost: two passes over the values. Raises ValueError unless values are 1-D and 1 <= k <= n.
    """
    if values.dim() != 1 or values.dtype not in DTYPES or not 1 <= k <= values.numel():
        raise ValueError(
            f"kth_largest: expected floating values [n] and 1 <= k <= n, got {tuple(values.shape)} in {values.dtype} "
            f"and {k}"
        )
    kth: Tensor = resolve("kth_largest", backend, values)(values, k)
    return kth


def count_digits(values: Tensor, higher: Sequence[int] = (), *, backend: str = "auto") -> Tensor:
    """How often each 16-bit digit occurs behind the digits `higher` of the magnitudes of values [n]: int64 [2^16].

    The digits of a magnitude are those of its bits, read as a whole number without the sign, the highest first: one of
    a value of two bytes, two of four, four of eight. With a `Selection` one pass for each gives the
    k-th largest magnitude of values that need not be in memory together; counts of parts add up.
    Cost: one pass. Raises ValueError unless values are 1-D and floating, and have a digit behind `higher`.
    """
    digits = values.element_size() // 2
    if values.dim() != 1 or values.dtype not in DTYPES or len(higher) >= digits:
        raise ValueError(
            f"count_digits: expected floating values [n] and fewer than {max(1, digits)} higher digits, got "
            f"{tuple(values.shape)} in {values.dtype} and {len(higher)}"
        )
    counts: Tensor = resolve("count_digits", backend, values)(values, tuple(higher))
    return counts


def votes(deltas: Tensor, thresholds: Tensor, *, backend: str = "auto") -> Tensor:
    """Σ_i sign Σ_t deltas[t, i] over the columns of deltas [T, n], less entries below thresholds [T]: an int64 scalar.

    Its sign is the majority that `elect` asks for; votes of parts add up. Sums are formed as there.
    Cost: one pass. Raises ValueError as `elect` does.
    """
    deltas, thresholds = _checked_election("votes", deltas, thresholds)
    total: Tensor = resolve("votes", backend, deltas)(deltas, thresholds)
    return total


def elect(deltas: Tensor, thresholds: Tensor, majority: int, *, backend: str = "auto") -> Tensor:
    """Mean over the tasks that agree with the elected sign [n], of deltas [T, n] less entries below thresholds [T].

    An entry counts if |deltas[t, i]| >= thresholds[t], and the sign of column i is that of the sum of its entries, the
    sums of positive and of negative ones formed in the order t = 0, 1, ..; where they cancel, it is `majority`: -1, 0
    or 1. The mean is over entries of that sign that are not zero; 0 where there is none.
    Yadav et al. 2023, "TIES-Merging", algorithm 1, steps 2 and 3. Cost: one pass.
    Raises ValueError for shapes that do not match, no task, inputs that are not floating, or another majority.
    """
    deltas, thresholds = _checked_election("elect", deltas, thresholds)
    if majority not in (-1, 0, 1):
        raise ValueError(f"elect: expected a majority of -1, 0 or 1, got {majority}")
    merged: Tensor = resolve("elect", backend, deltas)(deltas, thresholds, majority)
    return merged.to(deltas.dtype)


def _checked_election(op: str, deltas: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the arithmetic."""
    if deltas.dim() != 2 or not len(deltas) or thresholds.shape != deltas.shape[:1] or deltas.dtype not in DTYPES:
        raise ValueError(
            f"{op}: expected floating deltas [T, n] and thresholds [T], T >= 1, got {tuple(deltas.shape)} in "
            f"{deltas.dtype} and {tuple(thresholds.shape)}"
        )
    dtype = torch.promote_types(deltas.dtype, torch.float32)
    return deltas.to(dtype), thresholds.to(dtype)


def drop(values: Tensor, density: float, *, seed: int, first: int = 0, backend: str = "auto") -> Tensor:
    """B_i values_i / density [n], with random B_i that are 1 with probability `density` and else 0.

    B_i is drawn by number `first` + i of the SplitMix64 generator that starts from `seed`, so it depends on nothing
    else: not on the device, nor on what is drawn together. Density in [2^-32, 1], and 1 keeps everything.
    Cost: one pass. Raises ValueError unless values are 1-D and floating, and for a density out of range.
    """
    if values.dim() != 1 or values.dtype not in DTYPES or not 2**-32 <= density <= 1 or first < 0:
        raise ValueError(
            "drop: expected floating values [n], a density from 2^-32 to 1 and a number of 0 or more, got "
            f"{tuple(values.shape)} in {values.dtype}, {density} and {first}"
        )
    dtype = torch.promote_types(values.dtype, torch.float32)
    kept: Tensor = resolve("drop", backend, values)(values.to(dtype), density, seed=seed % 2**64, first=first)
    return kept.to(dtype)


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
