"""Thresholds and votes of TIES in plain torch, for `eager`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from isomerge.backends.selection import BITS, DIGIT, DIGITS, by_digits, joined

BLOCK = 2**16  # elements merged at a time on a CPU: eight float32 arrays then stay in its cache
COUNTED = 2**18  # elements counted at a time on a CPU, for its cache
FEW = DIGITS  # values, for which counting takes longer than it saves


def count_digits(values: Tensor, higher: Sequence[int]) -> Tensor:
    """Block by block; memory does not grow with n."""
    bits = values.view(BITS[values.element_size()])
    shift = 8 * values.element_size() - DIGIT * (1 + len(higher))
    step = COUNTED if values.device.type == "cpu" else max(1, values.numel())
    counts = torch.zeros(DIGITS, dtype=torch.int64, device=values.device)
    for block in bits.split(step):
        digits = block & torch.iinfo(bits.dtype).max
        if higher:
            digits = digits[digits >> (shift + DIGIT) == joined(higher)] & (DIGITS - 1) << shift
        counts += torch.bincount(digits >> shift if shift else digits, minlength=DIGITS)
    return counts


def kth_largest(values: Tensor, k: int) -> Tensor:
    """Digit by digit, but where there are few values."""
    if values.numel() <= FEW:
        return values.abs().kthvalue(values.numel() - k + 1).values
    return by_digits(values, k, count_digits)


def votes(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Block by block."""
    total = torch.zeros((), dtype=torch.int64, device=deltas.device)
    for _, _, _, elected in _parts(deltas, thresholds):
        total += elected.sign_().sum(dtype=torch.int64)
    return total


def elect(deltas: Tensor, thresholds: Tensor, majority: int) -> Tensor:
    """Block by block."""
    merged = torch.zeros_like(deltas[0])
    for part, positive, negative, elected in _parts(deltas, thresholds):
        merged[part] = _decided(positive, negative, elected, majority)
    return merged


def _parts(deltas: Tensor, thresholds: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Which columns, and what `_election` gives for them."""
    count = deltas.shape[1]
    step = BLOCK if deltas.device.type == "cpu" else max(1, count)
    limits = torch.nextafter(thresholds, thresholds.new_tensor(-1)).tolist()  # what is larger stays
    for first in range(0, count, step):
        part = slice(first, first + step)
        yield part, *_election(deltas[:, part], limits)


def _election(deltas: Tensor, limits: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the positive entries and of the magnitudes of the negative ones over the tasks, and the sum of all, of
    entries larger than their task's limit: one task at a time, so the memory does not grow with their number.
    """
    sums: dict[int, Tensor] = {}
    counts: dict[int, Tensor] = {}
    for entries, limit in zip(deltas, limits, strict=True):
        delta = torch.nn.functional.hardshrink(entries, limit)
        positive = delta.relu()
        for sign, part in ((1, positive), (-1, positive - delta)):
            present = part.sign()
            sums[sign] = sums[sign].add_(part) if sign in sums else part + 0.0  # a zero without sign
            counts[sign] = counts[sign].add_(present) if sign in counts else present
    elected = sums[1] - sums[-1]
    positive, negative = (sums[sign].div_(counts[sign].clamp_min_(1)) for sign in (1, -1))
    return positive, negative, elected


def _decided(positive: Tensor, negative: Tensor, elected: Tensor, majority: int) -> Tensor:
    """The mean of the elected sign; where the sum is zero, that of the sign `majority`, and zero if that is none."""
    winner = elected.sign_()
    winner += (1 - winner.abs()) * majority
    return positive.mul_(winner.relu()).sub_(negative.mul_(winner.neg().relu_()))  # where() takes 17 times as long
