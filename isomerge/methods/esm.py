"""Essential subspace merging."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from isomerge import ops
from isomerge.methods.bases import beside, norms, powers, sums

PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "vit": {"eigenvalue_power": 0.15, "task_exponent": 2.0, "dimension_exponent": 2.0, "layer_exponent": 2.0},
        "text": {"eigenvalue_power": 0.15, "task_exponent": 0.0, "dimension_exponent": 0.0, "layer_exponent": 2.0},
    }
)
"""What the released code does for CLIP's vision transformers and for RoBERTa."""


def esm(
    deltas: Tensor,
    moments: Tensor,
    *,
    eigenvalue_power: float = 0.15,
    task_exponent: float = 2.0,
    dimension_exponent: float = 2.0,
    precision: str = "default",
    backend: str = "auto",
) -> Tensor:
    """mean(σ_E) mean(σ_C) polar([Ê_1 .. Ê_T]) polar([Ĉ_1; ..; Ĉ_T]): essential subspaces, polarized.

    E_t, λ_t: the leading s = floor(m / T) uncentred principal directions of the feature shifts X_t Δ_tᵀ of task t.
    Ê_t = E_t diag(w_t) and Ĉ_t = diag(w_t) E_tᵀ Δ_t (g_t / mean_t g_t)^task_exponent, where w_t = λ_t^eigenvalue_power
    over its mean and g_t = ||Δ_t||_F. Column j of [Ĉ_1; ..; Ĉ_T], of norm h_j, is then scaled by
    (h_j / mean_j h_j)^dimension_exponent. σ_E, σ_C are the singular values of the two concatenations. An exponent of 0
    switches its level off; the third level, between layers, is `layer_factors`.

    deltas [..., T, m, n]; moments [..., T, n, n] the second moments X_tᵀ X_t of the layer's inputs or, where m != n,
    [..., T, m, m] those of the shifts; -> [..., m, n]. Scaling a moment, or the order of tasks, changes nothing.

    Where the released code differs: its update is twice this one, so its alphas are half of those here (0.76 is 1.52).
    Its g_t counts rows again that are padded for lack of tokens; here it is the norm. It fills directions without
    energy arbitrarily; here they are null, and means run over the others, so floor(m / T) beyond the rank of the
    shifts adds nothing. Its rank is int(m (1/T)) in floating point, one less for some T.

    Cost: T eigensolves of side min(m, n), two polar factors of m x T s and T s x n: for tall matrices the first of
    them, an eigensolve of side m, is the largest term.
    Source: "Essential Subspace Merging for Multi-Task Learning", arXiv 2606.19164, sections 3 and 4.
    """
    T, m, n = deltas.shape[-3:]
    if (
        moments.shape[:-2] != deltas.shape[:-2]
        or moments.shape[-1] != moments.shape[-2]
        or moments.shape[-1] not in (m, n)
    ):
        raise ValueError(
            f"esm: moments must be [..., T, n, n] or [..., T, m, m] for deltas {tuple(deltas.shape)}, "
            f"got {tuple(moments.shape)}"
        )
    of_inputs = moments.shape[-1] == n
    E, values = ops.principal(moments, m // T, delta=deltas if of_inputs else None, backend=backend)
    weights = _over_mean(values, eigenvalue_power)  # [..., T, s]
    energies = norms(deltas).double()  # [..., T]
    tasks = powers(torch.where(energies > 0, T * energies / sums(energies), 0), task_exponent)
    rows, squares = ops.project_scale(E, deltas, weights * tasks.unsqueeze(-1), backend=backend)
    columns = squares.sqrt()
    columns = powers(torch.where(columns > 0, n * columns / sums(columns), 0), dimension_exponent)
    left = beside(E * weights.unsqueeze(-2).to(E.dtype), dim=-1)  # [..., m, T s]
    right = rows * columns.unsqueeze(-2).to(rows.dtype)  # [..., T s, n]
    product, nuclear, ranks = ops.polar_product(left, right, precision=precision, backend=backend)
    scale = (nuclear / ranks.clamp_min(1)).prod(-1)
    return product.mul_(scale[..., None, None])


def layer_factors(norms: Tensor, exponent: float) -> Tensor:
    """(||M_l||_F / mean_l ||M_l||_F)^exponent of the layers of one type; norms [L] -> [L]. 1 where all are zero.

    Source: as `esm`, its inter-layer scaling.
    """
    mean = norms.mean()
    return (norms / mean).pow(exponent) if mean > 0 else torch.ones_like(norms)


def _over_mean(values: Tensor, exponent: float) -> Tensor:
    """λ^exponent over its mean along the last dimension, both over the non-null eigenvalues; 0 for null ones."""
    kept, tiny = values > 0, torch.finfo(values.dtype).tiny
    raised = torch.where(kept, powers(values.clamp_min(tiny), exponent), 0)
    mean = sums(raised) / kept.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(kept, raised / mean.clamp_min(tiny), 0)
