"""Sign-consensus and random-dropout baselines: TIES and DARE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def ties(deltas: Tensor, *, density: float = 0.2) -> Tensor:
    """Mean over the tasks that agree with the elected sign, of the deltas trimmed to their largest entries.

    Trim: of each Δ_t [m, n] keep the int(density m n) entries of largest magnitude (entries equal to the smallest kept
    one stay too). Elect: the sign of Σ_t of the trimmed deltas, element by element; where that sum is zero, the
    majority sign of the matrix. Merge: the mean of the non-zero trimmed entries of that sign.
    The paper trims over all parameters of a model at once; trimming tensor by tensor, as mergekit does, needs no pass
    over the whole model first.

    deltas [..., T, m, n], density in [0, 1]. Source: Yadav et al. 2023, "TIES-Merging", algorithm 1.
    """
    return _merged_by_sign(_trimmed(delta, density) for delta in deltas.unbind(-3))


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
    return _merged_by_sign(_dropped(deltas, density, seed))


def _trimmed(delta: Tensor, density: float) -> Tensor:
    magnitude = delta.abs()
    entries = delta.shape[-2] * delta.shape[-1]
    kept = int(density * entries)
    if kept == 0:
        return torch.zeros_like(delta)
    threshold = magnitude.flatten(-2).kthvalue(entries - kept + 1, dim=-1).values[..., None, None]
    return torch.where(magnitude >= threshold, delta, 0)


def _dropped(deltas: Tensor, density: float, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas.unbind(-3):
        kept = torch.rand(delta.shape, generator=generator) < density
        yield torch.where(kept.to(delta.device), delta / density, 0)


def _merged_by_sign(deltas: Iterable[Tensor]) -> Tensor:
    """Mean of the entries of the elected sign; one task at a time, so the memory does not grow with their number."""
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    for delta in deltas:
        for sign in (1, -1):
            part = (delta * sign).clamp_min_(0)
            count = (part > 0).to(torch.int16)
            sums[sign] = sums[sign].add_(part) if sign in sums else part
            counts[sign] = counts[sign].add_(count) if sign in counts else count
    elected = sums[1] - sums[-1]
    positive, negative = (sums[sign].div_(counts[sign].clamp_min_(1)) for sign in (1, -1))
    majority = elected.sign().sum((-2, -1), keepdim=True)
    positive_wins = (elected > 0) | ((elected == 0) & (majority > 0))
    negative_wins = (elected < 0) | ((elected == 0) & (majority < 0))
    return torch.where(positive_wins, positive, torch.where(negative_wins, -negative, 0))
