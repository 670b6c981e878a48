"""Sign-consensus and random-dropout baselines: TIES and DARE."""

from __future__ import annotations

import torch
from torch import Tensor

from isomerge.methods.linear import total


def ties(deltas: Tensor, *, density: float = 0.2) -> Tensor:
    """Mean over the tasks that agree with the elected sign, of the deltas trimmed to their largest entries.

    Trim: of each Δ_t [m, n] keep the int(density m n) entries of largest magnitude (entries equal to the smallest kept
    one stay too). Elect: the sign of Σ_t of the trimmed deltas, element by element; where that sum is zero, the
    majority sign of the matrix. Merge: the mean of the non-zero trimmed entries of that sign.
    The paper trims over all parameters of a model at once; trimming tensor by tensor, as mergekit does, needs no pass
    over the whole model first.

    deltas [..., T, m, n], density in [0, 1]. Source: Yadav et al. 2023, "TIES-Merging", algorithm 1.
    """
    return _merged_by_sign(_trimmed(deltas, density))


def dare_linear(deltas: Tensor, *, density: float = 0.2, seed: int = 0) -> Tensor:
    """Σ_t B_t Δ_t / density, B_t random 0/1 entries that are 1 with probability `density` (Yu et al. 2024, "DARE").

    deltas [..., T, m, n], density in (0, 1]. Drawn on the CPU from `seed`, tasks in order: the same on every device.
    """
    return total(_dropped(deltas, density, seed))


def dare_ties(deltas: Tensor, *, density: float = 0.2, seed: int = 0) -> Tensor:
    """The sign election and mean of `ties` on the dropped and rescaled deltas of `dare_linear`, without trimming."""
    return _merged_by_sign(_dropped(deltas, density, seed))


def _trimmed(deltas: Tensor, density: float) -> Tensor:
    magnitudes = deltas.abs().flatten(-2)
    entries = magnitudes.shape[-1]
    kept = int(density * entries)
    if kept == 0:
        return torch.zeros_like(deltas)
    threshold = magnitudes.kthvalue(entries - kept + 1, dim=-1).values[..., None, None]
    return torch.where(deltas.abs() >= threshold, deltas, 0)


def _dropped(deltas: Tensor, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(deltas.shape, generator=generator) < density
    return torch.where(kept.to(deltas.device), deltas / density, 0)


def _merged_by_sign(deltas: Tensor) -> Tensor:
    signs = total(deltas).sign()
    majority = signs.sum((-2, -1), keepdim=True).sign()
    signs = torch.where(signs == 0, majority, signs).unsqueeze(-3)
    agreeing = torch.where(deltas.sign() == signs, deltas, 0)
    count = (agreeing != 0).sum(-3)
    return total(agreeing).div_(count.clamp_min(1))
