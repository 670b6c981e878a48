"""Linear baselines: every element of the update is a linear function of that element's deltas."""

from __future__ import annotations

from torch import Tensor


def total(deltas: Tensor) -> Tensor:
    """Σ_t Δ_t of deltas [..., T, m, n], added in the order given: the bits do not depend on what is batched."""
    result = deltas[..., 0, :, :].clone()
    for t in range(1, deltas.shape[-3]):
        result += deltas[..., t, :, :]
    return result


def average(deltas: Tensor) -> Tensor:
    """(1/T) Σ_t Δ_t for deltas [..., T, m, n]: the weight average, or model soup (Wortsman et al. 2022)."""
    return total(deltas).div_(deltas.shape[-3])


def task_arithmetic(deltas: Tensor) -> Tensor:
    """Σ_t Δ_t for deltas [..., T, m, n] (Ilharco et al. 2023, "Task Arithmetic"); a sum, no mean."""
    return total(deltas)
