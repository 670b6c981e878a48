"""The k-th largest of magnitudes that need not be in memory together: by counting the digits of their bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

DIGIT = 16  # bits of a value that are counted in one pass
DIGITS = 2**DIGIT  # that there are
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of floats with so many bytes


class Selection:
    """The search for the k-th largest magnitude of floats, k >= 1.

    The bits of magnitudes are ordered as whole numbers are. One pass over the values counts how often each digit occurs
    among the magnitudes that begin as the result does, the highest digit first; `narrow` makes these counts the next
    digit. So there is a pass for every 16 bits of the dtype, until `found`.
    """

    def __init__(self, k: int, dtype: torch.dtype) -> None:
        self.higher: tuple[int, ...] = ()  # the digits that are known
        self._k, self._dtype = k, dtype  # the rank among the magnitudes that begin with these digits

    @property
    def found(self) -> bool:
        return len(self.higher) == 8 * self._dtype.itemsize // DIGIT

    def narrow(self, counts: Tensor) -> None:
        """Takes the next digit from `counts` [2^16], those of `count_digits` over all values."""
        at_least = counts.flip(0).cumsum(0)  # how many have the largest digit, one of the two largest, ...
        place = int(torch.searchsorted(at_least, self._k))
        self._k -= int(at_least[place - 1]) if place else 0
        self.higher += (len(counts) - 1 - place,)

    def value(self) -> Tensor:
        """The result, a scalar, once it is found."""
        assert self.found
        return torch.tensor(joined(self.higher), dtype=BITS[self._dtype.itemsize]).view(self._dtype)


def joined(digits: Sequence[int]) -> int:
    """The whole number that has these digits, the highest first."""
    return reduce(lambda number, digit: number << DIGIT | digit, digits, 0)


def by_digits(values: Tensor, k: int, count_digits: Callable[[Tensor, Sequence[int]], Tensor]) -> Tensor:
    """The k-th largest magnitude of values that are in memory, a scalar."""
    selection = Selection(k, values.dtype)
    while not selection.found:
        selection.narrow(count_digits(values, selection.higher))
    return selection.value().to(values.device)
