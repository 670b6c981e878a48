"""Order statistics of large tensors."""

from __future__ import annotations

import torch
from torch import Tensor

DIGIT = 16  # bits of a value that are counted in one pass; not worth it for fewer values than a digit has
BLOCK = 2**18  # elements counted at a time on a CPU, for its cache
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest magnitude of the elements of values [n], 1 <= k <= n, none of them NaN; a scalar, exact.

    Magnitudes are ordered as their bits are when read as whole numbers. So the result is found digit by digit, the
    highest first: one pass counts how often each digit occurs among the magnitudes that begin as the result does.
    Cost: a pass for every 16 bits of the dtype; memory does not grow with n.
    """
    if values.numel() <= 2**DIGIT:
        return values.abs().kthvalue(values.numel() - k + 1).values
    size = 8 * values.element_size()
    bits = values.view(_BITS[values.element_size()])
    step = BLOCK if values.device.type == "cpu" else max(1, values.numel())
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
