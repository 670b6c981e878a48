"""Sign-consensus and random-dropout baselines: TIES and DARE."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from isomerge import ops
from isomerge.methods.source import Merged, Source
from isomerge.methods.survey import Election, Survey, election

BLOCK = 2**17
"""Elements that are dropped at a time on a CPU: they and what is left of them then stay in its cache."""

TASK = 2**48
"""Numbers that are kept for each task to draw."""


def ties(deltas: Tensor, *, density: float = 0.2, elected: Election | None = None) -> Tensor:
    """Mean over the tasks that agree with the elected sign, of the deltas trimmed to their largest entries.

    Trim: of each Δ_t [m, n] keep the int(density m n) entries of largest magnitude (entries equal to the smallest kept
    one stay too). Elect: the sign of Σ_t of the trimmed deltas, element by element; where that sum is zero, the
    majority sign of the matrix. Merge: the mean of the non-zero trimmed entries of that sign.
    The paper trims over all parameters of a model at once; trimming tensor by tensor, as mergekit does, needs no pass
    over the whole model first. Deltas that are a piece of a tensor take what the `ties_survey` of it has `elected`.

    deltas [..., T, m, n], density in [0, 1]. Source: Yadav et al. 2023, "TIES-Merging", algorithm 1.
    """
    *batch, T, m, n = deltas.shape
    kept = int(density * m * n)
    units = deltas.reshape(math.prod(batch), T, m * n)
    return _stacked([_merged(unit, elected or election(unit, kept)) for unit in units], deltas)


def ties_from(source: Source[Merged], *, density: float = 0.2, elected: Election | None = None) -> Merged | None:
    """What `ties` makes of the base, for a piece of a tensor that was surveyed."""
    return None if elected is None else source.elect(*elected)


def ties_survey(T: int, n: int, dtype: torch.dtype, device: torch.device, *, density: float = 0.2) -> Survey:
    """Of a tensor of n elements and its deltas of T tasks in `dtype`: what `ties` needs to know of pieces of it."""
    return Survey(T, n, int(density * n), dtype, device)


def dare_linear(deltas: Tensor, *, density: float = 0.2, seed: int = 0, first: int = 0) -> Tensor:
    """Σ_t B_t Δ_t / density, B_t random 0/1 entries that are 1 with probability `density` (Yu et al. 2024, "DARE").

    deltas [..., T, m, n], density in (0, 1]. What is drawn depends on `seed`, t and the place in Δ_t alone, of which
    `first` elements come before these.
    """
    result = torch.zeros_like(deltas[..., 0, :, :], memory_format=torch.contiguous_format)
    for _, part, values in _dropped(deltas, density, seed, first):
        result.view(-1)[part] += values
    return result


def dare_linear_from(source: Source[Merged], *, density: float = 0.2, seed: int = 0, first: int = 0) -> Merged | None:
    """What `dare_linear` makes of the base."""
    return source.dropped(density, seed, first, TASK).blend("sum")


def dare_ties(
    deltas: Tensor, *, density: float = 0.2, seed: int = 0, first: int = 0, elected: Election | None = None
) -> Tensor:
    """The sign election and mean of `ties` on the dropped and rescaled deltas of `dare_linear`, without trimming."""
    *batch, T, m, n = deltas.shape
    left = _left(deltas, density, seed, first)
    units = left.view(T, math.prod(batch), m * n).unbind(1)
    return _stacked([_merged(unit, elected or election(unit, m * n)) for unit in units], deltas)


def dare_ties_survey(
    T: int, n: int, dtype: torch.dtype, device: torch.device, *, density: float = 0.2, seed: int = 0
) -> Survey:
    """What `ties_survey` is to `ties`."""
    return Survey(
        *(T, n, n, dtype, device),
        seen_as=lambda deltas, first: _left(deltas.unsqueeze(-2), density, seed, first),
        asked_of=lambda source, first: source.dropped(density, seed, first, TASK),
    )


def dare_ties_from(
    source: Source[Merged], *, density: float = 0.2, seed: int = 0, first: int = 0, elected: Election | None = None
) -> Merged | None:
    """What `dare_ties` makes of the base, for a piece of a tensor that was surveyed."""
    return None if elected is None else source.dropped(density, seed, first, TASK).elect(*elected)


def _left(deltas: Tensor, density: float, seed: int, first: int) -> Tensor:
    """B_t Δ_t / density [T, N] of all N elements of deltas [..., T, m, n]."""
    left = deltas.new_empty(deltas.shape[-3], deltas[..., 0, :, :].numel())
    for t, part, values in _dropped(deltas, density, seed, first):
        left[t, part] = values
    return left


def _dropped(deltas: Tensor, density: float, seed: int, first: int) -> Iterator[tuple[int, slice, Tensor]]:
    """B_t Δ_t / density in parts: t, where the part stands among the elements of Δ_t [..., m, n], and its values."""
    for t, delta in enumerate(deltas.unbind(-3)):
        values = delta.reshape(-1)
        step = BLOCK if delta.device.type == "cpu" else max(1, len(values))
        for begin in range(0, len(values), step):
            part = slice(begin, min(begin + step, len(values)))
            yield t, part, ops.drop(values[part], density, seed=seed, first=t * TASK + first + begin)


def _merged(deltas: Tensor, elected: Election) -> Tensor:
    return ops.elect(deltas, elected.thresholds.to(deltas.device), elected.majority)


def _stacked(merged: list[Tensor], deltas: Tensor) -> Tensor:
    """One [m n] for each unit of deltas [..., T, m, n] -> [..., m, n]; a single one without a copy."""
    shape = *deltas.shape[:-3], *deltas.shape[-2:]
    if len(merged) == 1:
        return merged[0].view(shape)
    return torch.stack(merged).view(shape) if merged else deltas.new_zeros(shape)
