"""What one layer's second moment says: its spectrum, and the energy of feature shifts that few directions keep.

Letters as in `ops`: Δ [m, n] a layer's update, M its moment, XᵀX [n, n] of the inputs ("input") or the moment [m, m]
of the feature shifts X Δᵀ ("output"), s directions kept of m.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isomerge import ops

LEADING = (10, 50, 125)
"""Thousandths of the directions whose energy is reported: 1 %, 5 % and 12.5 %, the last being 1/T for eight tasks."""

GRID = tuple(10 ** (-3 * (1 - i / 120)) for i in range(121))
"""Shares of the directions at which curves are sampled: 0.1 % to 100 %, evenly in their logarithm."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Eigenvalues λ_1 >= λ_2 >= .. of a moment [d, d].

    rank     those that are not null, by the rule of `ops.principal`
    leading  Σ_{i<=k} λ_i / trace with k = max(1, floor(share d)) for the shares of `LEADING`; None for a zero moment
    curve    λ_i / λ_1 with i = ceil(share d) for the shares of `GRID`; empty for a zero moment
    """

    rank: int
    leading: tuple[float, ...] | None
    curve: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """Energy that s directions keep, as a share; C = Δ M Δᵀ is the moment of the shifts, Δ = U diag(σ) Vᵀ.

    rank       of C, by the rule of `ops.principal`
    esd        Σ_{i<=s} λ_i(C) / trace(C): the s leading principal directions of the shifts
    svd        Σ_{i<=s} σ_i² / Σ_i σ_i²: the update's own energy in its s leading singular directions
    svd_shift  trace(U_s U_sᵀ C) / trace(C): the shifts' energy in those; at most `esd`
    curves     the three at every share of `GRID`, interpolated between whole numbers of directions

    `esd` and `svd_shift` are None, and their curves empty, where no shift has energy; all are for a zero update.
    """

    s: int
    rank: int
    esd: float | None
    svd: float | None
    svd_shift: float | None
    curves: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]


def spectrum(stored: Tensor) -> Spectrum:
    """The spectrum of a moment [d, d], or of YᵀY for inputs Y [tokens, d], tokens < d, by that of Y Yᵀ.

    Cost: one eigensolve in float64 of side d, or tokens.
    """
    rows, d = stored.shape
    # The rule for null eigenvalues is that of a float32 moment, whichever of the two is stored.
    moment, rtol = (ops.shift_cov(stored.double().mT), torch.finfo(torch.float32).eps) if rows < d else (stored, None)
    values = torch.nn.functional.pad(ops.principal(moment, rows, rtol=rtol).values, (0, d - rows))
    total = float(moment.diagonal().sum(dtype=torch.float64))
    if total <= 0:
        return Spectrum(0, None, ())
    summed = values.cumsum(0)
    leading = tuple(min(1.0, float(summed[max(1, d * share // 1000) - 1]) / total) for share in LEADING)
    relative = values / values[0]
    places = [min(d, max(1, -int(-share * d // 1))) - 1 for share in GRID]
    return Spectrum(int((values > 0).sum()), leading, tuple(relative[places].tolist()))


def kept(delta: Tensor, moment: Tensor, space: str, s: int) -> Kept:
    """What s directions keep of Δ = `delta` [m, n] and its shifts, from their moment in `space` "input" or "output".

    Cost: the float64 eigensolves of C and of Δ, of side min(m, n) each (m for C in output space).
    """
    m, n = delta.shape
    delta, M = delta.double(), moment.double()
    of_inputs = space == "input"
    # The moment as stored: the rule for null eigenvalues goes by its dtype.
    values = ops.principal(moment, m, delta=delta if of_inputs else None).values
    U, S, Vh = ops.rsvd(delta, min(m, n), precision="exact")
    trace = float(((delta @ M) * delta).sum() if of_inputs else M.diagonal().sum())
    # uᵢᵀ C uᵢ of the left singular vectors, which is σᵢ² vᵢᵀ M vᵢ
    rows = Vh * S[:, None] if of_inputs else U.mT * (S > 0)[:, None]
    along = ((rows @ M) * rows).sum(1)
    squares = S.square()

    esd, esd_curve = _share(values, trace, s, m)
    svd, svd_curve = _share(squares, float(squares.sum()), s, m)
    shift, shift_curve = _share(along, trace, s, m)
    return Kept(s, int((values > 0).sum()), esd, svd, shift, (esd_curve, svd_curve, shift_curve))


def _share(energies: Tensor, total: float, s: int, m: int) -> tuple[float | None, tuple[float, ...]]:
    """Σ_{i<=s} energies / total, and that sum at the shares of `GRID` of m directions; None and () without energy."""
    if total <= 0:
        return None, ()
    summed = torch.nn.functional.pad(energies.cumsum(0) / total, (1, 0)).clamp(0, 1)
    last = len(energies)
    position = (torch.tensor(GRID, dtype=torch.float64) * m).clamp_max(last)
    below = position.floor().long().clamp_max(last - 1)
    curve = torch.lerp(summed[below], summed[below + 1], position - below)
    return float(summed[min(s, last)]), tuple(curve.tolist())
