"""Thresholds and votes of TIES in plain torch, for `eager`."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**16  # elements merged at a time on a CPU: eight float32 arrays then stay in its cache
DIGIT = 16  # bits of a value that are counted in one pass; not worth it for fewer values than a digit has
COUNTED = 2**18  # elements counted at a time on a CPU, for its cache
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kth_largest(values: Tensor, k: int) -> Tensor:
    """Digit by digit of the magnitudes' bits, which are ordered as whole numbers are, the highest digit first: one pass
    counts how often each digit occurs among the magnitudes that begin as the result does. A pass for every 16 bits of
    the dtype; memory does not grow with n.
    """
    if values.numel() <= 2**DIGIT:
        return values.abs().kthvalue(values.numel() - k + 1).values
    size = 8 * values.element_size()
    bits = values.view(_BITS[values.element_size()])
    step = COUNTED if values.device.type == "cpu" else max(1, values.numel())
    prefix = 0
    for shift in range(size - DIGIT, -1, -DIGIT):
        counts = torch.zeros(2**DIGIT, dtype=torch.int64, device=values.device)
        for block in bits.split(step):
            digits = block & torch.iinfo(bits.dtype).max
            if shift + DIGIT < size:
                digits = digits[digits >> (shift + DIGIT) == prefix] & (2**DIGIT - 1) << shift
            counts += torch.bincount(digits >> shift if shift else digits, minlength=2**DIGIT)
        at_least = counts.flip(0).cumsum(0)  # how many have the largest digit, one of the two largest, ...
        place = int(torch.searchsorted(at_least, k))
        k -= int(at_least[place - 1]) if place else 0
        prefix = prefix << DIGIT | (2**DIGIT - 1 - place)
    return torch.tensor(prefix, dtype=bits.dtype, device=values.device).view(values.dtype)


def elect(deltas: Tensor, thresholds: Tensor) -> Tensor:
    """Block by block, each with the majority so far; those that it changes afterwards once more."""
    merged = torch.zeros_like(deltas[0])
    step = BLOCK if deltas.device.type == "cpu" else max(1, merged.numel())
    votes, guesses = 0, []
    blocks = list(zip(deltas.split(step, dim=-1), merged.split(step), strict=True))
    limits = torch.nextafter(thresholds, thresholds.new_tensor(-1)).tolist()  # what is larger stays
    for part, out in blocks:
        positive, negative, elected = _election(part, limits)
        votes += int(elected.sign().sum())
        guesses.append(_sign(votes))
        out.copy_(_decided(positive, negative, elected, guesses[-1]))
    for (part, out), guess in zip(blocks, guesses, strict=True):
        if guess != _sign(votes):
            out.copy_(_decided(*_election(part, limits), _sign(votes)))
    return merged


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
            sums[sign] = sums[sign].add_(part) if sign in sums else part.clone()
            counts[sign] = counts[sign].add_(present) if sign in counts else present
    elected = sums[1] - sums[-1]
    positive, negative = (sums[sign].div_(counts[sign].clamp_min_(1)) for sign in (1, -1))
    return positive, negative, elected


def _decided(positive: Tensor, negative: Tensor, elected: Tensor, majority: int) -> Tensor:
    """The mean of the elected sign; where the sum is zero, that of the sign `majority`, and zero if that is none."""
    winner = elected.sign_()
    winner += (1 - winner.abs()) * majority
    return positive.mul_(winner.relu()).sub_(negative.mul_(winner.neg().relu_()))  # where() takes 17 times as long


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
