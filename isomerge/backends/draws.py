"""Random numbers that are a function of a seed and an index alone, in plain torch, for `eager`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 2**15  # numbers drawn at a time on a CPU: five int64 arrays then stay in its cache


def _signed(value: int) -> int:
    """The whole number of 64 bits as torch writes it."""
    return (value + 2**63) % 2**64 - 2**63


# SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), the constants of Vigna's
# published version: products wrap around in int64 as they do in whole numbers without sign.
STEP = _signed(0x9E3779B97F4A7C15)
MIXED = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1))


def draws(seed: int, first: int, count: int, device: torch.device) -> Tensor:
    """The first 32 bits of the numbers `first` .. of the generator that starts from `seed`: int64 [count]."""
    x = torch.arange(first + 1, first + count + 1, device=device).mul_(STEP).add_(_signed(seed))
    for shift, factor in MIXED:
        x ^= (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)  # what shifts in is zeros
        x *= factor
    return (x >> 32).bitwise_and_(2**32 - 1)


def drop(values: Tensor, density: float, *, seed: int, first: int) -> Tensor:
    """Block by block."""
    kept, bound = torch.empty_like(values), math.ceil(density * 2**32)  # torch would compare with a float in float32
    step = BLOCK if values.device.type == "cpu" else max(1, len(values))
    for begin in range(0, len(values), step):
        part = values[begin : begin + step]
        dropped = draws(seed, first + begin, len(part), values.device) >= bound
        torch.div(part, density, out=kept[begin : begin + step]).masked_fill_(dropped, 0)
    return kept
