"""Linear baselines: every element of the update is a linear function of that element's deltas."""

from __future__ import annotations

from torch import Tensor

from isomerge.methods.source import Merged, Source


def total(deltas: Tensor) -> Tensor:
    """Σ_t Δ_t of deltas [..., T, m, n], a view where T = 1; added in the order given: the bits do not depend on what is
    batched.
    """
    if deltas.shape[-3] == 1:
        return deltas[..., 0, :, :]
    result = deltas[..., 0, :, :] + deltas[..., 1, :, :]
    for t in range(2, deltas.shape[-3]):
        result += deltas[..., t, :, :]
    return result


def average(deltas: Tensor) -> Tensor:
    """(1/T) Σ_t Δ_t for deltas [..., T, m, n]: the weight average, or model soup (Wortsman et al. 2022)."""
    count = deltas.shape[-3]
    return total(deltas).clone() if count == 1 else total(deltas).div_(count)


def task_arithmetic(deltas: Tensor) -> Tensor:
    """Σ_t Δ_t for deltas [..., T, m, n] (Ilharco et al. 2023, "Task Arithmetic"); a sum, no mean."""
    return total(deltas).clone() if deltas.shape[-3] == 1 else total(deltas)


def average_from(source: Source[Merged]) -> Merged | None:
    """What `average` makes of the base."""
    return source.blend("mean")


def task_arithmetic_from(source: Source[Merged]) -> Merged | None:
    """What `task_arithmetic` makes of the base."""
    return source.blend("sum")
