"""Sign-consensus and random-dropout baselines: TIES and DARE."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from isomerge import ops


def ties(deltas: Tensor, *, density: float = 0.2) -> Tensor:
    """Mean over the tasks that agree with the elected sign, of the deltas trimmed to their largest entries.

    Trim: of each Δ_t [m, n] keep the int(density m n) entries of largest magnitude (entries equal to the smallest kept
    one stay too). Elect: the sign of Σ_t of the trimmed deltas, element by element; where that sum is zero, the
    majority sign of the matrix. Merge: the mean of the non-zero trimmed entries of that sign.
    The paper trims over all parameters of a model at once; trimming tensor by tensor, as mergekit does, needs no pass
    over the whole model first.

    deltas [..., T, m, n], density in [0, 1]. Source: Yadav et al. 2023, "TIES-Merging", algorithm 1.
    """
    kept = int(density * deltas.shape[-2:].numel())

    def one(deltas: Tensor) -> Tensor:
        if kept == 0:
            return torch.zeros_like(deltas[0])
        return ops.elect(deltas, torch.stack([ops.kth_largest(delta, kept) for delta in deltas]))

    return _each(one, deltas)


def dare_linear(deltas: Tensor, *, density: float = 0.2, seed: int = 0) -> Tensor:
    """Σ_t B_t Δ_t / density, B_t random 0/1 entries that are 1 with probability `density` (Yu et al. 2024, "DARE").

    deltas [..., T, m, n], density in (0, 1]. Drawn on the CPU from `seed`, tasks in order: the same on every device.
    """
    result = torch.zeros_like(deltas[..., 0, :, :])
    for dropped in _dropped(deltas, density, seed):
        result += dropped
    return result


def dare_ties(deltas: Tensor, *, density: float = 0.2, seed: int = 0) -> Tensor:
    """The sign election and mean of `ties` on the dropped and rescaled deltas of `dare_linear`, without trimming."""
    left = torch.empty_like(deltas)
    for t, dropped in enumerate(_dropped(deltas, density, seed)):
        left[..., t, :, :] = dropped
    return _each(lambda unit: ops.elect(unit, unit.new_zeros(len(unit))), left)


def _dropped(deltas: Tensor, density: float, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas.unbind(-3):
        left_out = torch.rand(delta.shape, generator=generator) >= density
        yield (delta / density).masked_fill_(left_out.to(delta.device), 0)


def _each(function: Callable[[Tensor], Tensor], deltas: Tensor) -> Tensor:
    """[..., m, n] of what `function` makes of the elements of each unit, [T, m n] -> [m n]."""
    *batch, T, m, n = deltas.shape
    merged = [function(unit) for unit in deltas.reshape(math.prod(batch), T, m * n)]
    if len(merged) == 1:  # without a copy
        return merged[0].view(*batch, m, n)
    return torch.stack(merged).view(*batch, m, n) if merged else deltas.new_zeros(*batch, m, n)
