"""Sign-consensus and random-dropout baselines: TIES and DARE."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from isomerge.methods.selection import kth_largest

BLOCK = 2**16
"""Elements of a matrix that are merged at a time on a CPU: eight float32 arrays then stay in its cache."""


def ties(deltas: Tensor, *, density: float = 0.2) -> Tensor:
    """Mean over the tasks that agree with the elected sign, of the deltas trimmed to their largest entries.

    Trim: of each Δ_t [m, n] keep the int(density m n) entries of largest magnitude (entries equal to the smallest kept
    one stay too). Elect: the sign of Σ_t of the trimmed deltas, element by element; where that sum is zero, the
    majority sign of the matrix. Merge: the mean of the non-zero trimmed entries of that sign.
    The paper trims over all parameters of a model at once; trimming tensor by tensor, as mergekit does, needs no pass
    over the whole model first.

    deltas [..., T, m, n], density in [0, 1]. Source: Yadav et al. 2023, "TIES-Merging", algorithm 1.
    """
    batch, (T, m, n) = deltas.shape[:-3], deltas.shape[-3:]
    units = [deltas]
    for _ in batch:
        units = [part for unit in units for part in unit.unbind(0)]
    merged = [_ties(unit.reshape(T, m * n), int(density * m * n)) for unit in units]
    return torch.stack(merged).reshape(*batch, m, n) if len(merged) != 1 else merged[0].view(*batch, m, n)


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
    positive, negative, elected = _election(_dropped(deltas, density, seed))
    return _decided(positive, negative, elected, elected.sign().sum((-2, -1), keepdim=True).sign())


def _ties(deltas: Tensor, kept: int) -> Tensor:
    """[T, count] -> [count], block by block, each with the majority so far; those it changes afterwards once more."""
    merged = torch.zeros_like(deltas[0])
    if kept == 0:
        return merged
    thresholds = [kth_largest(delta, kept) for delta in deltas]
    step = BLOCK if deltas.device.type == "cpu" else merged.numel()
    votes, guesses = 0, []
    blocks = list(zip(deltas.split(step, dim=-1), merged.split(step), strict=True))
    for part, out in blocks:
        positive, negative, elected = _election(_trimmed(part, thresholds))
        votes += int(elected.sign().sum())
        guesses.append(_sign(votes))
        out.copy_(_decided(positive, negative, elected, guesses[-1]))
    for (part, out), guess in zip(blocks, guesses, strict=True):
        if guess != _sign(votes):
            out.copy_(_decided(*_election(_trimmed(part, thresholds)), _sign(votes)))
    return merged


def _trimmed(deltas: Tensor, thresholds: Sequence[Tensor]) -> Iterator[Tensor]:
    """Each delta with zeros in place of the entries below its threshold."""
    for delta, threshold in zip(deltas, thresholds, strict=True):
        below = torch.nextafter(threshold, threshold.new_tensor(-1))
        yield torch.nn.functional.hardshrink(delta, float(below))  # keeps what is larger than `below`


def _dropped(deltas: Tensor, density: float, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas.unbind(-3):
        left_out = torch.rand(delta.shape, generator=generator) >= density
        yield (delta / density).masked_fill_(left_out.to(delta.device), 0)


def _election(deltas: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the positive entries and of the magnitudes of the negative ones over the tasks, and the sum of all: one
    task at a time, so the memory does not grow with their number.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    for delta in deltas:
        positive = delta.relu()
        for sign, part in ((1, positive), (-1, positive - delta)):
            present = part.sign()
            sums[sign] = sums[sign].add_(part) if sign in sums else part.clone()
            counts[sign] = counts[sign].add_(present) if sign in counts else present
    elected = sums[1] - sums[-1]
    positive, negative = (sums[sign].div_(counts[sign].clamp_min_(1)) for sign in (1, -1))
    return positive, negative, elected


def _decided(positive: Tensor, negative: Tensor, elected: Tensor, majority: Tensor | int) -> Tensor:
    """The mean of the elected sign; where the sum is zero, that of the sign `majority`, and zero if that is none."""
    winner = elected.sign_()
    winner += (1 - winner.abs()) * majority
    return positive.mul_(winner.relu()).sub_(negative.mul_(winner.neg().relu_()))  # where() takes 17 times as long


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
